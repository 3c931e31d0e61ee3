//! How much a CPU does between two preemption points: rule G7, a bounded amount, whatever the
//! range.

use core::sync::atomic::{AtomicU32, Ordering};

use x86_64::structures::paging::PhysFrame;

use crate::checker::checked::Checked;
use crate::checker::kind::ViolationKind;
use crate::machine::HostedMachine;

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
