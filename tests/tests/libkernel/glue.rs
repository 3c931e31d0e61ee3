//! Between `libkernel` and the engine: `libkernel` keeps the areas and says when pages are mapped,
//! unmapped, protected and cloned; the engine clears the entries, flushes, and frees.
//!
//! The trait hands frames back where they are unmapped, and its caller frees them; but it drops on
//! the floor those of an area that mremap moves. Here each entry that maps a page has a reference
//! on it, which the engine gives up after the flush. So no frame is handed back.
//!
//! An address space is told nothing of the neighbours, so the tables go that are empty when
//! `unmap_range` has unmapped. It flushes and frees under the map lock: what it returns has no
//! place for what is left to be freed.
#![expect(unsafe_code, reason = "the map lock is taken on trust; entries change under their lock")]

use core::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use libkernel::error::{KernelError, Result};
use libkernel::memory::address::VA;
use libkernel::memory::address_space::{PageInfo, UserAddressSpace};
use libkernel::memory::page::PageFrame;
use libkernel::memory::paging::permissions::PtePermissions;
use libkernel::memory::proc_vm::memory_map::MemoryMap;
use libkernel::memory::region::VirtMemoryRegion;
use mmu_gather::pagetable::{EntryValue, Level};
use mmu_gather::{Limits, MmuGather, exit_mmap, unmap_range};
use mmu_tests::{Backing, PaperKernel, PaperMm, area, range};
use spin::RwLock;
use x86_64::PhysAddr;
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

/// A leaf that looks read-only to hardware, because its page is shared since a fork.
const COW: PageTableFlags = PageTableFlags::BIT_9;

thread_local! {
    // `UserAddressSpace::new` has no argument, so the kernel must be found without one.
    static KERNEL: RefCell<Weak<PaperKernel>> = const { RefCell::new(Weak::new()) };
    static NR_SPACES: Cell<usize> = const { Cell::new(0) };
}

/// Makes `kernel` the one in which address spaces are made.
pub(crate) fn boot(kernel: &Rc<PaperKernel>) {
    KERNEL.set(Rc::downgrade(kernel));
    NR_SPACES.set(0);
}

fn kernel() -> Rc<PaperKernel> {
    KERNEL.with_borrow(|kernel| kernel.upgrade().expect("booted"))
}

/// The paging structures of a process, as `libkernel` drives them. It must be `Send` and `Sync`, so
/// it is a number.
#[derive(Debug)]
pub(crate) struct Space {
    index: usize,
}

impl Space {
    pub(crate) fn with<R>(&self, call: impl FnOnce(&PaperKernel, &PaperMm) -> R) -> R {
        let kernel = kernel();
        call(&kernel, kernel.mm(self.index))
    }
}

impl UserAddressSpace for Space {
    fn new() -> Result<Self> {
        kernel().new_mm();
        let index = NR_SPACES.get();
        NR_SPACES.set(index + 1);
        Ok(Self { index })
    }

    fn activate(&self) {
        self.with(|kernel, mm| kernel.run(kernel.here(), mm));
    }

    fn deactivate(&self) {
        self.with(|kernel, _| kernel.stop(kernel.here()));
    }

    fn map_page(&mut self, page: PageFrame, va: VA, perms: PtePermissions) -> Result<()> {
        self.with(|kernel, mm| {
            let frame = PhysAddr::new((page.value() as u64) << 12);
            let value = EntryValue::leaf(Level::Pte, frame, flags_of(perms));
            // SAFETY: the map lock is held for writing, and the page has a reference for the entry.
            let mapped = unsafe { mm.space().map(kernel, va.value() as u64, Level::Pte, value) };
            mapped.map_err(|_| KernelError::NoMemory)?;
            kernel.ledger().add_mapping(PhysFrame::containing_address(frame));
            Ok(())
        })
    }

    fn unmap(&mut self, va: VA) -> Result<PageFrame> {
        let page = self.translate(va).ok_or(KernelError::NoMemRegion)?;
        self.unmap_range(va.page_region())?;
        Ok(page.pfn)
    }

    fn remap(&mut self, va: VA, new_page: PageFrame, perms: PtePermissions) -> Result<PageFrame> {
        let old = self.unmap(va)?;
        self.map_page(new_page, va, perms)?;
        Ok(old)
    }

    fn protect_range(&mut self, region: VirtMemoryRegion, perms: PtePermissions) -> Result<()> {
        self.with(|kernel, mm| {
            let (start, end) = (region.start_address().value(), region.end_address().value());
            // SAFETY: the map lock is held for writing until the gather has flushed.
            let mut gather = unsafe { MmuGather::new(kernel, mm) };
            let rights = |_, _, old| rights_of(kernel, perms, old);
            // SAFETY: the same pages with the rights of their area; one that is shared does not
            // become writable.
            let changed = unsafe { gather.change_protection(range(start as u64, end as u64), rights) };
            gather.flush().free();
            changed.map_err(|_| KernelError::InvalidValue)
        })
    }

    fn unmap_range(&mut self, region: VirtMemoryRegion) -> Result<Vec<PageFrame>> {
        self.with(|kernel, mm| {
            let (start, end) = (region.start_address().value(), region.end_address().value());
            let vma = area(start as u64, end as u64, Backing::Anonymous);
            // SAFETY: the map lock is held for writing.
            let flushed = unsafe { unmap_range(kernel, mm, &Limits::DEFAULT, &vma, vma.range) };
            flushed.map_err(|_| KernelError::InvalidValue)?.free();
            Ok(Vec::new())
        })
    }

    fn translate(&self, va: VA) -> Option<PageInfo> {
        self.with(|kernel, mm| {
            let found = kernel.lookup(mm, va.value() as u64);
            let frame = found.translate(va.page_aligned().value() as u64)?.as_u64() >> 12;
            let frame = usize::try_from(frame).expect("x86_64 has 64-bit numbers");
            Some(PageInfo { pfn: PageFrame::from_pfn(frame), perms: perms_of(found.value.flags()) })
        })
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

/// The flags that `perms` give a page which `old` maps. One that is shared does not become
/// writable.
fn rights_of(kernel: &PaperKernel, perms: PtePermissions, old: EntryValue) -> PageTableFlags {
    let account = kernel.ledger().page(PhysFrame::containing_address(old.leaf_address(Level::Pte)));
    let is_shared = account.is_some_and(|account| account.mappings > 1);
    flags_of(if is_shared && perms.is_write() { perms.into_cow() } else { perms })
}

fn flags_of(perms: PtePermissions) -> PageTableFlags {
    let mut flags = PageTableFlags::PRESENT | PageTableFlags::USER_ACCESSIBLE;
    flags.set(PageTableFlags::WRITABLE, perms.is_write());
    flags.set(PageTableFlags::NO_EXECUTE, !perms.is_execute());
    flags.set(COW, perms.is_cow());
    flags
}

fn perms_of(flags: PageTableFlags) -> PtePermissions {
    let is_cow = flags.contains(COW);
    let perms = match (
        is_cow || flags.contains(PageTableFlags::WRITABLE),
        flags.contains(PageTableFlags::NO_EXECUTE),
    ) {
        (true, true) => PtePermissions::rw(true),
        (true, false) => PtePermissions::rwx(true),
        (false, true) => PtePermissions::ro(true),
        (false, false) => PtePermissions::rx(true),
    };
    if is_cow { perms.into_cow() } else { perms }
}

/// A process of a kernel that uses `libkernel`.
pub(crate) struct Process {
    pub(crate) map: RwLock<MemoryMap<Space>>,
}

impl Process {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { map: RwLock::new(MemoryMap::new()?) })
    }

    /// fork.
    pub(crate) fn fork(&self) -> Result<Self> {
        Ok(Self { map: RwLock::new(self.map.write().clone_as_cow()?) })
    }

    /// The end, with whatever is still mapped. No CPU runs programs here any more.
    pub(crate) fn exit(self) {
        let mut map = self.map.into_inner();
        let vmas: Vec<_> = map
            .iter_vmas()
            .map(|vma| {
                (vma.region().start_address().value() as u64, vma.region().end_address().value() as u64)
            })
            .map(|(start, end)| area(start, end, Backing::Anonymous))
            .collect();
        map.address_space_mut().with(|kernel, mm| {
            // SAFETY: these are all the areas, and by the promise of the caller nobody comes back.
            unsafe { exit_mmap(kernel, mm, &Limits::DEFAULT, vmas.iter().copied(), || ()) }.free();
            kernel.free_one_table(mm.space().root());
        });
    }
}
