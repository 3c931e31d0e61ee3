//! What a kernel supplies about its pages; and the three traits taken together.
#![expect(unsafe_code, reason = "a batch page is taken on trust")]

use core::ptr::NonNull;

use mmu_pagetable::{EntryValue, Level, NonPresent, TableMemory, VirtRange};
use x86_64::structures::paging::PhysFrame;

use crate::levels::flush_tlb::FlushTlb;
use crate::queue::freed_pages::FreedPages;

/// Everything a kernel supplies. It is implemented for every type that implements the three traits,
/// and adds nothing to them. [`FlushTlb`] comes with [`Cpus`](mmu_tlb::Cpus), or is the kernel's
/// own.
pub trait Platform: TableMemory + FlushTlb + Pages {}

impl<K: TableMemory + FlushTlb + Pages> Platform for K {}

/// One mapped area, as far as the engine needs to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vma<A> {
    /// The addresses.
    pub range: VirtRange,
    /// Who owns the frames behind it.
    pub kind: VmaKind,
    /// The embedder's own word for the area, handed back with every page.
    pub area: A,
}

/// Who decides when the frames behind an area may be used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmaKind {
    /// Pages with counts, released through the gather.
    Normal,
    /// Frames without counts, or frames whose counts do not decide, such as a device's. Nothing is
    /// queued, yet the translations must be gone before the area can no longer be found, for from
    /// then on the owner frees the frames without asking (CVE-2022-39188). Linux: VM_PFNMAP,
    /// VM_MIXEDMAP.
    PfnMap,
}

/// A leaf that was just cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnmappedLeaf {
    /// The first address it mapped.
    pub address: u64,
    /// Level of the table it was in: 4 KiB, 2 MiB or 1 GiB.
    pub level: Level,
    /// What the entry held at the instant it was cleared. Its A/D bits are final. (Until the flush,
    /// CPUs that have cached it as writable and dirty may still write to the page.)
    pub value: EntryValue,
    /// The frame it mapped, or the first of its frames.
    pub frame: PhysFrame,
}

/// What becomes of the page of a cleared leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// It has no page with counts (the zero page, a device's frame): it is flushed for, and nothing
    /// is freed.
    Keep,
    /// The page comes back through [`free_pages`](Pages::free_pages) after the flush.
    Free,
    /// As [`Free`](Self::Free), and the page comes back through
    /// [`remove_rmaps`](Pages::remove_rmaps) before that. This is for a dirty page of a file, whose
    /// mapcount must not reach zero while another CPU may still write through an old entry. It
    /// forces a flush before the table lock is dropped.
    FreeAfterRmap,
}

/// What becomes of an entry that was not present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is cleared. No flush is needed for it.
    Clear,
    /// It is kept as it is; its table is then not empty.
    Keep,
}

/// A page of memory lent to a gather for one batch.
#[derive(Debug)]
pub struct BatchPage(NonNull<[u8; 4096]>);

impl BatchPage {
    /// Lends the page at `page`.
    ///
    /// # Safety
    /// The 4096 bytes at `page` are aligned to 8 bytes, writable, and used by nobody else until the
    /// page is given back.
    ///
    /// # Panics
    /// In a debug build, if `page` is not aligned.
    #[must_use]
    #[inline]
    pub unsafe fn new(page: NonNull<[u8; 4096]>) -> Self {
        debug_assert!(page.cast::<u64>().is_aligned(), "a batch page at {page:p} is not aligned to 8 bytes");
        Self(page)
    }

    /// Where the page is, so that it can be given back to where it came from.
    #[must_use]
    pub const fn into_inner(self) -> NonNull<[u8; 4096]> {
        self.0
    }
}

/// What a kernel supplies about unmapping and freeing its pages.
///
/// Everything but `unmap_page` and `unmap_non_present` is called for a batch at a time. What is
/// provided is correct for a kernel whose entries hold one reference each, and slow.
pub trait Pages {
    /// What the kernel attaches to an area: a reference to its own VMA, or nothing.
    type Area: Copy;

    /// The leaf was cleared: accounts for it (rmap, mapcount, dirty, accessed, rss) and says what
    /// becomes of the page.
    ///
    /// Other CPUs may still read and write the page through old entries.
    ///
    /// # Context
    /// The table's lock is held. It is called once for each leaf, and inlined. It must not free the
    /// page. Unless overridden it answers [`Free`](Disposition::Free): each leaf held one reference
    /// on its page.
    #[inline]
    fn unmap_page(&self, _area: Self::Area, _leaf: &UnmappedLeaf) -> Disposition {
        Disposition::Free
    }

    /// Releases references on pages: nothing can reach them through this address space any more.
    ///
    /// # Context
    /// No table lock is held. Between two calls of [`cond_resched`](Self::cond_resched) there come
    /// at most [`free_chunk`](crate::Limits::free_chunk) pages, or one run of more.
    fn free_pages(&self, pages: FreedPages<'_>);

    /// A page for a batch, at once or not at all. `None` is no error: the gather flushes sooner
    /// then. Unless overridden there is never one: a gather then flushes every seven pages, and
    /// every second table.
    ///
    /// # Context
    /// A table lock is held: it must not sleep, nor wait for another CPU (Linux: GFP_NOWAIT).
    #[inline]
    fn allocate_batch(&self) -> Option<BatchPage> {
        None
    }

    /// Takes back a page from [`allocate_batch`](Self::allocate_batch).
    ///
    /// # Panics
    /// In a debug build, unless overridden: pages that are lent and not taken back would leak.
    #[inline]
    fn free_batch(&self, page: BatchPage) {
        debug_assert!(false, "{page:?} was lent by allocate_batch, and this kernel has no free_batch");
    }

    /// Takes away the mapcount of pages for which [`unmap_page`](Self::unmap_page) answered
    /// [`FreeAfterRmap`](Disposition::FreeAfterRmap): the flush has completed.
    ///
    /// # Context
    /// The lock of the table that mapped them is still held.
    fn remove_rmaps(&self, _pages: FreedPages<'_>) {}

    /// Accounts for an entry that is neither present nor empty, and says whether it is cleared.
    ///
    /// # Context
    /// The table's lock is held.
    fn unmap_non_present(&self, _area: Self::Area, _address: u64, _level: Level, _entry: NonPresent) -> Fate {
        Fate::Clear
    }

    /// A large leaf was replaced by a table of 512 smaller ones that map the same memory: spreads
    /// its counts over them. It is also called for a migration entry in the place of a large leaf;
    /// the value is then not present.
    ///
    /// # Context
    /// The lock of the table that held the leaf is held; for a migration entry, the map lock alone,
    /// for writing.
    fn leaf_was_split(&self, _area: Self::Area, _leaf: &UnmappedLeaf) {}

    /// A good moment to run something else.
    ///
    /// # Context
    /// No table lock is held. The caller's map lock is, except while a flushed gather is freed.
    fn cond_resched(&self) {}

    /// Called around the count of open gathers: after it went up, between the look at it and the
    /// look at what is owed, and before it goes down. A kernel does nothing here; whoever tests one
    /// lets other CPUs run.
    ///
    /// # Context
    /// A table lock may be held.
    #[inline(always)]
    fn between_gather_steps(&self) {}

    /// Counts an event. It is not called for each page.
    fn observe_gather(&self, _event: GatherEvent) {}
}

/// Something worth counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GatherEvent {
    /// A batch page was taken.
    BatchTaken,
    /// A batch page was wanted and could not be had.
    BatchRefused,
    /// The gather was full, and flushed before the unmapping was done.
    ForcedFlush,
    /// Dirty pages, or pages that were moved, made the gather flush under a table lock.
    DirtyFlush,
    /// Another gather was open on the same address space: all of that was flushed.
    NestedFlush,
    /// When a table was locked, reclaim had cleared entries and not flushed yet: the next flush is
    /// of the whole address space.
    DeferredFlushSeen,
    /// A table lock was dropped after this many leaves had been cleared under it.
    LockDropped {
        /// Leaves cleared.
        leaves: u32,
    },
    /// A table of this level was unhooked.
    TableUnhooked(Level),
    /// No table batch page could be had: one table was flushed for and freed alone.
    TableFallback,
    /// A flush completed, and this much was freed.
    Released {
        /// Slots that the pages took: one a page, two a run.
        slots: u64,
        /// Tables.
        tables: u64,
    },
}
