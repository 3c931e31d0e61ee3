//! How much a CPU does between two preemption points: rule G7, a bounded amount, whatever the range.

use core::sync::atomic::{AtomicU32, Ordering};

use mmu_gather::Limits;
use x86_64::structures::paging::PhysFrame;

use crate::checker::ViolationKind;
use crate::machine::{Checked, HostedMachine};

/// What one CPU did since its last preemption point.
#[derive(Debug, Default)]
pub(crate) struct Work {
    leaves: AtomicU32,
    splits: AtomicU32,
    freed: AtomicU32,
}

/// The most that a CPU may do between two preemption points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MostWork {
    /// Leaves cleared, or restricted: all of one table.
    pub leaves: u32,
    /// Large leaves split: those that two ends of a range cut, on two levels.
    pub splits: u32,
    /// Frames given back to the allocator.
    pub freed: u32,
}

impl MostWork {
    /// What gathers with these limits promise.
    ///
    /// A chunk of pages, the tables of a batch and one that found none, the batch pages themselves; then the next chunk.
    #[must_use]
    pub const fn of(limits: &Limits) -> Self {
        let chunk = limits.free_chunk as u32 + 1;
        let tables = limits.table_slots as u32 + 1;
        Self { leaves: 512, splits: 4, freed: 2 * chunk + tables + limits.batch_pages as u32 + 2 }
    }
}

impl HostedMachine {
    /// This CPU could run something else now.
    pub(crate) fn begin_work_anew(&self) {
        let work = &self.cpu().work;
        work.leaves.store(0, Ordering::Relaxed);
        work.splits.store(0, Ordering::Relaxed);
        work.freed.store(0, Ordering::Relaxed);
    }

    /// An entry that mapped `frame` was cleared or lost rights.
    pub(crate) fn count_leaf(&self, checked: &Checked, frame: PhysFrame) {
        let most = self.options.most_work.leaves;
        self.count(checked, &self.cpu().work.leaves, most, frame);
    }

    /// A leaf that mapped the frames from `frame` on was split.
    pub(crate) fn count_split(&self, checked: &Checked, frame: PhysFrame) {
        let most = self.options.most_work.splits;
        self.count(checked, &self.cpu().work.splits, most, frame);
    }

    pub(crate) fn count_freed(&self, checked: &Checked, frame: PhysFrame) {
        let most = self.options.most_work.freed;
        self.count(checked, &self.cpu().work.freed, most, frame);
    }

    fn count(&self, checked: &Checked, counter: &AtomicU32, most: u32, frame: PhysFrame) {
        let done = counter.load(Ordering::Relaxed) + 1;
        counter.store(done, Ordering::Relaxed);
        if done > most {
            // Told once for each stretch.
            counter.store(0, Ordering::Relaxed);
            self.report(checked, ViolationKind::NoPreemptionPoint, self.current(), 0, frame, None);
        }
    }
}
