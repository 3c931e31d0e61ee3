//! CPUs run one address space after the other and come back: to some that nobody has touched, to
//! one whose pages went meanwhile, and to one that loses them again as soon as they are there.
//!
//! A switch has two ways to keep what is stale. It can leave translations of the space it comes
//! back to; a CPU without PCIDs forgets them anyhow. Or it can say that the CPU is further than it
//! is, so that a later request to flush is taken for an earlier one. For that, the spaces of each
//! CPU have seen more flushes than the shared one, or fewer.

use alloc::vec::Vec;

use mmu_gather::pagetable::VirtRange;
use mmu_kernel_shim::Error;

use crate::cpu::index::CpuIndex;
use crate::cpu::percpu::online;
use crate::cpu::{smp, watchdog};
use crate::println;
use crate::workloads::churn;
use crate::workloads::meeting::Meeting;
use crate::workloads::program::{BareKernel, Found, StampedProcess, page_range};

/// Start and pages of what all CPUs share.
const SHARED: (u64, u64) = (0x10_0000_0000, 24);
/// Pages of it that go one by one.
const FEW: u64 = 8;
/// Start and pages of what each process of a CPU's own has: at the same place in all of them.
const OWN: (u64, u64) = (SHARED.0, 8);
/// Round n has n spaces for each CPU, modulo this: fewer than a CPU keeps apart, as many, and
/// more.
const NR_OWN: u64 = 8;
/// How often each CPU goes round its own.
const LAPS: usize = 2;
/// Flushes that every second space of a CPU's own has seen: more than the shared one will.
const NR_FLUSHES: u64 = 16;
/// Rounds between two lines of progress.
const PROGRESS: u64 = 8;

/// Runs `rounds` rounds, each with a shared address space that is new.
///
/// # Errors
///
/// Whatever the kernel refused.
pub(crate) fn run_swap(kernel: &BareKernel, rounds: u64) -> Result<u64, Error> {
    let nr_cpus = u64::from(online().count());
    let mut exits = 0;
    for number in 0..rounds {
        if number.is_multiple_of(PROGRESS) {
            println!("progress: swap {number} of {rounds}");
        }
        let shared = StampedProcess::new(kernel, churn::new_process_number(CpuIndex::FIRST))?;
        shared.map(page_range(SHARED.0, SHARED.1))?;
        let round = Round {
            shared,
            nr_own: number % NR_OWN,
            goes_meanwhile: (number / NR_OWN).is_multiple_of(2),
            dropped: page_range(SHARED.0, if number.is_multiple_of(2) { FEW } else { SHARED.1 }),
            place: Meeting::new(nr_cpus),
            result: spin::Mutex::new(Ok(())),
        };
        smp::on_every_cpu(&|me| round.run(me));
        round.result.into_inner()?;
        kernel.exit(&round.shared.mm)?;
        exits += 1 + round.nr_own * nr_cpus;
    }
    Ok(exits)
}

struct Round<'a> {
    shared: StampedProcess<'a>,
    /// Address spaces that each CPU has for itself.
    nr_own: u64,
    /// Whether the shared pages go while all CPUs but the first are elsewhere.
    goes_meanwhile: bool,
    /// What goes when all CPUs are back.
    dropped: VirtRange,
    place: Meeting,
    /// What the kernel refused, if anything.
    result: spin::Mutex<Result<(), Error>>,
}

type Step<'a> = fn(&Round<'a>, CpuIndex, &mut Vec<StampedProcess<'a>>) -> Result<(), Error>;

impl<'a> Round<'a> {
    const STEPS: [Step<'a>; 7] = [
        Self::begin,
        Self::take_away_meanwhile,
        Self::go_round,
        Self::clear,
        Self::write_shared,
        Self::take_away,
        Self::look,
    ];

    /// What one CPU does.
    fn run(&self, me: CpuIndex) {
        watchdog::note(&"swapping address spaces");
        let mut own = Vec::new();
        for step in Self::STEPS {
            if let Err(error) = step(self, me, &mut own) {
                *self.result.lock() = Err(error);
            }
            self.place.meet();
            // Looked at between two meetings, so that all CPUs leave together.
            let refused = self.result.lock().is_err();
            self.place.meet();
            if refused {
                break;
            }
        }
        let kernel = self.shared.kernel;
        kernel.switch_to(None);
        for process in own {
            if let Err(error) = kernel.exit(&process.mm) {
                *self.result.lock() = Err(error);
            }
        }
    }

    /// Stamps what is shared and what is not, and stays in the space that was stamped last.
    fn begin(&self, me: CpuIndex, own: &mut Vec<StampedProcess<'a>>) -> Result<(), Error> {
        self.shared.enter();
        self.write_shared(me, own)?;
        let mine = page_range(OWN.0, OWN.1);
        for number in 0..self.nr_own {
            let process = StampedProcess::new(self.shared.kernel, churn::new_process_number(me))?;
            process.map(mine)?;
            process.enter();
            process.write(mine).must_be(Found::AsExpected, "own, at first");
            // Every second one has seen more flushes than the shared space will.
            for _ in 0..NR_FLUSHES * (number % 2) {
                let first = page_range(OWN.0, 1);
                process.kernel.madvise_dontneed(&process.mm, first)?;
                process.check_fresh(first).must_be(Found::AsExpected, "own, dropped");
                process.write(first).must_be(Found::AsExpected, "own, dropped");
            }
            own.push(process);
        }
        // Half of the CPUs stay there without running it, or with the shared space, if they have
        // no other.
        if !me.get().is_multiple_of(2) {
            self.shared.kernel.go_lazy();
        }
        Ok(())
    }

    fn take_away_meanwhile(&self, me: CpuIndex, _: &mut Vec<StampedProcess<'a>>) -> Result<(), Error> {
        if me == CpuIndex::FIRST && self.goes_meanwhile {
            self.shared.enter();
            return self.drop_shared(page_range(SHARED.0, SHARED.1));
        }
        Ok(())
    }

    /// Goes round its own spaces, which nobody has touched, and comes back to the shared one.
    fn go_round(&self, _: CpuIndex, own: &mut Vec<StampedProcess<'a>>) -> Result<(), Error> {
        for process in own.iter().cycle().take(own.len() * LAPS) {
            process.enter();
            process.check(page_range(OWN.0, OWN.1)).must_be(Found::AsExpected, "own, again");
        }
        let all = page_range(SHARED.0, SHARED.1);
        self.shared.enter();
        if self.goes_meanwhile {
            self.shared.check_fresh(all).must_be(Found::AsExpected, "shared, dropped meanwhile");
        } else {
            self.shared.check(all).must_be(Found::AsExpected, "shared, again");
        }
        Ok(())
    }

    /// Takes away the page of zeroes, which the reads have mapped: to replace that by a page takes
    /// a flush each time.
    fn clear(&self, me: CpuIndex, _: &mut Vec<StampedProcess<'a>>) -> Result<(), Error> {
        if me == CpuIndex::FIRST { self.drop_shared(page_range(SHARED.0, SHARED.1)) } else { Ok(()) }
    }

    fn write_shared(&self, _: CpuIndex, _: &mut Vec<StampedProcess<'a>>) -> Result<(), Error> {
        let all = page_range(SHARED.0, SHARED.1);
        self.shared.write(all).must_be(Found::AsExpected, "shared, writing");
        self.shared.check(all).must_be(Found::AsExpected, "shared, reading back");
        Ok(())
    }

    /// Takes pages away from CPUs that have come back.
    fn take_away(&self, me: CpuIndex, _: &mut Vec<StampedProcess<'a>>) -> Result<(), Error> {
        if me == CpuIndex::FIRST { self.drop_shared(self.dropped) } else { Ok(()) }
    }

    fn look(&self, _: CpuIndex, _: &mut Vec<StampedProcess<'a>>) -> Result<(), Error> {
        self.shared.check_fresh(self.dropped).must_be(Found::AsExpected, "shared, dropped");
        let nr_kept = SHARED.1 - self.dropped.nr_pages();
        if nr_kept > 0 {
            let kept = page_range(self.dropped.end(), nr_kept);
            self.shared.check(kept).must_be(Found::AsExpected, "shared, kept");
        }
        Ok(())
    }

    fn drop_shared(&self, range: VirtRange) -> Result<(), Error> {
        self.shared.kernel.madvise_dontneed(&self.shared.mm, range)
    }
}
