//! Between `memory_set`, the `x86_64` crate's mapper and the engine: `memory_set` keeps the areas,
//! the mapper puts new pages into the tables, and what goes away goes through a gather.
//!
//! `memory_set` asks its backend for one part of an area after the other, and tells it nothing of
//! the neighbours. So the backend only notes what goes. The entries, the tables and the flush come
//! at the end of the call, when the areas say what stays.
#![expect(unsafe_code, reason = "the map lock is taken on trust; tables are lent to the mapper")]

use std::sync::Arc;

use memory_set::{MappingBackend, MappingError, MappingResult, MemoryArea, MemorySet};
use mmu_gather::pagetable::adapters::MapperTables;
use mmu_gather::pagetable::{EntryValue, VirtRange};
use mmu_gather::{FlushedGather, Limits, MmuGather, exit_mmap};
use mmu_hosted::UnderMapLock;
use mmu_tests::{HostedMm, HostedPlatform, MapLock, counted};
use x86_64::VirtAddr;
use x86_64::structures::paging::mapper::{MapToError, MapperFlush, PageTableFrameMapping};
use x86_64::structures::paging::{MappedPageTable, Mapper, Page, PageTableFlags, Size4KiB};

/// What programs have no rights without.
pub(crate) const USER: PageTableFlags = PageTableFlags::PRESENT.union(PageTableFlags::USER_ACCESSIBLE);
/// Rights come and go with these.
const RIGHTS: PageTableFlags = PageTableFlags::WRITABLE.union(PageTableFlags::USER_ACCESSIBLE);

/// When the pages of an area come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Populate {
    AtOnce,
    WhenUsed,
}

/// What `memory_set` attaches to an area, and calls for its pages.
#[derive(Clone, Debug)]
pub(crate) struct Backed {
    pub(crate) kernel: Arc<HostedPlatform>,
    pub(crate) mm: HostedMm,
    pub(crate) populate: Populate,
}

/// What one call of `memory_set` takes from programs.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    unmapped: Vec<VirtRange>,
    protected: Vec<(VirtRange, PageTableFlags)>,
}

impl Backed {
    /// The `x86_64` crate's mapper of the tables of this address space.
    pub(crate) fn mapper(&self) -> MappedPageTable<'_, &HostedPlatform> {
        let root = self.kernel.frame_to_pointer(self.mm.space().root());
        // SAFETY: the root is a table as long as the address space is there, and with the map lock
        // held nobody else in the kernel uses it while the mapper is there.
        let root = unsafe { &mut *root };
        // SAFETY: every entry of the tables leads to a frame of the kernel's memory.
        unsafe { MappedPageTable::new(root, &*self.kernel) }
    }

    fn map_new_page(&self, address: u64, flags: PageTableFlags) -> MappingResult {
        let frame = self.kernel.new_page().ok_or(MappingError::BadState)?;
        let page = Page::<Size4KiB>::containing_address(VirtAddr::new(address));
        let upper = USER | PageTableFlags::WRITABLE;
        // SAFETY: the map lock is held, and the mapper maps that address.
        let mut tables = unsafe { MapperTables::new(&*self.kernel, self.mm.space(), address) };
        self.kernel.add_mapping(frame);
        // SAFETY: the page is new, and programs may use it until it is unmapped.
        let mapped = unsafe { self.mapper().map_to_with_table_flags(page, frame, flags, upper, &mut tables) };
        // No CPU has cached anything there, so there is nothing to flush.
        let mapped = mapped.map(MapperFlush::ignore);
        if mapped.is_err() {
            self.kernel.remove_mapping(frame);
        }
        match mapped {
            // Another CPU was faster.
            Ok(()) | Err(MapToError::PageAlreadyMapped(_)) => Ok(()),
            Err(_) => Err(MappingError::BadState),
        }
    }
}

impl MappingBackend for Backed {
    type Addr = usize;
    type Flags = PageTableFlags;
    type PageTable = Pending;

    fn map(&self, start: usize, size: usize, flags: PageTableFlags, pending: &mut Pending) -> bool {
        let mut pages = (start..start + size).step_by(4096);
        let is_mapped = self.populate == Populate::WhenUsed
            || pages.all(|address| self.map_new_page(address as u64, flags).is_ok());
        if !is_mapped {
            pending.unmapped.push(range_of(start, size));
        }
        is_mapped
    }

    fn unmap(&self, start: usize, size: usize, pending: &mut Pending) -> bool {
        pending.unmapped.push(range_of(start, size));
        true
    }

    fn protect(&self, start: usize, size: usize, flags: PageTableFlags, pending: &mut Pending) -> bool {
        pending.protected.push((range_of(start, size), flags));
        true
    }
}

/// A backend on which address spaces can be made.
pub(crate) trait Backend:
    MappingBackend<Addr = usize, Flags = PageTableFlags, PageTable = Pending> + From<Backed> + 'static
{
}

impl<B> Backend for B where
    B: MappingBackend<Addr = usize, Flags = PageTableFlags, PageTable = Pending> + From<Backed> + 'static
{
}

/// An address space of a kernel that uses `memory_set`.
pub(crate) struct AddressSpace<B: Backend> {
    pub(crate) kernel: Arc<HostedPlatform>,
    pub(crate) mm: HostedMm,
    pub(crate) areas: MapLock<MemorySet<B>>,
}

impl<B: Backend> AddressSpace<B> {
    pub(crate) fn new(kernel: &Arc<HostedPlatform>) -> Option<Self> {
        let mm = kernel.new_mm()?;
        let areas = MapLock::new(kernel, &mm, MemorySet::new());
        Some(Self { kernel: Arc::clone(kernel), mm, areas })
    }

    fn area(&self, range: VirtRange, flags: PageTableFlags, populate: Populate) -> MemoryArea<B> {
        let (start, size) = start_and_size(range);
        MemoryArea::new(start, size, flags, self.backed(populate).into())
    }

    fn backed(&self, populate: Populate) -> Backed {
        Backed { kernel: Arc::clone(&self.kernel), mm: self.mm.clone(), populate }
    }

    /// Changes the areas, then entries and tables, and flushes what that took away; the caller
    /// drops the lock, then frees.
    fn change(
        &self,
        areas: &mut MemorySet<B>,
        range: VirtRange,
        call: impl FnOnce(&mut MemorySet<B>, &mut Pending) -> MappingResult,
    ) -> (MappingResult, FlushedGather<'_, HostedPlatform>) {
        let mut pending = Pending::default();
        let result = call(areas, &mut pending);
        // SAFETY: the caller holds the map lock until `flush` has returned.
        let mut gather = unsafe { MmuGather::new(&*self.kernel, &self.mm) };
        for part in pending.unmapped {
            gather.zap_vma_range(&counted(part), part).expect("no page is large");
        }
        for (part, flags) in pending.protected {
            let rights = |_, _, old: EntryValue| (old.flags() - RIGHTS) | flags;
            // SAFETY: the map lock is held, and each page is this area's alone.
            unsafe { gather.change_protection(part, rights) }.expect("no page is large");
        }
        let stay = areas.iter().map(|area| range_of(area.start(), area.size()));
        // SAFETY: these are the areas that stay, and what was mapped elsewhere is gone.
        unsafe { gather.free_pgtables_in_gaps(stay, range) };
        (result, gather.flush())
    }

    /// As `change`, for a call that is done with one change.
    fn change_once(
        &self,
        most: UnderMapLock,
        range: VirtRange,
        call: impl FnOnce(&mut MemorySet<B>, &mut Pending) -> MappingResult,
    ) -> MappingResult {
        let mut areas = self.areas.lock(most);
        let (result, flushed) = self.change(&mut areas, range, call);
        drop(areas);
        flushed.free();
        result
    }

    /// Maps an area where none is. A page for which there is no table is freed under the lock.
    pub(crate) fn map(&self, range: VirtRange, flags: PageTableFlags, populate: Populate) -> MappingResult {
        let new = self.area(range, flags, populate);
        self.change_once(UnderMapLock::Frees, range, |areas, pending| areas.map(new, pending, false))
    }

    /// Maps an area in place of what is there: mmap with MAP_FIXED.
    pub(crate) fn replace(
        &self,
        range: VirtRange,
        flags: PageTableFlags,
        populate: Populate,
    ) -> MappingResult {
        let (start, size) = start_and_size(range);
        let new = self.area(range, flags, populate);
        let mut areas = self.areas.lock(UnderMapLock::Frees);
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

    /// The page-fault handler.
    pub(crate) fn fault(&self, address: u64, needs: PageTableFlags) -> MappingResult {
        let areas = self.areas.lock(UnderMapLock::Frees);
        let area = usize::try_from(address).ok().and_then(|address| areas.find(address));
        let area = area.filter(|area| area.flags().contains(needs)).ok_or(MappingError::BadState)?;
        self.backed(Populate::WhenUsed).map_new_page(address & !0xfff, area.flags())
    }

    /// munmap.
    pub(crate) fn unmap(&self, range: VirtRange) -> MappingResult {
        let (start, size) = start_and_size(range);
        let unmap = |areas: &mut MemorySet<B>, pending: &mut Pending| areas.unmap(start, size, pending);
        self.change_once(UnderMapLock::FreesEarly, range, unmap)
    }

    /// mprotect.
    pub(crate) fn protect(&self, range: VirtRange, flags: PageTableFlags) -> MappingResult {
        let (start, size) = start_and_size(range);
        let update = |old| (old != flags).then_some(flags);
        self.change_once(UnderMapLock::FreesEarly, range, |areas, pending| {
            areas.protect(start, size, update, pending)
        })
    }

    /// Unmaps everything: the first half of exec.
    pub(crate) fn clear(&self) -> MappingResult {
        let whole = self.mm.space().user_range();
        self.change_once(UnderMapLock::FreesEarly, whole, |areas, pending| areas.clear(pending))
    }

    /// The end, with whatever is still mapped. No CPU runs programs here any more.
    pub(crate) fn exit(&self) {
        let mut areas = self.areas.lock(UnderMapLock::FreesEarly);
        let all: Vec<_> = areas.iter().map(|area| counted(range_of(area.start(), area.size()))).collect();
        let unlink = || *areas = MemorySet::new();
        // SAFETY: these are all the areas, and by the promise of the caller nobody comes back.
        let flushed =
            unsafe { exit_mmap(&*self.kernel, &self.mm, &Limits::DEFAULT, all.iter().copied(), unlink) };
        drop(areas);
        flushed.free();
        self.kernel.free_root(&self.mm);
    }
}

pub(crate) fn range_of(start: usize, size: usize) -> VirtRange {
    VirtRange::new(start as u64, (start + size) as u64).expect("an area has pages")
}

#[expect(clippy::cast_possible_truncation, reason = "x86_64 has 64-bit addresses")]
fn start_and_size(range: VirtRange) -> (usize, usize) {
    (range.start() as usize, range.len_bytes() as usize)
}
