//! Between `libkernel` and the engine: `libkernel` keeps the areas and says when pages are mapped,
//! unmapped, protected and cloned; the engine clears the entries, flushes, and frees.
//!
//! The trait hands frames back where they are unmapped, and its caller frees them; but it drops on
//! the floor those of an area that mremap moves. Here each entry that maps a page is counted, and
//! the engine gives its count up after the flush. So no frame is handed back.
//!
//! An address space is told nothing of the neighbours, so the tables go that are empty when
//! `unmap_range` has unmapped. It flushes and frees under the map lock: what it returns has no
//! place for what is left to be freed.
#![expect(unsafe_code, reason = "the map lock is taken on trust; entries change under their lock")]

use core::cell::RefCell;
use std::sync::{Arc, Weak};

use libkernel::error::{KernelError, Result};
use libkernel::memory::address::VA;
use libkernel::memory::address_space::{PageInfo, UserAddressSpace};
use libkernel::memory::page::PageFrame;
use libkernel::memory::paging::permissions::PtePermissions;
use libkernel::memory::proc_vm::memory_map::MemoryMap;
use libkernel::memory::proc_vm::vmarea::VMAPermissions;
use libkernel::memory::region::VirtMemoryRegion;
use mmu_gather::pagetable::{EntryValue, Level, VirtRange};
use mmu_gather::{Limits, MmuGather, exit_mmap, unmap_range, zap_page_range};
use mmu_hosted::UnderMapLock;
use mmu_tests::{HostedMm, HostedPlatform, MapGuard, MapLock, counted};
use x86_64::PhysAddr;
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

/// A leaf that looks read-only to hardware, because its page is shared since a fork.
const COW: PageTableFlags = PageTableFlags::BIT_9;

thread_local! {
    // `UserAddressSpace::new` has no argument, so the kernel must be found without one.
    static KERNEL: RefCell<Weak<HostedPlatform>> = const { RefCell::new(Weak::new()) };
}

/// Makes `kernel` the one in which address spaces are made.
pub(crate) fn boot(kernel: &Arc<HostedPlatform>) {
    KERNEL.set(Arc::downgrade(kernel));
}

/// The paging structures of a process, as `libkernel` drives them.
#[derive(Debug)]
pub(crate) struct Space {
    pub(crate) kernel: Arc<HostedPlatform>,
    pub(crate) mm: HostedMm,
    /// A process has it, which exits some time.
    has_process: bool,
}

impl UserAddressSpace for Space {
    fn new() -> Result<Self> {
        let kernel = KERNEL.with_borrow(Weak::upgrade).ok_or(KernelError::InvalidValue)?;
        let mm = kernel.new_mm().ok_or(KernelError::NoMemory)?;
        Ok(Self { kernel, mm, has_process: false })
    }

    fn activate(&self) {
        self.kernel.switch_to(Some(&self.mm));
    }

    fn deactivate(&self) {
        self.kernel.switch_to(None);
    }

    fn map_page(&mut self, page: PageFrame, va: VA, perms: PtePermissions) -> Result<()> {
        let frame = frame_of(page);
        let value = EntryValue::leaf(Level::Pte, frame.start_address(), flags_of(perms));
        self.kernel.add_mapping(frame);
        let address = va.page_aligned().value() as u64;
        // SAFETY: the map lock is held, and the entry is counted.
        let mapped = unsafe { self.mm.space().map(&*self.kernel, address, Level::Pte, value) };
        mapped.map_err(|_| {
            self.kernel.remove_mapping(frame);
            KernelError::NoMemory
        })
    }

    fn unmap(&mut self, va: VA) -> Result<PageFrame> {
        let page = self.translate(va).ok_or(KernelError::NoMemRegion)?;
        self.unmap_range(va.page_region())?;
        Ok(page.pfn)
    }

    fn remap(&mut self, va: VA, new_page: PageFrame, perms: PtePermissions) -> Result<PageFrame> {
        let old = self.translate(va).ok_or(KernelError::NoMemRegion)?;
        let part = range_of(va.page_region());
        // SAFETY: the map lock is held. The tables stay, so that the new page finds them.
        let flushed =
            unsafe { zap_page_range(&*self.kernel, &self.mm, &Limits::DEFAULT, &counted(part), part) };
        flushed.map_err(|_| KernelError::InvalidValue)?.free();
        self.map_page(new_page, va, perms)?;
        Ok(old.pfn)
    }

    fn protect_range(&mut self, region: VirtMemoryRegion, perms: PtePermissions) -> Result<()> {
        // SAFETY: the map lock is held until the gather has flushed.
        let mut gather = unsafe { MmuGather::new(&*self.kernel, &self.mm) };
        let rights = |_, _, old| rights_of(&self.kernel, perms, old);
        // SAFETY: the same pages with the rights of their area; one that is shared does not become
        // writable.
        let changed = unsafe { gather.change_protection(range_of(region), rights) };
        gather.flush().free();
        changed.map_err(|_| KernelError::InvalidValue)
    }

    fn unmap_range(&mut self, region: VirtMemoryRegion) -> Result<Vec<PageFrame>> {
        let area = counted(range_of(region));
        // SAFETY: the map lock is held.
        let flushed = unsafe { unmap_range(&*self.kernel, &self.mm, &Limits::DEFAULT, &area, area.range) };
        flushed.map_err(|_| KernelError::InvalidValue)?.free();
        Ok(Vec::new())
    }

    fn translate(&self, va: VA) -> Option<PageInfo> {
        let found = self.kernel.lookup(&self.mm, va.value() as u64);
        let page = found.translate(va.page_aligned().value() as u64)?;
        let pfn = page_of(PhysFrame::containing_address(page));
        Some(PageInfo { pfn, perms: perms_of(found.value.flags()) })
    }

    fn protect_and_clone_region(
        &mut self,
        region: VirtMemoryRegion,
        other: &mut Self,
        perms: PtePermissions,
    ) -> Result<()> {
        self.protect_range(region, perms)?;
        for va in region.iter_pages() {
            if let Some(page) = self.translate(va) {
                other.map_page(page.pfn, va, perms)?;
            }
        }
        Ok(())
    }
}

impl Space {
    fn free_all(&self) {
        let whole = counted(self.mm.space().user_range());
        // SAFETY: every area is inside, and by the promise of the caller nobody comes back.
        unsafe { exit_mmap(&*self.kernel, &self.mm, &Limits::DEFAULT, [whole], || ()) }.free();
        self.kernel.free_root(&self.mm);
    }
}

/// A fork that runs out of memory drops what it has of the child.
impl Drop for Space {
    fn drop(&mut self) {
        if !self.has_process && !std::thread::panicking() {
            self.free_all();
        }
    }
}

/// The flags that `perms` give a page which `old` maps. One that is shared does not become
/// writable.
fn rights_of(kernel: &HostedPlatform, perms: PtePermissions, old: EntryValue) -> PageTableFlags {
    let page = PhysFrame::containing_address(old.leaf_address(Level::Pte));
    let is_shared = kernel.nr_mappings(page) > 1;
    flags_of(if is_shared && perms.is_write() { perms.into_cow() } else { perms })
}

fn flags_of(perms: PtePermissions) -> PageTableFlags {
    let mut flags = PageTableFlags::PRESENT;
    flags.set(PageTableFlags::USER_ACCESSIBLE, perms.is_read());
    flags.set(PageTableFlags::WRITABLE, perms.is_write());
    flags.set(PageTableFlags::NO_EXECUTE, !perms.is_execute());
    flags.set(COW, perms.is_cow());
    flags
}

fn perms_of(flags: PageTableFlags) -> PtePermissions {
    let perms = PtePermissions::from(VMAPermissions {
        read: flags.contains(PageTableFlags::USER_ACCESSIBLE),
        write: flags.intersects(COW | PageTableFlags::WRITABLE),
        execute: !flags.contains(PageTableFlags::NO_EXECUTE),
    });
    if flags.contains(COW) { perms.into_cow() } else { perms }
}

/// A process of a kernel that uses `libkernel`, on address spaces of this kind.
pub(crate) struct Process<S: UserAddressSpace> {
    pub(crate) kernel: Arc<HostedPlatform>,
    pub(crate) mm: HostedMm,
    map: MapLock<MemoryMap<S>>,
}

impl<S: UserAddressSpace + AsMut<Space>> Process<S> {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self::with(MemoryMap::new()?))
    }

    fn with(mut map: MemoryMap<S>) -> Self {
        let space = map.address_space_mut().as_mut();
        space.has_process = true;
        let (kernel, mm) = (Arc::clone(&space.kernel), space.mm.clone());
        Self { map: MapLock::new(&kernel, &mm, map), kernel, mm }
    }

    /// The areas, for a call that may do anything under their lock.
    pub(crate) fn lock(&self) -> MapGuard<'_, MemoryMap<S>> {
        self.map.lock(UnderMapLock::Frees)
    }

    /// fork.
    pub(crate) fn fork(&self) -> Result<Self> {
        let child = self.lock().clone_as_cow()?;
        Ok(Self::with(child))
    }

    /// The end, with whatever is still mapped. No CPU runs programs here any more.
    pub(crate) fn exit(&self) {
        self.lock().address_space_mut().as_mut().free_all();
    }
}

impl AsMut<Self> for Space {
    fn as_mut(&mut self) -> &mut Self {
        self
    }
}

pub(crate) fn frame_of(page: PageFrame) -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new((page.value() as u64) << 12))
}

pub(crate) fn page_of(frame: PhysFrame) -> PageFrame {
    let number = usize::try_from(frame.start_address().as_u64() >> 12);
    PageFrame::from_pfn(number.expect("x86_64 has 64-bit numbers"))
}

pub(crate) fn range_of(region: VirtMemoryRegion) -> VirtRange {
    let [start, end] = [region.start_address(), region.end_address()].map(|va| va.value() as u64);
    VirtRange::new(start, end).expect("a region has pages")
}
