//! How far the loop has come, and what it did.

use core::ops::Range;

use mmu_pagetable::{Level, VirtRange};

use crate::entries::part::TablePart;
use crate::queue::word::DelayedRmaps;

/// Why the loop stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// It came to the end, or there was no room for another page.
    Done,
    /// The next entry points to a table.
    Table,
}

/// What the loop did.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    /// The first entry not looked at.
    pub(crate) next: usize,
    /// Leaves cleared.
    pub(crate) leaves: usize,
    /// The first leaf cleared; `usize::MAX` until there is one.
    low: usize,
    /// One past the last leaf cleared.
    high: usize,
    /// Whether an entry was kept: left as it was, and passed over.
    pub(crate) kept: Kept,
    pub(crate) rmaps: DelayedRmaps,
    pub(crate) stop: Stop,
}

/// Which of the entries that the loop has passed are not empty now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    Nothing,
    Something,
}

impl Progress {
    #[inline(always)]
    pub(crate) const fn at(first: usize) -> Self {
        Self {
            next: first,
            leaves: 0,
            low: usize::MAX,
            high: 0,
            kept: Kept::Nothing,
            rmaps: DelayedRmaps::Absent,
            stop: Stop::Done,
        }
    }

    /// The addresses that the leaves mapped which were cleared.
    #[inline]
    pub(crate) fn cleared(&self, part: &TablePart<'_>, level: Level) -> Option<VirtRange> {
        let first = part.address(self.low.min(self.high), level);
        VirtRange::new(first, part.address(self.high, level)).ok()
    }

    #[inline(always)]
    pub(crate) fn note(&mut self, cleared: Range<usize>) {
        self.leaves += cleared.len();
        self.low = self.low.min(cleared.start);
        self.high = cleared.end;
    }
}
