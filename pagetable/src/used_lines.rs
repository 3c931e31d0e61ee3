//! Which cache lines of a table may hold entries. With this note, a walk of sparse memory looks at
//! one line instead of 64.

use core::fmt;
use core::iter;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use static_assertions::assert_eq_size;

use crate::level::Level;
use crate::range::VirtRange;

/// One of the 64 cache lines of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line(u8);

impl Line {
    /// Entries in a line.
    pub const ENTRIES: usize = 8;

    /// The index in the table of its first entry.
    #[must_use]
    #[inline]
    pub const fn first_entry(self) -> usize {
        // At most 63.
        (self.0 & 63) as usize * Self::ENTRIES
    }
}

/// A set of the cache lines of a table.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Lines(u64);

impl Lines {
    /// All of them.
    pub const ALL: Self = Self(u64::MAX);
    /// None of them.
    pub const EMPTY: Self = Self(0);

    /// The lines that have an entry in `entries`, indices of a table.
    #[must_use]
    #[inline]
    pub const fn touched_by(entries: &Range<usize>) -> Self {
        if entries.start >= entries.end {
            return Self::EMPTY;
        }
        Self::between(entries.start / Line::ENTRIES, entries.end.div_ceil(Line::ENTRIES))
    }

    /// The lines whose entries all are in `entries`, indices of a table.
    #[must_use]
    #[inline]
    pub const fn inside(entries: &Range<usize>) -> Self {
        Self::between(entries.start.div_ceil(Line::ENTRIES), entries.end / Line::ENTRIES)
    }

    #[inline]
    const fn between(first: usize, end: usize) -> Self {
        if first >= end || end > 64 { Self::EMPTY } else { Self(u64::MAX >> (64 - (end - first)) << first) }
    }

    /// The lines that are in both sets.
    #[must_use]
    #[inline]
    pub const fn intersect(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The lines of this set that are not in `other`.
    #[must_use]
    #[inline]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The lines of this set, and `line`.
    #[must_use]
    #[inline]
    pub const fn with(self, line: Line) -> Self {
        Self(self.0 | 1 << (line.0 & 63))
    }

    /// Whether the set has no line.
    #[must_use]
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The first line of the set.
    #[must_use]
    #[inline]
    pub const fn first(self) -> Option<Line> {
        // At most 63.
        if self.0 == 0 { None } else { Some(Line(self.0.trailing_zeros().to_le_bytes()[0])) }
    }

    /// The first run of entries of `entries` (indices) that lie in lines of the set, up to the next
    /// gap. If there is none, the result is empty and lies at the end of `entries`.
    #[must_use]
    #[inline]
    pub const fn first_run(self, entries: &Range<usize>) -> Range<usize> {
        // The set from the line of `start` on; what lies beyond the end is cut off below.
        let here = self.0 & (u64::MAX << ((entries.start / Line::ENTRIES) & 63));
        let first = here.trailing_zeros();
        let start = first as usize * Line::ENTRIES;
        if here == 0 || start >= entries.end {
            return entries.end..entries.end;
        }
        let end = (first + (here >> first).trailing_ones()) as usize * Line::ENTRIES;
        let start = if start > entries.start { start } else { entries.start };
        start..if end < entries.end { end } else { entries.end }
    }
}

impl IntoIterator for Lines {
    type Item = Line;
    type IntoIter = LinesIter;

    /// The lines in ascending order.
    #[inline]
    fn into_iter(self) -> LinesIter {
        LinesIter(self)
    }
}

/// The lines of a set, in ascending order.
#[derive(Clone, Debug)]
pub struct LinesIter(Lines);

impl Iterator for LinesIter {
    type Item = Line;

    #[inline]
    fn next(&mut self) -> Option<Line> {
        let line = self.0.first()?;
        self.0.0 &= self.0.0 - 1;
        Some(line)
    }

    #[inline]
    fn size_hint(&self) -> (usize, Option<usize>) {
        let lines = self.0.0.count_ones() as usize;
        (lines, Some(lines))
    }
}

impl ExactSizeIterator for LinesIter {}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lines({:#018x})", self.0)
    }
}

/// The parts of a range, inside the span of one table, whose entries may be something other than
/// empty; ascending, and as few as possible.
#[derive(Clone, Debug)]
pub struct UsedParts {
    lines: Lines,
    level: Level,
    rest: VirtRange,
}

impl UsedParts {
    pub(crate) const fn new(lines: Lines, level: Level, range: VirtRange) -> Self {
        Self { lines, level, rest: range }
    }

    /// One address for each entry: the first address that the entry covers, or the start of the
    /// range.
    #[inline]
    pub fn addresses(self) -> impl Iterator<Item = u64> {
        let span = self.level.entry_span();
        self.flat_map(move |part| {
            let next =
                move |address: &u64| Some((address | (span - 1)) + 1).filter(|next| *next < part.end());
            iter::successors(Some(part.start()), next)
        })
    }
}

impl Iterator for UsedParts {
    type Item = VirtRange;

    #[inline]
    fn next(&mut self) -> Option<VirtRange> {
        let (level, rest) = (self.level, self.rest);
        let entries = level.index(rest.start())..level.index(rest.end() - 1) + 1;
        let run = self.lines.first_run(&entries);
        self.lines = self.lines.without(Lines::between(0, run.end.div_ceil(Line::ENTRIES)));
        let table_start = rest.start() & !(level.table_span() - 1);
        let address = |index: usize| table_start + ((index as u64) << level.entry_shift());
        VirtRange::new(address(run.start), address(run.end)).ok()?.intersect(rest)
    }
}

/// Where a kernel notes which lines of one table may hold entries: eight bytes, beside the table's
/// lock.
///
/// INVARIANT: P4, the line of every entry that is not empty is noted. A line that is noted may be
/// empty, which costs nothing but time. The note is changed under the table's lock only; it may be
/// read without the lock by whoever could as well have read the entries.
///
/// Zeroed is a valid state, for a table without entries; any other state is valid for such a table,
/// too.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct UsedLines(AtomicU64);

assert_eq_size!(UsedLines, u64);

impl UsedLines {
    /// The note of a table without entries.
    #[must_use]
    #[inline]
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// The lines that may hold entries.
    #[must_use]
    #[inline]
    pub fn load(&self) -> Lines {
        // ORDERING: acquire, pairs with `set`: whoever finds a line forgotten also sees what came
        // before that (an open gather, rule G6).
        Lines(self.0.load(Ordering::Acquire))
    }

    /// Forgets every line: the table is new, and all of its entries are empty.
    #[inline]
    pub(crate) fn forget_all(&self) {
        self.set(0);
    }

    /// Notes every line: somebody has filled the table.
    #[inline]
    pub(crate) fn note_all(&self) {
        self.set(u64::MAX);
    }

    /// Notes `lines`, and no other line: somebody has looked at all of the table, which nobody else
    /// changes.
    pub(crate) fn note_exactly(&self, lines: Lines) {
        self.set(lines.0);
    }

    #[inline]
    fn set(&self, lines: u64) {
        // ORDERING: release, pairs with `load`.
        self.0.store(lines, Ordering::Release);
    }

    /// Notes the line of the entry with this index, which is about to be filled. The table's lock
    /// is held.
    #[inline]
    pub(crate) fn note(&self, index: usize) {
        let noted = self.0.load(Ordering::Relaxed);
        let line = 1 << (index / Line::ENTRIES % 64);
        if noted & line == 0 {
            self.set(noted | line);
        }
    }

    /// Forgets lines that are empty. The table's lock is held.
    #[inline]
    pub(crate) fn forget(&self, empty: Lines) {
        let noted = self.0.load(Ordering::Relaxed);
        self.set(noted & !empty.0);
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec::Vec;

    use super::*;

    /// Sets with runs of every kind: no line, every line, runs at both ends, single lines, and some
    /// without a pattern.
    fn sets() -> impl Iterator<Item = Lines> {
        let odd = (0..40).scan(1_u64, |state, _| {
            *state = state.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ *state >> 29;
            Some(*state)
        });
        [0, u64::MAX, 1, 1 << 63, 0xff, 0xf0f0 << 40, !(1 << 31)].into_iter().chain(odd).map(Lines)
    }

    fn ranges() -> impl Iterator<Item = Range<usize>> {
        let ends = [0, 1, 7, 8, 9, 63, 64, 100, 255, 256, 300, 503, 504, 505, 511, 512];
        ends.into_iter()
            .flat_map(move |start| ends.map(|end| start..end))
            .filter(|range| range.start < range.end)
    }

    fn has(lines: Lines, index: usize) -> bool {
        lines.0 >> (index / 8) & 1 != 0
    }

    #[test]
    fn the_first_run_begins_at_the_first_noted_entry_and_ends_before_the_next_that_is_not() {
        for lines in sets() {
            for range in ranges() {
                let start = range.clone().find(|index| has(lines, *index)).unwrap_or(range.end);
                let end = (start..range.end).find(|index| !has(lines, *index)).unwrap_or(range.end);
                assert_eq!(lines.first_run(&range), start..end, "{lines:?} {range:?}");
            }
            assert!(lines.first_run(&(512..512)).is_empty());
        }
    }

    #[test]
    fn a_range_touches_lines_and_has_lines_inside() {
        for range in ranges() {
            for line in Lines::ALL {
                let mut entries = line.first_entry()..line.first_entry() + Line::ENTRIES;
                let is_in = |set: Lines| !set.intersect(Lines::EMPTY.with(line)).is_empty();
                assert_eq!(is_in(Lines::touched_by(&range)), entries.any(|entry| range.contains(&entry)));
                let mut entries = line.first_entry()..line.first_entry() + Line::ENTRIES;
                assert_eq!(is_in(Lines::inside(&range)), entries.all(|entry| range.contains(&entry)));
            }
        }
        assert!(Lines::touched_by(&(9..9)).is_empty() && Lines::inside(&(9..9)).is_empty());
    }

    #[test]
    fn used_parts_are_the_noted_entries_of_the_range_in_order() {
        for level in [Level::Pte, Level::Pmd, Level::Pud] {
            let address = |index: usize| 3 * level.table_span() + ((index as u64) << level.entry_shift());
            for (lines, range) in sets().flat_map(|lines| ranges().map(move |range| (lines, range))) {
                let whole = VirtRange::new(address(range.start), address(range.end)).expect("not empty");
                let parts: Vec<VirtRange> = UsedParts::new(lines, level, whole).collect();
                assert!(parts.windows(2).all(|pair| pair[0].end() < pair[1].start()), "{parts:?}");
                for index in 0..512 {
                    let found = parts.iter().any(|part| part.contains(address(index)));
                    assert_eq!(found, range.contains(&index) && has(lines, index), "{lines:?} {range:?}");
                }
                let addresses = UsedParts::new(lines, level, whole).addresses();
                assert!(addresses.eq(range.clone().filter(|index| has(lines, *index)).map(address)));
                // A range that begins and ends in the middle of what an entry maps.
                let part = level.entry_span() / 4;
                if part < 4096 {
                    continue;
                }
                let cut = VirtRange::new(whole.start() + part, whole.end() - part).expect("not empty");
                let wanted =
                    range.filter(|index| has(lines, *index)).map(|index| address(index).max(cut.start()));
                assert!(UsedParts::new(lines, level, cut).addresses().eq(wanted), "{lines:?} {cut}");
                assert!(UsedParts::new(lines, level, cut).all(|part| cut.covers(part)), "{lines:?} {cut}");
            }
        }
    }

    #[test]
    fn what_is_noted_is_found_until_it_is_forgotten() {
        let used = UsedLines::new();
        for index in [0, 7, 8, 511] {
            used.note(index);
            assert!(has(used.load(), index));
        }
        assert_eq!(used.load().into_iter().len(), 3);
        used.forget(Lines::inside(&(0..8)));
        assert_eq!(used.load().into_iter().map(Line::first_entry).collect::<Vec<_>>(), [8, 504]);
    }
}
