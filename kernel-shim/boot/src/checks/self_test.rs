//! The self-test: every facility of `arch` and `cpu` once, on every CPU, with the numbers that were
//! measured.
//!
//! Its cycle counts are those of an emulator. It also shows that a translation stays in use on a
//! CPU until that CPU is told, so a kernel that forgets a flush is caught by reading memory.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use x86_64::instructions::interrupts::without_interrupts;
use x86_64::structures::idt::PageFaultErrorCode;
use x86_64::structures::paging::PhysFrame;

use crate::arch::exit::Verdict;
use crate::arch::phys_map::{FRAME_BYTES, PHYS_OFFSET};
use crate::arch::{apic, clock, frames, mmu};
use crate::checks::test_kernel::{self, float_sum};
use crate::checks::test_space::{COUNTS, DATA, NEW, OLD, TEXT, TestSpace};
use crate::counted::Counted;
use crate::cpu::agent::{Outcome, Program, Stop, Task};
use crate::cpu::index::{CpuIndex, CpuMask, MAX_CPUS};
use crate::cpu::percpu::{cpu, online};
use crate::cpu::ring3::{UserExit, run_user};
use crate::cpu::smp::{kick, on_cpus, on_every_cpu};
use crate::cpu::watchdog;
use crate::println;

/// Round trips measured for each pair of CPUs; the shortest one counts.
const ROUND_TRIPS: u64 = 50;
/// Flushes that each CPU asks for while all others ask too.
const STORM_FLUSHES: u64 = 500;
/// One flush in this many is asked for with interrupts off. Not more: such a CPU cannot halt, and
/// spins on a core that another CPU needs.
const MASKED_EVERY: u64 = 16;
/// Terms of a sum of floating-point numbers.
const SUMMED: u32 = 2000;
/// Reads through an entry that has changed, before the CPU is told.
const STALE_READS: u64 = 100_000;
/// Pages that each CPU's program faults in.
const FAULT_PAGES: u64 = 64;

/// Frames that are not handed over in the last test.
const KEPT_FRAMES: u64 = 16;
/// How long a program may take to get going.
const RING_3_TIMEOUT_US: u64 = 10_000_000;

/// One test: `Ok` with what was measured, `Err` with what was wrong.
type Test = fn() -> Result<String, String>;

/// Runs all tests, prints a line for each, and says whether all passed.
pub(crate) fn run_self_test() -> Verdict {
    let tests: [(&str, Test); 9] = [
        ("every CPU is set up, and known by its APIC", controls),
        ("the heap hands out what it gets back", heap),
        ("floating point survives interrupts", floating_point),
        ("a request reaches every CPU from every CPU", round_trips),
        ("requests that cross do not block each other", storm),
        ("a stale entry is used until the CPU is told", stale_entry),
        ("ring 3 faults, goes on, and ends", ring_3),
        ("a flush reaches a CPU that is in ring 3", flush_in_ring_3),
        ("all memory left is there", memory),
    ];
    test_kernel::start();
    let mut verdict = Verdict::Pass;
    for (name, test) in tests {
        watchdog::progress();
        match test() {
            Ok(measured) => println!("self-test: ok   {name}: {measured}"),
            Err(wrong) => {
                println!("self-test: FAIL {name}: {wrong}");
                verdict = Verdict::Violation;
            }
        }
    }
    verdict
}

fn controls() -> Result<String, String> {
    let wrong = spin::Mutex::new(None);
    on_every_cpu(&|me| {
        let (known, is) = (cpu(me).apic_id(), apic::id());
        let found = match mmu::wrong_control() {
            Some(what) => Some(format!("cpu {me}: {what}")),
            None if known != is => Some(format!("cpu {me}: APIC id {is}, known as {known}")),
            None => None,
        };
        if found.is_some() {
            *wrong.lock() = found;
        }
    });
    wrong.into_inner().map_or_else(|| Ok(cpus_online().to_string()), Err)
}

fn heap() -> Result<String, String> {
    let failures = AtomicU64::new(0);
    on_every_cpu(&|cpu| {
        for round in 0..200_usize {
            let value = cpu.get() * 1000 + round;
            let numbers: Vec<usize> = (0..round).map(|_| value).collect();
            if numbers.iter().any(|number| *number != value) {
                failures.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    fail_if_any(&failures, "allocation", "held something else")?;
    Ok(format!("200 vectors a CPU, on {}", cpus_online()))
}

/// Every CPU sums floating-point numbers while all are interrupted, by a handler that does the
/// same.
fn floating_point() -> Result<String, String> {
    let failures = AtomicU64::new(0);
    let space = TestSpace::new();
    let expected = float_sum(SUMMED);
    on_every_cpu(&|_| {
        space.load();
        for _ in 0..20 {
            space.flush(DATA);
            if float_sum(SUMMED).to_bits() != expected.to_bits() {
                failures.fetch_add(1, Ordering::Relaxed);
            }
        }
        TestSpace::load_kernel_root();
    });
    fail_if_any(&failures, "sum", "came out different")?;
    Ok(String::from("20 sums a CPU, interrupted by all"))
}

/// Each CPU has a space of its own, so a flush of one interrupts one CPU.
fn round_trips() -> Result<String, String> {
    let cpus = online();
    let spaces: Vec<&TestSpace> = cpus.iter().map(|_| TestSpace::new()).collect();
    on_every_cpu(&|me| spaces[me.get()].load());
    let shortest: Vec<AtomicU64> = (0..MAX_CPUS * MAX_CPUS).map(|_| AtomicU64::new(u64::MAX)).collect();
    let answers = test_kernel::nr_answers();
    for from in cpus.iter() {
        // One CPU asks at a time, the others have halted: the numbers are those of an idle machine.
        on_cpus(CpuMask::only(from), &|me| {
            for to in cpus.without(me).iter() {
                for _ in 0..ROUND_TRIPS {
                    let start = clock::cycles();
                    spaces[to.get()].flush(DATA);
                    let cycles = clock::cycles() - start;
                    shortest[me.get() * MAX_CPUS + to.get()].fetch_min(cycles, Ordering::Relaxed);
                }
                watchdog::progress();
            }
        });
    }
    on_every_cpu(&|_| TestSpace::load_kernel_root());
    let others = u64::from(cpus.count()) - 1;
    let told = expect_answers(answers, u64::from(cpus.count()) * others * ROUND_TRIPS)?;
    if others == 0 {
        return Ok(String::from("one CPU, nobody to tell"));
    }
    for from in cpus.iter() {
        let row: Vec<u64> = cpus
            .iter()
            .map(|to| shortest[from.get() * MAX_CPUS + to.get()].load(Ordering::Relaxed))
            .map(|cycles| if cycles == u64::MAX { 0 } else { cycles })
            .collect();
        println!("self-test:      shortest round trip from cpu {from} to each, emulated cycles: {row:?}");
    }
    Ok(told)
}

/// All CPUs flush one space, which all have loaded.
fn storm() -> Result<String, String> {
    let space = TestSpace::new();
    on_every_cpu(&|_| space.load());
    let answers = test_kernel::nr_answers();
    on_every_cpu(&|_| {
        for flush in 0..STORM_FLUSHES {
            if flush % MASKED_EVERY != 0 {
                space.flush(DATA);
            } else {
                // A CPU that may not be interrupted takes its mail while it waits.
                without_interrupts(|| space.flush(DATA));
            }
            watchdog::progress();
        }
    });
    on_every_cpu(&|_| TestSpace::load_kernel_root());
    let cpus = u64::from(online().count());
    expect_answers(answers, cpus * (cpus - 1) * STORM_FLUSHES)
}

/// Checks how many requests were carried out since there were `before`, and says how many.
fn expect_answers(before: u64, expected: u64) -> Result<String, String> {
    let answers = Counted(test_kernel::nr_answers() - before, "request");
    if answers.0 == expected { Ok(answers.to_string()) } else { Err(format!("{answers}, not {expected}")) }
}

/// A last-level entry is pointed at another frame; each CPU reads before and after its own INVLPG.
fn stale_entry() -> Result<String, String> {
    let space = TestSpace::new();
    let [old, new] = [space.frame_filled_with(OLD), space.frame_filled_with(NEW)];
    space.map(DATA, old, TestSpace::KERNEL_DATA);
    let (stale_cpus, wrong, steps) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let nr_cpus = u64::from(online().count());
    on_every_cpu(&|me| {
        space.load();
        wrong.fetch_add(u64::from(space.read(DATA) != OLD), Ordering::Relaxed);
        wait_for_arrivals(&steps, nr_cpus);
        if me == CpuIndex::FIRST {
            space.remap(DATA, new);
        }
        wait_for_arrivals(&steps, 2 * nr_cpus);
        let stale_reads = (0..STALE_READS).filter(|_| space.read(DATA) == OLD).count() as u64;
        stale_cpus.fetch_add(u64::from(stale_reads == STALE_READS), Ordering::Relaxed);
        mmu::invalidate_page(DATA);
        wrong.fetch_add(u64::from(space.read(DATA) != NEW), Ordering::Relaxed);
        TestSpace::load_kernel_root();
    });
    fail_if_any(&wrong, "read", "came out wrong before the change or after INVLPG")?;
    let stale = stale_cpus.load(Ordering::Relaxed);
    Ok(format!(
        "{stale} of {} read the old frame {STALE_READS} times, then the new one after INVLPG",
        cpus_online()
    ))
}

/// A program on each CPU, all in one address space, writes pages that are mapped when it faults,
/// checks them, and tries to read the kernel half.
fn ring_3() -> Result<String, String> {
    let space = TestSpace::new();
    space.map_agent();
    let (faults, systems) = (AtomicU64::new(0), AtomicU64::new(0));
    let problem: spin::Mutex<Option<String>> = spin::Mutex::new(None);
    let cycles = AtomicU64::new(0);
    on_every_cpu(&|me| {
        space.load();
        let first = DATA.as_u64() + me.get() as u64 * FAULT_PAGES * FRAME_BYTES;
        let value = 1000 * (me.get() as u64 + 1);
        let task = |program| Task {
            program,
            first,
            stride_bytes: FRAME_BYTES,
            nr_words: FAULT_PAGES,
            value,
            step: 1,
        };
        let start = clock::cycles();
        let wrote = space.run_agent(&mut task(Program::Write).context(TEXT), &faults);
        cycles.fetch_add(clock::cycles() - start, Ordering::Relaxed);
        let checked = space.run_agent(&mut task(Program::Check).context(TEXT), &faults);
        systems.fetch_add(2, Ordering::Relaxed);
        let summed = space.run_agent(&mut task(Program::Read).context(TEXT), &faults);
        let expected: u64 = (value..value + FAULT_PAGES).sum();
        let done = Outcome { stopped: None, nr_left: 0, sum: 0 };
        if wrote != Ok(done) || checked != Ok(done) || summed != Ok(Outcome { sum: expected, ..done }) {
            *problem.lock() =
                Some(format!("cpu {me}: wrote {wrote:?}, checked {checked:?}, summed {summed:?}"));
        }
        // The kernel half is mapped but not for ring 3.
        let kernel = Task { first: PHYS_OFFSET.as_u64(), ..task(Program::Read) };
        let exit = run_user(&mut kernel.context(TEXT));
        let denied = PageFaultErrorCode::PROTECTION_VIOLATION | PageFaultErrorCode::USER_MODE;
        if exit != (UserExit::PageFault { address: PHYS_OFFSET, error: denied }) {
            *problem.lock() =
                Some(format!("cpu {me}: reading the kernel half from ring 3 ended with {exit:?}"));
        }
        TestSpace::load_kernel_root();
        watchdog::progress();
    });
    if let Some(problem) = problem.into_inner() {
        return Err(problem);
    }
    let faults = faults.into_inner();
    let expected = u64::from(online().count()) * FAULT_PAGES;
    if faults != expected {
        return Err(format!("{}, not {expected}", Counted(faults, "page fault")));
    }
    Ok(format!(
        "{faults} page faults, {} emulated cycles each, entry and return included",
        cycles.into_inner() / faults
    ))
}

/// The other CPUs watch one word in ring 3. The first CPU changes the entry and tells them, and
/// they read the new frame; then they are kicked out of an endless loop.
fn flush_in_ring_3() -> Result<String, String> {
    let space = TestSpace::new();
    space.map_agent();
    let [old, new] = [space.frame_filled_with(OLD), space.frame_filled_with(NEW)];
    space.map(DATA, old, TestSpace::USER_DATA);
    let counts = space.frame_filled_with(0);
    space.map(COUNTS, counts, TestSpace::USER_DATA);
    let watch = |nr_words| Task {
        program: Program::Watch,
        first: DATA.as_u64(),
        stride_bytes: 0,
        nr_words,
        value: OLD,
        step: 0,
    };
    let others = online().without(CpuIndex::FIRST);
    if others.is_empty() {
        return Ok(String::from("one CPU, nobody to tell"));
    }
    let nr_cpus = u64::from(online().count());
    let [steps, stale, saw_new, kicked, faults, late] = [const { AtomicU64::new(0) }; 6];
    on_every_cpu(&|me| {
        space.load();
        if me == CpuIndex::FIRST {
            wait_for_arrivals(&steps, nr_cpus);
            space.remap(DATA, new);
            wait_for_arrivals(&steps, 2 * nr_cpus);
            // The others watch now, and nobody has told them of the change.
            wait_for_arrivals(&steps, 3 * nr_cpus);
            clock::wait_us(20_000);
            // The others are in the endless watch by now.
            space.flush(DATA);
            wait_for_arrivals(&steps, 4 * nr_cpus);
            // Each program counts in a word of its own; once the word is not 0, the program runs.
            for cpu in others.iter() {
                let running =
                    clock::wait_until(RING_3_TIMEOUT_US, || TestSpace::word(counts, cpu.get()) != 0);
                kick(cpu);
                late.fetch_add(u64::from(!running), Ordering::Relaxed);
            }
        } else {
            let untouched = space.run_agent(&mut watch(1).context(TEXT), &faults);
            wait_for_arrivals(&steps, nr_cpus);
            wait_for_arrivals(&steps, 2 * nr_cpus);
            let unaware = space.run_agent(&mut watch(STALE_READS).context(TEXT), &faults);
            let not_stopped =
                |outcome: &Result<Outcome, UserExit>| matches!(outcome, Ok(Outcome { stopped: None, .. }));
            stale.fetch_add(u64::from(not_stopped(&untouched) && not_stopped(&unaware)), Ordering::Relaxed);
            wait_for_arrivals(&steps, 3 * nr_cpus);
            let told = space.run_agent(&mut watch(u64::MAX).context(TEXT), &faults);
            let expected = Some(Stop { address: DATA.as_u64(), seen: NEW });
            let saw = matches!(told, Ok(Outcome { stopped, .. }) if stopped == expected);
            saw_new.fetch_add(u64::from(saw), Ordering::Relaxed);
            wait_for_arrivals(&steps, 4 * nr_cpus);
            let first = COUNTS.as_u64() + 8 * me.get() as u64;
            let mut counting = Task { program: Program::Count, first, ..watch(0) }.context(TEXT);
            let left = run_user(&mut counting) == UserExit::Interrupted;
            kicked.fetch_add(u64::from(left), Ordering::Relaxed);
        }
        TestSpace::load_kernel_root();
    });
    fail_if_any(&late, "program", "did not run in time")?;
    let expected = nr_cpus - 1;
    let (stale, saw_new, kicked) = (stale.into_inner(), saw_new.into_inner(), kicked.into_inner());
    if saw_new != expected || kicked != expected {
        return Err(format!(
            "of {} {saw_new} saw the new frame, {kicked} left the endless loop",
            Counted(expected, "CPU")
        ));
    }
    Ok(format!(
        "{stale} of {} read the old frame {STALE_READS} times, {saw_new} the new one once told",
        Counted(expected, "program")
    ))
}

/// Writes to every unused frame and reads it back. The last test, because it keeps the memory.
fn memory() -> Result<String, String> {
    let range = frames::hand_over(KEPT_FRAMES).ok_or("no memory left to hand over")?;
    for frame in range {
        TestSpace::set_word(frame, 0, frame.start_address().as_u64());
    }
    let kept = |frame: &PhysFrame| TestSpace::word(*frame, 0) == frame.start_address().as_u64();
    let wrong = range.filter(|frame| !kept(frame)).count() as u64;
    if wrong > 0 {
        return Err(format!("{} did not keep what was written", Counted(wrong, "frame")));
    }
    Ok(format!("{} frames from {:#x} on", range.count(), range.start.start_address()))
}

fn fail_if_any(failures: &AtomicU64, noun: &'static str, what: &str) -> Result<(), String> {
    match failures.load(Ordering::Relaxed) {
        0 => Ok(()),
        number => Err(format!("{} {what}", Counted(number, noun))),
    }
}

/// The CPUs that are up, counted.
fn cpus_online() -> Counted {
    Counted(u64::from(online().count()), "CPU")
}

/// Waits until `total` arrivals are counted, this one included.
fn wait_for_arrivals(arrivals: &AtomicU64, total: u64) {
    arrivals.fetch_add(1, Ordering::AcqRel);
    while arrivals.load(Ordering::Acquire) < total {
        core::hint::spin_loop();
    }
}
