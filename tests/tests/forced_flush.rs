//! How often a gather must flush before it is done, by how many batch pages it can have.

use mmu_gather::pagetable::{Bounds, Level};
use mmu_gather::{GatherEvent, Limits};
use mmu_tests::{Backing, Event, GIB, GatherOnPaper, Options, PaperKernel, Supply, area, range};

const NO_BATCH: Limits = Limits { batch_pages: 0, ..Limits::DEFAULT };
const ONE_BATCH: Limits = Limits { batch_pages: 1, ..Limits::DEFAULT };

fn forced_flushes(kernel: &PaperKernel) -> usize {
    kernel.count(|event| *event == Event::Gather(GatherEvent::ForcedFlush))
}

/// Records, then forced flushes with all batch pages, one, none.
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

/// Linux: "mm/mmu_gather: ensure tlb_remove_page pairs are never parted"; a length read as a frame frees a wrong page.
#[test]
fn a_run_is_never_cut_at_the_edge_of_a_batch_or_of_a_free_chunk() {
    for bundle_slots in 2..=8 {
        for batch_slots in 2..=7 {
            for free_chunk in 1..=4 {
                let limits =
                    Limits { bundle_slots, batch_slots, batch_pages: 2, free_chunk, ..Limits::DEFAULT };
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
                // Wrong pages released would be violations; pages forgotten are these.
                assert_eq!(kernel.ledger().nr_held(), 0, "{limits:?}");
                assert!(kernel.count(|event| matches!(event, Event::FreeChunk { slots } if *slots > usize::from(free_chunk) + 1)) == 0);
            }
        }
    }
}
