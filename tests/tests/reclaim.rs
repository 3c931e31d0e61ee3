//! One flush for pages of many address spaces, and the calls that notice that this flush is still
//! to come.

use mmu_gather::Limits;
use mmu_gather::pagetable::{Bounds, Level};
use mmu_gather::tlb::{TlbEvent, UnmapBatch, flush_tlb_batched_pending};
use mmu_tests::{Access, Backing, CPU, Event, Fault, GIB, GatherOnPaper, Options, PaperKernel, area, range};
use x86_64::structures::paging::PhysFrame;

const PAGE: u64 = 4096;

/// Address spaces 0, 1 and 2, eight pages each, run on CPUs 1, 2 and 3, which have written to every
/// page.
fn three_programs() -> PaperKernel {
    let kernel = PaperKernel::new(Options::default());
    for index in 0..3 {
        let mm = kernel.new_mm();
        kernel.map_range(mm, range(GIB, GIB + 8 * PAGE));
        kernel.run(CPU[index + 1], mm);
        for page in 0..8 {
            kernel.touch(CPU[index + 1], GIB + page * PAGE, Access::Write).expect("mapped");
        }
    }
    kernel.take_events();
    kernel
}

fn nr_ipis(kernel: &PaperKernel) -> usize {
    kernel.count(|event| matches!(event, Event::Ipi { .. }))
}

#[test]
fn pages_of_many_address_spaces_share_one_flush_and_each_cpu_is_interrupted_once() {
    let kernel = three_programs();
    let mut batch = UnmapBatch::new();
    let mut pages = Vec::new();
    for index in 0..3 {
        for page in 0..8 {
            pages.push(kernel.reclaim(&mut batch, kernel.mm(index), GIB + page * PAGE));
        }
    }
    assert_eq!(nr_ipis(&kernel), 0, "nobody was told yet");
    let receipt = batch.flush(&kernel).expect("something was pending");
    assert_eq!(receipt.scope(), None);
    assert_eq!(nr_ipis(&kernel), 3);
    for frame in pages {
        kernel.release(frame, 1);
    }
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Write), Err(Fault::NotPresent));
    assert!(batch.flush(&kernel).is_none(), "nothing is pending any more");
    assert_eq!(nr_ipis(&kernel), 3);
}

#[test]
fn the_generation_rises_when_the_entry_is_cleared_not_when_the_flush_is_sent() {
    let kernel = three_programs();
    let mm = kernel.mm(0);
    let before = mm.context().tlb_gen();
    let mut batch = UnmapBatch::new();
    let frame = kernel.reclaim(&mut batch, mm, GIB);
    assert_eq!(mm.context().tlb_gen(), before.next());
    // A CPU that comes back between the two flushes, although no request was sent to it.
    kernel.run(CPU[1], kernel.mm(1));
    kernel.run(CPU[1], mm);
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Write), Err(Fault::NotPresent));
    let _receipt = batch.flush(&kernel);
    kernel.release(frame, 1);
}

#[test]
fn pages_that_move_make_up_for_a_flush_that_is_still_to_come() {
    // All pages of the range, so that nothing moves; or one.
    for nr_reclaimed in [8, 1] {
        let kernel = three_programs();
        let mm = kernel.mm(0);
        let mut batch = UnmapBatch::new();
        let frames: Vec<_> =
            (0..nr_reclaimed).map(|page| kernel.reclaim(&mut batch, mm, GIB + page * PAGE)).collect();
        assert!(kernel.cached(CPU[1], GIB).is_some(), "nobody was told yet");
        let mut gather = kernel.gather(mm);
        gather.move_pages(range(GIB, GIB + 8 * PAGE), 2 * GIB).expect("memory");
        gather.flush().free();
        assert_eq!(
            kernel.touch(CPU[1], GIB, Access::Read),
            Err(Fault::NotPresent),
            "{nr_reclaimed} reclaimed"
        );
        let _receipt = batch.flush(&kernel);
        frames.into_iter().for_each(|frame| kernel.release(frame, 1));
    }
}

#[test]
fn a_cpu_that_caught_up_before_the_flush_is_not_flushed_again() {
    let kernel = three_programs();
    let mm = kernel.mm(0);
    let mut batch = UnmapBatch::new();
    let frame = kernel.reclaim(&mut batch, mm, GIB);
    kernel.stop(CPU[1]);
    kernel.run(CPU[1], mm);
    kernel.take_events();
    let _receipt = batch.flush(&kernel);
    assert_eq!(nr_ipis(&kernel), 1);
    assert_eq!(kernel.count(|event| *event == Event::Tlb(TlbEvent::AlreadyCurrent)), 1);
    assert_eq!(kernel.count(|event| matches!(event, Event::Cr3 { .. })), 0);
    kernel.release(frame, 1);
}

#[test]
fn lazy_cpus_are_skipped_and_catch_up_when_they_wake() {
    let kernel = three_programs();
    let mm = kernel.mm(0);
    kernel.go_lazy(CPU[1]);
    let mut batch = UnmapBatch::new();
    let frame = kernel.reclaim(&mut batch, mm, GIB);
    let _receipt = batch.flush(&kernel);
    assert_eq!(nr_ipis(&kernel), 0);
    assert_eq!(kernel.count(|event| *event == Event::Tlb(TlbEvent::IpisSaved { lazy: 1, elsewhere: 0 })), 1);
    kernel.release(frame, 1);
    kernel.run(CPU[1], mm);
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Write), Err(Fault::NotPresent));
}

/// The CPU that reclaims may itself run a program that loses a page.
#[test]
fn the_reclaiming_cpu_flushes_itself() {
    let kernel = three_programs();
    kernel.on(CPU[1], || {
        let mut batch = UnmapBatch::new();
        let frame = kernel.reclaim(&mut batch, kernel.mm(0), GIB);
        let _receipt = batch.flush(&kernel);
        kernel.release(frame, 1);
        assert_eq!(kernel.touch(CPU[1], GIB, Access::Write), Err(Fault::NotPresent));
    });
    assert_eq!(nr_ipis(&kernel), 0);
}

/// Reclaim has cleared an entry, so the zapper finds it empty. The zapper must not return while a
/// CPU can use the page.
#[test]
fn a_zapper_that_sees_a_deferred_flush_makes_its_own_flush_whole() {
    for zapped in [GIB, GIB + PAGE] {
        let kernel = three_programs();
        let mm = kernel.mm(0);
        let mut batch = UnmapBatch::new();
        let frame = kernel.reclaim(&mut batch, mm, GIB);
        assert!(mm.context().has_deferred_flushes());
        let vma = area(GIB, GIB + 8 * PAGE, Backing::Anonymous);
        kernel.zap(mm, &vma, range(zapped, zapped + PAGE)).free();
        assert_eq!(kernel.touch(CPU[1], GIB, Access::Write), Err(Fault::NotPresent), "zapped {zapped:#x}");
        assert_eq!(kernel.cached(CPU[1], GIB + 7 * PAGE), None, "all of it was flushed");
        assert!(!mm.context().has_deferred_flushes(), "made up for");
        assert_eq!(nr_ipis(&kernel), 1);
        let _receipt = batch.flush(&kernel);
        kernel.release(frame, 1);
    }
}

#[test]
fn a_deferred_flush_that_was_made_up_for_costs_nothing_twice() {
    let kernel = three_programs();
    let mm = kernel.mm(0);
    let mut batch = UnmapBatch::new();
    let frame = kernel.reclaim(&mut batch, mm, GIB);
    flush_tlb_batched_pending(&kernel, mm.context());
    assert_eq!(nr_ipis(&kernel), 1);
    flush_tlb_batched_pending(&kernel, mm.context());
    assert_eq!(nr_ipis(&kernel), 1);
    let vma = area(GIB, GIB + 8 * PAGE, Backing::Anonymous);
    kernel.take_events();
    kernel.zap(mm, &vma, range(GIB, GIB + PAGE)).free();
    assert_eq!(nr_ipis(&kernel), 0, "the entry was none, and its flush is done");
    let _receipt = batch.flush(&kernel);
    kernel.release(frame, 1);
}

/// Reclaim unmaps another page while the flush for the first is under way: the flush for the second
/// stays outstanding.
#[test]
fn what_reclaim_adds_during_a_flush_stays_outstanding() {
    let kernel = three_programs();
    let mm = kernel.mm(0);
    let mut batch = UnmapBatch::new();
    let first = kernel.reclaim(&mut batch, mm, GIB);
    kernel.once(
        |event| matches!(event, Event::Ipi { .. }),
        |kernel| {
            let mut late = UnmapBatch::new();
            let frame = kernel.reclaim(&mut late, kernel.mm(0), GIB + 5 * PAGE);
            // Never flushed by this batch; the page is kept.
            kernel.ledger().add_mapping(frame);
        },
    );
    flush_tlb_batched_pending(&kernel, mm.context());
    assert!(mm.context().has_deferred_flushes());
    flush_tlb_batched_pending(&kernel, mm.context());
    assert!(!mm.context().has_deferred_flushes());
    assert_eq!(kernel.touch(CPU[1], GIB + 5 * PAGE, Access::Write), Err(Fault::NotPresent));
    let _receipt = batch.flush(&kernel);
    kernel.release(first, 1);
}

#[test]
fn large_pages_look_for_deferred_flushes_too() {
    let kernel = three_programs();
    let mm = kernel.mm(0);
    let large = area(2 * GIB, 2 * GIB + (2 << 20), Backing::Anonymous);
    kernel.map(mm, 2 * GIB, Level::Pmd);
    let mut batch = UnmapBatch::new();
    let frame = kernel.reclaim(&mut batch, mm, GIB);
    kernel.zap(mm, &large, large.range).free();
    assert!(!mm.context().has_deferred_flushes());
    let _receipt = batch.flush(&kernel);
    kernel.release(frame, 1);
}

/// A large page at 2 GiB, in use on CPU 1. Reclaim has just cleared its leaf and has not flushed
/// yet.
fn large_leaf_reclaimed(level: Level) -> (PaperKernel, UnmapBatch<PaperKernel>, PhysFrame) {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map(mm, 2 * GIB, level);
    kernel.run(CPU[1], mm);
    kernel.touch(CPU[1], 2 * GIB, Access::Write).expect("mapped");
    let mut batch = UnmapBatch::new();
    let frame = kernel.reclaim_at(&mut batch, mm, 2 * GIB, level);
    (kernel, batch, frame)
}

/// CPU 1 cannot use the page any more; then reclaim flushes, and frees.
fn assert_made_up_for(kernel: &PaperKernel, mut batch: UnmapBatch<PaperKernel>, frame: PhysFrame) {
    assert_eq!(kernel.touch(CPU[1], 2 * GIB, Access::Write), Err(Fault::NotPresent));
    let _receipt = batch.flush(kernel);
    kernel.release(frame, 1);
}

/// Entries above the last level are read without their lock. A walk that finds one empty takes the
/// lock once, to see the note of a deferred flush.
#[test]
fn reclaims_deferred_flush_of_a_large_leaf_is_made_up_for_by_whoever_finds_the_entry_empty() {
    for level in [Level::Pmd, Level::Pud] {
        let whole = range(2 * GIB, 2 * GIB + level.entry_span());
        let part = range(2 * GIB, 2 * GIB + 4 * PAGE);
        for discarded in [whole, part, range(GIB, 4 * GIB)] {
            let (kernel, batch, frame) = large_leaf_reclaimed(level);
            let vma = area(discarded.start(), discarded.end(), Backing::Anonymous);
            kernel.zap(kernel.mm(0), &vma, discarded).free();
            assert_made_up_for(&kernel, batch, frame);
        }
        let (kernel, batch, frame) = large_leaf_reclaimed(level);
        let vma = area(whole.start(), whole.end(), Backing::Anonymous);
        let tables_stay = Bounds::between(Some(whole.start()), Some(whole.end()));
        kernel.unmap(kernel.mm(0), &Limits::DEFAULT, &[vma], tables_stay);
        assert_made_up_for(&kernel, batch, frame);

        let (kernel, batch, frame) = large_leaf_reclaimed(level);
        let mut gather = kernel.gather(kernel.mm(0));
        gather.move_pages(range(2 * GIB, 2 * GIB + (2 << 20)), 4 * GIB).expect("memory");
        gather.flush().free();
        assert_made_up_for(&kernel, batch, frame);
    }
}

/// The line of a leaf that is gone may no longer be noted as used, and lines that are not noted are
/// not read.
#[test]
fn a_deferred_flush_is_seen_where_the_used_line_was_forgotten_too() {
    let (kernel, batch, frame) = large_leaf_reclaimed(Level::Pmd);
    let mm = kernel.mm(0);
    let pmd = kernel.find_table(mm, 2 * GIB, Level::Pmd).expect("linked");
    let locked = pmd.lock(&kernel);
    locked.forget_empty_lines(&(0..512));
    assert!(locked.used_lines().is_empty());
    drop(locked);
    let vma = area(2 * GIB, 3 * GIB, Backing::Anonymous);
    kernel.zap(mm, &vma, vma.range).free();
    assert_made_up_for(&kernel, batch, frame);
}
