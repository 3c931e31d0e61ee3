//! The unsafe calls of a gather, made safe: the kernel on paper has one thread, which is as good as
//! the map lock.
#![expect(unsafe_code, reason = "answers for what the test does")]

use mmu_gather::pagetable::{Bounds, Level, MapError, VirtRange};
use mmu_gather::{MmuGather, SplitError, Vma};
use x86_64::structures::paging::PhysFrame;

use crate::kernel::PaperKernel;
use crate::platform::Backing;

/// The unsafe calls of a gather, for tests that may not use `unsafe`.
pub trait GatherOnPaper {
    /// As [`MmuGather::remove_page`]; the test cleared the entry, or there never was one.
    fn queue_page(&mut self, frame: PhysFrame, cleared: VirtRange, level: Level);
    /// As [`MmuGather::remove_pages`], likewise.
    fn queue_run(&mut self, frame: PhysFrame, nr_pages: u32, cleared: VirtRange);
    /// As [`MmuGather::free_pgtables`]; the test names the areas.
    fn unhook_tables(&mut self, vmas: impl IntoIterator<Item = Vma<Backing>>, bounds: Bounds);
    /// As [`MmuGather::free_empty_tables`].
    fn unhook_empty_tables(&mut self, range: VirtRange);
    /// As [`MmuGather::free_pgtables_in_gaps`]; the test names the areas that stay.
    fn unhook_tables_in_gaps(&mut self, areas: impl IntoIterator<Item = VirtRange>, range: VirtRange);
    /// As [`MmuGather::split_leaf`].
    ///
    /// # Errors
    /// As there.
    fn split(&mut self, area: Backing, address: u64) -> Result<(), SplitError>;
    /// As [`MmuGather::move_page_tables`].
    ///
    /// # Errors
    /// As there.
    fn move_pages(&mut self, old: VirtRange, new_start: u64) -> Result<(), MapError>;
}

impl GatherOnPaper for MmuGather<'_, '_, PaperKernel> {
    fn queue_page(&mut self, frame: PhysFrame, cleared: VirtRange, level: Level) {
        // SAFETY: the ledger counts the reference, and notices one that is dropped twice or too
        // early.
        unsafe { self.remove_page(frame, cleared, level) };
    }

    fn queue_run(&mut self, frame: PhysFrame, nr_pages: u32, cleared: VirtRange) {
        // SAFETY: as in `queue_page`.
        unsafe { self.remove_pages(frame, nr_pages, cleared) };
    }

    fn unhook_tables(&mut self, vmas: impl IntoIterator<Item = Vma<Backing>>, bounds: Bounds) {
        // SAFETY: one thread: nobody faults. Where a test names areas that are not gone, the
        // checker says so.
        unsafe { self.free_pgtables(vmas, bounds) };
    }

    fn unhook_empty_tables(&mut self, range: VirtRange) {
        // SAFETY: one thread stands in for the map lock.
        unsafe { self.free_empty_tables(range) };
    }

    fn unhook_tables_in_gaps(&mut self, areas: impl IntoIterator<Item = VirtRange>, range: VirtRange) {
        // SAFETY: as in `unhook_tables`.
        unsafe { self.free_pgtables_in_gaps(areas, range) };
    }

    fn split(&mut self, area: Backing, address: u64) -> Result<(), SplitError> {
        // SAFETY: one thread stands in for the map lock.
        unsafe { self.split_leaf(area, address) }
    }

    fn move_pages(&mut self, old: VirtRange, new_start: u64) -> Result<(), MapError> {
        // SAFETY: as in `split`.
        unsafe { self.move_page_tables(old, new_start) }
    }
}
