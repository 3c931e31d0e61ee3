//! All that the checker keeps of one machine.

use crate::checker::events::{Detail, Story};
use crate::checker::kind::ViolationKind;
use crate::checker::ledger::{Checker, CpuWatch};
use crate::checker::violation::Violation;
use crate::mmu::Mmu;

/// What only a checked machine has.
#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) checker: Checker,
    pub(crate) story: Story,
}

impl Checked {
    /// Notes a violation.
    pub(crate) fn report(&self, kind: ViolationKind, tell: impl FnOnce() -> Violation) {
        self.checker.report(kind, || {
            let violation = tell();
            let Violation { cpu, address, frame, .. } = violation;
            self.story.detail(cpu, Detail::Violated(kind, address, frame));
            violation
        });
    }
}

/// A software MMU and the watch over what it holds.
#[derive(Debug)]
pub(crate) struct Caches {
    pub(crate) mmu: Mmu,
    pub(crate) watch: CpuWatch,
}
