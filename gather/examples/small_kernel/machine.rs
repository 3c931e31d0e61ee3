// The machine of the small kernel, and the three traits that it implements for the engine. It has
// two CPUs, and sixteen frames of memory for tables, in an ordinary process: a TLB is a set of
// addresses, an interrupt is a call, and one thread plays both CPUs in turn.

use core::cell::{Cell, RefCell, UnsafeCell};
use core::pin::Pin;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;
use std::collections::BTreeSet;

use mmu_gather::pagetable::{Bounds, EntryValue, Level, PagingMode, TableLock, TableMemory, VirtRange};
use mmu_gather::spin;
use mmu_gather::tlb::{
    CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, CtxIds, flush_interrupt, init_cpu, switch_mm,
};
use mmu_gather::x86_64::PhysAddr;
use mmu_gather::x86_64::instructions::tlb::Pcid;
use mmu_gather::x86_64::structures::paging::mapper::PageTableFrameMapping;
use mmu_gather::x86_64::structures::paging::{PageTable, PageTableFlags, PhysFrame};
use mmu_gather::{
    BatchPage, CutLeaf, Disposition, FlushedGather, FreedPages, Limits, Mm, MmuGather, Pages, UnmappedLeaf,
    Vma, VmaKind, exit_mmap,
};

type Bits = [AtomicU64; 1];
type MyMm = Pin<Box<Mm<Bits>>>;

const CPU: [CpuId; 2] = [CpuId::new(0), CpuId::new(1)];

struct Kernel {
    // Frame n is element n; frame 0 is the root of the kernel's own address space.
    memory: Vec<UnsafeCell<PageTable>>,
    // One for each table.
    locks: Vec<TableLock<spin::Spin>>,
    free_tables: RefCell<Vec<PhysFrame>>,
    freed_pages: Cell<usize>,
    cpus: [CpuTlb<Bits>; 2],
    tlbs: [RefCell<BTreeSet<u64>>; 2],
    // The CPU that the thread plays.
    here: Cell<CpuId>,
    ids: CtxIds,
}

// SAFETY: a frame of a table is an element of `memory`, which is neither moved nor freed.
unsafe impl PageTableFrameMapping for Kernel {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.memory[index_of(frame)].get()
    }
}

// SAFETY: a table is zeroed, and given out once until it is freed; each has a lock of its own.
unsafe impl TableMemory for Kernel {
    type Lock = TableLock<spin::Spin>;

    unsafe fn table_lock(&self, table: PhysFrame) -> &TableLock<spin::Spin> {
        &self.locks[index_of(table)]
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        let table = self.free_tables.borrow_mut().pop()?;
        // SAFETY: the frame is free: nobody else uses it.
        unsafe { self.frame_to_pointer(table).write(PageTable::new()) };
        Some(table)
    }

    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        self.free_tables.borrow_mut().extend(tables);
    }
}

// SAFETY: the thread stays on the CPU that it plays; `invlpg` and `load_cr3` drop what the
// instructions drop.
unsafe impl Cpus for Kernel {
    type Bits = Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(self.here.get())
    }

    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        &self.cpus[cpu.index()]
    }

    fn init_root(&self) -> PhysFrame {
        frame(0)
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Bits>) {
        for cpu in targets.iter() {
            // SAFETY: the thread plays `cpu`, which nothing interrupts.
            self.on(cpu, || unsafe { flush_interrupt(self, cpu) });
        }
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }

    fn invlpg(&self, address: u64) {
        self.tlb().borrow_mut().remove(&address);
    }

    unsafe fn load_cr3(&self, _: PhysFrame, _: Pcid, _: CachedTranslations) {
        self.tlb().borrow_mut().clear();
    }
}

impl Pages for Kernel {
    type Area = ();

    fn unmap_page(&self, (): (), _: &UnmappedLeaf) -> Disposition {
        Disposition::Free
    }

    fn free_pages(&self, pages: FreedPages<'_>) {
        self.freed_pages.set(self.freed_pages.get() + pages.iter().count());
    }

    fn allocate_batch(&self) -> Option<BatchPage> {
        let page = NonNull::from(Box::leak(Box::new(PageTable::new())));
        // SAFETY: a `PageTable` has 4096 bytes, aligned to 4096, and this one is nobody else's.
        Some(unsafe { BatchPage::new(page.cast()) })
    }

    fn free_batch(&self, page: BatchPage) {
        // SAFETY: the page comes from `allocate_batch`.
        drop(unsafe { Box::from_raw(page.into_inner().cast::<PageTable>().as_ptr()) });
    }
}

impl Kernel {
    fn new() -> Self {
        let kernel = Self {
            memory: (0..16).map(|_| UnsafeCell::new(PageTable::new())).collect(),
            locks: (0..16).map(|_| TableLock::new(())).collect(),
            free_tables: RefCell::new((1..16).map(frame).collect()),
            freed_pages: Cell::new(0),
            cpus: [CpuTlb::new(), CpuTlb::new()],
            tlbs: [RefCell::default(), RefCell::default()],
            here: Cell::new(CPU[0]),
            ids: CtxIds::new(),
        };
        for cpu in CPU {
            // SAFETY: the thread plays `cpu`, on which nothing is loaded yet.
            kernel.on(cpu, || unsafe { init_cpu(&kernel, cpu) });
        }
        kernel
    }

    // Has the thread play `cpu`.
    fn on<R>(&self, cpu: CpuId, f: impl FnOnce() -> R) -> R {
        let before = self.here.replace(cpu);
        let result = f();
        self.here.set(before);
        result
    }

    fn tlb(&self) -> &RefCell<BTreeSet<u64>> {
        &self.tlbs[self.here.get().index()]
    }

    fn new_mm(&self) -> MyMm {
        let root = self.allocate_table().expect("a frame is left");
        // SAFETY: the root is an empty table that is this address space's alone, and `ids` is the
        // one source of names.
        Box::pin(unsafe { Mm::new(&self.ids, root, PagingMode::FourLevel) })
    }

    // Has programs of `mm`, or of none, run on `cpu`.
    fn run(&self, cpu: CpuId, mm: Option<&MyMm>) {
        let next = mm.map(|mm| mm.as_ref().pinned_context());
        // SAFETY: the thread plays `cpu`; whoever drops an `mm` has had it leave every CPU.
        self.on(cpu, || unsafe { switch_mm(self, cpu, next) });
    }

    // Maps new pages at `range`.
    fn map(&self, mm: &MyMm, range: VirtRange) {
        let flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE;
        for address in (range.start()..range.end()).step_by(4096) {
            let page = EntryValue::leaf(Level::Pte, PhysAddr::new((1 << 30) + address), flags);
            // SAFETY: no table of `mm` is freed meanwhile, and the page is nobody else's.
            unsafe { mm.space().map(self, address, Level::Pte, page) }.expect("frames are left");
        }
    }

    // A program on `cpu` uses the page at `address`. Whether it can is decided by the TLB, or by a
    // walk, which fills the TLB.
    fn touch(&self, cpu: CpuId, mm: &MyMm, address: u64) -> bool {
        let mut tlb = self.tlbs[cpu.index()].borrow_mut();
        // SAFETY: no table of `mm` is freed meanwhile.
        let walk = || unsafe { mm.space().lookup(self, address) }.translate(address).is_some();
        tlb.contains(&address) || (walk() && tlb.insert(address))
    }
}

fn frame(number: u64) -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new(number * 4096))
}

fn index_of(frame: PhysFrame) -> usize {
    usize::try_from(frame.start_address().as_u64() / 4096).expect("a small number")
}

fn area(start: u64, end: u64) -> Vma<()> {
    let range = VirtRange::new(start, end).expect("aligned, and not empty");
    Vma { range, kind: VmaKind::Normal, area: () }
}
