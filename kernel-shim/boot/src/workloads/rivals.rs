//! CPUs take pages of one address space away at the same moment, each a part of its own, and then
//! every CPU reads all of them.
//!
//! Flush requests overtake each other here: a CPU that carries out the first of several finds the
//! address space several generations on. It may not take the pages of that one request for all that
//! has changed (rule T3 of `mmu_tlb`). Nobody takes frames meanwhile, so a CPU that has kept a
//! translation reads poison.

use mmu_kernel_shim::Error;

use crate::arch::phys_map::FRAME_BYTES;
use crate::cpu::index::CpuIndex;
use crate::cpu::percpu::online;
use crate::cpu::{smp, watchdog};
use crate::println;
use crate::workloads::churn;
use crate::workloads::meeting::Meeting;
use crate::workloads::program::{BareKernel, Found, StampedProcess, page_range};

/// Where the parts are, one beside the other.
const FIRST: u64 = 0x30_0000_0000;
/// Pages of a part: few enough to be invalidated one by one.
const PART: u64 = 8;
const PART_BYTES: u64 = PART * FRAME_BYTES;
/// A page that nobody drops.
const ASIDE: u64 = 0x2f_0000_0000;
/// Reads of that page, by the CPU that drops nothing.
const GLANCED: u64 = 1000;
/// Rounds between two lines of progress.
const PROGRESS: u64 = 100;

/// Runs `rounds` rounds in one process.
///
/// With three CPUs or more, the last one drops nothing: it has no flush of its own that would bring
/// it up to date.
///
/// # Errors
///
/// Whatever the kernel refused.
pub(crate) fn run_rivals(kernel: &BareKernel, rounds: u64) -> Result<u64, Error> {
    let nr_cpus = u64::from(online().count());
    let nr_rivals = if nr_cpus < 3 { nr_cpus } else { nr_cpus - 1 };
    let dropped = page_range(FIRST, PART * nr_rivals);
    let kept = page_range(dropped.end(), PART);
    let all = page_range(FIRST, PART * (nr_rivals + 1));
    let aside = page_range(ASIDE, 1);
    let process = StampedProcess::new(kernel, churn::new_process_number(CpuIndex::FIRST))?;
    process.map(all)?;
    process.map(aside)?;
    let place = Meeting::new(nr_cpus);
    let result = spin::Mutex::<_>::new(Ok(()));
    smp::on_every_cpu(&|me| {
        watchdog::note(&"dropping what all CPUs use");
        let rival = me.get() as u64;
        let part = page_range(FIRST + rival * PART_BYTES, PART);
        process.enter();
        for round in 0..rounds {
            if me == CpuIndex::FIRST && round.is_multiple_of(PROGRESS) {
                println!("progress: rivals {round} of {rounds}");
            }
            for range in [all, aside] {
                process.write(range).must_be(Found::AsExpected, "writing");
            }
            place.meet();
            if rival >= nr_rivals {
                process.watch(aside, GLANCED).must_be(Found::AsExpected, "glancing");
            } else if let Err(error) = kernel.madvise_dontneed(&process.mm, part) {
                *result.lock() = Err(error);
            }
            place.meet();
            // Whether anything was refused is settled here, so all CPUs leave together.
            if result.lock().is_err() {
                break;
            }
            process.check_fresh(dropped).must_be(Found::AsExpected, "reading what was dropped");
            process.check(kept).must_be(Found::AsExpected, "reading what was kept");
            place.meet();
            // The reads have mapped the page of zeroes, and to replace that by a page takes a flush
            // each time. One flush for all of them leaves the time to the rivals.
            if me == CpuIndex::FIRST
                && let Err(error) = kernel.madvise_dontneed(&process.mm, dropped)
            {
                *result.lock() = Err(error);
            }
            place.meet();
        }
        kernel.go_lazy();
        place.meet();
    });
    result.into_inner()?;
    kernel.exit(&process.mm)?;
    smp::on_every_cpu(&|_| kernel.switch_to(None));
    Ok(1)
}
