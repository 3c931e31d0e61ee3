//! Samples in rounds: every row once a round, in a new random order, so that a disturbance of the
//! machine hits all rows.

use core::time::Duration;
use std::time::Instant;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

use crate::entry::{Clock, Entry, Sampler};
use mmu_measured::preempted::times_preempted;
use mmu_measured::shape::Shape;

/// What was measured of one row on one workload: nanoseconds a leaf, one number a round.
#[derive(Clone, Debug, Default)]
pub struct Series(pub Vec<f64>);

impl Series {
    /// The middle one; `None` if there are none.
    #[must_use]
    pub fn median(&self) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied()
    }

    /// The least.
    #[must_use]
    pub fn min(&self) -> Option<f64> {
        self.0.iter().copied().min_by(f64::total_cmp)
    }

    /// The median of the ratios to `floor`, round by round.
    #[must_use]
    pub fn ratio_to(&self, floor: &Self) -> Option<f64> {
        Self(self.0.iter().zip(&floor.0).map(|(mine, theirs)| mine / theirs).collect()).median()
    }
}

/// Takes `rounds` rounds (one more is thrown away) of every row on `shape`, but stops after
/// `patience`.
#[must_use]
pub fn measure(
    sampler: &Sampler<'_>,
    shape: &Shape,
    entries: &[Entry],
    rounds: u32,
    patience: Duration,
) -> Vec<Series> {
    let mut series = vec![Series::default(); entries.len()];
    let mut order: Vec<usize> = (0..entries.len()).collect();
    let mut random = SmallRng::seed_from_u64(u64::from(std::process::id()));
    let start = Instant::now();
    for round in 0..=rounds {
        order.shuffle(&mut random);
        for index in &order {
            let nanoseconds = undisturbed(sampler, shape, entries[*index]);
            if round > 0 {
                series[*index].0.push(nanoseconds);
            }
        }
        if round > 2 && start.elapsed() > patience {
            break;
        }
    }
    series
}

/// One sample during which the thread kept its CPU, or, after a few tries, the last one.
fn undisturbed(sampler: &Sampler<'_>, shape: &Shape, entry: Entry) -> f64 {
    let mut tries = 0;
    loop {
        let before = times_preempted();
        let mut clock = Clock::default();
        sampler.sample(shape, entry, &mut clock);
        tries += 1;
        if times_preempted() == before || tries == 4 {
            return clock.nanoseconds_for(shape.nr_leaves());
        }
    }
}
