//! Processes come and go on every CPU at once: each is created, stamps its memory, loses parts of
//! it in every way, and exits.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use mmu_kernel_shim::Error;

use crate::checks::violation;
use crate::cpu::index::{CpuIndex, MAX_CPUS};
use crate::cpu::{smp, watchdog};
use crate::println;
use crate::workloads::program::{BareKernel, Found, StampedProcess, page_range};

/// Areas far apart, so that each has tables of its own.
const FIRST: u64 = 0x1_0000_0000;
const SECOND: u64 = 0x40_0000_0000;
const THIRD: u64 = 0x7000_0000_0000;
/// Pages read before they are written to again.
const LOOKED_AT: u64 = 4;
/// Processes between two lines of progress.
const PROGRESS: u64 = 50;

/// Processes that each CPU has made.
static MADE: [AtomicU32; MAX_CPUS] = [const { AtomicU32::new(0) }; MAX_CPUS];

/// Runs `nr_processes` processes, spread over all CPUs, each with `nr_pages` pages in three areas.
///
/// # Errors
///
/// Whatever the kernel refused; memory is short.
pub(crate) fn run_churn(kernel: &BareKernel, nr_processes: u64, nr_pages: u64) -> Result<u64, Error> {
    let next = AtomicU64::new(0);
    let result = spin::Mutex::<_>::new(Ok(()));
    let exits = AtomicU64::new(0);
    smp::on_every_cpu(&|me| {
        watchdog::note(&"running one process after the other");
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= nr_processes {
                break;
            }
            if number.is_multiple_of(PROGRESS) {
                println!("progress: churn {number} of {nr_processes}");
            }
            match run_process(kernel, me, nr_pages / 3) {
                Ok(()) => {
                    exits.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    *result.lock() = Err(error);
                    break;
                }
            }
        }
        kernel.switch_to(None);
    });
    result.into_inner()?;
    Ok(exits.into_inner())
}

/// A new number for a process of `cpu`; no two CPUs give out the same one.
pub(crate) fn new_process_number(cpu: CpuIndex) -> u32 {
    let made = MADE[cpu.get()].fetch_add(1, Ordering::Relaxed);
    // 24 bits: 64 CPUs, 262,144 processes each.
    u32::try_from(cpu.get() << 18).unwrap_or(0) | made & 0x3_ffff
}

/// The life of one process on this CPU, with three areas of `nr_pages` pages.
///
/// # Errors
///
/// Whatever the kernel refused.
pub(crate) fn run_process(kernel: &BareKernel, me: CpuIndex, nr_pages: u64) -> Result<(), Error> {
    let process = StampedProcess::new(kernel, new_process_number(me))?;
    let areas = [FIRST, SECOND, THIRD].map(|start| page_range(start, nr_pages));
    let [first, second, third] = areas;
    for area in areas {
        process.map(area)?;
    }
    process.enter();
    // New memory must read as zero, although its frames belonged to others a moment ago.
    process.check_fresh(page_range(FIRST, LOOKED_AT)).must_be(Found::AsExpected, "reading new memory");
    for area in areas {
        process.write(area).must_be(Found::AsExpected, "writing");
    }
    for area in areas {
        process.check(area).must_be(Found::AsExpected, "reading back");
    }
    kernel.munmap(&process.mm, first)?;
    if process.check(first) == Found::AsExpected {
        let machine = kernel.machine();
        violation::usable_after_unmap(&machine.ledger, process.mm.root(), first.start());
    }
    kernel.madvise_dontneed(&process.mm, second)?;
    process.check_fresh(page_range(SECOND, LOOKED_AT)).must_be(Found::AsExpected, "reading dropped memory");
    process.check(third).must_be(Found::AsExpected, "reading what was kept");
    kernel.mremap(&process.mm, third, first)?;
    // Moved memory keeps its content, and so the page numbers in its stamps. They are right at the
    // new place, too: both starts have the same low bits.
    process.check(first).must_be(Found::AsExpected, "reading moved memory");
    kernel.go_lazy();
    kernel.exit(&process.mm)
}
