//! Prints what must never happen, so that a person can follow it, and ends the run: whatever comes
//! after the first violation may be its consequence.

use core::fmt;

use x86_64::structures::paging::PhysFrame;

use crate::arch::exit::{self, Verdict};
use crate::checks::ledger::{Ledger, Wrong};
use crate::checks::stamp::Word;
use crate::cpu::index::CpuIndex;
use crate::cpu::percpu::this_index;
use crate::println;

/// A word that a program read and should not have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Misread {
    /// Root of the address space.
    pub(crate) root: PhysFrame,
    /// Where it read.
    pub(crate) address: u64,
    /// What it read.
    pub(crate) seen: u64,
    /// What it should have read.
    pub(crate) expected: u64,
    /// What the page tables map there now.
    pub(crate) mapped: Option<PhysFrame>,
}

/// A program read what is not its own.
pub(crate) fn misread(ledger: &Ledger, misread: &Misread) -> ! {
    let Misread { root, address, seen, expected, mapped } = *misread;
    let word = Word::decode(seen);
    end_run(
        match word {
            Word::Poison(_) => "a program read a frame that was freed",
            Word::Stamp(_) => "a program read another owner's data",
            Word::Zero => "a program lost what it had written",
            Word::Other(_) => "a program read memory that is not a program's",
        },
        || {
            println!("violation:   cpu {}, address {address:#x}", this_index());
            println!("violation:   read     {seen:#018x}: {word}");
            println!("violation:   expected {expected:#018x}: {}", Word::decode(expected));
            if let Word::Poison(frame) = word {
                println!("violation:   {}", ledger.history(frame));
            }
            match mapped {
                Some(frame) => println!("violation:   mapped there now: {}", ledger.history(frame)),
                None => println!("violation:   mapped there now: nothing"),
            }
            print_last_unmap(ledger, root, address);
        },
    )
}

/// A program could use an address after its unmapping had returned.
pub(crate) fn usable_after_unmap(ledger: &Ledger, root: PhysFrame, address: u64) -> ! {
    end_run("a program used an address after its unmapping had returned", || {
        println!("violation:   cpu {}, address {address:#x}", this_index());
        print_last_unmap(ledger, root, address);
    })
}

/// A walk of the page tables met reserved bits: it went through a table that was freed.
pub(crate) fn walked_freed_table(address: u64) -> ! {
    end_run("a page walk met an entry with reserved bits, as a freed table has", || {
        println!("violation:   cpu {}, address {address:#x}", this_index());
    })
}

/// A program took an exception that its code cannot raise.
pub(crate) fn program_broke(vector: u64, address: u64) -> ! {
    end_run("a program took an exception that its code does not raise: the code changed", || {
        println!("violation:   cpu {}, exception {vector} at {address:#x}", this_index());
    })
}

/// Something is wrong with a frame that was freed or given out.
pub(crate) fn bad_frame(ledger: &Ledger, frame: PhysFrame, wrong: Wrong) -> ! {
    end_run(wrong, || println!("violation:   cpu {}, {}", this_index(), ledger.history(frame)))
}

/// A root is being freed that a CPU has loaded.
pub(crate) fn root_in_use(cpu: CpuIndex, root: PhysFrame) -> ! {
    end_run("a root table was freed while a CPU had it loaded", || {
        let address = root.start_address();
        println!("violation:   cpu {} freed {address:#x}, which is in CR3 of cpu {cpu}", this_index());
    })
}

/// What a workload found wrong, in its own words.
pub(crate) fn found_by_workload(what: fmt::Arguments<'_>) -> ! {
    end_run(what, || println!("violation:   cpu {}", this_index()))
}

fn print_last_unmap(ledger: &Ledger, root: PhysFrame, address: u64) {
    match ledger.last_unmap(root, address) {
        Some(unmap) => println!("violation:   {unmap}; it is step {} now", ledger.step()),
        None => println!("violation:   its unmapping has not returned yet; it is step {} now", ledger.step()),
    }
}

/// Prints `what` and the story, unless another CPU prints one already, and ends the run.
fn end_run(what: impl fmt::Display, story: impl FnOnce()) -> ! {
    if exit::decide(Verdict::Violation) {
        println!("violation: {what}");
        story();
        println!("boot: verdict {:?}", Verdict::Violation);
        exit::exit(Verdict::Violation)
    }
    exit::halt()
}
