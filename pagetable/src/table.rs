//! One table page: 512 entries, and a view of them.
#![expect(unsafe_code, reason = "the one place where a frame number becomes a table")]

use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use core::fmt;
use core::ptr;

use static_assertions::{assert_eq_align, assert_eq_size};
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::entry::{Entry, EntryValue};
use crate::level::Level;
use crate::memory::TableMemory;
use crate::range::VirtRange;
use crate::used_lines::{Line, Lines, UsedLines, UsedParts};

/// A table page in the hardware's format.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct Table {
    entries: [Entry; 512],
}

assert_eq_size!(Table, PageTable);
assert_eq_align!(Table, PageTable);

impl Table {
    /// The entry at `index`.
    ///
    /// # Panics
    /// If `index` is 512 or more.
    #[must_use]
    #[inline]
    pub const fn entry(&self, index: usize) -> &Entry {
        &self.entries[index]
    }

    /// All 512 entries.
    #[must_use]
    #[inline]
    pub const fn entries(&self) -> &[Entry; 512] {
        &self.entries
    }

    /// Whether all 512 entries are empty now. The answer lasts only while the lock is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.iter().all(|entry| entry.load().is_empty())
    }

    /// Whether all entries of one cache line are empty now.
    #[inline]
    pub(crate) fn line_is_empty(&self, line: Line) -> bool {
        let first = line.first_entry();
        self.entries[first..first + Line::ENTRIES].iter().fold(0, |any, entry| any | entry.load().bits()) == 0
    }
}

/// The end of a debug build's panic message about an entry in a line that is not noted.
pub(crate) const PAST_THE_NOTES: &str = "is not noted in its used lines: entries were written past `LockedTable::entry`. \
    A kernel that writes them by means of its own says None in `TableMemory::used_lines`";

/// A borrowed view of one table: its entries, its frame, and its level.
///
/// Holding one proves that the page was a table of this level when the view was made. It proves
/// nothing about its entries: without the lock they may change between any two reads.
#[derive(Clone, Copy)]
pub struct TableView<'m> {
    table: &'m Table,
    frame: PhysFrame,
    level: Level,
}

impl<'m> TableView<'m> {
    /// The view of the table in `frame`.
    ///
    /// # Safety
    /// - `frame` holds a table of `level` that came from `memory` (or is the root of an address
    ///   space in it);
    /// - it is not freed while the view is used: the caller's lock (Linux: mmap_lock) keeps
    ///   `unhook_tables` away, or the caller is the one who frees it.
    #[must_use]
    #[inline]
    pub unsafe fn new<M: PageTableFrameMapping>(memory: &'m M, frame: PhysFrame, level: Level) -> Self {
        let pointer = memory.frame_to_pointer(frame).cast::<Table>();
        // SAFETY: by the contract of `TableMemory` (first item) the pointer is valid and aligned
        // while the frame is a table, which the caller promises for the life of the view. `Table`
        // has the size and alignment of `PageTable` (asserted above) and is only read and written
        // through atomics, so sharing it is sound.
        let table = unsafe { &*pointer };
        Self { table, frame, level }
    }

    /// The table's entries.
    #[must_use]
    #[inline]
    pub const fn table(&self) -> &'m Table {
        self.table
    }

    /// The frame the table occupies.
    #[must_use]
    #[inline]
    pub const fn frame(&self) -> PhysFrame {
        self.frame
    }

    /// The table's level.
    #[must_use]
    #[inline]
    pub const fn level(&self) -> Level {
        self.level
    }

    /// Reads the entry that `address` selects.
    #[must_use]
    #[inline]
    pub fn load(&self, address: u64) -> EntryValue {
        self.table.entry(self.level.index(address)).load()
    }

    /// The entries that `range` selects, those it covers only in part among them. `range` lies
    /// inside the span of the table.
    ///
    /// # Panics
    /// If `range` reaches beyond the table.
    #[must_use]
    #[inline]
    pub fn entries(&self, range: VirtRange) -> &'m [Entry] {
        let first = self.level.index(range.start());
        let last = self.level.index(range.end() - 1);
        &self.table.entries[first..=last]
    }

    /// The table that the entry for `address` links, if it links one.
    ///
    /// # Safety
    /// As for [`TableView::new`]: nobody frees that table while the view is used.
    #[must_use]
    #[inline]
    pub unsafe fn child<M: PageTableFrameMapping>(&self, memory: &'m M, address: u64) -> Option<Self> {
        let below = self.level.below()?;
        let frame = self.load(address).as_table(self.level)?;
        // SAFETY: a present, non-leaf entry of a live table points to a live table of the level
        // below (P2); the caller keeps it alive.
        Some(unsafe { Self::new(memory, frame, below) })
    }

    #[inline(always)]
    pub(crate) fn notes<'n, M: TableMemory>(&self, memory: &'n M) -> Option<&'n UsedLines> {
        // SAFETY: as in `lock`.
        unsafe { memory.used_lines(self.frame) }
    }

    /// The lines that may hold entries; all lines, if the kernel does not note them. Without the
    /// lock they may change at any time.
    #[must_use]
    #[inline]
    pub fn used_lines<M: TableMemory>(&self, memory: &M) -> Lines {
        self.notes(memory).map_or(Lines::ALL, UsedLines::load)
    }

    /// The parts of `range` whose entries may be something other than empty, by the noted lines;
    /// see [`used_lines`](Self::used_lines). `range` lies inside the span of the table.
    ///
    /// A debug build also looks at the lines that are not noted, and panics if one has an entry:
    /// somebody writes entries by means of their own, past the notes (rule P4). A release build
    /// does not look: doing so took 2.3 times the instructions a table in sparse memory, which is
    /// what the notes save.
    #[inline]
    pub fn used_parts<M: TableMemory>(&self, memory: &M, range: VirtRange) -> UsedParts {
        let used = self.used_lines(memory);
        if cfg!(debug_assertions) {
            self.check_unused(memory, used, range);
        }
        UsedParts::new(used, self.level, range)
    }

    /// Asserts rule P4 for the lines of `range` that are not in `used`, the lines that were noted a
    /// moment ago.
    pub(crate) fn check_unused<M: TableMemory>(&self, memory: &M, used: Lines, range: VirtRange) {
        let entries = self.level.index(range.start())..self.level.index(range.end() - 1) + 1;
        for line in Lines::touched_by(&entries).without(used) {
            // Without the lock, a line may be noted, filled, emptied and forgotten while we look;
            // hardly three times in a row.
            let is_missing = (0..3).all(|_| {
                !self.table.line_is_empty(line)
                    && self.used_lines(memory).intersect(Lines::EMPTY.with(line)).is_empty()
            });
            assert!(!is_missing, "P4: {self:?} has an entry in {line:?}, which {PAST_THE_NOTES}");
        }
    }

    /// Prefetches, for somebody who will soon look at them, up to eight lines of the entries that
    /// `range` selects, and the note of the table's used lines, if there is one.
    ///
    /// The lock is fetched with the note where it lies beside it. The lock itself is not asked for:
    /// a kernel may take a call of [`TableMemory::table_lock`] to mean that the lock will be taken.
    ///
    /// # Panics
    /// If `range` reaches beyond the table.
    #[inline]
    pub fn prefetch_entries<M: TableMemory>(&self, memory: &M, range: VirtRange) {
        if let Some(used) = self.notes(memory) {
            // SAFETY: as in `prefetch`.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr::from_ref(used).cast()) };
        }
        let first = self.level.index(range.start()) & !(Line::ENTRIES - 1);
        let last = self.level.index(range.end() - 1);
        for line in self.table.entries[first..=last].chunks(Line::ENTRIES).take(8) {
            // SAFETY: as in `prefetch`.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
        }
    }

    /// Prefetches the first used line, for somebody who will soon look at the table.
    #[inline]
    pub fn prefetch<M: TableMemory>(&self, memory: &M) {
        if let Some(line) = self.used_lines(memory).first() {
            let line = ptr::from_ref(self.table.entry(line.first_entry()));
            // SAFETY: a prefetch reads nothing that the program can tell, and SSE is in the
            // baseline of x86_64.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
        }
    }
}

impl fmt::Debug for TableView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} table at {:#x}", self.level, self.frame.start_address())
    }
}
