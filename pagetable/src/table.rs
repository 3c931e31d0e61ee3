//! One table page: 512 entries, a lock, and the memory they live in.
#![expect(unsafe_code, reason = "the one place where a frame number becomes a table")]

use core::fmt;

use spin::RelaxStrategy;
use spin::mutex::{SpinMutex, SpinMutexGuard};
use static_assertions::const_assert_eq;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::entry::{Entry, EntryValue};
use crate::level::Level;
use crate::range::VirtRange;

/// A table page in the hardware's format.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct Table {
    entries: [Entry; 512],
}

const_assert_eq!(size_of::<Table>(), size_of::<PageTable>());
const_assert_eq!(align_of::<Table>(), align_of::<PageTable>());

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

    /// Whether all 512 entries are none now. Final only while the lock is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.iter().all(|entry| entry.load().is_none())
    }
}

/// The lock of one table page. Guards the entries of that page against other software, never against hardware.
///
/// `R` decides what a waiting CPU does; it must keep answering flush requests, or two CPUs that wait for each other
/// stop for ever. Linux: `ptlock_ptr`.
#[doc(alias = "ptlock")]
pub type TableLock<R> = SpinMutex<(), R>;

/// Where table pages live: what a kernel supplies to this crate.
///
/// The pointer to a frame comes from the `x86_64` crate's own [`PageTableFrameMapping`], so an implementation that
/// exists for `MappedPageTable` serves unchanged. Its `FrameAllocator` is not used: it takes `&mut self`, and several
/// CPUs allocate at once.
///
/// # Safety
/// - `frame_to_pointer` of a frame that `allocate_table` returned, or of a root, points to that frame's 4096 bytes,
///   readable and writable, for as long as the frame is a table; no Rust reference other than `&Table` to it exists.
/// - `allocate_table` returns a frame that nobody else uses and that reads as zero.
/// - `table_lock` returns the same lock for the same frame until the frame is freed, and locks of tables on one path
///   from a root are distinct.
pub unsafe trait TableMemory: PageTableFrameMapping {
    /// What a CPU does while it waits for a table lock.
    type Relax: RelaxStrategy;

    /// The lock of the table in `frame`.
    fn table_lock(&self, frame: PhysFrame) -> &TableLock<Self::Relax>;

    /// A zeroed frame for a new table; `None` when memory is short.
    ///
    /// # Context
    /// No table lock is held. May sleep if the caller of the mapping function may.
    fn allocate_table(&self) -> Option<PhysFrame>;

    /// Takes back pages that were tables, or were meant to become tables.
    ///
    /// The engine calls this only for pages that no CPU can reach any more: never linked, or unhooked and flushed
    /// everywhere, lazy CPUs included. A kernel whose own software walks tables without a lock (Linux: gup_fast) must
    /// still wait for those walkers, say by handing the pages to RCU here.
    ///
    /// # Context
    /// No table lock is held.
    fn free_tables(&self, tables: &[PhysFrame]);
}

/// A borrowed view of one table: its entries, where it is, and its level.
///
/// Holding one proves that the page was a table of this level when the view was made. It proves nothing about its
/// entries: without the lock they may change between any two reads.
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
    /// - `frame` holds a table of `level` that came from `memory` (or is the root of an address space in it);
    /// - it is not freed while the view is used: the caller's lock (Linux: mmap_lock) keeps `free_range` away, or the
    ///   caller is the one who frees it.
    #[must_use]
    #[inline]
    pub unsafe fn new<M: PageTableFrameMapping>(memory: &'m M, frame: PhysFrame, level: Level) -> Self {
        let pointer = memory.frame_to_pointer(frame).cast::<Table>();
        // SAFETY: by the contract of `TableMemory` (first item) the pointer is valid and aligned while the frame is a
        // table, which the caller promises for the life of the view. `Table` has the size and alignment of
        // `PageTable` (asserted above) and is only read and written through atomics, so sharing it is sound.
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

    /// The entries that `range` selects, which lies inside the span of the table; those it covers in part are among them.
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

    /// The table that the entry for `address` points to, if it points to one.
    ///
    /// # Safety
    /// As for [`TableView::new`]: nobody frees that table while the view is used.
    #[must_use]
    #[inline]
    pub unsafe fn child<M: PageTableFrameMapping>(&self, memory: &'m M, address: u64) -> Option<Self> {
        let below = self.level.below()?;
        let frame = self.load(address).as_table(self.level)?;
        // SAFETY: a present, non-leaf entry of a live table points to a live table of the level below (P2); the
        // caller keeps it alive.
        Some(unsafe { Self::new(memory, frame, below) })
    }

    /// Takes the table's lock.
    ///
    /// # Context
    /// Spins. Never taken while a lock of the same or a lower level is held.
    #[inline]
    pub fn lock<M: TableMemory>(&self, memory: &'m M) -> LockedTable<'m, M::Relax> {
        LockedTable { view: *self, _guard: memory.table_lock(self.frame).lock() }
    }

    /// Takes the table's lock if nobody holds it.
    pub fn try_lock<M: TableMemory>(&self, memory: &'m M) -> Option<LockedTable<'m, M::Relax>> {
        Some(LockedTable { view: *self, _guard: memory.table_lock(self.frame).try_lock()? })
    }
}

impl fmt::Debug for TableView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} table at {:#x}", self.level, self.frame.start_address())
    }
}

/// A table whose lock is held: the proof that no other software changes its entries. Hardware still may set A/D.
pub struct LockedTable<'m, R> {
    view: TableView<'m>,
    _guard: SpinMutexGuard<'m, (), R>,
}

impl<'m, R> LockedTable<'m, R> {
    /// The table without the proof.
    #[must_use]
    #[inline]
    pub const fn view(&self) -> TableView<'m> {
        self.view
    }

    /// The entry that `address` selects.
    #[must_use]
    #[inline]
    pub fn entry(&self, address: u64) -> &'m Entry {
        self.view.table.entry(self.view.level.index(address))
    }

    /// The entries that `range` selects; see [`TableView::entries`].
    ///
    /// # Panics
    /// If `range` reaches beyond the table.
    #[must_use]
    #[inline]
    pub fn entries(&self, range: VirtRange) -> &'m [Entry] {
        self.view.entries(range)
    }
}

impl<R> fmt::Debug for LockedTable<'_, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "locked {:?}", self.view)
    }
}
