#![doc = "The engine walks, clears and frees; the kernel flushes by means of its own."]
// Its tables are its own, made by the mapper of the `x86_64` crate and taken over by the engine; one
// thread at a time walks them. Its CPUs are flushed by a broadcast instruction that names address
// spaces by number. A frame is memory of this process here, at the address that is its number, and
// all TLBs together are a set of pages.
use core::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use mmu_gather::pagetable::{AddressSpace, Bounds, NoLock, PagingMode, TableMemory, VirtRange};
use mmu_gather::tlb::{FreedTables, PageSpan};
use mmu_gather::{
    CutLeaf, FlushTlb, FreedPages, Limits, MmOf, OwnContext, Pages, Vma, VmaKind, exit_mmap, unmap_region,
};
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{
    FrameAllocator, Mapper, OffsetPageTable, Page, PageTable, PageTableFlags, PhysFrame, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

/// The number by which the broadcast names an address space.
type Asid = u16;
type MyMm = MmOf<OwnContext<Asid>>;

#[derive(Default)]
struct Kernel {
    tlbs: RefCell<BTreeSet<(Asid, u64)>>,
    nr_tables: Cell<usize>,
    freed_pages: Cell<usize>,
}

// SAFETY: the number of a frame is its address.
unsafe impl PageTableFrameMapping for Kernel {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        frame.start_address().as_u64() as *mut PageTable
    }
}

// SAFETY: a table is zeroed, and given out once until it is freed; one thread walks them.
unsafe impl TableMemory for Kernel {
    type Lock = NoLock;

    unsafe fn table_lock(&self, _: PhysFrame) -> &NoLock {
        &NoLock
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        let table = Box::into_raw(Box::new(PageTable::new()));
        self.nr_tables.set(self.nr_tables.get() + 1);
        PhysFrame::from_start_address(PhysAddr::new(table as u64)).ok()
    }

    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        for table in tables {
            // SAFETY: it comes from `allocate_table`, and nobody reaches it any more.
            drop(unsafe { Box::from_raw(self.frame_to_pointer(*table)) });
        }
        self.nr_tables.set(self.nr_tables.get() - tables.len());
    }
}

// SAFETY: the broadcast reaches every CPU, whatever it runs, and is complete when it returns.
unsafe impl FlushTlb for Kernel {
    type Context = OwnContext<Asid>;

    fn flush_tlb(&self, asid: &OwnContext<Asid>, span: Option<PageSpan>, _: FreedTables) {
        let forgets = |page: &u64| span.is_none_or(|span| (span.start..span.end).contains(page));
        self.tlbs.borrow_mut().retain(|(of, page)| *of != **asid || !forgets(page));
    }
}

impl Pages for Kernel {
    type Area = ();

    fn free_pages(&self, pages: FreedPages<'_>) {
        self.freed_pages.set(self.freed_pages.get() + pages.iter().count());
    }
}

// SAFETY: a table is a new page.
unsafe impl FrameAllocator<Size4KiB> for &Kernel {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        self.allocate_table()
    }
}

impl Kernel {
    // Maps pages at `range`, as this kernel always did.
    fn map(&self, root: PhysFrame, range: VirtRange) {
        // SAFETY: nobody else uses the table.
        let root = unsafe { &mut *self.frame_to_pointer(root) };
        // SAFETY: the number of a frame is its address.
        let mut mapper = unsafe { OffsetPageTable::new(root, VirtAddr::zero()) };
        for address in (range.start()..range.end()).step_by(4096) {
            let page = Page::<Size4KiB>::containing_address(VirtAddr::new(address));
            let frame = PhysFrame::containing_address(PhysAddr::new((1 << 30) + address));
            // SAFETY: the page is nobody else's.
            let mapped = unsafe { mapper.map_to(page, frame, PageTableFlags::PRESENT, &mut &*self) };
            mapped.expect("there is memory for tables").ignore();
        }
    }

    // A program uses the page at `address`. Whether it can is decided by the TLB of its CPU, or by a
    // walk, which fills it.
    fn touch(&self, mm: &MyMm, address: u64) -> bool {
        // SAFETY: no table of `mm` is freed meanwhile.
        let is_mapped = unsafe { mm.space().lookup(self, address) }.translate(address).is_some();
        let entry = (**mm.context(), address);
        if is_mapped { self.tlbs.borrow_mut().insert(entry) } else { self.tlbs.borrow().contains(&entry) }
    }
}

fn munmap(kernel: &Kernel, mm: &MyMm, vma: Vma<()>, neighbours: Bounds) -> Result<(), CutLeaf> {
    // SAFETY: one thread alone frees tables of `mm`, which is an address space of this kernel, and
    // nothing is mapped between the area and its neighbours. (A kernel with more threads holds its
    // map lock until this has returned.)
    let flushed = unsafe { unmap_region(kernel, mm, &Limits::DEFAULT, [vma], neighbours, || ()) }?;
    // No CPU can use the pages any more. Here the map lock is dropped.
    flushed.free();
    Ok(())
}

fn area(start: u64, end: u64) -> Vma<()> {
    let range = VirtRange::new(start, end).expect("aligned, and not empty");
    Vma { range, kind: VmaKind::Normal, area: () }
}

pub(crate) fn main() {
    let kernel = Kernel::default();
    let root = kernel.allocate_table().expect("there is memory for tables");
    let (code, data) = (area(0x1000, 0x3000), area(0x20_0000, 0x24_0000));
    for vma in [code, data] {
        kernel.map(root, vma.range);
    }
    // SAFETY: the tables below the root are this kernel's, and nobody else uses them.
    let space = unsafe { AddressSpace::adopt(&kernel, root, PagingMode::FourLevel) };
    // SAFETY: the broadcast knows it by this number.
    let mm = unsafe { MyMm::with_own_flush(space, 7) };
    assert!(kernel.touch(&mm, 0x1000) && kernel.touch(&mm, 0x20_0000));
    munmap(&kernel, &mm, data, Bounds::between(Some(code.range.end()), None))
        .expect("no large page is there");
    assert!(!kernel.touch(&mm, 0x20_0000), "no CPU can use the page any more");
    assert_eq!((kernel.freed_pages.get(), kernel.nr_tables.get()), (64, 4));

    // SAFETY: `code` is the last area, and no CPU runs programs of `mm` any more.
    unsafe { exit_mmap(&kernel, &mm, &Limits::DEFAULT, [code], || ()) }.free();
    // SAFETY: no CPU has the root in CR3 any more, and nothing is mapped below it.
    unsafe { kernel.free_tables(&[root]) };
    assert_eq!((kernel.freed_pages.get(), kernel.nr_tables.get()), (66, 0));
    assert!(kernel.tlbs.take().is_empty());
}
