#![doc = "The gather alone: a kernel that walks, clears and flushes by itself, as it did before."]
// Its address space is a single table behind one lock; its TLB is a set of pages.
use core::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use mmu_gather::pagetable::{Level, VirtRange};
use mmu_gather::tlb::{FreedTables, PageSpan};
use mmu_gather::{FlushTlb, FreedPages, OwnContext, PageGather, Release, Room};
use spin::Mutex;
use x86_64::PhysAddr;
use x86_64::structures::paging::{PageTable, PageTableFlags, PhysFrame};

#[derive(Default)]
struct Kernel {
    tlb: RefCell<BTreeSet<u64>>,
    freed_pages: Cell<usize>,
}

// SAFETY: there is one TLB, and the call drops what the span asks for.
unsafe impl FlushTlb for Kernel {
    // Whatever `flush_tlb` needs to find the address space; there is only one here.
    type Context = OwnContext<()>;

    fn flush_tlb(&self, _: &Self::Context, span: Option<PageSpan>, _: FreedTables) {
        self.tlb.borrow_mut().retain(|page| span.is_some_and(|span| !(span.start..span.end).contains(page)));
    }
}

impl Release for Kernel {
    fn release_pages(&self, pages: FreedPages<'_>) {
        self.freed_pages.set(self.freed_pages.get() + pages.iter().count());
    }

    unsafe fn release_tables(&self, _: &[PhysFrame]) {
        unreachable!("this kernel keeps its tables, and queues none");
    }
}

fn munmap(kernel: &Kernel, context: &OwnContext<()>, table: &Mutex<PageTable>, range: VirtRange) {
    let mut gather = PageGather::new(kernel, context);
    let mut locked = table.lock();
    for address in (range.start()..range.end()).step_by(4096) {
        let entry = &mut locked[Level::Pte.index(address)];
        let Ok(frame) = entry.frame() else { continue };
        // (A kernel whose programs run meanwhile, and that looks at dirty bits, exchanges it.)
        entry.set_unused();
        // SAFETY: the entry has just been cleared, and held the one reference on its page.
        if unsafe { gather.queue_page(frame, address, Level::Pte) } == Room::Full {
            drop(locked);
            gather.flush_mmu();
            locked = table.lock();
        }
    }
    let flushed = gather.flush();
    // No CPU can use the pages any more. The lock may go, and only then are they freed.
    drop(locked);
    flushed.free();
}

pub(crate) fn main() {
    let (kernel, context, table) = (Kernel::default(), OwnContext::new(()), Mutex::new(PageTable::new()));
    for (number, entry) in (0..20).zip(table.lock().iter_mut()) {
        entry.set_addr(PhysAddr::new((1 << 30) + number * 4096), PageTableFlags::PRESENT);
        kernel.tlb.borrow_mut().insert(number * 4096);
    }
    munmap(&kernel, &context, &table, VirtRange::new(0, 19 * 4096).expect("aligned, and not empty"));
    assert_eq!(kernel.freed_pages.get(), 19);
    assert_eq!(kernel.tlb.take(), [19 * 4096].into(), "the last page is still mapped");
}
