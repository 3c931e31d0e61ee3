//! Pages handed back to the caller, not to the kernel's own allocator.
#![expect(unsafe_code, reason = "passes on what the kernel promises")]

use core::fmt;

use mmu_pagetable::{Level, NonPresent, TableMemory, UsedLines};
use mmu_tlb::{FreedTables, PageSpan};
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::levels::flush_tlb::FlushTlb;
use crate::platform::{BatchPage, Disposition, Fate, GatherEvent, Pages, Platform, UnmappedLeaf};
use crate::queue::freed_pages::FreedPages;

/// A kernel, but for the pages that one call unmaps: those go to a closure, and not to
/// [`Pages::free_pages`].
///
/// For kernels whose layers hand frames back to their caller. All pages of the gather go there,
/// also those of flushes in the middle, when it is full, and those of a gather that is dropped.
/// Tables and batch pages go to the kernel.
///
/// # Examples
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/small_kernel/machine.rs"));
/// use mmu_gather::{FreeWith, zap_page_range};
///
/// # fn main() -> Result<(), CutLeaf> {
/// # let kernel = Kernel::new();
/// # let mm = kernel.new_mm();
/// # let vma = area(0x1000, 0x5000);
/// # kernel.map(&mm, vma.range);
/// let handed_back = RefCell::new(Vec::new());
/// let collector = FreeWith::new(&kernel, |pages: FreedPages<'_>| {
///     handed_back.borrow_mut().extend(pages.iter());
/// });
/// // SAFETY: this thread alone unmaps, and `mm` is an address space of `kernel`.
/// unsafe { zap_page_range(&collector, &mm, &Limits::DEFAULT, &vma, vma.range) }?.free();
/// assert_eq!(handed_back.borrow().len(), 4);
/// assert_eq!(kernel.freed_pages.get(), 0, "the kernel did not free them");
/// # Ok(())
/// # }
/// ```
pub struct FreeWith<'k, K, F> {
    kernel: &'k K,
    free: F,
}

impl<'k, K: Platform, F: Fn(FreedPages<'_>)> FreeWith<'k, K, F> {
    /// `kernel`, whose pages go to `free` for as long as gathers are begun with this.
    #[must_use]
    pub const fn new(kernel: &'k K, free: F) -> Self {
        Self { kernel, free }
    }
}

// SAFETY: the kernel's own.
unsafe impl<K: Platform, F> PageTableFrameMapping for FreeWith<'_, K, F> {
    #[inline]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.kernel.frame_to_pointer(frame)
    }
}

// SAFETY: the kernel's own memory, locks and notes, in every method.
unsafe impl<K: Platform, F> TableMemory for FreeWith<'_, K, F> {
    type Lock = K::Lock;

    #[inline]
    unsafe fn table_lock(&self, frame: PhysFrame) -> &K::Lock {
        // SAFETY: passed on to our caller.
        unsafe { self.kernel.table_lock(frame) }
    }

    #[inline]
    unsafe fn used_lines(&self, frame: PhysFrame) -> Option<&UsedLines> {
        // SAFETY: passed on to our caller.
        unsafe { self.kernel.used_lines(frame) }
    }

    #[inline(always)]
    fn between_look_and_change(&self) {
        self.kernel.between_look_and_change();
    }

    #[inline]
    fn allocate_table(&self) -> Option<PhysFrame> {
        self.kernel.allocate_table()
    }

    #[inline]
    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        // SAFETY: passed on to our caller.
        unsafe { self.kernel.free_tables(tables) };
    }
}

// SAFETY: the kernel's own flush.
unsafe impl<K: Platform, F> FlushTlb for FreeWith<'_, K, F> {
    type Context = K::Context;

    #[inline]
    fn flush_tlb(&self, context: &Self::Context, span: Option<PageSpan>, tables: FreedTables) {
        self.kernel.flush_tlb(context, span, tables);
    }

    #[inline]
    unsafe fn leave_here(&self, context: &Self::Context) {
        // SAFETY: passed on to our caller.
        unsafe { self.kernel.leave_here(context) };
    }

    #[inline]
    unsafe fn leave_everywhere(&self, context: &Self::Context) {
        // SAFETY: passed on to our caller.
        unsafe { self.kernel.leave_everywhere(context) };
    }
}

impl<K: Platform, F: Fn(FreedPages<'_>)> Pages for FreeWith<'_, K, F> {
    type Area = K::Area;

    #[inline]
    fn unmap_page(&self, area: Self::Area, leaf: &UnmappedLeaf) -> Disposition {
        self.kernel.unmap_page(area, leaf)
    }

    #[inline]
    fn free_pages(&self, pages: FreedPages<'_>) {
        (self.free)(pages);
    }

    #[inline]
    fn allocate_batch(&self) -> Option<BatchPage> {
        self.kernel.allocate_batch()
    }

    #[inline]
    fn free_batch(&self, page: BatchPage) {
        self.kernel.free_batch(page);
    }

    #[inline]
    fn remove_rmaps(&self, pages: FreedPages<'_>) {
        self.kernel.remove_rmaps(pages);
    }

    #[inline]
    fn unmap_non_present(&self, area: Self::Area, address: u64, level: Level, entry: NonPresent) -> Fate {
        self.kernel.unmap_non_present(area, address, level, entry)
    }

    #[inline]
    fn leaf_was_split(&self, area: Self::Area, leaf: &UnmappedLeaf) {
        self.kernel.leaf_was_split(area, leaf);
    }

    #[inline]
    fn cond_resched(&self) {
        self.kernel.cond_resched();
    }

    #[inline]
    fn observe_gather(&self, event: GatherEvent) {
        self.kernel.observe_gather(event);
    }
}

impl<K, F> fmt::Debug for FreeWith<'_, K, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FreeWith").finish_non_exhaustive()
    }
}
