//! What a campaign has covered, and what it never came to.

use mmu_hosted::{Boundaries, Boundary, Features, Pairs, Sequence};

/// What the sequences of a campaign did, all together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Coverage {
    /// Pairs of operations that followed one another.
    pub followed: Pairs,
    /// Pairs of operations of which the second ended while the first was going on.
    pub overlapped: Pairs,
    /// The counters of the kernel, with the most that one sequence has counted.
    pub counters: Vec<(&'static str, u64)>,
    boundaries: BoundaryTimes,
}

#[derive(Clone, Debug)]
struct BoundaryTimes([u64; Boundary::ALL.len()]);

impl Default for BoundaryTimes {
    fn default() -> Self {
        Self([0; Boundary::ALL.len()])
    }
}

impl Coverage {
    /// Adds what a sequence did.
    pub(crate) fn add(&mut self, sequence: &Sequence, reached: Boundaries, features: &Features) {
        for pair in sequence.steps.windows(2) {
            if let [first, second] = pair {
                self.followed.add(first.op.number(), second.op.number());
            }
        }
        self.overlapped.add_all(&features.overlapped);
        if self.counters.is_empty() {
            self.counters.clone_from(&features.counted);
        }
        for ((_, most), (_, counted)) in self.counters.iter_mut().zip(&features.counted) {
            *most = (*most).max(*counted);
        }
        for boundary in reached.iter() {
            self.boundaries.0[boundary as usize] += 1;
        }
    }

    /// Every boundary, with the number of sequences that reached it.
    pub(crate) fn boundaries(&self) -> impl Iterator<Item = (Boundary, u64)> + '_ {
        Boundary::ALL.into_iter().zip(self.boundaries.0)
    }

    /// How many boundaries were reached, and how many there are.
    #[must_use]
    pub(crate) fn reached(&self) -> (usize, usize) {
        (self.boundaries.0.iter().filter(|times| **times > 0).count(), Boundary::ALL.len())
    }

    /// The boundaries that no sequence reached.
    #[must_use]
    pub(crate) fn not_reached(&self) -> Vec<&'static str> {
        self.boundaries().filter(|(_, times)| *times == 0).map(|(boundary, _)| boundary.name()).collect()
    }

    /// The counters that no sequence has raised.
    #[must_use]
    pub(crate) fn never_counted(&self) -> Vec<&'static str> {
        self.counters.iter().filter(|(_, most)| *most == 0).map(|(name, _)| *name).collect()
    }
}
