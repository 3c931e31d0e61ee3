//! The two passes over a layout or a log: one timed, on a machine that models no caches, and one
//! checked.

use core::time::Duration;

use mmu_adapter::HostedKernel;
use mmu_gather::Limits;
use mmu_hosted::{Checking, Found, MachineFault, Options};
use mmu_kernel_shim::{Config, Misbehaviour, Supply};

use crate::output::report::{LayoutReport, Lost, Report};

/// How layouts and logs are run.
#[derive(Clone, Copy, Debug)]
pub struct RunOptions {
    /// CPUs of the machine, 1 to 64.
    pub nr_cpus: u32,
    /// Decides the order of the munmaps, what programs touch, and how CPUs interleave.
    pub seed: u64,
    /// Capacities of every gather.
    pub limits: Limits,
    /// Whether gathers get batch pages.
    pub batches: Supply,
    /// Whether the checked pass runs; the timed one always does.
    pub checking: Checking,
    /// The fault that is planted in the kernel.
    pub misbehaviour: Misbehaviour,
    /// The fault that is planted in the machine.
    pub fault: MachineFault,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            nr_cpus: 4,
            seed: 1,
            limits: Limits::DEFAULT,
            batches: Supply::Always,
            checking: Checking::On,
            misbehaviour: Misbehaviour::Absent,
            fault: MachineFault::Absent,
        }
    }
}

impl RunOptions {
    /// The machine of one pass, with `nr_frames` frames; faults are planted in the checked pass
    /// only.
    pub(crate) fn machine(&self, checking: Checking, nr_frames: u64) -> Options {
        Options {
            checking,
            fault: if checking == Checking::On { self.fault } else { MachineFault::Absent },
            ..Options::new(self.nr_cpus, nr_frames, self.seed)
        }
    }

    /// The kernel of one pass; faults are planted in the checked pass only.
    pub(crate) fn config(&self, checking: Checking) -> Config {
        Config {
            limits: self.limits,
            batches: self.batches,
            misbehaviour: if checking == Checking::On { self.misbehaviour } else { Misbehaviour::Absent },
            ..Config::default()
        }
    }
}

/// Runs `pass` timed and then, if the checker is on, once more checked, and adds what was found to
/// `report`.
///
/// # Errors
/// What `pass` returns; nothing is added then.
pub(crate) fn run_passes<E>(
    options: &RunOptions,
    report: &mut Report,
    mut pass: impl FnMut(Checking) -> Result<PassResult, E>,
) -> Result<(), E> {
    let timed = pass(Checking::Off)?;
    let ns_per_page = timed.ns_per_page();
    let mut result = match options.checking {
        Checking::On => {
            report.checked = true;
            let checked = pass(Checking::On)?;
            report.faults += checked.nr_faults;
            checked
        }
        Checking::Off => timed,
    };
    result.report.ns_per_page = ns_per_page;
    report.add(result.report, &result.found, result.lost);
    Ok(())
}

/// What one pass came to.
pub(crate) struct PassResult {
    report: LayoutReport,
    teardown: Duration,
    found: Found,
    lost: Lost,
    /// How often the planted fault has happened.
    nr_faults: u64,
}

impl PassResult {
    /// The result of a pass whose last process has exited; `teardown` is the time of the calls that
    /// gave memory up.
    pub(crate) fn from_kernel(kernel: &HostedKernel, report: LayoutReport, teardown: Duration) -> Self {
        kernel.drop_caches();
        let (frames, tables) = kernel.lost();
        let counted = kernel.counters().snapshot();
        let nr_faults = match kernel.config().misbehaviour {
            Misbehaviour::Absent => kernel.machine().nr_faults(),
            Misbehaviour::FreeBeforeFlush => counted.leaves,
        };
        let found = kernel.machine().violations();
        let lost = Lost { frames, tables, double_frees: counted.double_frees };
        Self { report, teardown, found, lost, nr_faults }
    }

    fn ns_per_page(&self) -> f64 {
        match self.report.pages {
            0 => 0.0,
            pages => self.teardown.as_nanos() as f64 / pages as f64,
        }
    }
}
