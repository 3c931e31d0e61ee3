//! Sequences on the small kernel.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use mmu_gather::Limits;
use mmu_hosted::{
    HostedMachine, MachineFault, MostWork, Outcome, Pace, Run, Sequence, Supply, Telling, Verdict,
};
use mmu_kernel_shim::{Config, Discarding, Misbehaviour};

use crate::kernel::ShimKernel;
use crate::views::View;

/// What is wrong, on purpose, with the machine and the kernel that a sequence runs on, and how much
/// is remembered.
#[derive(Clone, Copy, Debug)]
pub struct Trial {
    /// The machine.
    pub fault: MachineFault,
    /// The kernel.
    pub misbehaviour: Misbehaviour,
    /// How much of what happens is remembered.
    pub telling: Telling,
}

impl Default for Trial {
    /// Nothing is wrong, and little is remembered.
    fn default() -> Self {
        Self { fault: MachineFault::Absent, misbehaviour: Misbehaviour::Absent, telling: Telling::Last }
    }
}

/// Capacities small enough that every boundary is reached by a few pages.
const LIMITS: Limits = Limits::DEFAULT
    .with_bundle_slots(4)
    .with_batch_slots(16)
    .with_batch_pages(3)
    .with_table_slots(3)
    .with_free_chunk(8);

impl Trial {
    /// The part of it that is the machine's.
    pub(crate) fn of_the_machine(self) -> mmu_hosted::Trial {
        let Self { fault, telling, .. } = self;
        let most_work = MostWork::promised_by(&LIMITS);
        mmu_hosted::Trial { fault, telling, most_work, ..mmu_hosted::Trial::default() }
    }

    /// Boots the kernel.
    pub(crate) fn boot(self, machine: &Arc<HostedMachine>) -> io::Result<ShimKernel> {
        let misbehaviour = self.misbehaviour;
        // The other variants of this kernel: without notes of used lines (machine.rs), and this.
        let [_, writes_protected] = machine.options().variants;
        let discarding = if writes_protected { Discarding::WriteProtectedFirst } else { Discarding::AtOnce };
        ShimKernel::boot(machine, Config { limits: LIMITS, misbehaviour, discarding, ..Config::default() })
    }
}

/// Runs `sequence` from power-on until every address space has exited.
///
/// # Errors
/// If the host refuses memory.
///
/// # Panics
/// If the engine does: an assertion of its own, or a deadlock.
pub fn execute(sequence: &Sequence) -> io::Result<Outcome> {
    execute_with(sequence, MachineFault::Absent)
}

/// As [`execute`], on a machine that does something wrong: to see the checker notice.
///
/// # Errors
/// As for [`execute`].
///
/// # Panics
/// As for [`execute`].
pub fn execute_with(sequence: &Sequence, fault: MachineFault) -> io::Result<Outcome> {
    let trial = Trial { fault, ..Trial::default() };
    mmu_hosted::execute(sequence, trial.of_the_machine(), |machine| trial.boot(machine))
}

/// Runs a sequence and catches whatever it does.
///
/// # Errors
/// If the host refuses memory for the machine.
pub fn judge(sequence: &Sequence) -> io::Result<Run> {
    judge_in(sequence, Trial::default())
}

/// As [`judge`], with something wrong on purpose, or with all that happens remembered.
///
/// # Errors
/// If the host refuses memory for the machine.
pub fn judge_in(sequence: &Sequence, trial: Trial) -> io::Result<Run> {
    mmu_hosted::judge(sequence, trial.of_the_machine(), |machine| trial.boot(machine))
}

/// Leaves steps out while the same sort of failure stays.
///
/// # Errors
/// If the host refuses memory for the machine.
pub fn shrink(sequence: &Sequence, trial: Trial, verdict: Verdict) -> io::Result<(Sequence, Verdict)> {
    mmu_hosted::shrink(sequence, trial.of_the_machine(), verdict, |machine| trial.boot(machine))
}

/// Runs `sequence` one step at a time while gathers get batch pages as `supply` says; what could be
/// seen at every sync, and at the end.
///
/// # Errors
/// If the host refuses memory for the machine.
///
/// # Panics
/// As for [`execute`].
pub fn views(sequence: &Sequence, supply: Supply) -> io::Result<(Outcome, Vec<View>)> {
    let trial = Trial::default();
    let seen = Arc::new(Mutex::default());
    let boot = |machine: &Arc<HostedMachine>| Ok(trial.boot(machine)?.noting(supply, Arc::clone(&seen)));
    let in_turn = mmu_hosted::Trial { pace: Pace::OneAtATime, ..trial.of_the_machine() };
    let outcome = mmu_hosted::execute(sequence, in_turn, boot)?;
    let seen = core::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
    Ok((outcome, seen))
}
