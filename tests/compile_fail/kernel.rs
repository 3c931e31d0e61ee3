//! The smallest embedder that compiles. SAFETY, of every `unsafe` here: nothing of it is ever run.
#![allow(dead_code, reason = "no case uses all of it")]

use std::boxed::Box;
use std::pin::Pin;
use std::sync::atomic::AtomicU64;

pub use mmu_gather::pagetable::*;
pub use mmu_gather::tlb::*;
pub use mmu_gather::*;
pub use x86_64::PhysAddr;
pub use x86_64::structures::paging::mapper::PageTableFrameMapping;
pub use x86_64::structures::paging::{PageTable, PageTableFlags, PhysFrame};

pub type Bits = [AtomicU64; 1];
pub type MyMm = Mm<Bits>;

pub struct Kernel {
    lock: TableLock<spin::Spin>,
    cpu: CpuTlb<Bits>,
    ids: CtxIds,
}

unsafe impl PageTableFrameMapping for Kernel {
    fn frame_to_pointer(&self, _: PhysFrame) -> *mut PageTable {
        unimplemented!()
    }
}

unsafe impl TableMemory for Kernel {
    type Lock = TableLock<spin::Spin>;

    unsafe fn table_lock(&self, _: PhysFrame) -> &TableLock<spin::Spin> {
        &self.lock
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        None
    }

    unsafe fn free_tables(&self, _: &[PhysFrame]) {}
}

unsafe impl Cpus for Kernel {
    type Bits = Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(CpuId::new(0))
    }

    fn cpu_state(&self, _: CpuId) -> &CpuTlb<Bits> {
        &self.cpu
    }

    fn init_root(&self) -> PhysFrame {
        frame()
    }

    fn flush_others(&self, _: &CpuSet<Bits>, _: &FlushRequest<'_, Bits>, _: impl FnOnce()) {}
}

impl Pages for Kernel {
    type Area = ();

    fn unmap_page(&self, (): (), _: &UnmappedLeaf) -> Disposition {
        Disposition::Free
    }

    fn free_pages(&self, _: FreedPages<'_>) {}

    fn allocate_batch(&self) -> Option<BatchPage> {
        None
    }

    fn free_batch(&self, _: BatchPage) {}
}

pub fn frame() -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new(0x1000))
}

pub fn page() -> VirtRange {
    VirtRange::new(0x1000, 0x2000).unwrap()
}

impl Kernel {
    pub fn new() -> Self {
        Self { lock: TableLock::new(()), cpu: CpuTlb::new(), ids: CtxIds::new() }
    }

    pub fn unpinned_mm(&self) -> MyMm {
        unsafe { Mm::new(&self.ids, frame(), PagingMode::FourLevel) }
    }

    pub fn new_mm(&self) -> Pin<Box<MyMm>> {
        Box::pin(self.unpinned_mm())
    }

    pub fn gather<'k, 'm>(&'k self, mm: &'m MyMm) -> MmuGather<'k, 'm, Self> {
        unsafe { MmuGather::new(self, mm) }
    }

    /// A table that the kernel unhooked.
    pub fn unhook(&self, mm: &MyMm) -> UnhookedTable {
        let mut table = None;
        unsafe { mm.space().unhook_tables(self, page(), Bounds::whole(), |unhooked| table = Some(unhooked)) };
        table.unwrap()
    }

    pub fn table<'a>(&'a self, mm: &'a MyMm) -> TableView<'a> {
        unsafe { mm.space().root_table(self) }
    }

    /// The scheduler's way to run a program.
    pub fn run(&self, mm: Pin<&MyMm>) {
        unsafe { switch_mm(self, CpuId::new(0), Some(mm.pinned_context())) };
    }
}
