//! How to fuzz.

use core::time::Duration;

use mmu_adapter::Trial;

/// How to fuzz.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FuzzOptions {
    /// Which sequences: the n-th is made from this and n, mixed.
    pub seed: u64,
    /// CPUs of each machine.
    pub nr_cpus: u32,
    /// Stops after so many operations, over all jobs; whole sequences are run.
    pub most_ops: Option<u64>,
    /// Stops after so long.
    pub most_time: Option<Duration>,
    /// Operations in one sequence.
    pub length: usize,
    /// Where sequences come from.
    pub guidance: Guidance,
    /// Sequences run at the same time, each on a thread of its own.
    pub jobs: usize,
    /// What is wrong on purpose.
    pub trial: Trial,
}

/// Where sequences come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Guidance {
    /// Some are made from those that went somewhere new.
    Guided,
    /// All are made up.
    MadeUp,
}
