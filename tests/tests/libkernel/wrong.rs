//! What a stranger gets wrong: address spaces that take pages and tables down by themselves.
#![expect(unsafe_code, reason = "answers for what the checker is to notice")]

use core::marker::PhantomData;

use libkernel::error::Result;
use libkernel::memory::address::VA;
use libkernel::memory::address_space::{PageInfo, UserAddressSpace};
use libkernel::memory::page::PageFrame;
use libkernel::memory::paging::permissions::PtePermissions;
use libkernel::memory::region::VirtMemoryRegion;
use mmu_gather::MmuGather;
use mmu_gather::pagetable::{Level, VirtRange};
use mmu_gather::tlb::flush_tlb_mm;
use mmu_tests::counted;
use x86_64::structures::paging::PhysFrame;

use crate::glue::{Space, range_of};

/// How an address space unmaps.
pub(crate) trait Unmap: 'static {
    fn unmap(space: &Space, range: VirtRange);
}

/// Clear an entry, free the page; then flush.
pub(crate) struct FreedBeforeFlush;

/// The same, and nobody flushes.
pub(crate) struct NeverFlushed;

/// A gather, which takes what is unmapped for all there is.
pub(crate) struct NeighboursForgotten;

/// An address space that unmaps in this way.
pub(crate) struct Wrong<U> {
    right: Space,
    // It is `Send` and `Sync`, whatever `U` is.
    unmap: PhantomData<fn() -> U>,
}

impl<U> AsMut<Space> for Wrong<U> {
    fn as_mut(&mut self) -> &mut Space {
        &mut self.right
    }
}

impl<U: Unmap> UserAddressSpace for Wrong<U> {
    fn new() -> Result<Self> {
        Ok(Self { right: Space::new()?, unmap: PhantomData })
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
        U::unmap(&self.right, range_of(region));
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

impl Unmap for FreedBeforeFlush {
    fn unmap(space: &Space, range: VirtRange) {
        free_at_once(space, range);
        let _flushed = flush_tlb_mm(&*space.kernel, space.mm.context());
    }
}

impl Unmap for NeverFlushed {
    fn unmap(space: &Space, range: VirtRange) {
        free_at_once(space, range);
    }
}

impl Unmap for NeighboursForgotten {
    fn unmap(space: &Space, range: VirtRange) {
        // SAFETY: the map lock is held.
        let mut gather = unsafe { MmuGather::new(&*space.kernel, &space.mm) };
        gather.zap_vma_range(&counted(range), range).expect("no page is large");
        // SAFETY: none; the kit says what is wrong.
        unsafe { gather.free_pgtables_in_gaps([], range) };
        gather.flush().free();
    }
}

fn free_at_once(space: &Space, range: VirtRange) {
    for address in (range.start()..range.end()).step_by(4096) {
        // SAFETY: the map lock keeps the tables.
        let table = unsafe { space.mm.space().find_table(&*space.kernel, address, Level::Pte) };
        let Some(locked) = table.map(|table| table.lock(&*space.kernel)) else { continue };
        // SAFETY: none; the kit says what is wrong.
        let old = unsafe { locked.entry(address).get_and_clear() };
        drop(locked);
        if old.is_present() {
            space.kernel.remove_mapping(PhysFrame::containing_address(old.leaf_address(Level::Pte)));
        }
    }
}
