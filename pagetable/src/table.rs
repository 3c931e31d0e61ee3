//! One table page: 512 entries, a lock, and the memory they live in.
#![expect(unsafe_code, reason = "the one place where a frame number becomes a table")]

use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
use core::fmt;
use core::ops::Range;
use core::ptr;

use spin::RelaxStrategy;
use spin::mutex::{SpinMutex, SpinMutexGuard};
use static_assertions::{assert_eq_align, assert_eq_size};
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::entry::{Entry, EntryValue};
use crate::level::Level;
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
    fn line_is_empty(&self, line: Line) -> bool {
        let first = line.first_entry();
        self.entries[first..first + Line::ENTRIES].iter().fold(0, |any, entry| any | entry.load().bits()) == 0
    }
}

/// The lock of one table page. It guards the entries of that page against other software, never
/// against hardware.
///
/// `R` decides what a waiting CPU does. It must keep answering flush requests, or two CPUs that
/// wait for each other stop for ever. Linux: `ptlock_ptr`.
#[doc(alias = "ptlock")]
pub type TableLock<R> = SpinMutex<(), R>;

/// Where table pages live: what a kernel supplies to this crate.
///
/// The pointer to a frame comes from the `x86_64` crate's own [`PageTableFrameMapping`], so an
/// implementation that exists for `MappedPageTable` serves unchanged. Its `FrameAllocator` is not
/// used, because it takes `&mut self`, and several CPUs allocate at once.
///
/// # Safety
/// - `frame_to_pointer` of a frame that `allocate_table` returned, or of a root, points to that
///   frame's 4096 bytes, readable and writable, for as long as the frame is a table; no Rust
///   reference other than `&Table` to it exists.
/// - `allocate_table` returns a frame that nobody else uses and that reads as zero.
/// - `table_lock` returns the same lock for the same frame until the frame is freed, and locks of
///   tables on one path from a root are distinct.
/// - `used_lines` returns the same [`UsedLines`] for the same frame until the frame is freed, and
///   another one for every other frame. If it returns one, entries of linked tables are filled only
///   through [`LockedTable::entry`] (rule P4); the kernel half of a root, which the engine does not
///   look at, is exempt.
/// - Nobody combines a view of one memory with a reference to another of the same type. A machine
///   has one memory; where a process has several (a simulator), whoever holds two keeps their views
///   apart.
///
/// # Example
/// Tables in an ordinary process:
///
/// ```
#[doc = include_str!("../doc/memory.rs")]
/// ```
pub unsafe trait TableMemory: PageTableFrameMapping {
    /// What a CPU does while it waits for a table lock.
    type Relax: RelaxStrategy;

    /// The lock of the table in `frame`. Only a caller that takes the lock next, or tries to, asks
    /// for it.
    ///
    /// # Safety
    /// `frame` is a table of this memory, and is not freed while the lock is used.
    unsafe fn table_lock(&self, frame: PhysFrame) -> &TableLock<Self::Relax>;

    /// Where it is noted which cache lines of the table in `frame` may hold entries; best beside
    /// the lock.
    ///
    /// With these notes, tearing down sparse memory looks at the used lines only, not at all 64 of
    /// each table. A kernel that does not keep them, or that writes entries by means of its own,
    /// returns `None`: every line is then looked at.
    ///
    /// # Safety
    /// As for [`table_lock`](Self::table_lock).
    #[inline]
    unsafe fn used_lines(&self, _frame: PhysFrame) -> Option<&UsedLines> {
        None
    }

    /// A zeroed frame for a new table; `None` when memory is short.
    ///
    /// # Context
    /// No table lock is held. May sleep if the caller of the mapping function may.
    fn allocate_table(&self) -> Option<PhysFrame>;

    /// Takes back pages that were tables, or were meant to become tables.
    ///
    /// The engine calls this only for pages that no CPU can reach any more: never linked, or
    /// unhooked and flushed everywhere, lazy CPUs included. A kernel whose own software walks
    /// tables without a lock (Linux: gup_fast) must still wait for those walkers, for example by
    /// handing the pages to RCU here.
    ///
    /// # Context
    /// No table lock is held.
    ///
    /// # Safety
    /// - Each of `tables` came from [`allocate_table`](Self::allocate_table), or was a root, and is
    ///   given back once.
    /// - Each was never linked, or was unhooked and every CPU, lazy ones included, has flushed
    ///   since.
    /// - No CPU has one of them as its root.
    unsafe fn free_tables(&self, tables: &[PhysFrame]);
}

/// The end of a debug build's panic message about an entry in a line that is not noted.
const PAST_THE_NOTES: &str = "is not noted in its used lines: entries were written past `LockedTable::entry`. \
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

    /// Takes the table's lock.
    ///
    /// # Context
    /// Spins. Never taken while a lock of the same or a lower level is held.
    #[inline]
    pub fn lock<M: TableMemory>(&self, memory: &'m M) -> LockedTable<'m, M::Relax> {
        // SAFETY: a view is of a live table (contract of `new`), in the one memory there is
        // (contract of `TableMemory`).
        let guard = unsafe { memory.table_lock(self.frame) }.lock();
        LockedTable { view: *self, used: self.notes(memory), _guard: guard }
    }

    /// Takes the table's lock if nobody holds it.
    pub fn try_lock<M: TableMemory>(&self, memory: &'m M) -> Option<LockedTable<'m, M::Relax>> {
        // SAFETY: as in `lock`.
        let guard = unsafe { memory.table_lock(self.frame) }.try_lock()?;
        Some(LockedTable { view: *self, used: self.notes(memory), _guard: guard })
    }

    #[inline(always)]
    fn notes<'n, M: TableMemory>(&self, memory: &'n M) -> Option<&'n UsedLines> {
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

/// A table whose lock is held: the proof that no other software changes its entries. Hardware may
/// still set A/D bits.
pub struct LockedTable<'m, R> {
    view: TableView<'m>,
    used: Option<&'m UsedLines>,
    _guard: SpinMutexGuard<'m, (), R>,
}

impl<'m, R> LockedTable<'m, R> {
    /// The table, without the proof that its lock is held.
    #[must_use]
    #[inline]
    pub const fn view(&self) -> TableView<'m> {
        self.view
    }

    /// The entry that `address` selects.
    #[must_use]
    #[inline]
    pub const fn entry(&self, address: u64) -> LockedEntry<'_> {
        self.entry_at(self.view.level.index(address))
    }

    const fn entry_at(&self, index: usize) -> LockedEntry<'_> {
        LockedEntry { entry: self.view.table.entry(index), index, used: self.used }
    }

    /// The entries that `range` selects, for looking and clearing; see [`TableView::entries`]. What
    /// is put in goes through [`entry`](Self::entry).
    ///
    /// # Panics
    /// If `range` reaches beyond the table.
    #[must_use]
    #[inline]
    pub fn entries(&self, range: VirtRange) -> &'m [Entry] {
        self.view.entries(range)
    }

    /// The lines that may hold entries; all lines, if the kernel does not note them. Debug builds
    /// check them, as in [`TableView::used_parts`].
    #[must_use]
    #[inline]
    pub fn used_lines(&self) -> Lines {
        let used = self.used.map_or(Lines::ALL, UsedLines::load);
        debug_assert!(
            Lines::ALL.without(used).into_iter().all(|line| self.view.table.line_is_empty(line)),
            "P4: {:?} has an entry in a line that {PAST_THE_NOTES}",
            self.view
        );
        used
    }

    /// Forgets the lines whose eight entries all lie in `entries` (indices).
    ///
    /// Lines that reach beyond either end stay noted, empty or not: looking at them costs more than
    /// forgetting them would ever save.
    ///
    /// # Safety
    /// All of `entries` are empty now. An entry that is left would be passed over, and lost when
    /// its table is freed.
    #[inline]
    pub unsafe fn forget_cleared_lines(&self, entries: &Range<usize>) {
        let lines = Lines::inside(entries);
        if let Some(used) = self.used
            && !lines.is_empty()
        {
            debug_assert!(
                lines.into_iter().all(|line| self.view.table.line_is_empty(line)),
                "P4: {self:?} has entries in {lines:?}"
            );
            used.forget(lines);
        }
    }

    /// Forgets the lines that are empty among those that `entries` (indices) touch. It looks at
    /// each of them that is noted.
    pub fn forget_empty_lines(&self, entries: &Range<usize>) {
        if let Some(used) = self.used {
            let noted = used.load().intersect(Lines::touched_by(entries)).into_iter();
            let empty = noted.filter(|line| self.view.table.line_is_empty(*line));
            used.forget(empty.fold(Lines::EMPTY, Lines::with));
        }
    }
}

/// An entry of a table whose lock is held. What is stored here is noted in the table's
/// [`UsedLines`].
#[derive(Clone, Copy, Debug)]
pub struct LockedEntry<'l> {
    entry: &'l Entry,
    index: usize,
    used: Option<&'l UsedLines>,
}

impl LockedEntry<'_> {
    /// As [`Entry::load`].
    #[must_use]
    #[inline]
    pub fn load(&self) -> EntryValue {
        self.entry.load()
    }

    /// As [`Entry::store`].
    ///
    /// # Safety
    /// A CPU may walk the table at any time, so:
    /// - What is put in may be used at once by whoever has the address space loaded. A leaf maps a
    ///   page that its programs may use in that way, as for
    ///   [`AddressSpace::map`](crate::AddressSpace::map); a link leads to a table of the level
    ///   below that nothing else links, as for
    ///   [`AddressSpace::link_table`](crate::AddressSpace::link_table).
    /// - No link is overwritten: only
    ///   [`AddressSpace::unhook_tables`](crate::AddressSpace::unhook_tables) unhooks tables (rule
    ///   P2).
    /// - What a leaf loses, its mapping or a right, other CPUs may go on using until they have
    ///   flushed. Until then its page is not freed, nor taken for one that cannot be written; and
    ///   somebody is going to flush: an open gather that was told before the lock drops
    ///   ([`changed`](https://docs.rs/mmu-gather)), or a reclaim batch that was told likewise.
    #[inline]
    pub unsafe fn store(&self, value: EntryValue) {
        self.note(value);
        // SAFETY: passed on to our caller; the lock is held (this is a part of its guard), and the
        // line is noted.
        unsafe { self.entry.store(value) };
    }

    /// As [`Entry::exchange`].
    ///
    /// # Safety
    /// As for [`store`](Self::store).
    #[must_use]
    #[inline]
    pub unsafe fn exchange(&self, new: EntryValue) -> EntryValue {
        self.note(new);
        // SAFETY: as in `store`.
        unsafe { self.entry.exchange(new) }
    }

    /// As [`Entry::compare_exchange`].
    ///
    /// # Errors
    /// The value found, when it was another one.
    ///
    /// # Safety
    /// As for [`store`](Self::store).
    #[inline]
    pub unsafe fn compare_exchange(&self, current: EntryValue, new: EntryValue) -> Result<(), EntryValue> {
        self.note(new);
        // SAFETY: as in `store`.
        unsafe { self.entry.compare_exchange(current, new) }
    }

    /// As [`Entry::get_and_clear`].
    ///
    /// # Safety
    /// As for [`store`](Self::store) of the empty entry.
    #[must_use]
    #[inline]
    pub unsafe fn get_and_clear(&self) -> EntryValue {
        // SAFETY: as in `store`; nothing is put in.
        unsafe { self.entry.get_and_clear() }
    }

    /// INVARIANT: P4, the line is noted before the entry is filled: whoever can see the entry finds
    /// its line noted.
    #[inline]
    fn note(&self, value: EntryValue) {
        if let Some(used) = self.used
            && !value.is_empty()
        {
            used.note(self.index);
        }
    }
}

impl<R> fmt::Debug for LockedTable<'_, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "locked {:?}", self.view)
    }
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;
    use core::sync::atomic::AtomicU64;

    use x86_64::PhysAddr;

    use super::*;

    #[repr(align(4096))]
    struct Words([AtomicU64; 512]);

    /// One table, wherever the frame; counts how often its lock is asked for.
    struct Memory {
        table: Words,
        lock: TableLock<spin::Spin>,
        used_lines: Option<UsedLines>,
        asked_for_lock: Cell<u32>,
    }

    impl Memory {
        fn new(used_lines: Option<UsedLines>) -> Self {
            let table = Words([const { AtomicU64::new(0) }; 512]);
            Self { table, lock: TableLock::new(()), used_lines, asked_for_lock: Cell::new(0) }
        }
    }

    // SAFETY: the table lives as long as the memory, and its entries are atomics.
    unsafe impl PageTableFrameMapping for Memory {
        fn frame_to_pointer(&self, _: PhysFrame) -> *mut PageTable {
            ptr::from_ref(&self.table.0).cast_mut().cast()
        }
    }

    // SAFETY: one frame, one lock, one note; nothing is linked or allocated.
    unsafe impl TableMemory for Memory {
        type Relax = spin::Spin;

        unsafe fn table_lock(&self, _: PhysFrame) -> &TableLock<spin::Spin> {
            self.asked_for_lock.set(self.asked_for_lock.get() + 1);
            &self.lock
        }

        unsafe fn used_lines(&self, _: PhysFrame) -> Option<&UsedLines> {
            self.used_lines.as_ref()
        }

        fn allocate_table(&self) -> Option<PhysFrame> {
            None
        }

        unsafe fn free_tables(&self, _: &[PhysFrame]) {}
    }

    #[test]
    fn a_lock_is_asked_for_only_by_who_takes_it() {
        for used_lines in [None, Some(UsedLines::new())] {
            let memory = Memory::new(used_lines);
            let frame = PhysFrame::containing_address(PhysAddr::new(0x5000));
            // SAFETY: the memory has a table for this frame, and outlives the view.
            let view = unsafe { TableView::new(&memory, frame, Level::Pte) };
            let range = VirtRange::new(0x3000, 0x40_000).expect("a good range");
            view.prefetch_entries(&memory, range);
            view.prefetch(&memory);
            assert_eq!(view.used_parts(&memory, range).count(), usize::from(memory.used_lines.is_none()));
            assert_eq!(memory.asked_for_lock.get(), 0);
            drop(view.lock(&memory));
            assert_eq!(memory.asked_for_lock.get(), 1);
            drop(view.try_lock(&memory));
            assert_eq!(memory.asked_for_lock.get(), 2);
        }
    }
}
