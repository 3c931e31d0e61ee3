//! mprotect by the driver: no right outlives its flush, nothing is flushed for what was gained, and
//! a large page is not cut.
#![expect(unsafe_code, reason = "the rights are the caller's affair")]

use mmu_gather::pagetable::{EntryValue, Level, TableMemory as _, TableView, VirtRange};
use mmu_gather::tlb::{TlbEvent, UnmapBatch};
use mmu_gather::{CutLeaf, MmuGather};
use mmu_tests::{Access, Backing, CPU, Event, Fault, GIB, GatherOnPaper, MIB, Options, PaperKernel, range};
use x86_64::PhysAddr;
use x86_64::structures::paging::PageTableFlags;

const PAGE: u64 = 4096;
const READ: PageTableFlags = PageTableFlags::USER_ACCESSIBLE;
const WRITE: PageTableFlags = PageTableFlags::USER_ACCESSIBLE.union(PageTableFlags::WRITABLE);

/// Pages across two tables and a page of 2 MiB, all written to by CPU 1.
fn busy_kernel() -> PaperKernel {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map_range(mm, small());
    kernel.map(mm, GIB + 4 * MIB, Level::Pmd);
    kernel.run(CPU[1], mm);
    for address in pages().chain([GIB + 4 * MIB]) {
        kernel.touch(CPU[1], address, Access::Write).expect("mapped");
    }
    kernel.take_events();
    kernel
}

fn small() -> VirtRange {
    range(GIB + 2 * MIB - 8 * PAGE, GIB + 2 * MIB + 8 * PAGE)
}

fn pages() -> impl Iterator<Item = u64> {
    (small().start()..small().end()).step_by(4096)
}

fn protect(
    gather: &mut MmuGather<'_, '_, PaperKernel>,
    range: VirtRange,
    rights: PageTableFlags,
) -> Result<(), CutLeaf> {
    // SAFETY: programs may use the pages in whatever way.
    unsafe { gather.change_protection(range, |_, _, _| rights) }
}

fn nr_flushes(kernel: &PaperKernel) -> usize {
    kernel.count(|event| matches!(event, Event::Tlb(TlbEvent::Requested { .. })))
}

#[test]
fn no_program_writes_once_the_flush_has_returned() {
    let kernel = busy_kernel();
    let mm = kernel.mm(0);
    let mut gather = kernel.gather(mm);
    let all = range(small().start(), GIB + 6 * MIB);
    protect(&mut gather, all, READ).expect("no leaf is cut");
    kernel.touch(CPU[1], small().start(), Access::Write).expect("the old right is still cached");
    gather.flush().free();
    for address in pages().chain([GIB + 4 * MIB]) {
        assert_eq!(kernel.touch(CPU[1], address, Access::Write), Err(Fault::ReadOnly), "{address:#x}");
        kernel.touch(CPU[1], address, Access::Read).expect("still mapped");
    }
    assert_eq!(kernel.ledger().nr_held(), 17, "no page was freed");
}

#[test]
fn a_gather_that_is_forgotten_halfway_flushes_for_the_rights_when_it_is_dropped() {
    let kernel = busy_kernel();
    let mut gather = kernel.gather(kernel.mm(0));
    protect(&mut gather, small(), READ).expect("no leaf is cut");
    drop(gather);
    assert_eq!(kernel.touch(CPU[1], small().start(), Access::Write), Err(Fault::ReadOnly));
}

#[test]
fn nothing_is_flushed_for_rights_that_are_gained_or_stay() {
    let kernel = busy_kernel();
    let mm = kernel.mm(0);
    let mut gather = kernel.gather(mm);
    protect(&mut gather, small(), READ).expect("no leaf is cut");
    gather.flush().free();
    assert_eq!(nr_flushes(&kernel), 1);
    for rights in [READ, WRITE, WRITE] {
        let mut gather = kernel.gather(mm);
        protect(&mut gather, small(), rights).expect("no leaf is cut");
        gather.flush().free();
    }
    assert_eq!(nr_flushes(&kernel), 1);
    // What is cached does not do, so the CPU walks, and finds the new right.
    kernel.touch(CPU[1], small().start(), Access::Write).expect("writable again");
}

#[test]
fn execution_that_is_forbidden_is_flushed_for_and_allowing_it_is_not() {
    let kernel = busy_kernel();
    let mm = kernel.mm(0);
    for (rights, flushes) in
        [(WRITE | PageTableFlags::NO_EXECUTE, 1), (WRITE, 1), (PageTableFlags::WRITABLE, 2)]
    {
        let mut gather = kernel.gather(mm);
        protect(&mut gather, small(), rights).expect("no leaf is cut");
        gather.flush().free();
        assert_eq!(nr_flushes(&kernel), flushes, "{rights:?}");
        let value = kernel.lookup(mm, small().start()).value;
        let bits = PageTableFlags::NO_EXECUTE | WRITE;
        assert_eq!(value.flags() & bits, rights, "everything else stays");
        assert!(value.is_present() && value.is_dirty());
    }
}

#[test]
fn a_large_page_that_the_range_cuts_keeps_its_rights_and_all_others_change() {
    let kernel = busy_kernel();
    let mm = kernel.mm(0);
    let mut gather = kernel.gather(mm);
    let cut = protect(&mut gather, range(small().start(), GIB + 5 * MIB), READ);
    let cut = cut.expect_err("the range ends in a large page");
    assert_eq!((cut.address, cut.level), (GIB + 4 * MIB, Level::Pmd));
    // It is not reported twice.
    protect(&mut gather, small(), READ).expect("no leaf is cut");
    gather.split(Backing::Anonymous, GIB + 5 * MIB).expect("memory");
    protect(&mut gather, range(GIB + 4 * MIB, GIB + 5 * MIB), READ).expect("no leaf is cut any more");
    gather.flush().free();
    assert_eq!(kernel.touch(CPU[1], GIB + 5 * MIB - PAGE, Access::Write), Err(Fault::ReadOnly));
    kernel.touch(CPU[1], GIB + 5 * MIB, Access::Write).expect("beyond the range");
    for address in pages() {
        assert_eq!(kernel.touch(CPU[1], address, Access::Write), Err(Fault::ReadOnly), "{address:#x}");
    }
}

/// Reclaim has cleared an entry and not flushed: mprotect promises for that page, too.
#[test]
fn what_reclaim_has_cleared_and_not_flushed_is_made_up_for() {
    let one_table = range(small().start(), small().start() + 8 * PAGE);
    let large = range(GIB + 4 * MIB, GIB + 6 * MIB);
    for (range, level) in [(one_table, Level::Pte), (large, Level::Pmd)] {
        let kernel = busy_kernel();
        let mm = kernel.mm(0);
        let mut batch = UnmapBatch::new();
        kernel.reclaim_at(&mut batch, mm, range.start(), level);
        kernel.touch(CPU[1], range.start(), Access::Write).expect("cached, and not flushed yet");
        let mut gather = kernel.gather(mm);
        // No right is lost, so nothing else needs a flush.
        protect(&mut gather, range, WRITE).expect("no leaf is cut");
        gather.flush().free();
        assert_eq!(kernel.touch(CPU[1], range.start(), Access::Write), Err(Fault::NotPresent), "{level:?}");
        batch.flush(&kernel);
    }
}

#[test]
fn bits_that_hardware_ignores_change_as_answered_and_nothing_else_does() {
    let kernel = busy_kernel();
    let mm = kernel.mm(0);
    let before = kernel.lookup(mm, small().start()).value;
    let (soft, high) = (PageTableFlags::BIT_9 | PageTableFlags::BIT_11, PageTableFlags::BIT_52);
    for rights in [before.flags() | soft | high, before.flags(), PageTableFlags::all()] {
        let mut gather = kernel.gather(mm);
        protect(&mut gather, small(), rights).expect("no leaf is cut");
        gather.flush().free();
        let now = kernel.lookup(mm, small().start()).value;
        assert_eq!(
            now.flags() & (soft | high),
            rights & (soft | high),
            "{now:?} after {rights:?}, before {before:?}"
        );
        assert_eq!(now.leaf_address(Level::Pte), before.leaf_address(Level::Pte));
        let others = PageTableFlags::GLOBAL | PageTableFlags::NO_CACHE | PageTableFlags::HUGE_PAGE;
        let others = others | PageTableFlags::PRESENT | PageTableFlags::ACCESSED | PageTableFlags::DIRTY;
        assert_eq!(now.flags() & others, before.flags() & others, "{rights:?}");
    }
    assert_eq!(nr_flushes(&kernel), 1, "for what may no longer be executed, at the end");
}

#[test]
fn nothing_in_the_kernels_half_changes_and_no_range_is_too_large() {
    let kernel = busy_kernel();
    let mm = kernel.mm(0);
    // A writable page of 1 GiB at the very top.
    let top = kernel.allocate_table().expect("memory");
    let leaf = EntryValue::leaf(Level::Pud, PhysAddr::new(0), PageTableFlags::WRITABLE);
    // SAFETY: the table is new.
    let upper = unsafe { TableView::new(&kernel, top, Level::Pud) };
    // SAFETY: nobody uses the memory behind it.
    unsafe { upper.lock(&kernel).entry(u64::MAX).store(leaf) };
    // SAFETY: the address space lives to the end.
    let root = unsafe { mm.space().root_table(&kernel) };
    // SAFETY: no program uses the kernel's half.
    unsafe { root.lock(&kernel).entry(u64::MAX).store(EntryValue::table(top)) };
    let mut gather = kernel.gather(mm);
    protect(&mut gather, range(0, 1 << 56), READ).expect("no leaf is cut");
    gather.flush().free();
    assert_eq!(kernel.touch(CPU[1], GIB + 4 * MIB, Access::Write), Err(Fault::ReadOnly));
    assert_eq!(upper.load(u64::MAX), leaf);
}
