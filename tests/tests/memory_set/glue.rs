//! Between `memory_set`, the `x86_64` crate's mapper and the engine: `memory_set` keeps the areas,
//! the mapper puts new pages into the tables, and what goes away goes through a gather.
//!
//! `memory_set` asks its backend for one part of an area after the other, and tells it nothing of
//! the neighbours. So the backend only clears entries, in a gather that is open for the whole call;
//! the tables and the flush come at the end of the call, when the areas say what stays.
#![expect(unsafe_code, reason = "the map lock is taken on trust; tables are lent to the mapper")]

use memory_set::{MappingBackend, MappingResult, MemoryArea, MemorySet};
use mmu_gather::pagetable::adapters::MapperTables;
use mmu_gather::pagetable::{EntryValue, VirtRange};
use mmu_gather::{FlushedGather, Limits, MmuGather, Vma, exit_mmap};
use mmu_tests::{Backing, PaperKernel, PaperMm, area};
use spin::RwLock;
use x86_64::VirtAddr;
use x86_64::structures::paging::mapper::{MapperFlush, PageTableFrameMapping};
use x86_64::structures::paging::{MappedPageTable, Mapper, Page, PageTableFlags, Size4KiB};

/// What `memory_set` attaches to an area, and calls for its pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backed<'k> {
    pub(crate) kernel: &'k PaperKernel,
    pub(crate) mm: &'k PaperMm,
    pub(crate) backing: Backing,
}

/// What one call of `memory_set` has changed so far, and no CPU was told of.
#[derive(Debug)]
pub(crate) struct Pending<'k> {
    gather: MmuGather<'k, 'k, PaperKernel>,
}

impl<'k> Backed<'k> {
    fn vma(&self, start: usize, size: usize) -> Vma<Backing> {
        area(start as u64, (start + size) as u64, self.backing)
    }

    /// The `x86_64` crate's mapper of the tables of this address space.
    pub(crate) fn mapper(&self) -> MappedPageTable<'k, &'k PaperKernel> {
        let root = self.kernel.frame_to_pointer(self.mm.space().root());
        // SAFETY: the root is a table as long as the kernel lives, and with the map lock held for
        // writing nobody else uses it while the mapper is there.
        let root = unsafe { &mut *root };
        // SAFETY: every entry of the tables leads to a frame of the kernel's memory.
        unsafe { MappedPageTable::new(root, self.kernel) }
    }

    fn map_new_page(&self, address: u64, flags: PageTableFlags) -> bool {
        let frame = self.kernel.ledger().new_page(4096);
        let page = Page::<Size4KiB>::containing_address(VirtAddr::new(address));
        let upper = PageTableFlags::PRESENT | PageTableFlags::WRITABLE | PageTableFlags::USER_ACCESSIBLE;
        let flags = flags | PageTableFlags::PRESENT | PageTableFlags::USER_ACCESSIBLE;
        // SAFETY: the map lock is held for writing, and the mapper maps that address.
        let mut tables = unsafe { MapperTables::new(self.kernel, self.mm.space(), address) };
        // SAFETY: the page is new, and programs may use it until it is unmapped.
        let mapped = unsafe { self.mapper().map_to_with_table_flags(page, frame, flags, upper, &mut tables) };
        // No CPU has cached anything there, so there is nothing to flush.
        let is_mapped = mapped.map(MapperFlush::ignore).is_ok();
        if is_mapped {
            self.kernel.ledger().add_mapping(frame);
        }
        is_mapped
    }
}

impl<'k> MappingBackend for Backed<'k> {
    type Addr = usize;
    type Flags = PageTableFlags;
    type PageTable = Pending<'k>;

    fn map(&self, start: usize, size: usize, flags: PageTableFlags, pending: &mut Pending<'k>) -> bool {
        let mut pages = (start..start + size).step_by(4096);
        let is_mapped = pages.all(|address| self.map_new_page(address as u64, flags));
        if !is_mapped {
            self.unmap(start, size, pending);
        }
        is_mapped
    }

    fn unmap(&self, start: usize, size: usize, pending: &mut Pending<'k>) -> bool {
        let vma = self.vma(start, size);
        pending.gather.zap_vma_range(&vma, vma.range).is_ok()
    }

    fn protect(&self, start: usize, size: usize, flags: PageTableFlags, pending: &mut Pending<'k>) -> bool {
        let rights = |_, _, old: EntryValue| (old.flags() - PageTableFlags::WRITABLE) | flags;
        // SAFETY: the map lock is held, and each page is this area's alone.
        unsafe { pending.gather.change_protection(self.vma(start, size).range, rights) }.is_ok()
    }
}

impl<'k> Pending<'k> {
    /// Begins a call that changes `mm`; the map lock is held for writing.
    pub(crate) fn new(kernel: &'k PaperKernel, mm: &'k PaperMm) -> Self {
        // SAFETY: the caller holds the map lock until `flush` has returned.
        Self { gather: unsafe { MmuGather::new(kernel, mm) } }
    }

    /// Unhooks the tables of `range` that no area of `areas` needs, and makes every CPU forget all
    /// that went.
    pub(crate) fn flush(
        mut self,
        areas: impl IntoIterator<Item = VirtRange>,
        range: VirtRange,
    ) -> FlushedGather<'k, PaperKernel> {
        // SAFETY: these are the areas that stay, and what was mapped elsewhere is gone.
        unsafe { self.gather.free_pgtables_in_gaps(areas, range) };
        self.gather.flush()
    }
}

/// The areas of an address space.
pub(crate) type Areas<'k> = MemorySet<Backed<'k>>;

/// An address space of a kernel that uses `memory_set`.
#[derive(Debug)]
pub(crate) struct AddressSpace<'k> {
    pub(crate) kernel: &'k PaperKernel,
    pub(crate) mm: &'k PaperMm,
    pub(crate) areas: RwLock<Areas<'k>>,
}

impl<'k> AddressSpace<'k> {
    pub(crate) fn new(kernel: &'k PaperKernel) -> Self {
        Self { kernel, mm: kernel.new_mm(), areas: RwLock::new(MemorySet::new()) }
    }

    /// Changes the areas, and flushes what that took away; the caller drops the lock, then frees.
    fn change(
        &self,
        areas: &mut Areas<'k>,
        range: VirtRange,
        call: impl FnOnce(&mut Areas<'k>, &mut Pending<'k>) -> MappingResult,
    ) -> (MappingResult, FlushedGather<'k, PaperKernel>) {
        let mut pending = Pending::new(self.kernel, self.mm);
        let result = call(areas, &mut pending);
        let stay = areas.iter().map(|area| area.backend().vma(area.start(), area.size()).range);
        (result, pending.flush(stay, range))
    }

    /// As `change`, for a call that is done with one change.
    fn change_once(
        &self,
        range: VirtRange,
        call: impl FnOnce(&mut Areas<'k>, &mut Pending<'k>) -> MappingResult,
    ) -> MappingResult {
        let mut areas = self.areas.write();
        let (result, flushed) = self.change(&mut areas, range, call);
        drop(areas);
        flushed.free();
        result
    }

    /// Maps new pages, in place of what is there: mmap with MAP_FIXED.
    pub(crate) fn map(&self, range: VirtRange, flags: PageTableFlags, backing: Backing) -> MappingResult {
        let (start, size) = start_and_size(range);
        let backed = Backed { kernel: self.kernel, mm: self.mm, backing };
        let new = MemoryArea::new(start, size, flags, backed);
        let mut areas = self.areas.write();
        // Not left to `MemorySet::map`: it would map again before anybody has flushed.
        let (unmapped, replaced) =
            self.change(&mut areas, range, |areas, pending| areas.unmap(start, size, pending));
        let (mapped, not_mapped) =
            self.change(&mut areas, range, |areas, pending| areas.map(new, pending, false));
        drop(areas);
        replaced.free();
        not_mapped.free();
        unmapped.and(mapped)
    }

    /// munmap.
    pub(crate) fn unmap(&self, range: VirtRange) -> MappingResult {
        let (start, size) = start_and_size(range);
        self.change_once(range, |areas, pending| areas.unmap(start, size, pending))
    }

    /// mprotect.
    pub(crate) fn protect(&self, range: VirtRange, flags: PageTableFlags) -> MappingResult {
        let (start, size) = start_and_size(range);
        let update = |old| (old != flags).then_some(flags);
        self.change_once(range, |areas, pending| areas.protect(start, size, update, pending))
    }

    /// Unmaps everything: the first half of exec.
    pub(crate) fn clear(&self) -> MappingResult {
        self.change_once(self.mm.space().user_range(), |areas, pending| areas.clear(pending))
    }

    /// The end, with whatever is still mapped. No CPU runs programs here any more.
    pub(crate) fn exit(self) {
        let mut areas = self.areas.write();
        let all: Vec<_> = areas.iter().map(|area| area.backend().vma(area.start(), area.size())).collect();
        let unlink = || *areas = MemorySet::new();
        // SAFETY: these are all the areas, and by the promise of the caller nobody comes back.
        let flushed =
            unsafe { exit_mmap(self.kernel, self.mm, &Limits::DEFAULT, all.iter().copied(), unlink) };
        drop(areas);
        flushed.free();
        self.kernel.free_one_table(self.mm.space().root());
    }
}

#[expect(clippy::cast_possible_truncation, reason = "x86_64 has 64-bit addresses")]
fn start_and_size(range: VirtRange) -> (usize, usize) {
    (range.start() as usize, range.len_bytes() as usize)
}
