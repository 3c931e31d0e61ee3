//! The gather alone: a kernel that walks, clears and flushes by itself loses nothing, and frees
//! nothing too early.
#![expect(unsafe_code, reason = "the flush, and what is queued, are taken on trust")]

use core::cell::{Cell, RefCell};
use core::panic::AssertUnwindSafe;
use core::ptr::NonNull;
use std::collections::BTreeSet;
use std::panic::catch_unwind;

use mmu_gather::pagetable::{Level, VirtRange};
use mmu_gather::tlb::{FreedTables, PageSpan};
use mmu_gather::{
    BatchPage, FlushTlb, FreedPages, Limits, OwnContext, PageGather, Release, Room, TlbContext as _,
};
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

const PAGE: u64 = 4096;

/// A kernel with one TLB: the pages that a CPU can still use. Page n is behind frame n.
#[derive(Default)]
struct Kernel {
    tlb: RefCell<BTreeSet<u64>>,
    /// Tables that a CPU can still walk.
    walkable: RefCell<BTreeSet<PhysFrame>>,
    flushes: RefCell<Vec<(PageSpan, FreedTables)>>,
    freed: RefCell<Vec<PhysFrame>>,
    batches: Cell<u32>,
    lends_batches: bool,
    unwinds: Cell<bool>,
}

#[repr(align(4096))]
struct Batch(#[expect(dead_code, reason = "memory")] [u8; 4096]);

// SAFETY: there is one TLB, and the call drops what the span asks for.
unsafe impl FlushTlb for Kernel {
    type Context = OwnContext<()>;

    fn flush_tlb(&self, _: &OwnContext<()>, span: Option<PageSpan>, tables: FreedTables) {
        assert!(!self.unwinds.get(), "the flush of the kernel's own unwinds");
        let span = span.expect("a gather of pages knows its span");
        self.tlb.borrow_mut().retain(|page| !(span.start..span.end).contains(page));
        if tables == FreedTables::Yes {
            self.walkable.borrow_mut().clear();
        }
        self.flushes.borrow_mut().push((span, tables));
    }
}

impl Release for Kernel {
    fn release_pages(&self, pages: FreedPages<'_>) {
        for run in pages.iter() {
            for frame in (0..u64::from(run.nr_pages)).map(|index| run.frame + index) {
                let page = frame.start_address().as_u64();
                assert!(!self.tlb.borrow().contains(&page), "G1: {page:#x} is freed and a CPU can use it");
                self.freed.borrow_mut().push(frame);
            }
        }
    }

    unsafe fn release_tables(&self, tables: &[PhysFrame]) {
        for table in tables {
            assert!(!self.walkable.borrow().contains(table), "G1: {table:?} is freed and a CPU can walk it");
            self.freed.borrow_mut().push(*table);
        }
    }

    fn allocate_batch(&self) -> Option<BatchPage> {
        if !self.lends_batches {
            return None;
        }
        self.batches.set(self.batches.get() + 1);
        let page = NonNull::from(Box::leak(Box::new(Batch([0; 4096])))).cast();
        // SAFETY: 4096 bytes, aligned, nobody else's.
        Some(unsafe { BatchPage::new(page) })
    }

    fn free_batch(&self, page: BatchPage) {
        self.batches.set(self.batches.get() - 1);
        // SAFETY: it comes from `allocate_batch`.
        drop(unsafe { Box::from_raw(page.into_inner().cast::<Batch>().as_ptr()) });
    }
}

impl Kernel {
    fn lending_batches() -> Self {
        Self { lends_batches: true, ..Self::default() }
    }

    /// Maps and unmaps page `number`, and queues it.
    fn queue(&self, gather: &mut PageGather<'_, '_, Self>, number: u64) -> Room {
        self.tlb.borrow_mut().insert(number * PAGE);
        // SAFETY: there are no entries; nobody else frees the page.
        unsafe { gather.queue_page(frame(number), number * PAGE, Level::Pte) }
    }

    /// Unhooks the table at frame `number`, and queues it.
    fn queue_table(&self, gather: &mut PageGather<'_, '_, Self>, number: u64, address: u64) {
        self.walkable.borrow_mut().insert(frame(number));
        // SAFETY: as in `queue`.
        unsafe { gather.queue_table(frame(number), address, Level::Pte) };
    }

    fn nr_freed(&self) -> usize {
        self.freed.borrow().len()
    }
}

fn frame(number: u64) -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new(number * PAGE))
}

/// Pages queued up to the first answer that the gather is full.
fn pages_until_full(kernel: &Kernel, limits: &Limits) -> u64 {
    let context = OwnContext::new(());
    let mut gather = PageGather::new(kernel, &context).with_limits(limits);
    let pages = (1..).find(|number| kernel.queue(&mut gather, *number) == Room::Full).expect("it gets full");
    assert_eq!((kernel.nr_freed(), kernel.flushes.borrow().len()), (0, 0), "queueing alone does neither");
    gather.flush_mmu();
    assert_eq!((kernel.nr_freed() as u64, kernel.flushes.borrow().len()), (pages, 1));
    assert_eq!(kernel.queue(&mut gather, pages + 1), Room::Left, "it can be filled again");
    gather.flush().free();
    assert_eq!(kernel.nr_freed() as u64, pages + 1);
    assert_eq!(kernel.batches.get(), 0, "batch pages come back");
    pages
}

#[test]
fn pages_are_queued_without_a_flush_until_the_answer_is_full() {
    assert_eq!(pages_until_full(&Kernel::default(), &Limits::DEFAULT), 7, "without batch pages");
    assert_eq!(pages_until_full(&Kernel::lending_batches(), &Limits::DEFAULT.with_batch_pages(1)), 7 + 509);
    assert_eq!(pages_until_full(&Kernel::lending_batches(), &Limits::DEFAULT), 7 + 19 * 509);
}

#[test]
fn nothing_is_freed_before_the_flush_and_everything_once() {
    let (kernel, context) = (Kernel::lending_batches(), OwnContext::new(()));
    let mut gather = PageGather::new(&kernel, &context);
    for number in 1..=600 {
        assert_eq!(kernel.queue(&mut gather, number), Room::Left);
    }
    let flushed = gather.flush();
    assert!(kernel.tlb.borrow().is_empty(), "every CPU has forgotten");
    assert_eq!(kernel.nr_freed(), 0, "and nothing is free");
    flushed.free();
    let mut freed = kernel.freed.take();
    freed.sort();
    assert_eq!(freed, (1..=600).map(frame).collect::<Vec<_>>());
    assert_eq!(kernel.batches.get(), 0);
}

#[test]
fn a_gather_that_is_dropped_flushes_and_frees() {
    let (kernel, context) = (Kernel::lending_batches(), OwnContext::new(()));
    let mut gather = PageGather::new(&kernel, &context);
    for number in 1..=20 {
        let _ = kernel.queue(&mut gather, number);
    }
    drop(gather);
    assert_eq!((kernel.nr_freed(), kernel.batches.get()), (20, 0));
    // What was flushed and not freed is freed, too.
    let mut gather = PageGather::new(&kernel, &context);
    let _ = kernel.queue(&mut gather, 21);
    drop(gather.flush());
    let mut gather = PageGather::new(&kernel, &context);
    let _ = kernel.queue(&mut gather, 22);
    gather.flush_tlb_only();
    drop(gather);
    assert_eq!(kernel.nr_freed(), 22);
}

#[test]
fn a_gather_of_nothing_neither_flushes_nor_frees() {
    let (kernel, context) = (Kernel::default(), OwnContext::new(()));
    PageGather::new(&kernel, &context).flush().free();
    drop(PageGather::new(&kernel, &context));
    let mut gather = PageGather::new(&kernel, &context);
    gather.flush_mmu();
    gather.flush_mmu();
    gather.flush().free();
    assert!(kernel.flushes.borrow().is_empty());
}

#[test]
fn tables_wait_with_the_pages_or_go_alone_when_no_batch_page_can_be_had() {
    let (kernel, context) = (Kernel::lending_batches(), OwnContext::new(()));
    let mut gather = PageGather::new(&kernel, &context);
    let _ = kernel.queue(&mut gather, 1);
    kernel.queue_table(&mut gather, 100, 0x1234);
    kernel.queue_table(&mut gather, 101, 0x40_0000);
    assert_eq!(kernel.nr_freed(), 0);
    gather.flush().free();
    assert_eq!(kernel.nr_freed(), 3);
    let (span, tables) = kernel.flushes.borrow()[0];
    assert_eq!((span.start, span.end, tables), (0x1000, 0x40_1000, FreedTables::Yes));

    let kernel = Kernel::default();
    let mut gather = PageGather::new(&kernel, &context);
    let _ = kernel.queue(&mut gather, 1);
    kernel.queue_table(&mut gather, 100, PAGE);
    assert_eq!((kernel.nr_freed(), kernel.flushes.borrow().len()), (0, 0), "one needs no batch page");
    kernel.queue_table(&mut gather, 101, 0x40_0000);
    assert_eq!((kernel.nr_freed(), kernel.flushes.borrow().len()), (3, 1), "flushed and freed at once");
    gather.flush().free();
    assert_eq!(kernel.flushes.borrow().len(), 1);
}

#[test]
fn as_many_tables_as_the_limits_allow_wait() {
    let (kernel, context) = (Kernel::lending_batches(), OwnContext::new(()));
    let mut gather = PageGather::new(&kernel, &context).with_limits(&Limits::DEFAULT.with_table_slots(3));
    for number in 0..2 {
        kernel.queue_table(&mut gather, 100 + number, number << 21);
    }
    assert_eq!(kernel.nr_freed(), 0);
    kernel.queue_table(&mut gather, 102, 2 << 21);
    assert_eq!((kernel.nr_freed(), kernel.flushes.borrow().len()), (3, 1));
}

#[test]
fn the_flush_covers_what_was_queued_at_the_stride_of_the_smallest() {
    let (kernel, context) = (Kernel::default(), OwnContext::new(()));
    let mut gather = PageGather::new(&kernel, &context);
    // SAFETY: as in `queue`.
    let _ = unsafe { gather.queue_page(frame(512), 3 << 20, Level::Pmd) };
    gather.flush_tlb_only();
    let run = VirtRange::new(0x5000, 0x8000).expect("a good range");
    // SAFETY: as in `queue`.
    let _ = unsafe { gather.queue_pages(frame(5), 3, run) };
    gather.changed(VirtRange::new(0x9000, 0xa000).expect("a good range"), Level::Pte);
    gather.flush().free();
    let spans = [(2 << 20, 4 << 20, 21), (0x5000, 0xa000, 12)];
    let spans =
        spans.map(|(start, end, stride_shift)| (PageSpan { start, end, stride_shift }, FreedTables::No));
    assert_eq!(*kernel.flushes.borrow(), spans);
    assert_eq!(kernel.nr_freed(), 4, "one page of 2 MiB, and a run of three");
}

#[test]
fn a_kernel_that_goes_on_though_the_gather_is_full_is_told() {
    let (kernel, context) = (Kernel::default(), OwnContext::new(()));
    let mut gather = PageGather::new(&kernel, &context);
    for number in 1..=7 {
        let _ = kernel.queue(&mut gather, number);
    }
    let went_on = catch_unwind(AssertUnwindSafe(|| kernel.queue(&mut gather, 8)));
    if cfg!(debug_assertions) {
        let said = went_on.expect_err("a debug build names it");
        assert!(said.downcast_ref::<&str>().expect("words").contains("call flush_mmu before the next page"));
    } else {
        assert_eq!(went_on.expect("a release build frees at once"), Room::Left);
        assert_eq!(kernel.nr_freed(), 7);
    }
}

#[test]
fn what_waits_leaks_if_the_flush_unwinds() {
    let (kernel, context) = (Kernel::lending_batches(), OwnContext::new(()));
    let mut gather = PageGather::new(&kernel, &context);
    let _ = kernel.queue(&mut gather, 1);
    kernel.unwinds.set(true);
    catch_unwind(AssertUnwindSafe(|| gather.flush())).expect_err("the kernel's flush unwinds");
    assert_eq!(kernel.nr_freed(), 0);
}

/// Nothing links a root, so the caller is wrong; no CPU walks it all the same when it is freed.
#[test]
fn a_table_of_the_topmost_level_is_flushed_for_like_any_other() {
    for kernel in [Kernel::default(), Kernel::lending_batches()] {
        let context = OwnContext::new(());
        kernel.walkable.borrow_mut().insert(frame(9));
        let mut gather = PageGather::new(&kernel, &context);
        // SAFETY: not kept, as the test says.
        unsafe { gather.queue_table(frame(9), 0, Level::Pgd) };
        gather.flush().free();
        assert_eq!(*kernel.freed.borrow(), [frame(9)]);
    }
}

/// Rights that were taken away, say: an `MmuGather` of the same address space makes up for it.
#[test]
fn a_flush_that_unwinds_is_owed_by_the_address_space() {
    let (kernel, context) = (Kernel::default(), OwnContext::new(()));
    let page = VirtRange::new(8 * PAGE, 9 * PAGE).expect("a page");
    for dropped in [false, true] {
        let mut gather = PageGather::new(&kernel, &context);
        gather.changed(page, Level::Pte);
        kernel.unwinds.set(true);
        let unwound =
            catch_unwind(AssertUnwindSafe(|| if dropped { drop(gather) } else { gather.flush().free() }));
        unwound.expect_err("the kernel's flush unwinds");
        kernel.unwinds.set(false);
        assert!(context.has_deferred_flushes(), "dropped: {dropped}");
    }
}
