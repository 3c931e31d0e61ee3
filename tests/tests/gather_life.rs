//! From the first entry cleared to the last page freed: modes, nesting, and gathers that end early.

use mmu_gather::pagetable::{Bounds, Level, UnhookedTable};
use mmu_gather::tlb::{OnlineCpus, PcidSupport, TlbEvent};
use mmu_gather::{GatherEvent, GatherMode, Limits};
use mmu_tests::{
    Access, Backing, CPU, Event, Fault, GIB, GatherOnPaper, MIB, Options, PaperKernel, PaperMm, area, range,
};

const PAGE: u64 = 4096;

fn kernel_with_pages(options: Options, nr_pages: u64) -> PaperKernel {
    let kernel = PaperKernel::new(options);
    let mm = kernel.new_mm();
    kernel.map_range(mm, range(GIB, GIB + nr_pages * PAGE));
    for cpu in kernel.cpu_ids() {
        kernel.run(cpu, mm);
        for page in 0..nr_pages {
            kernel.touch(cpu, GIB + page * PAGE, Access::Write).expect("mapped");
        }
    }
    kernel.take_events();
    kernel
}

#[test]
fn an_unfinished_gather_finishes_itself_when_dropped() {
    let kernel = kernel_with_pages(Options::default(), 600);
    let mm = kernel.mm(0);
    let vma = area(GIB, GIB + 600 * PAGE, Backing::Anonymous);
    let mut gather = kernel.gather(mm);
    gather.unmap_vmas([vma], vma.range).expect("no leaf is cut");
    gather.unhook_tables([vma], Bounds::whole());
    assert_eq!(mm.open_gathers(), 1);
    assert!(kernel.batches_lent() > 0);
    drop(gather);
    assert_eq!(mm.open_gathers(), 0);
    assert_eq!(kernel.batches_lent(), 0);
    assert_eq!(kernel.ledger().nr_held(), 0);
    assert_eq!(kernel.nr_tables(mm), [0; 4]);
    for cpu in kernel.cpu_ids() {
        assert_eq!(kernel.touch(cpu, GIB, Access::Read), Err(Fault::NotPresent), "{cpu}");
    }
}

#[test]
fn a_flushed_gather_frees_as_well_when_dropped_as_when_told() {
    for told in [false, true] {
        let kernel = kernel_with_pages(Options::default(), 20);
        let vma = area(GIB, GIB + 20 * PAGE, Backing::Anonymous);
        let flushed = kernel.zap(kernel.mm(0), &vma, vma.range);
        assert_eq!(kernel.ledger().nr_held(), 20, "flushed, not freed");
        assert_eq!(kernel.mm(0).open_gathers(), 0, "the flush is what others wait for");
        assert_eq!(kernel.cached(CPU[1], GIB), None);
        if told {
            flushed.free();
        } else {
            drop(flushed);
        }
        assert_eq!(kernel.ledger().nr_held(), 0);
        assert_eq!(kernel.batches_lent(), 0);
    }
}

/// Empty gathers happen all the time. If they flushed everything, the kernel would be slow and no
/// test would fail (DragonOS).
#[test]
fn an_empty_gather_flushes_nothing_and_frees_nothing() {
    let kernel = kernel_with_pages(Options::default(), 1);
    let mm = kernel.mm(0);
    drop(kernel.gather(mm));
    kernel.gather(mm).flush().free();
    let vma = area(2 * GIB, 3 * GIB, Backing::Anonymous);
    kernel.zap(mm, &vma, vma.range).free();
    kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::between(Some(GIB + PAGE), None));
    assert_eq!(kernel.count(|event| matches!(event, Event::Tlb(TlbEvent::Requested { .. }))), 0);
    assert_eq!(mm.context().tlb_gen().get(), 0);
}

#[test]
fn a_gather_can_be_filled_again_after_a_flush() {
    let kernel = kernel_with_pages(Options::default(), 30);
    let mm = kernel.mm(0);
    let vma = area(GIB, GIB + 30 * PAGE, Backing::Anonymous);
    let mut gather = kernel.gather(mm);
    for part in 0..3 {
        let start = GIB + part * 10 * PAGE;
        gather.zap_vma_range(&vma, range(start, start + 10 * PAGE)).expect("no leaf is cut");
        gather.flush_mmu();
        assert_eq!(kernel.ledger().nr_held() as u64, 20 - part * 10);
        assert_eq!(kernel.cached(CPU[1], start), None);
    }
    gather.flush_mmu();
    drop(gather);
    assert_eq!(kernel.count(|event| matches!(event, Event::Ipi { to } if *to == CPU[1])), 3);
}

#[test]
fn a_tlb_only_flush_frees_nothing_and_what_it_covered_is_freed_without_another() {
    let kernel = kernel_with_pages(Options::default(), 5);
    let mm = kernel.mm(0);
    let vma = area(GIB, GIB + 5 * PAGE, Backing::Anonymous);
    let mut gather = kernel.gather(mm);
    gather.zap_vma_range(&vma, vma.range).expect("no leaf is cut");
    gather.flush_tlb_only();
    assert_eq!(kernel.ledger().nr_held(), 5);
    gather.flush_tlb_only();
    gather.flush().free();
    assert_eq!(kernel.ledger().nr_held(), 0);
    assert_eq!(kernel.count(|event| matches!(event, Event::Ipi { to } if *to == CPU[1])), 1);
}

#[test]
fn two_gathers_on_one_mm_both_flush_all_of_it() {
    let kernel = kernel_with_pages(Options::default(), 8);
    let mm = kernel.mm(0);
    let vma = area(GIB, GIB + 8 * PAGE, Backing::Anonymous);
    let mut first = kernel.gather(mm);
    first.zap_vma_range(&vma, range(GIB, GIB + 4 * PAGE)).expect("no leaf is cut");
    // The second gather finds the pages of the first unmapped already, and must not return while a
    // CPU can use them.
    let second = kernel.zap(mm, &vma, vma.range);
    assert_eq!(kernel.count(|event| *event == Event::Gather(GatherEvent::NestedFlush)), 1);
    for cpu in kernel.cpu_ids() {
        assert_eq!(kernel.cached(cpu, GIB), None, "{cpu}");
    }
    second.free();
    first.flush().free();
    assert_eq!(kernel.ledger().nr_held(), 0);
}

/// The first gather to finish sees that the second is still open, and flushes what the second
/// cleared, too.
#[test]
fn the_gather_that_finishes_first_covers_what_the_other_cleared() {
    let kernel = kernel_with_pages(Options::default(), 8);
    let mm = kernel.mm(0);
    let vma = area(GIB, GIB + 8 * PAGE, Backing::Anonymous);
    let mut first = kernel.gather(mm);
    let mut second = kernel.gather(mm);
    second.zap_vma_range(&vma, vma.range).expect("no leaf is cut");
    first.zap_vma_range(&vma, vma.range).expect("no leaf is cut");
    first.flush().free();
    assert_eq!(kernel.cached(CPU[2], GIB + 7 * PAGE), None);
    assert_eq!(kernel.ledger().nr_held(), 8, "the second holds them still");
    second.flush().free();
    assert_eq!(kernel.ledger().nr_held(), 0);
}

#[test]
fn gathers_on_different_address_spaces_do_not_disturb_each_other() {
    let kernel = kernel_with_pages(Options::default(), 2);
    let (mm, other) = (kernel.mm(0), kernel.new_mm());
    let open = kernel.gather(other);
    let vma = area(GIB, GIB + 2 * PAGE, Backing::Anonymous);
    kernel.zap(mm, &vma, vma.range).free();
    assert_eq!(kernel.count(|event| *event == Event::Gather(GatherEvent::NestedFlush)), 0);
    drop(open);
}

#[test]
fn a_forced_flush_of_a_nested_gather_is_whole_too() {
    let kernel = kernel_with_pages(Options::default(), 40);
    let mm = kernel.mm(0);
    let vma = area(GIB, GIB + 40 * PAGE, Backing::Anonymous);
    let mut first = kernel.gather(mm);
    first.zap_vma_range(&vma, range(GIB + 39 * PAGE, GIB + 40 * PAGE)).expect("no leaf is cut");
    let small = Limits::DEFAULT.with_bundle_slots(4).with_batch_pages(0);
    let mut second = kernel.gather(mm).with_limits(&small);
    second.zap_vma_range(&vma, range(GIB, GIB + 4 * PAGE)).expect("no leaf is cut");
    assert_eq!(kernel.count(|event| *event == Event::Gather(GatherEvent::ForcedFlush)), 1);
    assert_eq!(kernel.cached(CPU[1], GIB + 39 * PAGE), None, "the first's page too");
    drop(second);
    drop(first);
}

#[test]
fn with_one_cpu_online_the_flush_is_local_and_pages_still_wait_for_it() {
    let options = Options { cpus: 1, online: OnlineCpus::One, ..Options::default() };
    let kernel = kernel_with_pages(options, 20);
    let mm = kernel.mm(0);
    let vma = area(GIB, GIB + 20 * PAGE, Backing::Anonymous);
    let mut gather = kernel.gather(mm);
    assert_eq!(gather.mode(), GatherMode::Shared, "a program may preempt the caller");
    gather.unmap_vmas([vma], vma.range).expect("no leaf is cut");
    assert!(kernel.cached(CPU[0], GIB).is_some(), "cleared, not flushed");
    assert_eq!(kernel.ledger().nr_held(), 20, "nothing is freed before the flush");
    gather.unhook_tables([vma], Bounds::whole());
    gather.flush().free();
    assert_eq!(kernel.cached(CPU[0], GIB), None);
    assert_eq!(kernel.ledger().nr_held(), 0);
    assert_eq!(kernel.count(|event| matches!(event, Event::Ipi { .. } | Event::StateRead(_))), 2);
}

#[test]
fn a_whole_address_space_goes_with_one_flush_of_everything() {
    for pcid in [PcidSupport::Off, PcidSupport::On] {
        let kernel = kernel_with_pages(Options { pcid, ..Options::default() }, 20);
        let mm = kernel.mm(0);
        for cpu in kernel.cpu_ids() {
            kernel.go_lazy(cpu);
        }
        let vma = area(GIB, GIB + 20 * PAGE, Backing::Anonymous);
        let mut gather = kernel.gather_fullmm(mm);
        assert_eq!(gather.mode(), GatherMode::FullMm);
        gather.unmap_vmas([vma], vma.range).expect("no leaf is cut");
        gather.unhook_tables([vma], Bounds::whole());
        gather.flush().free();
        let requests = kernel.count(|event| matches!(event, Event::Tlb(TlbEvent::Requested { .. })));
        assert_eq!(requests, 1);
        assert_eq!(
            kernel.count(|event| matches!(event, Event::Tlb(TlbEvent::Requested { pages: None, .. }))),
            1
        );
        assert!(!mm.context().is_loaded_somewhere(&kernel));
        assert_eq!(kernel.ledger().nr_held(), 0);
        assert_eq!(kernel.nr_tables(mm), [0; 4]);
    }
}

/// Unhooks the last-level table at 1 GiB, which is empty, and leaves those above.
#[expect(unsafe_code, reason = "unhooks a table")]
fn unhook_one(kernel: &PaperKernel, mm: &PaperMm) -> UnhookedTable {
    let mut unhooked = None;
    let bounds = Bounds::between(Some(GIB), Some(GIB + 2 * MIB));
    // SAFETY: one thread; nothing is mapped there, and whoever gets the table queues it.
    unsafe {
        mm.space().unhook_tables(kernel, range(GIB, GIB + PAGE), bounds, |table| unhooked = Some(table))
    };
    unhooked.expect("one table")
}

#[test]
#[should_panic(expected = "belongs to another address space")]
fn a_table_of_another_address_space_is_refused() {
    let kernel = kernel_with_pages(Options::default(), 1);
    let vma = area(GIB, GIB + PAGE, Backing::Anonymous);
    kernel.zap(kernel.mm(0), &vma, vma.range).free();
    let other = kernel.new_mm();
    kernel.gather(other).remove_table(unhook_one(&kernel, kernel.mm(0)), GIB);
}

#[test]
#[should_panic(expected = "was not translated through")]
fn a_table_that_does_not_cover_the_address_to_be_flushed_is_refused() {
    let kernel = kernel_with_pages(Options::default(), 1);
    let vma = area(GIB, GIB + PAGE, Backing::Anonymous);
    kernel.zap(kernel.mm(0), &vma, vma.range).free();
    kernel.gather(kernel.mm(0)).remove_table(unhook_one(&kernel, kernel.mm(0)), GIB + 2 * MIB);
}

#[test]
fn a_table_queued_by_hand_is_flushed_and_freed_like_any_other() {
    let kernel = kernel_with_pages(Options::default(), 1);
    let mm = kernel.mm(0);
    let vma = area(GIB, GIB + PAGE, Backing::Anonymous);
    kernel.zap(mm, &vma, vma.range).free();
    kernel.go_lazy(CPU[1]);
    let mut gather = kernel.gather(mm);
    let unhooked = unhook_one(&kernel, mm);
    let frame = unhooked.frame();
    gather.remove_table(unhooked, GIB);
    assert!(kernel.is_live_table(frame), "not flushed for yet");
    gather.flush().free();
    assert!(!kernel.is_live_table(frame));
    assert!(!kernel.state(CPU[1]).has_loaded(mm.context()), "lazy CPUs were told");
}

/// The tables of an area are looked up while the area before it is being cleared.
#[test]
fn a_page_that_appears_while_the_area_before_is_cleared_is_cleared_too() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map(mm, GIB, Level::Pte);
    let vmas = [1, 2, 3].map(|gib| area(gib * GIB, gib * GIB + 4096, Backing::Anonymous));
    // A fault in an area that is not detached. Only the root existed there so far.
    kernel.once(
        |event| matches!(event, Event::Gather(GatherEvent::LockDropped { .. })),
        |kernel| {
            kernel.map(kernel.mm(0), 2 * GIB, Level::Pte);
        },
    );
    let mut gather = kernel.gather(mm);
    gather.unmap_vmas(vmas, range(0, 4 * GIB)).expect("no leaf is cut");
    gather.flush().free();
    assert_eq!(kernel.nr_hooks_waiting(), 0);
    assert_eq!(kernel.ledger().nr_held(), 0);
}
