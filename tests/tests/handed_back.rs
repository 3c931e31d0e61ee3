//! Frames that go back to the caller and not to an allocator, frames that are counted objects, and
//! what a kernel with a flush of its own is asked for.
#![expect(unsafe_code, reason = "a small kernel: page tables, counts, a flush")]

use core::cell::{Cell, RefCell};
use core::panic::AssertUnwindSafe;
use std::collections::BTreeSet;
use std::panic::catch_unwind;
use std::sync::Arc;

use mmu_gather::pagetable::{
    AddressSpace, Bounds, EntryValue, Level, PagingMode, TableLock, TableMemory, VirtRange,
};
use mmu_gather::tlb::{FreedTables, PageSpan};
use mmu_gather::{
    FlushTlb, FreeWith, FreedPages, Limits, MmOf, MmuGather, OwnContext, Pages, TlbContext as _, Vma,
    VmaKind, exit_mmap, unmap_region, zap_page_range,
};
use x86_64::PhysAddr;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PageTableFlags, PhysFrame};

const PAGE: u64 = 4096;

/// A page: an object with a count. The number of its frame is its address, as of a page of metadata
/// found by number.
#[repr(align(4096))]
struct Page(#[expect(dead_code, reason = "memory")] [u8; 4096]);

/// What the kernel was asked for, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Did {
    LeftHere,
    Flushed(Option<PageSpan>, FreedTables),
    Freed(usize),
    LeftEverywhere,
}

/// A kernel that flushes by itself, whose entries each hold a strong reference on an [`Arc`].
#[derive(Default)]
struct Kernel {
    /// Frames that a CPU can still use.
    tlb: RefCell<BTreeSet<u64>>,
    did: RefCell<Vec<Did>>,
    unwinds: Cell<bool>,
}

type MyMm = MmOf<OwnContext<&'static str>>;

#[repr(C, align(4096))]
struct TablePage {
    table: PageTable,
    lock: TableLock<spin::Spin>,
}

// SAFETY: the number of a frame is its address.
unsafe impl PageTableFrameMapping for Kernel {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        frame.start_address().as_u64() as *mut PageTable
    }
}

// SAFETY: a table is zeroed, and given out once until it is freed; each has a lock of its own.
unsafe impl TableMemory for Kernel {
    type Lock = TableLock<spin::Spin>;

    unsafe fn table_lock(&self, table: PhysFrame) -> &TableLock<spin::Spin> {
        // SAFETY: tables come from `allocate_table`, and this one is not freed meanwhile.
        unsafe { &(*self.frame_to_pointer(table).cast::<TablePage>()).lock }
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        let page = Box::into_raw(Box::new(TablePage { table: PageTable::new(), lock: TableLock::new(()) }));
        PhysFrame::from_start_address(PhysAddr::new(page as u64)).ok()
    }

    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        for table in tables {
            // SAFETY: it comes from `allocate_table`, and nobody reaches it any more.
            drop(unsafe { Box::from_raw(self.frame_to_pointer(*table).cast::<TablePage>()) });
        }
    }
}

// SAFETY: there is one TLB, which forgets what it is asked to.
unsafe impl FlushTlb for Kernel {
    type Context = OwnContext<&'static str>;

    fn flush_tlb(&self, name: &Self::Context, span: Option<PageSpan>, tables: FreedTables) {
        assert_eq!(**name, "shell");
        assert!(!self.unwinds.get(), "the flush of the kernel's own unwinds");
        self.did.borrow_mut().push(Did::Flushed(span, tables));
        self.tlb.borrow_mut().clear();
    }

    unsafe fn leave_here(&self, _: &Self::Context) {
        self.did.borrow_mut().push(Did::LeftHere);
    }

    unsafe fn leave_everywhere(&self, _: &Self::Context) {
        self.did.borrow_mut().push(Did::LeftEverywhere);
    }
}

impl Pages for Kernel {
    type Area = ();

    fn free_pages(&self, pages: FreedPages<'_>) {
        for run in pages.iter() {
            let address = run.frame.start_address().as_u64();
            assert!(!self.tlb.borrow().contains(&address), "G1: {address:#x} is freed, and a CPU can use it");
            // SAFETY: the entry held the reference that `map` has put there, and has given it up.
            drop(unsafe { Arc::from_raw(address as *const Page) });
        }
        self.did.borrow_mut().push(Did::Freed(pages.iter().count()));
    }
}

impl Kernel {
    fn new_mm(&self) -> MyMm {
        let root = self.allocate_table().expect("memory");
        // SAFETY: an empty table of this address space alone.
        let space = unsafe { AddressSpace::new(root, PagingMode::FourLevel) };
        // SAFETY: the flush knows it by this name.
        unsafe { MmOf::with_own_flush(space, "shell") }
    }

    /// Maps `page` at `address`: the entry takes the reference.
    fn map(&self, mm: &MyMm, address: u64, page: Arc<Page>) {
        let frame = Arc::into_raw(page) as u64;
        let flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE;
        let entry = EntryValue::leaf(Level::Pte, PhysAddr::new(frame), flags);
        // SAFETY: no table of `mm` is freed meanwhile, and the entry holds the page.
        unsafe { mm.space().map(self, address, Level::Pte, entry) }.expect("memory");
        self.tlb.borrow_mut().insert(frame);
    }

    fn free_root(&self, mm: &MyMm) {
        // SAFETY: nothing is mapped below it any more, and no CPU exists that has it loaded.
        unsafe { self.free_tables(&[mm.space().root()]) };
    }
}

fn new_page() -> Arc<Page> {
    Arc::new(Page([0; 4096]))
}

fn area(start: u64, nr_pages: u64) -> Vma<()> {
    let range = VirtRange::new(start, start + nr_pages * PAGE).expect("a good range");
    Vma { range, kind: VmaKind::Normal, area: () }
}

#[test]
fn pages_that_are_counted_objects_end_with_their_last_reference() {
    let (kernel, shared) = (Kernel::default(), new_page());
    // The address of an `Arc`'s value is behind its counts, so it must be aligned to be a frame.
    assert!((Arc::as_ptr(&shared) as u64).is_multiple_of(PAGE));
    let mm = kernel.new_mm();
    let own = new_page();
    let gone = Arc::downgrade(&own);
    kernel.map(&mm, 0x1000, own);
    kernel.map(&mm, 0x2000, Arc::clone(&shared));
    kernel.map(&mm, 0x3000, Arc::clone(&shared));
    assert_eq!(Arc::strong_count(&shared), 3);
    let vma = area(0x1000, 3);
    // SAFETY: this thread alone unmaps.
    let flushed = unsafe { zap_page_range(&kernel, &mm, &Limits::DEFAULT, &vma, vma.range) };
    let flushed = flushed.expect("no large page is there");
    assert_eq!(gone.strong_count(), 1, "flushed, and not freed");
    flushed.free();
    assert_eq!((gone.strong_count(), Arc::strong_count(&shared)), (0, 1));
    // SAFETY: this thread alone unmaps; there is no other area.
    unsafe { unmap_region(&kernel, &mm, &Limits::DEFAULT, [vma], Bounds::whole(), || ()) }
        .expect("no large page is there")
        .free();
    kernel.free_root(&mm);
}

#[test]
fn pages_are_handed_back_also_those_of_forced_flushes_and_of_a_gather_that_is_dropped() {
    let kernel = Kernel::default();
    let mm = kernel.new_mm();
    let vma = area(0x1000, 100);
    let handed_back = RefCell::new(Vec::new());
    let take = |pages: FreedPages<'_>| {
        for run in pages.iter() {
            assert!(!kernel.tlb.borrow().contains(&run.frame.start_address().as_u64()), "G1");
            handed_back.borrow_mut().push(run.frame);
        }
    };
    for ends in ["free", "drop", "gather"] {
        for page in 1..=100 {
            kernel.map(&mm, page * PAGE, new_page());
        }
        let collector = FreeWith::new(&kernel, &take);
        if ends == "gather" {
            // SAFETY: this thread alone unmaps.
            let mut gather = unsafe { MmuGather::new(&collector, &mm) };
            gather.unmap_vmas([vma], vma.range).expect("no large page is there");
        } else {
            // SAFETY: this thread alone unmaps.
            let flushed = unsafe { zap_page_range(&collector, &mm, &Limits::DEFAULT, &vma, vma.range) };
            let flushed = flushed.expect("no large page is there");
            assert_eq!(
                handed_back.borrow().len(),
                98,
                "without batch pages every seven pages are flushed for"
            );
            if ends == "free" { flushed.free() } else { drop(flushed) }
        }
        assert_eq!(handed_back.borrow().len(), 100, "{ends}");
        for frame in handed_back.take() {
            // SAFETY: the entry held it.
            drop(unsafe { Arc::from_raw(frame.start_address().as_u64() as *const Page) });
        }
    }
    assert!(
        !kernel.did.borrow().iter().any(|did| matches!(did, Did::Freed(_))),
        "nothing went to the kernel"
    );
    // SAFETY: nobody runs programs there, and nothing is mapped.
    unsafe { exit_mmap(&kernel, &mm, &Limits::DEFAULT, [vma], || ()) }.free();
    kernel.free_root(&mm);
}

#[test]
fn a_kernel_that_flushes_by_itself_is_asked_to_leave_first_and_last_when_a_space_ends() {
    let kernel = Kernel::default();
    let mm = kernel.new_mm();
    kernel.map(&mm, 0x1000, new_page());
    // SAFETY: nobody runs programs there, and there is no other area.
    unsafe { exit_mmap(&kernel, &mm, &Limits::DEFAULT, [area(0x1000, 1)], || ()) }.free();
    let did = kernel.did.take();
    // No batch page can be had, so one table waits, and the second is flushed for at once. The
    // third waits again.
    let whole = Did::Flushed(None, FreedTables::Yes);
    assert_eq!(did, [Did::LeftHere, whole, Did::Freed(1), whole, Did::LeftEverywhere]);
    kernel.free_root(&mm);
}

#[test]
fn a_flush_that_is_owed_is_made_up_for_by_whoever_looks_next() {
    let kernel = Kernel::default();
    let mm = kernel.new_mm();
    kernel.map(&mm, 0x1000, new_page());
    kernel.unwinds.set(true);
    // SAFETY: this thread alone unmaps.
    let zap =
        || unsafe { zap_page_range(&kernel, &mm, &Limits::DEFAULT, &area(0x1000, 1), area(0x1000, 1).range) };
    catch_unwind(AssertUnwindSafe(zap)).expect_err("the kernel's flush unwinds");
    kernel.unwinds.set(false);
    assert!(mm.context().has_deferred_flushes() && !kernel.tlb.borrow().is_empty());
    zap().expect("no large page is there").free();
    assert_eq!(
        *kernel.did.borrow(),
        [Did::Flushed(None, FreedTables::Yes)],
        "all of it, and nothing is freed"
    );
    assert!(!mm.context().has_deferred_flushes() && kernel.tlb.borrow().is_empty());
    // Once.
    zap().expect("no large page is there").free();
    assert_eq!(kernel.did.borrow().len(), 1);
    // SAFETY: nobody runs programs there.
    unsafe { exit_mmap(&kernel, &mm, &Limits::DEFAULT, [area(0x1000, 1)], || ()) }.free();
    kernel.free_root(&mm);
}

/// Two gathers at once: the one that ends first covers what the other has cleared (rule G6).
#[test]
fn a_gather_flushes_all_of_the_space_while_another_is_open() {
    let kernel = Kernel::default();
    let mm = kernel.new_mm();
    kernel.map(&mm, 0x1000, new_page());
    // SAFETY: this thread alone unmaps.
    let mut first = unsafe { MmuGather::new(&kernel, &mm) };
    first.unmap_vmas([area(0x1000, 1)], area(0x1000, 1).range).expect("no large page is there");
    // SAFETY: as above.
    let second = unsafe { MmuGather::new(&kernel, &mm) };
    second.flush().free();
    assert_eq!(*kernel.did.borrow(), [Did::Flushed(None, FreedTables::Yes)]);
    first.flush().free();
    // SAFETY: nobody runs programs there.
    unsafe { exit_mmap(&kernel, &mm, &Limits::DEFAULT, [area(0x1000, 1)], || ()) }.free();
    kernel.free_root(&mm);
}
