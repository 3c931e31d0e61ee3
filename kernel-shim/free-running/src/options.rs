//! How a run is to be: what comes from the command line.

use core::time::Duration;

/// How many CPUs a run may have.
pub const MAX_CPUS: usize = 8;

/// A run.
#[derive(Clone, Debug)]
pub struct Options {
    /// CPUs, 2 to [`MAX_CPUS`]. As many as the host has cores show most.
    pub nr_cpus: usize,
    /// How long it lasts; the phase that has begun is finished.
    pub time: Duration,
    /// Of what programs do. Threads are free, so that the same seed does not give the same run.
    pub seed: u64,
    /// What is wrong, on purpose.
    pub fault: PlantedFault,
    /// How interrupts reach a CPU.
    pub interrupts: Interrupts,
    /// Nobody gets any further for so long: the run is stuck.
    pub patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nr_cpus: 2,
            time: Duration::from_secs(60),
            seed: 1,
            fault: PlantedFault::Absent,
            interrupts: Interrupts::Alternating,
            patience: Duration::from_secs(20),
        }
    }
}

/// What is wrong, on purpose, so that the machine can be seen to notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlantedFault {
    /// Nothing.
    Absent,
    /// Flushes drop nothing, neither INVLPG nor a load of CR3 that should.
    SkipFlush,
    /// The kernel frees pages when their entries are cleared, before any flush.
    FreeBeforeFlush,
    /// One flush that another CPU asked for, in four, is answered and not carried out.
    DropIpi,
    /// No flush that another CPU asked for is carried out: all are answered.
    LocalFlushOnly,
    /// Now and then an interrupt is lost, and its sender waits for ever.
    LoseInterrupt,
}

/// How interrupts reach a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupts {
    /// It looks for them between two accesses and wherever it waits.
    Polled,
    /// They are signals, and come between any two instructions.
    Signals,
    /// One phase of the run so, the next the other way.
    Alternating,
}

/// The way of one phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    Polled,
    Signals,
}

impl Interrupts {
    /// The way of the phase with this number.
    pub(crate) const fn in_phase(self, number: usize) -> Delivery {
        match self {
            Self::Polled => Delivery::Polled,
            Self::Signals => Delivery::Signals,
            Self::Alternating if number.is_multiple_of(2) => Delivery::Polled,
            Self::Alternating => Delivery::Signals,
        }
    }
}
