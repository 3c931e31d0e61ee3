//! What a stranger gets wrong: backends that do it by themselves, and a call that does not ask for
//! the neighbours.
#![expect(unsafe_code, reason = "answers for what the checker is to notice")]

use memory_set::{MappingBackend, MappingResult};
use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::flush_tlb_mm;
use mmu_tests::PaperKernel;
use x86_64::VirtAddr;
use x86_64::structures::paging::mapper::CleanUp;
use x86_64::structures::paging::{FrameDeallocator, Mapper, Page, PageTableFlags, PhysFrame, Size4KiB};

use crate::glue::{AddressSpace, Backed, Pending};

/// When the backend flushes, which frees pages and tables where it clears their entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flush {
    AfterFreeing,
    Never,
}

/// The backend that many kernels have: unmap a page, free its frame; then free empty tables.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hasty<'k> {
    pub(crate) right: Backed<'k>,
    pub(crate) flush: Flush,
}

struct FreeTables<'k>(&'k PaperKernel);

impl FrameDeallocator<Size4KiB> for FreeTables<'_> {
    unsafe fn deallocate_frame(&mut self, table: PhysFrame) {
        self.0.free_one_table(table);
    }
}

impl<'k> MappingBackend for Hasty<'k> {
    type Addr = usize;
    type Flags = PageTableFlags;
    type PageTable = Pending<'k>;

    fn map(&self, start: usize, size: usize, flags: PageTableFlags, pending: &mut Pending<'k>) -> bool {
        self.right.map(start, size, flags, pending)
    }

    fn unmap(&self, start: usize, size: usize, _: &mut Pending<'k>) -> bool {
        let (kernel, mut mapper) = (self.right.kernel, self.right.mapper());
        let page_at = |address: usize| Page::containing_address(VirtAddr::new(address as u64));
        for address in (start..start + size).step_by(4096) {
            let page: Page<Size4KiB> = page_at(address);
            let Ok((frame, flush)) = mapper.unmap(page) else { return false };
            kernel.ledger().remove_rmap(frame);
            kernel.release(frame, 1);
            flush.ignore();
        }
        let all = Page::range_inclusive(page_at(start), page_at(start + size - 4096));
        // SAFETY: nothing is used again; the checker says what was wrong.
        unsafe { mapper.clean_up_addr_range(all, &mut FreeTables(kernel)) };
        if self.flush == Flush::AfterFreeing {
            let _flushed = flush_tlb_mm(kernel, self.right.mm.context());
        }
        true
    }

    fn protect(&self, start: usize, size: usize, flags: PageTableFlags, pending: &mut Pending<'k>) -> bool {
        self.right.protect(start, size, flags, pending)
    }
}

/// munmap as in the glue, but that it takes the areas for the only ones there are.
pub(crate) fn unmap_as_if_alone(space: &AddressSpace<'_>, range: VirtRange) -> MappingResult {
    let (start, end) = (range.start(), range.end());
    let [start, end] = [start, end].map(|at| usize::try_from(at).expect("x86_64 has 64-bit addresses"));
    let mut areas = space.areas.write();
    let mut pending = Pending::new(space.kernel, space.mm);
    let result = areas.unmap(start, end - start, &mut pending);
    let flushed = pending.flush([], range);
    drop(areas);
    flushed.free();
    result
}
