//! An address space as paging structures: a root, and how many tables are linked below it.

use core::sync::atomic::{AtomicU64, Ordering};

use x86_64::structures::paging::PhysFrame;

use crate::level::{Level, PagingMode};
use crate::memory::TableMemory;
use crate::range::VirtRange;
use crate::table::TableView;

/// A root table and the count of the tables linked below it.
///
/// It has no lock of its own. Each table has one (Linux: split page-table locks), and the
/// embedder's map lock (Linux: mmap_lock) decides who may walk while tables are unhooked.
///
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/doc/memory.rs"));
/// # fn main() {
/// use mmu_pagetable::{AddressSpace, Bounds, EntryValue, Level, PagingMode, VirtRange};
/// use x86_64::structures::paging::PageTableFlags;
///
/// // `Memory` is the example of `TableMemory`. One thread uses it, and no CPU loads its tables.
/// let memory = Memory::new();
/// let root = memory.allocate_table().expect("a frame");
/// // SAFETY: the root is zeroed, belongs to no other address space, and is never freed.
/// let space = unsafe { AddressSpace::new(root, PagingMode::FourLevel) };
///
/// let leaf = EntryValue::leaf(Level::Pte, PhysAddr::new(0x5000), PageTableFlags::WRITABLE);
/// // SAFETY: nobody frees tables meanwhile, and no program uses the page.
/// unsafe { space.map(&memory, 0x40_0000, Level::Pte, leaf) }.expect("frames for three tables");
/// // SAFETY: nobody frees tables meanwhile.
/// let found = unsafe { space.lookup(&memory, 0x40_0123) };
/// assert_eq!(found.translate(0x40_0123), Some(PhysAddr::new(0x5123)));
///
/// // Teardown: clear the entry, then unhook its table and those above it, lowest level first.
/// // SAFETY: nobody frees tables meanwhile.
/// let table = unsafe { space.find_table(&memory, 0x40_0000, Level::Pte) }.expect("linked above");
/// // SAFETY: no CPU has the page cached.
/// let _old = unsafe { table.lock(&memory).entry(0x40_0000).get_and_clear() };
/// let range = VirtRange::new(0x40_0000, 0x40_1000).expect("a page");
/// let mut levels = Vec::new();
/// // SAFETY: nobody else walks, and the tables are not used again.
/// unsafe {
///     space.unhook_tables(&memory, range, Bounds::whole(), |table| levels.push(table.level()));
/// }
/// assert_eq!(levels, [Level::Pte, Level::Pmd, Level::Pud]);
/// # }
/// ```
#[derive(Debug)]
pub struct AddressSpace {
    root: PhysFrame,
    mode: PagingMode,
    /// Tables linked, by level of the table: PTE, PMD, PUD, P4D. Linux keeps nr_ptes, nr_pmds and
    /// nr_puds in one counter.
    linked: [AtomicU64; 4],
}

impl AddressSpace {
    /// An address space whose root table is the zeroed frame `root`, or one whose upper half is
    /// already filled in.
    ///
    /// For a root below which tables are linked already there is
    /// [`adopt`](Self::adopt).
    ///
    /// # Safety
    /// - `root` holds a table of the mode's root level, whose lower half is empty, in the memory
    ///   that every later call is given;
    /// - `root` is the root of no other address space;
    /// - the frame stays a table until the address space is dropped and every CPU has left it.
    #[must_use]
    #[expect(unsafe_code, reason = "a frame number is taken on trust")]
    pub const unsafe fn new(root: PhysFrame, mode: PagingMode) -> Self {
        Self { root, mode, linked: [const { AtomicU64::new(0) }; 4] }
    }

    /// The frame of the root table, which CR3 holds.
    #[must_use]
    #[inline]
    pub const fn root(&self) -> PhysFrame {
        self.root
    }

    /// How many levels there are.
    #[must_use]
    #[inline]
    pub const fn mode(&self) -> PagingMode {
        self.mode
    }

    /// All addresses a program may use, page zero included.
    ///
    /// # Panics
    /// Never: the range is not empty in either mode.
    #[must_use]
    #[inline]
    pub const fn user_range(&self) -> VirtRange {
        match VirtRange::new(0, self.mode.user_end()) {
            Ok(range) => range,
            Err(_) => panic!("user space is not empty"),
        }
    }

    /// How many tables of `level` are linked now, the root not counted. Linux: mm_pgtables_bytes.
    #[doc(alias = "mm_pgtables_bytes")]
    #[must_use]
    pub fn nr_tables(&self, level: Level) -> u64 {
        self.counter(level).map_or(0, |counter| counted(counter.load(Ordering::Relaxed)))
    }

    /// Counts `tables` tables of `level` that somebody else has linked below the root, such as the
    /// `x86_64` crate's mapper ([`MapperTables`](crate::adapters::MapperTables) finds the levels).
    ///
    /// The engine counts what it links and unhooks itself. If it unhooks more than were counted, a
    /// debug build says so; a release build goes on from zero.
    pub fn note_linked(&self, level: Level, tables: u64) {
        if let Some(counter) = self.counter(level) {
            counter.fetch_add(tables, Ordering::Relaxed);
        }
    }

    /// The root table.
    ///
    /// # Safety
    /// Every table that the caller reaches from here stays a table while the view is used. Either
    /// the caller holds the embedder's map lock, for reading at least, and stays inside areas that
    /// are mapped; or the caller is the one who frees the tables.
    #[must_use]
    #[inline]
    #[expect(unsafe_code, reason = "hands out a view of the root")]
    pub unsafe fn root_table<'m, M: TableMemory>(&self, memory: &'m M) -> TableView<'m> {
        // SAFETY: `new`'s caller promised that the root is a table of this level; the lifetime is
        // our caller's promise.
        unsafe { TableView::new(memory, self.root, self.mode.root_level()) }
    }

    pub(crate) fn count_linked(&self, level: Level) {
        self.note_linked(level, 1);
    }

    #[inline]
    pub(crate) fn count_unhooked(&self, level: Level, tables: u64) {
        if let Some(counter) = self.counter(level) {
            let before = counter.fetch_sub(tables, Ordering::Relaxed);
            if is_below_zero(before.wrapping_sub(tables)) {
                linked_by_others(counter, level, before, tables);
            }
        }
    }

    fn counter(&self, level: Level) -> Option<&AtomicU64> {
        match level {
            Level::Pte => Some(&self.linked[0]),
            Level::Pmd => Some(&self.linked[1]),
            Level::Pud => Some(&self.linked[2]),
            Level::P4d => Some(&self.linked[3]),
            Level::Pgd => None,
        }
    }
}

/// Whether a count went below zero.
const fn is_below_zero(count: u64) -> bool {
    count > u64::MAX / 2
}

/// A count that may be below zero for a moment.
const fn counted(count: u64) -> u64 {
    if is_below_zero(count) { 0 } else { count }
}

/// `tables` tables were taken off a count that was `before`, and less: it goes back to zero.
#[cold]
#[inline(never)]
fn linked_by_others(counter: &AtomicU64, level: Level, before: u64, tables: u64) {
    let before = counted(before);
    counter.fetch_add(tables - before, Ordering::Relaxed);
    debug_assert!(
        false,
        "{tables} {level:?} tables were unhooked where {before} were counted: others have linked tables here, \
        which `AddressSpace::note_linked` or `MapperTables` is to be told of, or `AddressSpace::adopt` counts"
    );
}
