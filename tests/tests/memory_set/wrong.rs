//! What a stranger gets wrong: backends that take pages and tables down by themselves.
#![expect(unsafe_code, reason = "answers for what the checker is to notice")]

use core::marker::PhantomData;

use memory_set::MappingBackend;
use mmu_gather::MmuGather;
use mmu_gather::pagetable::TableMemory;
use mmu_gather::tlb::flush_tlb_mm;
use mmu_hosted::{Note, UnderMapLock};
use mmu_tests::{HostedPlatform, counted};
use x86_64::VirtAddr;
use x86_64::structures::paging::mapper::CleanUp;
use x86_64::structures::paging::{FrameDeallocator, Mapper, Page, PageTableFlags, PhysFrame, Size4KiB};

use crate::glue::{Backed, Pending, range_of};

/// How a backend unmaps.
pub(crate) trait Unmap: Clone + 'static {
    fn unmap(right: &Backed, start: usize, size: usize);
}

/// Unmap a page, free its frame; then free empty tables; then flush: the backend that many kernels
/// have.
#[derive(Clone, Debug)]
pub(crate) struct FreedBeforeFlush;

/// The same, and nobody flushes.
#[derive(Clone, Debug)]
pub(crate) struct NeverFlushed;

/// A gather for each part of an area, which takes that part for all there is.
#[derive(Clone, Debug)]
pub(crate) struct NeighboursForgotten;

/// A backend that unmaps in this way.
#[derive(Clone, Debug)]
pub(crate) struct Wrong<U>(Backed, PhantomData<U>);

impl<U> From<Backed> for Wrong<U> {
    fn from(right: Backed) -> Self {
        Self(right, PhantomData)
    }
}

impl<U: Unmap> MappingBackend for Wrong<U> {
    type Addr = usize;
    type Flags = PageTableFlags;
    type PageTable = Pending;

    fn map(&self, start: usize, size: usize, flags: PageTableFlags, pending: &mut Pending) -> bool {
        self.0.map(start, size, flags, pending)
    }

    fn unmap(&self, start: usize, size: usize, _: &mut Pending) -> bool {
        let (machine, root) = (self.0.kernel.machine(), self.0.mm.space().root());
        // The kit is not to find that first.
        machine.note(Note::MapLocked { root, most: UnderMapLock::Frees });
        U::unmap(&self.0, start, size);
        true
    }

    fn protect(&self, start: usize, size: usize, flags: PageTableFlags, pending: &mut Pending) -> bool {
        self.0.protect(start, size, flags, pending)
    }
}

impl Unmap for FreedBeforeFlush {
    fn unmap(right: &Backed, start: usize, size: usize) {
        free_at_once(right, start, size);
        let _flushed = flush_tlb_mm(&*right.kernel, right.mm.context());
    }
}

impl Unmap for NeverFlushed {
    fn unmap(right: &Backed, start: usize, size: usize) {
        free_at_once(right, start, size);
    }
}

impl Unmap for NeighboursForgotten {
    fn unmap(right: &Backed, start: usize, size: usize) {
        let part = range_of(start, size);
        // SAFETY: the map lock is held.
        let mut gather = unsafe { MmuGather::new(&*right.kernel, &right.mm) };
        gather.zap_vma_range(&counted(part), part).expect("no page is large");
        // SAFETY: none; the kit says what is wrong.
        unsafe { gather.free_pgtables_in_gaps([], part) };
        gather.flush().free();
    }
}

struct FreeTables<'a>(&'a HostedPlatform);

impl FrameDeallocator<Size4KiB> for FreeTables<'_> {
    unsafe fn deallocate_frame(&mut self, table: PhysFrame) {
        // SAFETY: none; the kit says what is wrong.
        unsafe { self.0.free_tables(&[table]) };
    }
}

fn free_at_once(right: &Backed, start: usize, size: usize) {
    let page_at = |address: usize| Page::<Size4KiB>::containing_address(VirtAddr::new(address as u64));
    for address in (start..start + size).step_by(4096) {
        // What no program has used is not there.
        let Ok((frame, flush)) = right.mapper().unmap(page_at(address)) else { continue };
        right.kernel.remove_mapping(frame);
        flush.ignore();
    }
    let all = Page::range_inclusive(page_at(start), page_at(start + size - 4096));
    // SAFETY: nothing is used again; the kit says what was wrong.
    unsafe { right.mapper().clean_up_addr_range(all, &mut FreeTables(&right.kernel)) };
}
