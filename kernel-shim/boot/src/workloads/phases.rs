//! The parts of a workload, one after the other, and what each of them counted. A violation ends
//! the run where it is found.

use alloc::string::{String, ToString};

use mmu_kernel_shim::Misbehaviour;

use crate::arch::clock;
use crate::arch::exit::Verdict;
use crate::checks::violation;
use crate::cpu::watchdog;
use crate::machine::{PlantedFault, Shootdowns};
use crate::println;
use crate::workloads::program::BareKernel;
use crate::workloads::{churn, lazy, measure, rivals, stage, swap, threads};

/// How long the parts are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Length {
    threads_rounds: u64,
    churn_processes: u64,
    churn_pages: u64,
    lazy_rounds: u64,
    rivals_rounds: u64,
    swap_rounds: u64,
}

impl Length {
    /// More than 100,000 pages, 1,000 shootdowns and 100 exits.
    pub(crate) const FULL: Self = Self {
        threads_rounds: 300,
        churn_processes: 400,
        churn_pages: 300,
        lazy_rounds: 60,
        rivals_rounds: 500,
        swap_rounds: 32,
    };
    /// A few seconds.
    pub(crate) const SHORT: Self = Self {
        threads_rounds: 60,
        churn_processes: 40,
        churn_pages: 96,
        lazy_rounds: 8,
        rivals_rounds: 200,
        swap_rounds: 16,
    };
}

/// A kernel, and what was done with it so far.
pub(crate) struct Phases<'a> {
    kernel: &'a BareKernel,
    module: Option<&'static [u8]>,
    nr_exits: u64,
    start: u64,
    /// The part that could not be done, and why.
    refused: Option<(&'static str, String)>,
}

impl<'a> Phases<'a> {
    pub(crate) fn new(kernel: &'a BareKernel, module: Option<&'static [u8]>) -> Self {
        Self { kernel, module, nr_exits: 0, start: clock::cycles(), refused: None }
    }

    pub(crate) fn drill(self) -> Self {
        // Left out where a fault is planted: the programs of the drill do not check what they read.
        let config = self.kernel.config();
        if self.kernel.machine().fault() != PlantedFault::Absent
            || config.misbehaviour != Misbehaviour::Absent
        {
            return self;
        }
        self.run_part("drill", |kernel, _| stage::run_drill(kernel))
    }

    pub(crate) fn threads(self, length: Length) -> Self {
        self.run_part("threads", |kernel, _| error_text(threads::run_threads(kernel, length.threads_rounds)))
    }

    pub(crate) fn churn(self, length: Length) -> Self {
        self.run_part("churn", |kernel, _| {
            error_text(churn::run_churn(kernel, length.churn_processes, length.churn_pages))
        })
    }

    pub(crate) fn lazy(self, length: Length) -> Self {
        self.run_part("lazy", |kernel, _| error_text(lazy::run_lazy(kernel, length.lazy_rounds)))
    }

    pub(crate) fn rivals(self, length: Length) -> Self {
        self.run_part("rivals", |kernel, _| error_text(rivals::run_rivals(kernel, length.rivals_rounds)))
    }

    pub(crate) fn swap(self, length: Length) -> Self {
        self.run_part("swap", |kernel, _| error_text(swap::run_swap(kernel, length.swap_rounds)))
    }

    pub(crate) fn measure(self) -> Self {
        self.run_part("measure", |kernel, _| error_text(measure::run_measure(kernel)))
    }

    pub(crate) fn layout(self) -> Self {
        self.run_part("layout", |kernel, module| {
            let module = module.ok_or("no layout was loaded beside the image")?;
            stage::run_layout(kernel, module)
        })
    }

    /// Prints the sums, and returns whether everything held.
    pub(crate) fn verdict(self) -> Verdict {
        let machine = self.kernel.machine();
        let counted = self.kernel.counters().snapshot();
        let Shootdowns { count, cycles, least_cycles } = machine.shootdowns();
        let mean = cycles.checked_div(count).unwrap_or(0);
        let least = least_cycles.unwrap_or(0);
        if let Some((name, why)) = self.refused {
            println!("workload: {name}: {why}");
            return Verdict::Usage;
        }
        self.kernel.drop_caches();
        let (lost_frames, lost_tables) = self.kernel.lost();
        println!(
            "total: pages={} tables={} shootdowns={count} shootdown_cycles_least={least} \
             shootdown_cycles_mean={mean} ipis={} flushes_ranged={} flushes_full={} exits={} faults={} ms={} \
             lost_frames={lost_frames} lost_tables={lost_tables} double_frees={}",
            counted.leaves,
            counted.released_tables + counted.table_fallbacks,
            counted.ipis_sent,
            counted.flushes_ranged,
            counted.flushes_full,
            self.nr_exits,
            counted.faults,
            milliseconds_since(self.start),
            counted.double_frees,
        );
        if (lost_frames, lost_tables, counted.double_frees) != (0, 0, 0) {
            violation::found_by_workload(format_args!("frames were lost, or freed twice"));
        }
        Verdict::Pass
    }

    /// Does one part, unless an earlier one could not be done, and prints what it counted.
    fn run_part(
        mut self,
        name: &'static str,
        work: impl FnOnce(&BareKernel, Option<&'static [u8]>) -> Result<u64, String>,
    ) -> Self {
        if self.refused.is_some() {
            return self;
        }
        println!("progress: {name}");
        let before = self.kernel.counters().snapshot();
        let shootdowns = self.kernel.machine().shootdowns().count;
        let start = clock::cycles();
        match work(self.kernel, self.module) {
            Ok(nr_exits) => self.nr_exits += nr_exits,
            Err(why) => {
                self.refused = Some((name, why));
                return self;
            }
        }
        watchdog::progress();
        let counted = self.kernel.counters().snapshot().since(&before);
        println!(
            "phase: name={name} ms={} pages={} tables={} shootdowns={} ipis={} faults={}",
            milliseconds_since(start),
            counted.leaves,
            counted.released_tables + counted.table_fallbacks,
            self.kernel.machine().shootdowns().count - shootdowns,
            counted.ipis_sent,
            counted.faults,
        );
        self
    }
}

fn milliseconds_since(start: u64) -> u64 {
    clock::cycles().wrapping_sub(start) / (clock::cycles_per_second() / 1000).max(1)
}

fn error_text<T>(result: Result<T, mmu_kernel_shim::Error>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}
