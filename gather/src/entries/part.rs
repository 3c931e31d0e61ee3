//! The part of a locked table that the loop goes through.

use mmu_pagetable::{Entry, Level, Lines, LockedTable, VirtRange};

/// Entries of a locked table. It borrows the guard: while there is one, the lock is held.
pub(crate) struct TablePart<'l> {
    pub(crate) entries: &'l [Entry; 512],
    /// The address that the first entry of the table maps.
    pub(crate) start: u64,
    pub(crate) used: Lines,
    /// The entry to begin with.
    pub(crate) first: usize,
    /// One past the last entry.
    pub(crate) end: usize,
}

impl<'l> TablePart<'l> {
    /// The entries of `range`, which lies inside the span of the table; `level` is the table's.
    #[inline]
    pub(crate) fn new(locked: &'l LockedTable<'_, impl Sized>, range: VirtRange, level: Level) -> Self {
        Self {
            entries: locked.view().table().entries(),
            start: range.start() & !(level.table_span() - 1),
            used: locked.used_lines(),
            first: level.index(range.start()),
            end: level.index(range.end() - 1) + 1,
        }
    }

    /// The address that an entry maps.
    #[inline(always)]
    pub(crate) const fn address(&self, index: usize, level: Level) -> u64 {
        self.start + ((index as u64) << level.entry_shift())
    }
}
