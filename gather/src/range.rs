//! What must be flushed: the addresses cleared since the last flush, and at which levels.

use mmu_pagetable::{Level, VirtRange};
use mmu_tlb::{FreedTables, PageSpan};

/// The addresses and levels to flush. It grows with every entry cleared, and is emptied only
/// together with a flush (rule G2).
///
/// Linux: start, end, cleared_ptes.. and freed_tables of mmu_gather.
#[derive(Debug)]
pub(crate) struct FlushRange {
    start: u64,
    end: u64,
    /// Bit `level` is set when an entry of a table of that level was cleared.
    cleared_levels: u8,
    tables: FreedTables,
}

impl FlushRange {
    pub(crate) const fn empty() -> Self {
        Self { start: u64::MAX, end: 0, cleared_levels: 0, tables: FreedTables::No }
    }

    /// Entries of `level` tables that cover `range` were cleared.
    #[inline]
    pub(crate) fn cleared(&mut self, range: VirtRange, level: Level) {
        self.start = self.start.min(range.start());
        self.end = self.end.max(range.end());
        self.cleared_levels |= 1 << level as u8;
    }

    /// A table of `level` was unhooked. `address` is one that the caller gave up inside its span:
    /// one INVLPG there drops what is cached of the entry that pointed to the table, whatever else
    /// the table covered.
    pub(crate) fn unhooked(&mut self, level: Level, address: u64) {
        self.start = self.start.min(address);
        self.end = self.end.max(address + Level::Pte.entry_span());
        // Nothing links a root; whoever frees one as a table is flushed for all the same.
        self.cleared_levels |= 1 << level.above().unwrap_or(level) as u8;
        self.tables = FreedTables::Yes;
    }

    #[inline]
    pub(crate) const fn is_empty(&self) -> bool {
        self.cleared_levels == 0
    }

    #[inline]
    pub(crate) const fn tables(&self) -> FreedTables {
        self.tables
    }

    /// The span to flush, its ends rounded out to the stride; `None` if nothing was cleared.
    ///
    /// Rounding matters: from an unrounded start, steps of 2 MiB can pass over the last 2 MiB that
    /// were touched.
    #[inline]
    pub(crate) fn span(&self) -> Option<PageSpan> {
        if self.is_empty() {
            return None;
        }
        Some(self.span_of_some())
    }

    /// As [`span`](Self::span), where something was cleared.
    #[inline]
    pub(crate) fn span_of_some(&self) -> PageSpan {
        let is_cleared = |level: &Level| self.cleared_levels & (1 << *level as u8) != 0;
        // One is; if none were, single pages would be right for all of them.
        let smallest = Level::ALL.into_iter().find(is_cleared).unwrap_or(Level::Pte);
        let stride = smallest.entry_span();
        PageSpan {
            start: self.start & !(stride - 1),
            end: (self.end + (stride - 1)) & !(stride - 1),
            stride_shift: smallest.entry_shift(),
        }
    }

    /// Everything noted so far has been flushed.
    #[inline]
    pub(crate) const fn reset(&mut self) {
        *self = Self::empty();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> VirtRange {
        VirtRange::new(start, end).expect("a good range")
    }

    #[test]
    fn the_stride_is_the_smallest_level_cleared() {
        let mut flush = FlushRange::empty();
        flush.cleared(range(2 << 20, 4 << 20), Level::Pmd);
        assert_eq!(flush.span().expect("not empty").stride_shift, 21);
        flush.cleared(range(0x1000, 0x2000), Level::Pte);
        assert_eq!(flush.span(), Some(PageSpan { start: 0x1000, end: 4 << 20, stride_shift: 12 }));
    }

    #[test]
    fn a_stride_of_freed_tables_skips_none_of_them() {
        let mut flush = FlushRange::empty();
        flush.unhooked(Level::Pte, 3 << 19);
        flush.unhooked(Level::Pte, 5 << 19);
        let span = flush.span().expect("not empty");
        assert_eq!(span.stride_shift, 21);
        for table in [0, 2 << 20] {
            assert!(span.pages().any(|page| page >> 21 == table >> 21), "{span:?} misses {table:#x}");
        }
        assert_eq!(flush.tables(), FreedTables::Yes);
    }

    #[test]
    fn nothing_cleared_is_nothing_to_flush() {
        let mut flush = FlushRange::empty();
        assert_eq!(flush.span(), None);
        flush.cleared(range(0, 0x1000), Level::Pte);
        flush.reset();
        assert!(flush.is_empty() && flush.tables() == FreedTables::No);
    }
}
