//! Where what waited goes: what the queues ask of a kernel.
#![expect(unsafe_code, reason = "tables are freed on a promise")]

use mmu_pagetable::TableMemory;
use x86_64::structures::paging::PhysFrame;

use crate::platform::{BatchPage, GatherEvent, Pages};
use crate::queue::freed_pages::FreedPages;

/// What takes back pages and tables that were flushed for.
///
/// A kernel that implements [`Pages`] and [`TableMemory`] has this trait by that. One that walks
/// and clears its tables itself implements this trait and not those two, and collects what it
/// unmaps in a [`PageGather`](crate::PageGather).
pub trait Release {
    /// As [`Pages::free_pages`].
    fn release_pages(&self, pages: FreedPages<'_>);

    /// As [`TableMemory::free_tables`].
    ///
    /// # Safety
    /// Each of `tables` was unhooked, every CPU has flushed since, and it is given back once.
    unsafe fn release_tables(&self, tables: &[PhysFrame]);

    /// As [`Pages::allocate_batch`].
    #[inline]
    fn allocate_batch(&self) -> Option<BatchPage> {
        None
    }

    /// As [`Pages::free_batch`].
    #[inline]
    fn free_batch(&self, page: BatchPage) {
        debug_assert!(false, "{page:?} was lent by allocate_batch, and this kernel has no free_batch");
    }

    /// As [`Pages::cond_resched`].
    #[inline]
    fn cond_resched(&self) {}

    /// As [`Pages::observe_gather`].
    #[inline]
    fn observe_gather(&self, _event: GatherEvent) {}
}

impl<K: TableMemory + Pages> Release for K {
    #[inline(always)]
    fn release_pages(&self, pages: FreedPages<'_>) {
        Pages::free_pages(self, pages);
    }

    #[inline(always)]
    unsafe fn release_tables(&self, tables: &[PhysFrame]) {
        // SAFETY: passed on to our caller.
        unsafe { TableMemory::free_tables(self, tables) };
    }

    #[inline(always)]
    fn allocate_batch(&self) -> Option<BatchPage> {
        Pages::allocate_batch(self)
    }

    #[inline(always)]
    fn free_batch(&self, page: BatchPage) {
        Pages::free_batch(self, page);
    }

    #[inline(always)]
    fn cond_resched(&self) {
        Pages::cond_resched(self);
    }

    #[inline(always)]
    fn observe_gather(&self, event: GatherEvent) {
        Pages::observe_gather(self, event);
    }
}
