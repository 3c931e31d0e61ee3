//! How often a gather must flush in between, depending on how many batch pages it can have.

use mmu_gather::pagetable::{Bounds, Level};
use mmu_gather::{GatherEvent, Limits};
use mmu_tests::{Backing, Event, GIB, GatherOnPaper, Options, PaperKernel, Supply, area, range};

const NO_BATCH: Limits = Limits::DEFAULT.with_batch_pages(0);
const ONE_BATCH: Limits = Limits::DEFAULT.with_batch_pages(1);

fn forced_flushes(kernel: &PaperKernel) -> usize {
    kernel.count(|event| *event == Event::Gather(GatherEvent::ForcedFlush))
}

/// Pages queued, then forced flushes with all batch pages, with one, and without any.
const SINGLE_PAGES: [(u64, [usize; 3]); 4] =
    [(512, [0, 0, 73]), (9677, [0, 18, 1382]), (9678, [1, 18, 1382]), (262_144, [27, 508, 37449])];

#[test]
fn single_pages_force_a_flush_every_9678_516_or_7_records() {
    for (nr_pages, expected) in SINGLE_PAGES {
        for (limits, expected) in [Limits::DEFAULT, ONE_BATCH, NO_BATCH].iter().zip(expected) {
            let kernel = PaperKernel::new(Options::default());
            let mm = kernel.new_mm();
            kernel.remove_single_pages(mm, limits, nr_pages);
            assert_eq!(forced_flushes(&kernel), expected, "{nr_pages} pages, {limits:?}");
            assert_eq!(kernel.ledger().nr_held(), 0);
            assert_eq!(kernel.batches_lent(), 0);
        }
    }
}

/// The same through real tables: a visit ends at the end of a table, yet a batch does not.
#[test]
fn zapping_mapped_pages_forces_the_same_flushes() {
    for (nr_pages, expected) in &SINGLE_PAGES[..3] {
        for (limits, expected) in [Limits::DEFAULT, ONE_BATCH, NO_BATCH].iter().zip(expected) {
            let kernel = PaperKernel::new(Options::default());
            let mm = kernel.new_mm();
            let vma = area(GIB, GIB + nr_pages * 4096, Backing::Anonymous);
            kernel.map_range(mm, vma.range);
            kernel.unmap(mm, limits, &[vma], Bounds::whole());
            assert_eq!(forced_flushes(&kernel), *expected, "{nr_pages} pages, {limits:?}");
            assert_eq!(kernel.ledger().nr_held(), 0);
        }
    }
}

#[test]
fn a_refused_batch_page_forces_the_same_flushes_as_a_limit() {
    for (supply, expected) in [(Supply::Left(1), 18), (Supply::Left(0), 1382)] {
        let kernel = PaperKernel::new(Options::default());
        let mm = kernel.new_mm();
        let vma = area(GIB, GIB + 9677 * 4096, Backing::Anonymous);
        kernel.map_range(mm, vma.range);
        kernel.supply_batches(supply);
        let mut gather = kernel.gather(mm);
        gather.unmap_vmas([vma], vma.range).expect("no leaf is cut");
        gather.flush().free();
        assert_eq!(forced_flushes(&kernel), expected, "{supply:?}");
        assert_eq!(kernel.batches_lent(), 0);
    }
}

#[test]
fn runs_take_two_slots_and_force_a_flush_every_4849() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let mut gather = kernel.gather(mm);
    let frame = kernel.ledger().new_page(4096);
    let next = kernel.ledger().new_page(4096);
    assert_eq!(next, frame + 1);
    for run in 0..262_144u64 {
        kernel.ledger().add_reference(frame);
        kernel.ledger().add_reference(next);
        let address = GIB + run * 8192;
        gather.queue_run(frame, 2, range(address, address + 8192));
    }
    gather.flush().free();
    assert_eq!(forced_flushes(&kernel), 54);
    assert_eq!(kernel.ledger().nr_held(), 0);
}

/// Linux: "mm/mmu_gather: ensure tlb_remove_page pairs are never parted"; a length that is read as
/// a frame frees a wrong page.
#[test]
fn a_run_is_never_cut_at_the_edge_of_a_batch_or_of_a_free_chunk() {
    for bundle_slots in 2..=8 {
        for batch_slots in 2..=7 {
            for free_chunk in 1..=4 {
                let limits = Limits::DEFAULT
                    .with_bundle_slots(bundle_slots)
                    .with_batch_slots(batch_slots)
                    .with_batch_pages(2)
                    .with_free_chunk(free_chunk);
                let kernel = PaperKernel::new(Options::default());
                let mm = kernel.new_mm();
                let mut gather = kernel.gather(mm).with_limits(&limits);
                for record in 0..40u32 {
                    let nr_pages = 1 + record % 3;
                    let pages: Vec<_> = (0..nr_pages)
                        .map(|_| {
                            let frame = kernel.ledger().new_page(4096);
                            kernel.ledger().add_reference(frame);
                            frame
                        })
                        .collect();
                    let address = GIB + u64::from(record) * 0x4000;
                    if nr_pages == 1 {
                        gather.queue_page(pages[0], range(address, address + 4096), Level::Pte);
                    } else {
                        let end = address + u64::from(nr_pages) * 4096;
                        gather.queue_run(pages[0], nr_pages, range(address, end));
                    }
                }
                gather.flush().free();
                // Releasing a wrong page is a violation; this looks for pages that were forgotten.
                assert_eq!(kernel.ledger().nr_held(), 0, "{limits:?}");
                assert!(kernel.count(|event| matches!(event, Event::FreeChunk { slots } if *slots > usize::from(free_chunk) + 1)) == 0);
            }
        }
    }
}

/// Seven pages fill the slots on the stack: a batch page is for the eighth.
#[test]
fn a_batch_page_is_taken_only_when_there_is_something_to_put_there() {
    for (nr_pages, taken) in [(2, 0), (6, 0), (7, 0), (8, 1), (516, 1), (517, 2)] {
        for area_of in [nr_pages, 3] {
            let kernel = PaperKernel::new(Options::default());
            let mm = kernel.new_mm();
            kernel.map_range(mm, range(GIB, GIB + nr_pages * 4096));
            let vmas: Vec<_> = (0..nr_pages)
                .step_by(usize::try_from(area_of).expect("small"))
                .map(|first| {
                    let end = (first + area_of).min(nr_pages);
                    area(GIB + first * 4096, GIB + end * 4096, Backing::Anonymous)
                })
                .collect();
            let mut gather = kernel.gather(mm);
            gather.unmap_vmas(vmas, range(GIB, 2 * GIB)).expect("no leaf is cut");
            drop(gather);
            let taken_here = kernel.count(|event| *event == Event::Gather(GatherEvent::BatchTaken));
            assert_eq!(taken_here, taken, "{nr_pages} pages, {area_of} an area");
            assert_eq!(forced_flushes(&kernel), 0);
            assert_eq!(kernel.ledger().nr_held(), 0);
        }
    }
}

/// A gather that a visit has left full takes pages queued by hand, too, and loses none of them.
#[test]
fn pages_queued_after_a_visit_that_used_the_last_slot_find_room() {
    for nr_pages in [7, 516] {
        for batches in [Supply::Unlimited, Supply::Left(1), Supply::Left(0)] {
            let kernel = PaperKernel::new(Options::default());
            let mm = kernel.new_mm();
            kernel.supply_batches(batches);
            let vma = area(GIB, GIB + nr_pages * 4096, Backing::Anonymous);
            kernel.map_range(mm, vma.range);
            let mut gather = kernel.gather(mm);
            gather.unmap_vmas([vma], vma.range).expect("no leaf is cut");
            let frame = kernel.ledger().new_page(4096);
            for _ in 0..3 {
                kernel.ledger().add_reference(frame);
            }
            gather.queue_run(frame, 1, range(2 * GIB, 2 * GIB + 4096));
            gather.queue_page(frame, range(2 * GIB, 2 * GIB + 4096), Level::Pte);
            gather.queue_run(frame, 1, range(2 * GIB, 2 * GIB + 4096));
            gather.flush().free();
            assert_eq!(kernel.ledger().nr_held(), 0, "{nr_pages} pages");
        }
    }
}

/// Memory may be available again a moment later: the gather asks again after a refusal.
#[test]
fn a_batch_page_that_was_refused_is_asked_for_again() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    // Refused twice, then granted.
    kernel.supply_batches(Supply::Pattern(!0b11));
    let vma = area(GIB, GIB + 100 * 4096, Backing::Anonymous);
    kernel.map_range(mm, vma.range);
    let mut gather = kernel.gather(mm);
    gather.unmap_vmas([vma], vma.range).expect("no leaf is cut");
    drop(gather);
    assert_eq!(kernel.count(|event| *event == Event::Gather(GatherEvent::BatchRefused)), 2);
    assert_eq!(kernel.count(|event| *event == Event::Gather(GatherEvent::BatchTaken)), 1);
    assert_eq!(forced_flushes(&kernel), 2, "each refusal forces one, and then there is room");
}

/// A batch is written where the kernel says. At an address that is not aligned, writing is
/// undefined behaviour, although most machines would merely be slow.
#[cfg(debug_assertions)]
#[test]
#[should_panic(expected = "is not aligned to 8 bytes")]
#[expect(unsafe_code, reason = "lends a page")]
fn a_batch_page_that_is_not_aligned_is_named_by_a_debug_build() {
    let mut memory = vec![0_u64; 1024];
    let odd = memory.as_mut_ptr().cast::<u8>().wrapping_add(4);
    let page = core::ptr::NonNull::new(odd.cast()).expect("not null");
    // SAFETY: the address is not aligned, which must be reported before anything is written.
    let _page = unsafe { mmu_gather::BatchPage::new(page) };
}
