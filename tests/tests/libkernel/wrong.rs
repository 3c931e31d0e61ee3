//! What a stranger gets wrong: an address space that does it by itself, and a call that does not
//! ask for the neighbours.
#![expect(unsafe_code, reason = "answers for what the checker is to notice")]

use libkernel::error::Result;
use libkernel::memory::address::VA;
use libkernel::memory::address_space::{PageInfo, UserAddressSpace};
use libkernel::memory::page::PageFrame;
use libkernel::memory::paging::permissions::PtePermissions;
use libkernel::memory::region::VirtMemoryRegion;
use mmu_gather::pagetable::{Level, VirtRange};
use mmu_gather::tlb::flush_tlb_mm;
use x86_64::structures::paging::PhysFrame;

use crate::glue::{Process, Space};
use crate::world::region;

/// When the address space flushes, which frees pages where it clears their entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flush {
    AfterFreeing,
    Never,
}

/// An address space without a gather: clear an entry, free the page.
#[derive(Debug)]
pub(crate) struct Hasty {
    pub(crate) right: Space,
    pub(crate) flush: Flush,
}

impl UserAddressSpace for Hasty {
    fn new() -> Result<Self> {
        Ok(Self { right: Space::new()?, flush: Flush::AfterFreeing })
    }

    fn activate(&self) {
        self.right.activate();
    }

    fn deactivate(&self) {
        self.right.deactivate();
    }

    fn map_page(&mut self, page: PageFrame, va: VA, perms: PtePermissions) -> Result<()> {
        self.right.map_page(page, va, perms)
    }

    fn unmap(&mut self, va: VA) -> Result<PageFrame> {
        self.right.unmap(va)
    }

    fn remap(&mut self, va: VA, new_page: PageFrame, perms: PtePermissions) -> Result<PageFrame> {
        self.right.remap(va, new_page, perms)
    }

    fn protect_range(&mut self, region: VirtMemoryRegion, perms: PtePermissions) -> Result<()> {
        self.right.protect_range(region, perms)
    }

    fn unmap_range(&mut self, region: VirtMemoryRegion) -> Result<Vec<PageFrame>> {
        self.right.with(|kernel, mm| {
            for address in region.iter_pages().map(|va| va.value() as u64) {
                let Some(table) = kernel.find_table(mm, address, Level::Pte) else { continue };
                let locked = table.lock(kernel);
                // SAFETY: none; the checker says what is wrong.
                let old = unsafe { locked.entry(address).get_and_clear() };
                drop(locked);
                if old.is_present() {
                    let frame = PhysFrame::containing_address(old.leaf_address(Level::Pte));
                    kernel.ledger().remove_rmap(frame);
                    kernel.release(frame, 1);
                }
            }
            if self.flush == Flush::AfterFreeing {
                let _flushed = flush_tlb_mm(kernel, mm.context());
            }
        });
        Ok(Vec::new())
    }

    fn translate(&self, va: VA) -> Option<PageInfo> {
        self.right.translate(va)
    }

    fn protect_and_clone_region(
        &mut self,
        region: VirtMemoryRegion,
        other: &mut Self,
        perms: PtePermissions,
    ) -> Result<()> {
        self.right.protect_and_clone_region(region, &mut other.right, perms)
    }
}

/// munmap as in the glue, but that it takes the areas for the only ones there are.
pub(crate) fn unmap_as_if_alone(process: &Process, range: VirtRange) -> Result<()> {
    let mut map = process.map.write();
    map.munmap(region(range))?;
    map.address_space_mut().with(|kernel, mm| {
        let mut gather = kernel.gather(mm);
        // SAFETY: none; the checker says what is wrong.
        unsafe { gather.free_pgtables_in_gaps([], range) };
        gather.flush().free();
    });
    Ok(())
}
