//! What a sweep does: each setting under each of its conditions, first counted, then timed in
//! rounds.

use core::time::Duration;
use std::io;
use std::time::Instant;

use mmu_gather::Limits;
use mmu_measured::memory::Memory;
use mmu_measured::preempted::times_preempted;
use mmu_measured::shape::Shape;
use mmu_measured::shuffle;
use mmu_measured::space::Space;
use serde::Serialize;

use crate::sweep::axes::{Arrangement, Batch, Conditions, NrPages};
use crate::sweep::captured_process::CapturedProcess;
use crate::sweep::machine::{BatchPool, SweepMachine, Unwatched, Watcher};
use crate::sweep::tally::{Counts, Tally};

/// Why a sweep could not be measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MeasureError {
    /// The machine's memory cannot be had.
    #[error("{0}")]
    Memory(io::Error),
    /// A teardown did not free what was mapped.
    #[error(
        "batch {batch}, {conditions}: {} of {} pages and {} of {} tables were freed",
        pages.0, pages.1, tables.0, tables.1
    )]
    Lost {
        /// The setting.
        batch: Batch,
        /// The rest of it.
        conditions: Conditions,
        /// Pages that were freed, and pages that were mapped.
        pages: (u64, u64),
        /// Tables that were freed, and tables that were built.
        tables: (u64, u64),
    },
}

/// What is to be compared, under which conditions, how often.
#[derive(Clone, Debug)]
pub(crate) struct SweepPlan {
    /// The settings.
    pub batches: Vec<Batch>,
    /// Each setting is tried under each of these.
    pub conditions: Vec<Conditions>,
    /// The processes that conditions name.
    pub processes: Vec<CapturedProcess>,
    /// Timed samples of each; none: only counts.
    pub repeat: u32,
    /// Once this has passed, timing stops as soon as there are three samples of each.
    pub patience: Duration,
}

/// One setting under one set of conditions.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Measured {
    /// The setting.
    pub batch: Batch,
    /// What is the same for all settings it is compared with.
    #[serde(flatten)]
    pub conditions: Conditions,
    /// The same in every run.
    pub counts: Counts,
    /// What this machine needed, if that was asked for.
    pub measured: Option<Timing>,
}

/// Nanoseconds a page, from before munmap to after the last page is free.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Timing {
    /// The middle sample.
    pub ns_per_page_median: f64,
    /// The least.
    pub ns_per_page_min: f64,
    /// How many there are.
    pub samples: usize,
}

/// Everything that was found.
#[derive(Clone, Debug)]
pub(crate) struct Measurements {
    /// All settings under all conditions; the settings of one set of conditions side by side.
    pub cells: Vec<Measured>,
    /// Conditions for which the machine does not have enough frames.
    pub left_out: Vec<Conditions>,
    /// What reading the clock twice takes; taken off each sample.
    pub clock_ns: f64,
    /// Most bytes of stack from the call of munmap to something the kernel is asked for.
    pub stack_bytes: usize,
}

/// Carries out `plan`; `step` is called as often as [`SweepPlan::steps`] says, or less.
///
/// # Errors
/// If memory cannot be had, or a page or table was not freed.
pub(crate) fn measure(plan: &SweepPlan, mut step: impl FnMut()) -> Result<Measurements, MeasureError> {
    let memory = Memory::map().map_err(MeasureError::Memory)?;
    let pool = BatchPool::default();
    let mut rig = Rig { memory: &memory, pool: &pool, shapes: Vec::new() };
    let mut found =
        Measurements { cells: Vec::new(), left_out: Vec::new(), clock_ns: clock_ns(), stack_bytes: 0 };
    for conditions in &plan.conditions {
        if !rig.prepare(plan, conditions) {
            found.left_out.push(*conditions);
            continue;
        }
        for batch in &plan.batches {
            let (counts, stack_bytes) = rig.count(*batch, *conditions)?;
            found.stack_bytes = found.stack_bytes.max(stack_bytes);
            found.cells.push(Measured { batch: *batch, conditions: *conditions, counts, measured: None });
            step();
        }
    }
    let mut samples = vec![Vec::new(); found.cells.len()];
    let mut order: Vec<usize> = (0..found.cells.len()).collect();
    let start = Instant::now();
    for round in 0..plan.repeat {
        if round > 2 && start.elapsed() > plan.patience {
            break;
        }
        // In a new order each time, so that a disturbance of the machine hits all settings alike.
        shuffle(&mut order);
        for index in &order {
            let cell = &found.cells[*index];
            samples[*index].push(rig.time(cell.batch, cell.conditions, found.clock_ns)?);
            step();
        }
    }
    for (cell, samples) in found.cells.iter_mut().zip(samples) {
        cell.measured = Timing::from_samples(samples);
    }
    Ok(found)
}

impl SweepPlan {
    /// How many samples it takes, the counting ones included.
    #[must_use]
    pub(crate) fn steps(&self) -> u64 {
        (self.batches.len() * self.conditions.len()) as u64 * u64::from(self.repeat + 1)
    }
}

impl Timing {
    fn from_samples(mut samples: Vec<f64>) -> Option<Self> {
        samples.sort_by(f64::total_cmp);
        let ns_per_page_median = *samples.get(samples.len() / 2)?;
        Some(Self { ns_per_page_median, ns_per_page_min: *samples.first()?, samples: samples.len() })
    }
}

/// The memory, and the layouts that go into it.
struct Rig<'m> {
    memory: &'m Memory,
    pool: &'m BatchPool,
    shapes: Vec<((Arrangement, NrPages), Shape)>,
}

impl Rig<'_> {
    /// Lays the pages out, once; says whether they fit.
    fn prepare(&mut self, plan: &SweepPlan, conditions: &Conditions) -> bool {
        if self.shape(*conditions).is_some() {
            return true;
        }
        let shape = match conditions.shape {
            Arrangement::Process(name) => {
                plan.processes.iter().find(|process| process.name == name).and_then(CapturedProcess::shape)
            }
            arrangement => arrangement.shape(conditions.size),
        };
        let Some(shape) = shape else { return false };
        self.shapes.push(((conditions.shape, conditions.size), shape));
        true
    }

    fn shape(&self, conditions: Conditions) -> Option<&Shape> {
        let wanted = (conditions.shape, conditions.size);
        self.shapes.iter().find(|(key, _)| *key == wanted).map(|(_, shape)| shape)
    }

    fn count(&self, batch: Batch, conditions: Conditions) -> Result<(Counts, usize), MeasureError> {
        let tally = Tally::of_shape(self.shape(conditions));
        let machine = SweepMachine::new(self.memory, self.pool, conditions, tally);
        let tally = machine.watch();
        let mut counts = Counts::default();
        self.tear_down(&machine, batch, conditions, |munmap| {
            tally.begin();
            munmap();
            counts = tally.counts();
        })?;
        Ok((counts, tally.stack_bytes()))
    }

    /// One sample: nanoseconds a page. Small layouts are torn down several times for it.
    fn time(&self, batch: Batch, conditions: Conditions, clock_ns: f64) -> Result<f64, MeasureError> {
        let machine = SweepMachine::new(self.memory, self.pool, conditions, Unwatched);
        let times = (256 / conditions.size.0).clamp(1, 64);
        let mut tries = 0;
        loop {
            let before = times_preempted();
            let mut elapsed = Duration::ZERO;
            for _ in 0..times {
                self.tear_down(&machine, batch, conditions, |munmap| {
                    let start = Instant::now();
                    munmap();
                    elapsed += start.elapsed();
                })?;
            }
            tries += 1;
            if times_preempted() == before || tries == 4 {
                let ns = elapsed.as_secs_f64() * 1e9 - clock_ns * times as f64;
                return Ok(ns.max(0.0) / (times * conditions.size.0) as f64);
            }
        }
    }

    /// Builds the layout, has it torn down by what `measure` is given, and looks whether all of it
    /// is free.
    fn tear_down<W: Watcher>(
        &self,
        machine: &SweepMachine<'_, W>,
        batch: Batch,
        conditions: Conditions,
        measure: impl FnOnce(&dyn Fn()),
    ) -> Result<(), MeasureError> {
        let Some(shape) = self.shape(conditions) else { return Ok(()) };
        let space = Space::without_stretches(machine.base(), shape);
        let limits: Limits = batch.limits(shape.nr_leaves());
        let free_before = self.memory.nr_free_tables();
        machine.with_loaded(&space.mm, || measure(&|| machine.munmap(&space.mm, &limits, &shape.areas)));
        let pages = self.memory.take_free_pages();
        let tables = self.memory.nr_free_tables() - free_before;
        if (pages, tables) == (shape.nr_leaves(), space.nr_tables()) {
            return Ok(());
        }
        Err(MeasureError::Lost {
            batch,
            conditions,
            pages: (pages, shape.nr_leaves()),
            tables: (tables, space.nr_tables()),
        })
    }
}

/// What the clock itself adds to a sample: the middle of many empty ones.
fn clock_ns() -> f64 {
    let mut samples: Vec<u128> = (0..1001)
        .map(|_| {
            let start = Instant::now();
            start.elapsed().as_nanos()
        })
        .collect();
    samples.sort_unstable();
    samples[samples.len() / 2] as f64
}
