//! All that the checker keeps of one machine.

use std::sync::{Mutex, OnceLock};

use crate::checker::contents::Kept;
use crate::checker::events::{Detail, EventLog};
use crate::checker::kind::ViolationKind;
use crate::checker::ledger::{CpuWatch, Ledger};
use crate::checker::violation::Violation;
use crate::mmu::Mmu;

/// What only a checked machine has.
#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) ledger: Ledger,
    pub(crate) log: EventLog,
    /// Once the kernel has told of an area.
    pub(crate) contents: OnceLock<Mutex<Kept>>,
}

impl Checked {
    /// Notes a violation.
    pub(crate) fn report(&self, kind: ViolationKind, violation: impl FnOnce() -> Violation) {
        self.ledger.report(kind, || {
            let violation = violation();
            let Violation { cpu, address, frame, .. } = violation;
            self.log.detail(cpu, Detail::Violated(kind, address, frame));
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
