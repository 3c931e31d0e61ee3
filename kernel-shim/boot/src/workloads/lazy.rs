//! CPUs that stay with an address space without running it, while its pages and its tables go.
//!
//! A lazy CPU may skip the flush of pages, if it catches up before it runs a program again. It must
//! not skip the flush of tables: its CR3 still points to the root, and each kernel address it reads
//! may start a walk there.

use core::sync::atomic::{AtomicBool, Ordering};

use mmu_kernel_shim::Error;

use crate::arch::clock;
use crate::cpu::index::CpuIndex;
use crate::cpu::percpu::online;
use crate::cpu::{smp, watchdog};
use crate::println;
use crate::workloads::churn;
use crate::workloads::meeting::Meeting;
use crate::workloads::program::{BareKernel, Found, StampedProcess, page_range, read_all_over};

/// Start and pages of the area that loses its pages and keeps its tables.
const KEPT: (u64, u64) = (0x10_0000_0000, 24);
/// Start and pages of the area that loses its tables, too.
const GONE: (u64, u64) = (0x50_0000_0000, 24);
/// Pages that a lazy CPU reads before it looks again whether its stretch is over.
const ROAMED: u64 = 512;
/// How long lazy CPUs go on after the address space is gone.
const AFTERMATH_US: u64 = 200;
/// Rounds between two lines of progress.
const PROGRESS: u64 = 10;

/// Runs `rounds` rounds, each with one process.
///
/// # Errors
///
/// Whatever the kernel refused.
pub(crate) fn run_lazy(kernel: &BareKernel, rounds: u64) -> Result<u64, Error> {
    let mut exits = 0;
    for round in 0..rounds {
        if round % PROGRESS == 0 {
            println!("progress: lazy {round} of {rounds}");
        }
        let process = StampedProcess::new(kernel, churn::new_process_number(CpuIndex::FIRST))?;
        process.map(page_range(KEPT.0, KEPT.1))?;
        process.map(page_range(GONE.0, GONE.1))?;
        let round = Round {
            process,
            place: Meeting::new(u64::from(online().count())),
            is_over: [const { AtomicBool::new(false) }; 2],
        };
        let result = spin::Mutex::<_>::new(Ok(()));
        smp::on_every_cpu(&|me| {
            if me == CpuIndex::FIRST {
                *result.lock() = round.first_cpu();
            } else {
                round.other_cpu(me);
            }
        });
        result.into_inner()?;
        exits += 1;
    }
    Ok(exits)
}

struct Round<'a> {
    process: StampedProcess<'a>,
    place: Meeting,
    /// Whether lazy CPUs should come back: from the first lazy stretch, and from the second.
    is_over: [AtomicBool; 2],
}

impl Round<'_> {
    fn first_cpu(&self) -> Result<(), Error> {
        let (process, kernel) = (&self.process, self.process.kernel);
        watchdog::note(&"unmapping under lazy CPUs");
        self.begin();
        let unmapped = self.unmap_under_lazy_cpus();
        self.is_over[0].store(true, Ordering::Relaxed);
        self.place.meet();
        // The others come back, run the process, and go lazy again.
        self.place.meet();
        kernel.go_lazy();
        let exited = kernel.exit(&process.mm);
        clock::wait_us(AFTERMATH_US);
        self.is_over[1].store(true, Ordering::Relaxed);
        self.place.meet();
        kernel.switch_to(None);
        unmapped.and(exited)
    }

    fn other_cpu(&self, me: CpuIndex) {
        let (process, kernel) = (&self.process, self.process.kernel);
        self.begin();
        kernel.go_lazy();
        self.read_until(me, &self.is_over[0]);
        self.place.meet();
        watchdog::note(&"back from a lazy stretch");
        process.enter();
        // All of the memory was dropped, so a word that this thread wrote before is stale.
        for (start, nr_pages) in [KEPT, GONE] {
            let range = page_range(start, nr_pages);
            process.check_fresh(range).must_be(Found::AsExpected, "after a lazy stretch");
            process.write(range).must_be(Found::AsExpected, "after a lazy stretch");
            process.check(range).must_be(Found::AsExpected, "after a lazy stretch");
        }
        kernel.go_lazy();
        self.place.meet();
        self.read_until(me, &self.is_over[1]);
        self.place.meet();
        kernel.switch_to(None);
    }

    /// Every CPU runs the process and stamps its memory.
    fn begin(&self) {
        self.process.enter();
        for (start, nr_pages) in [KEPT, GONE] {
            let range = page_range(start, nr_pages);
            self.process.write(range).must_be(Found::AsExpected, "at first");
            self.process.check(range).must_be(Found::AsExpected, "at first");
        }
        self.place.meet();
    }

    fn unmap_under_lazy_cpus(&self) -> Result<(), Error> {
        let (process, kernel) = (&self.process, self.process.kernel);
        let (kept, gone) = (page_range(KEPT.0, KEPT.1), page_range(GONE.0, GONE.1));
        kernel.madvise_dontneed(&process.mm, kept)?;
        process.check_fresh(kept).must_be(Found::AsExpected, "dropped pages");
        kernel.munmap(&process.mm, gone)?;
        process.map(gone)?;
        process.check_fresh(gone).must_be(Found::AsExpected, "unmapped pages");
        for range in [kept, gone] {
            process.write(range).must_be(Found::AsExpected, "new pages");
        }
        Ok(())
    }

    /// Kernel work on a lazy CPU: reads all over memory.
    fn read_until(&self, me: CpuIndex, is_over: &AtomicBool) {
        watchdog::note(&"lazy");
        let mut turn = me.get() as u64;
        while !is_over.load(Ordering::Relaxed) {
            turn = turn.wrapping_add(64);
            read_all_over(self.process.kernel.machine(), turn, ROAMED);
        }
    }
}
