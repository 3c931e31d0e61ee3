//! A table whose lock is held, and its entries.
#![expect(unsafe_code, reason = "entries are changed here; locks are asked for")]

use core::fmt;
use core::ops::Range;
use core::ptr;

use crate::entry::{Entry, EntryValue};
use crate::lock::Lock;
use crate::memory::TableMemory;
use crate::range::VirtRange;
use crate::table::{PAST_THE_NOTES, TableView};
use crate::used_lines::{Lines, UsedLines};

/// What holds the lock of a table of `M`.
pub type GuardOf<'m, M> = <<M as TableMemory>::Lock as Lock>::Guard<'m>;

impl<'m> TableView<'m> {
    /// Takes the table's lock.
    ///
    /// # Context
    /// Spins. No table lock is held: whoever needs two calls [`lock_both`](Self::lock_both). Where
    /// each table has a lock of its own, that of a parent may be held, for somebody who comes down
    /// from the root by locks.
    #[inline]
    pub fn lock<M: TableMemory>(&self, memory: &'m M) -> LockedTable<'m, GuardOf<'m, M>> {
        self.under(memory, self.table_lock(memory).lock())
    }

    /// Takes the table's lock if nobody holds it.
    pub fn try_lock<M: TableMemory>(&self, memory: &'m M) -> Option<LockedTable<'m, GuardOf<'m, M>>> {
        Some(self.under(memory, self.table_lock(memory).try_lock()?))
    }

    /// Takes the locks of this table and of `other`, which may be one lock, or one table.
    ///
    /// Two that do this cannot deadlock, whatever the order and whichever tables share a lock: no
    /// lock is waited for while another one is held. If the second lock is not free, the first is
    /// given up until it is.
    ///
    /// # Context
    /// Spins. No table lock is held.
    pub fn lock_both<M: TableMemory>(&self, memory: &'m M, other: Self) -> LockedPair<'m, GuardOf<'m, M>> {
        loop {
            let lock = self.table_lock(memory);
            let guard = lock.lock();
            let other_lock = other.table_lock(memory);
            let other_guard = if ptr::eq(lock, other_lock) {
                None
            } else if let Some(guard) = other_lock.try_lock() {
                Some(guard)
            } else {
                drop(guard);
                // Waits for it, as whoever has nothing else.
                drop(other_lock.lock());
                continue;
            };
            return LockedPair { first: self.under(memory, guard), second: other.under(memory, other_guard) };
        }
    }

    #[inline(always)]
    fn table_lock<M: TableMemory>(&self, memory: &'m M) -> &'m M::Lock {
        // SAFETY: a view is of a live table (contract of `new`), in the one memory there is
        // (contract of `TableMemory`).
        unsafe { memory.table_lock(self.frame()) }
    }

    /// The table, whose lock `guard` holds, or another guard that lives at least as long.
    #[inline(always)]
    fn under<M: TableMemory, G>(&self, memory: &'m M, guard: G) -> LockedTable<'m, G> {
        LockedTable { view: *self, used: self.notes(memory), _guard: guard }
    }
}

/// A table whose lock is held: the proof that no other software changes its entries. Hardware may
/// still set A/D bits.
///
/// `G` is what holds the lock: [`GuardOf`] the memory, for what [`TableView::lock`] returns.
pub struct LockedTable<'m, G> {
    view: TableView<'m>,
    used: Option<&'m UsedLines>,
    _guard: G,
}

impl<'m, G> LockedTable<'m, G> {
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
        self.entry_at(self.view.level().index(address))
    }

    const fn entry_at(&self, index: usize) -> LockedEntry<'_> {
        LockedEntry { entry: self.view.table().entry(index), index, used: self.used }
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
            Lines::ALL.without(used).into_iter().all(|line| self.view.table().line_is_empty(line)),
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
                lines.into_iter().all(|line| self.view.table().line_is_empty(line)),
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
            let empty = noted.filter(|line| self.view.table().line_is_empty(*line));
            used.forget(empty.fold(Lines::EMPTY, Lines::with));
        }
    }
}

/// Two tables whose locks are held, both until this is dropped: they may have one lock.
#[derive(Debug)]
pub struct LockedPair<'m, G> {
    // Fields are dropped in this order: the lock that was taken last goes first, as guards that put
    // interrupts back as they were ask for.
    /// Without a guard, if the first one's is the lock of both.
    second: LockedTable<'m, Option<G>>,
    first: LockedTable<'m, G>,
}

impl<'m, G> LockedPair<'m, G> {
    /// The table that was asked for both.
    #[must_use]
    #[inline]
    pub const fn first(&self) -> &LockedTable<'m, G> {
        &self.first
    }

    /// The other one.
    #[must_use]
    #[inline]
    pub const fn second(&self) -> &LockedTable<'m, Option<G>> {
        &self.second
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

impl<G> fmt::Debug for LockedTable<'_, G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "locked {:?}", self.view)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use core::cell::Cell;
    use core::sync::atomic::AtomicU64;

    use x86_64::PhysAddr;
    use x86_64::structures::paging::mapper::PageTableFrameMapping;
    use x86_64::structures::paging::{PageTable, PhysFrame};

    use super::*;
    use crate::level::Level;
    use crate::lock::TableLock;

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
        type Lock = TableLock<spin::Spin>;

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

    /// Two tables, with locks that keep interrupts off.
    #[derive(Default)]
    struct Interrupts {
        tables: [Words; 2],
        locks: [IrqLock; 2],
    }

    impl Default for Words {
        fn default() -> Self {
            Self([const { AtomicU64::new(0) }; 512])
        }
    }

    std::thread_local! {
        /// Whether interrupts are on.
        static ON: Cell<bool> = const { Cell::new(true) };
    }

    #[derive(Default)]
    struct IrqLock(Cell<bool>);

    /// Puts interrupts back as they were.
    struct IrqGuard<'l>(&'l IrqLock, bool);

    impl Drop for IrqGuard<'_> {
        fn drop(&mut self) {
            self.0.0.set(false);
            ON.set(self.1);
        }
    }

    // SAFETY: one thread uses it.
    unsafe impl Lock for IrqLock {
        type Guard<'a> = IrqGuard<'a>;

        fn lock(&self) -> IrqGuard<'_> {
            self.try_lock().expect("one thread does not wait")
        }

        fn try_lock(&self) -> Option<IrqGuard<'_>> {
            (!self.0.replace(true)).then(|| IrqGuard(self, ON.replace(false)))
        }
    }

    // SAFETY: as for `Memory`.
    unsafe impl PageTableFrameMapping for Interrupts {
        fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
            let number = usize::from(frame.start_address().as_u64() != 0);
            ptr::from_ref(&self.tables[number].0).cast_mut().cast()
        }
    }

    // SAFETY: as for `Memory`.
    unsafe impl TableMemory for Interrupts {
        type Lock = IrqLock;

        unsafe fn table_lock(&self, frame: PhysFrame) -> &IrqLock {
            &self.locks[usize::from(frame.start_address().as_u64() != 0)]
        }

        fn allocate_table(&self) -> Option<PhysFrame> {
            None
        }

        unsafe fn free_tables(&self, _: &[PhysFrame]) {}
    }

    #[test]
    fn of_two_locks_the_one_that_was_taken_last_is_dropped_first() {
        let memory = Interrupts::default();
        let views = [0, 0x5000].map(|address| {
            let frame = PhysFrame::containing_address(PhysAddr::new(address));
            // SAFETY: the memory has a table for this frame, and outlives the view.
            unsafe { TableView::new(&memory, frame, Level::Pte) }
        });
        for [first, second] in [[0, 1], [1, 0], [0, 0]] {
            let both = views[first].lock_both(&memory, views[second]);
            assert!(!ON.get());
            drop(both);
            assert!(ON.get(), "as they were before");
        }
    }
}
