//! What things cost, in cycles of the emulator: compare these numbers with each other, not with
//! hardware.

use alloc::sync::Arc;
use alloc::vec::Vec;

use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::{FreedTables, PageSpan, flush_tlb_mm_range};
use mmu_kernel_shim::{Area, Error, Mm, PageContent, Vma};
use x86_64::VirtAddr;

use crate::arch::phys_map::FRAME_BYTES;
use crate::arch::{clock, mmu};
use crate::cpu::index::{CpuIndex, CpuMask};
use crate::cpu::percpu::online;
use crate::cpu::{smp, watchdog};
use crate::machine::BareMachine;
use crate::println;
use crate::workloads::program::{BareKernel, page_range};

/// How often each thing is measured.
const TIMES: usize = 40;
/// Pages unmapped at once.
const BULK: u64 = 512;
/// Where they are mapped.
const PLACE: u64 = 0x10_0000_0000;
/// Instructions in one measurement.
const INSTRUCTIONS: u64 = 64;

/// Measures and prints; frames are neither poisoned nor checked meanwhile.
///
/// # Errors
///
/// Whatever the kernel refused.
pub(crate) fn run_measure(kernel: &BareKernel) -> Result<u64, Error> {
    watchdog::note(&"measuring");
    kernel.machine().ledger.set_checking(false);
    let done = measure_all(kernel);
    kernel.machine().ledger.set_checking(true);
    done.map(|()| 1)
}

fn measure_all(kernel: &BareKernel) -> Result<(), Error> {
    let mm = kernel.new_mm()?;
    let range = page_range(PLACE, BULK);
    kernel.mmap(&mm, Vma { range, area: Area::anon() })?;
    measure_round_trips(kernel, &mm);
    kernel.switch_to(Some(&mm));
    measure_instructions();
    measure_unmap(kernel, &mm, "unmap per page, nobody else has it loaded", BULK)?;
    measure_unmap(kernel, &mm, "flush of one page, this CPU only", 1)?;
    let others = online().without(CpuIndex::FIRST);
    if !others.is_empty() {
        smp::on_cpus(others, &|_| kernel.switch_to(Some(&mm)));
        measure_unmap(kernel, &mm, "flush of one page, every CPU has it loaded", 1)?;
        measure_unmap(kernel, &mm, "flush of 32 pages, every CPU has it loaded", 32)?;
        measure_unmap(kernel, &mm, "full flush and 64 pages, every CPU has it loaded", 64)?;
        measure_unmap(kernel, &mm, "unmap per page, every CPU has it loaded", BULK)?;
        smp::on_cpus(others, &|_| kernel.switch_to(None));
    }
    kernel.switch_to(None);
    kernel.exit(&mm)
}

/// INVLPG and CR3 loads, alone.
fn measure_instructions() {
    let mut invlpg = Vec::new();
    let mut load = Vec::new();
    for _ in 0..TIMES {
        invlpg.push(cycles_of(|| {
            for page in 0..INSTRUCTIONS {
                mmu::invalidate_page(VirtAddr::new(PLACE + page * 4096));
            }
        }));
        load.push(cycles_of(|| {
            for _ in 0..INSTRUCTIONS {
                mmu::reload_root();
            }
        }));
    }
    print_cycles("INVLPG", invlpg, INSTRUCTIONS);
    print_cycles("CR3 load", load, INSTRUCTIONS);
}

/// Flushes of a page that one other CPU has loaded, which has halted.
fn measure_round_trips(kernel: &BareKernel, mm: &Arc<Mm<BareMachine>>) {
    let span = PageSpan { start: PLACE, end: PLACE + FRAME_BYTES, stride_shift: 12 };
    let mut all = Vec::new();
    for to in online().without(CpuIndex::FIRST).iter() {
        smp::on_cpus(CpuMask::only(to), &|_| kernel.switch_to(Some(mm)));
        for _ in 0..TIMES {
            all.push(cycles_of(|| {
                // Nothing is freed with the receipt.
                let _flushed = flush_tlb_mm_range(kernel, mm.engine().context(), span, FreedTables::No);
            }));
            watchdog::progress();
        }
        smp::on_cpus(CpuMask::only(to), &|_| kernel.switch_to(None));
    }
    print_cycles("flush of one page, one other CPU only", all, 1);
}

/// Drops the first `nr_pages` pages of the region, again and again, and prints what one call costs;
/// for [`BULK`] pages, what one page costs.
fn measure_unmap(kernel: &BareKernel, mm: &Mm<BareMachine>, what: &str, nr_pages: u64) -> Result<(), Error> {
    let range: VirtRange = page_range(PLACE, nr_pages);
    let mut all = Vec::new();
    for _ in 0..TIMES {
        kernel.populate(mm, range, PageContent::Anon)?;
        let mut result = Ok(());
        all.push(cycles_of(|| result = kernel.madvise_dontneed(mm, range)));
        result?;
        watchdog::progress();
    }
    print_cycles(what, all, if nr_pages == BULK { BULK } else { 1 });
    Ok(())
}

fn cycles_of(work: impl FnOnce()) -> u64 {
    let start = clock::cycles();
    work();
    clock::cycles().wrapping_sub(start)
}

/// Prints the least and the median of what was measured, each divided by `parts`.
fn print_cycles(what: &str, mut all: Vec<u64>, parts: u64) {
    all.sort_unstable();
    if let (Some(least), Some(median)) = (all.first(), all.get(all.len() / 2)) {
        println!("cycles: least={} median={} times={} what={what}", least / parts, median / parts, all.len());
    }
}
