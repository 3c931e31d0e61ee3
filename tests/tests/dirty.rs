//! Dirty pages of files: nobody may take such a page for clean while a CPU can still write to it.

use mmu_gather::pagetable::Level;
use mmu_gather::{GatherEvent, Limits};
use mmu_tests::{Access, Backing, CPU, Event, GIB, MIB, Noted, Options, PaperKernel, area, range};

const PAGE: u64 = 4096;

/// `nr_pages` pages of a file at 1 GiB; CPU 1 has written to those that `dirty` picks out.
fn kernel_with_file(nr_pages: u64, dirty: impl Fn(u64) -> bool) -> PaperKernel {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map_range(mm, range(GIB, GIB + nr_pages * PAGE));
    kernel.run(CPU[1], mm);
    for page in 0..nr_pages {
        let access = if dirty(page) { Access::Write } else { Access::Read };
        kernel.touch(CPU[1], GIB + page * PAGE, access).expect("mapped");
    }
    kernel.take_events();
    kernel
}

fn zap(kernel: &PaperKernel, limits: &Limits, nr_pages: u64) {
    let vma = area(GIB, GIB + nr_pages * PAGE, Backing::File);
    let mut gather = kernel.gather(kernel.mm(0)).with_limits(limits);
    gather.zap_vma_range(&vma, vma.range).expect("no leaf is cut");
    gather.flush().free();
}

fn position(events: &[Noted], pick: impl Fn(&Event) -> bool) -> usize {
    events.iter().position(|noted| pick(&noted.event)).expect("it happened")
}

#[test]
fn a_dirty_page_is_flushed_under_the_lock_then_loses_its_rmap_then_the_lock_drops_then_it_is_freed() {
    for level in [Level::Pte, Level::Pmd] {
        let kernel = PaperKernel::new(Options::default());
        let mm = kernel.new_mm();
        kernel.map(mm, GIB, level);
        kernel.run(CPU[1], mm);
        kernel.touch(CPU[1], GIB, Access::Write).expect("mapped");
        kernel.take_events();
        let vma = area(GIB, GIB + level.entry_span(), Backing::File);
        kernel.zap(mm, &vma, vma.range).free();

        let events = kernel.take_events();
        let cleared = position(&events, |event| matches!(event, Event::LeafCleared(_)));
        let flushed = position(&events, |event| matches!(event, Event::Ipi { .. }));
        let rmap = position(&events, |event| matches!(event, Event::RmapRemoved(_)));
        let dropped =
            position(&events, |event| matches!(event, Event::Gather(GatherEvent::LockDropped { .. })));
        let freed = position(&events, |event| matches!(event, Event::PageFreed(_)));
        assert!(cleared < flushed && flushed < rmap && rmap < dropped && dropped < freed, "{events:#?}");
        assert!(events[flushed].under_lock && events[rmap].under_lock, "{level:?}");
        assert!(!events[dropped].under_lock && !events[freed].under_lock, "{level:?}");
    }
}

#[test]
fn a_clean_page_of_a_file_needs_no_flush_under_the_lock() {
    let kernel = kernel_with_file(4, |_| false);
    zap(&kernel, &Limits::DEFAULT, 4);
    assert_eq!(kernel.count(|event| *event == Event::Gather(GatherEvent::DirtyFlush)), 0);
    assert_eq!(kernel.count(|event| matches!(event, Event::Ipi { .. })), 1);
    assert_eq!(kernel.ledger().nr_held(), 0);
}

#[test]
fn dirty_pages_of_an_anonymous_area_need_no_flush_under_the_lock() {
    let kernel = kernel_with_file(4, |_| true);
    let vma = area(GIB, GIB + 4 * PAGE, Backing::Anonymous);
    kernel.zap(kernel.mm(0), &vma, vma.range).free();
    assert_eq!(kernel.count(|event| *event == Event::Gather(GatherEvent::DirtyFlush)), 0);
}

/// One flush for each table, however many of its pages are dirty.
#[test]
fn all_dirty_pages_of_a_table_share_one_flush() {
    let kernel = kernel_with_file(512, |_| true);
    zap(&kernel, &Limits::DEFAULT, 512);
    assert_eq!(kernel.count(|event| *event == Event::Gather(GatherEvent::DirtyFlush)), 1);
    assert_eq!(kernel.count(|event| *event == Event::Gather(GatherEvent::ForcedFlush)), 0);
    assert_eq!(kernel.count(|event| matches!(event, Event::RmapRemoved(_))), 512);
    assert_eq!(kernel.ledger().nr_held(), 0);
}

/// Only the bundle and one batch are searched for delayed rmaps, so no delayed rmap may ever be in
/// another batch.
#[test]
fn every_delayed_rmap_is_removed_exactly_once_at_every_batch_boundary() {
    let patterns: [fn(u64) -> bool; 5] =
        [|_| true, |page| page % 2 == 0, |page| page > 20, |page| page < 5, |page| page == 39];
    for (number, dirty) in patterns.into_iter().enumerate() {
        for bundle_slots in 2..=5 {
            for batch_slots in 2..=4 {
                for batch_pages in 0..=4 {
                    let limits = Limits::DEFAULT
                        .with_bundle_slots(bundle_slots)
                        .with_batch_slots(batch_slots)
                        .with_batch_pages(batch_pages);
                    let kernel = kernel_with_file(40, dirty);
                    zap(&kernel, &limits, 40);
                    let nr_dirty = (0..40).filter(|page| dirty(*page)).count();
                    let removed = kernel.count(|event| matches!(event, Event::RmapRemoved(_)));
                    // The checker reports a page that is freed with its rmap, and an rmap that is
                    // removed twice.
                    assert_eq!(removed, nr_dirty, "pattern {number}, {limits:?}");
                    assert_eq!(kernel.ledger().nr_held(), 0, "pattern {number}, {limits:?}");
                }
            }
        }
    }
}

/// Clean pages wait in the gather across a dirty flush, and are freed after the flush of the
/// gather.
#[test]
fn clean_and_dirty_pages_of_several_tables_all_go() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.run(CPU[1], mm);
    for table in 0..4u64 {
        for page in 0..6u64 {
            let address = GIB + table * 2 * MIB + page * PAGE;
            kernel.map(mm, address, Level::Pte);
            let access = if (table + page) % 3 == 0 { Access::Write } else { Access::Read };
            kernel.touch(CPU[1], address, access).expect("mapped");
        }
    }
    let vma = area(GIB, GIB + 8 * MIB, Backing::File);
    for limits in [Limits::DEFAULT, Limits::DEFAULT.with_bundle_slots(3).with_batch_pages(0)] {
        let mut gather = kernel.gather(mm).with_limits(&limits);
        gather.zap_vma_range(&vma, vma.range).expect("no leaf is cut");
        gather.flush().free();
    }
    assert_eq!(kernel.ledger().nr_held(), 0);
}
