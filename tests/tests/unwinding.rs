//! A kernel whose own calls unwind: nothing is freed twice or too early, nothing aborts, and no
//! flush is forgotten.

use core::panic::AssertUnwindSafe;
use std::panic::catch_unwind;

use mmu_gather::pagetable::{Bounds, VirtRange};
use mmu_gather::{GatherEvent, Limits};
use mmu_tests::{
    Access, Backing, CPU, Event, Fault, GIB, GatherOnPaper, MIB, Options, PaperKernel, area, range,
};

const PAGE: u64 = 4096;

/// `nr_pages` pages at 1 GiB, in use on CPU 1.
fn kernel_in_use(nr_pages: u64) -> (PaperKernel, VirtRange) {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let pages = range(GIB, GIB + nr_pages * PAGE);
    kernel.map_range(mm, pages);
    kernel.run(CPU[1], mm);
    for address in (pages.start()..pages.end()).step_by(4096) {
        kernel.touch(CPU[1], address, Access::Write).expect("mapped");
    }
    kernel.take_events();
    (kernel, pages)
}

/// Does `work`; a call of the kernel unwinds in the middle of it, at the event that `at` picks out.
fn unwinding(kernel: &PaperKernel, at: impl Fn(&Event) -> bool + 'static, work: impl FnOnce()) {
    kernel.once(at, |_| std::panic::resume_unwind(Box::new("the kernel's own")));
    let panic = catch_unwind(AssertUnwindSafe(work)).expect_err("it unwinds");
    assert_eq!(panic.downcast_ref(), Some(&"the kernel's own"), "once, and nothing else");
    assert_eq!(kernel.nr_hooks_waiting(), 0);
}

/// The next call makes up for what was not flushed, and everything is as usual afterwards.
fn assert_made_up_for(kernel: &PaperKernel, pages: VirtRange, lost: u64) {
    let mm = kernel.mm(0);
    assert_eq!(mm.open_gathers(), 0, "the count is right");
    kernel.zap(mm, &area(pages.start(), pages.end(), Backing::Anonymous), pages).free();
    for address in (pages.start()..pages.end()).step_by(4096) {
        assert_eq!(kernel.touch(CPU[1], address, Access::Write), Err(Fault::NotPresent), "{address:#x}");
    }
    assert!(!mm.context().has_deferred_flushes());
    assert_eq!(kernel.ledger().nr_held() as u64, lost, "what waited leaks, nothing else does");
    assert_eq!(kernel.take_violations(), []);
}

#[test]
fn a_flush_that_unwinds_is_not_made_again_what_waits_leaks_and_the_next_call_makes_up_for_it() {
    for nr_pages in [1, 2, 40] {
        for dropped in [false, true] {
            let (kernel, pages) = kernel_in_use(nr_pages);
            let (mm, vma) = (kernel.mm(0), area(pages.start(), pages.end(), Backing::Anonymous));
            unwinding(
                &kernel,
                |event| matches!(event, Event::Ipi { .. }),
                || {
                    if dropped {
                        let mut gather = kernel.gather(mm);
                        gather.zap_vma_range(&vma, pages).expect("no leaf is cut");
                        drop(gather);
                    } else {
                        kernel.zap(mm, &vma, pages).free();
                    }
                },
            );
            assert_eq!(kernel.count(|event| matches!(event, Event::Ipi { .. })), 1, "not again");
            assert!(kernel.touch(CPU[1], GIB, Access::Write).is_ok(), "not told; the page is not free");
            assert_made_up_for(&kernel, pages, nr_pages);
        }
    }
}

/// It has found the entries empty while the other was open, and no flush was owed yet.
#[test]
fn a_gather_that_was_open_beside_one_whose_flush_unwinds_flushes_for_both() {
    for nr_pages in [1, 2, 40] {
        let (kernel, pages) = kernel_in_use(nr_pages);
        let (mm, vma) = (kernel.mm(0), area(pages.start(), pages.end(), Backing::Anonymous));
        let (mut clears, mut beside) = (kernel.gather(mm), kernel.gather(mm));
        clears.zap_vma_range(&vma, pages).expect("no leaf is cut");
        beside.zap_vma_range(&vma, pages).expect("no leaf is cut");
        unwinding(&kernel, |event| matches!(event, Event::Ipi { .. }), || clears.flush().free());
        beside.flush().free();
        for address in (pages.start()..pages.end()).step_by(4096) {
            assert_eq!(kernel.touch(CPU[1], address, Access::Write), Err(Fault::NotPresent), "{address:#x}");
        }
        assert_made_up_for(&kernel, pages, nr_pages);
    }
}

/// The first pages are cleared already, and no gather has them in its range; the same holds for the
/// page whose call unwinds.
#[test]
fn a_page_whose_unmapping_unwinds_is_flushed_for_by_the_gather_as_it_goes_or_by_the_next() {
    for nr_pages in [1, 3, 20] {
        for nr_before in [0, nr_pages - 1] {
            let (kernel, pages) = kernel_in_use(nr_pages);
            let (mm, vma) = (kernel.mm(0), area(pages.start(), pages.end(), Backing::Anonymous));
            let last = GIB + nr_before * PAGE;
            unwinding(
                &kernel,
                move |event| matches!(event, Event::LeafCleared(leaf) if leaf.address == last),
                || kernel.zap(mm, &vma, pages).free(),
            );
            assert_eq!(mm.open_gathers(), 0);
            assert_eq!(kernel.lookup(mm, last).value.bits(), 0, "cleared");
            kernel.zap(mm, &vma, pages).free();
            for address in (pages.start()..pages.end()).step_by(4096) {
                assert_eq!(kernel.touch(CPU[1], address, Access::Write), Err(Fault::NotPresent));
            }
            assert_eq!(kernel.take_violations(), []);
        }
    }
}

/// The queue marks pages as handed over only after the whole slice was, so a slice whose call
/// unwinds must not be handed over again.
#[test]
fn pages_whose_freeing_unwinds_are_not_freed_again() {
    for limits in [Limits::DEFAULT, Limits::DEFAULT.with_bundle_slots(3).with_batch_pages(0)] {
        let (kernel, pages) = kernel_in_use(20);
        let (mm, vma) = (kernel.mm(0), area(pages.start(), pages.end(), Backing::Anonymous));
        unwinding(
            &kernel,
            |event| matches!(event, Event::PageFreed(_)),
            || {
                let mut gather = kernel.gather(mm).with_limits(&limits);
                gather.zap_vma_range(&vma, pages).expect("no leaf is cut");
                gather.flush_mmu();
            },
        );
        assert_eq!(kernel.count(|event| matches!(event, Event::PageFreed(_))), 1, "{limits:?}");
        assert_eq!(mm.open_gathers(), 0);
        kernel.zap(mm, &vma, pages).free();
        assert_eq!(kernel.take_violations(), []);
    }
}

#[test]
fn an_unlinking_that_unwinds_leaves_the_flush_made_or_owed() {
    for nr_pages in [1, 5] {
        let (kernel, pages) = kernel_in_use(nr_pages);
        let mm = kernel.mm(0);
        let vma = area(pages.start(), pages.end(), Backing::Anonymous);
        let unwound = catch_unwind(AssertUnwindSafe(|| unmap_and_unwind(&kernel, vma)));
        assert!(unwound.is_err());
        assert_eq!(mm.open_gathers(), 0, "the count is right");
        kernel.zap(mm, &vma, pages).free();
        assert_eq!(kernel.touch(CPU[1], GIB, Access::Write), Err(Fault::NotPresent));
        assert_eq!(kernel.take_violations(), []);
    }
}

#[expect(unsafe_code, reason = "one thread stands in for the map lock")]
fn unmap_and_unwind(kernel: &PaperKernel, vma: mmu_gather::Vma<Backing>) {
    let bounds = Bounds::between(Some(GIB), Some(GIB + MIB));
    // SAFETY: one thread; the area is the caller's.
    let flushed = unsafe {
        mmu_gather::unmap_region(kernel, kernel.mm(0), &Limits::DEFAULT, [vma], bounds, || {
            std::panic::resume_unwind(Box::new(()))
        })
    };
    drop(flushed);
}

#[test]
fn a_move_that_unwinds_under_its_locks_owes_the_flush_of_the_old_place() {
    let (kernel, pages) = kernel_in_use(4);
    let mm = kernel.mm(0);
    unwinding(
        &kernel,
        |event| *event == Event::Gather(GatherEvent::DirtyFlush),
        || {
            let mut gather = kernel.gather(mm);
            let _ = gather.move_pages(pages, 2 * GIB);
        },
    );
    assert_made_up_for(&kernel, pages, 4);
    let moved = area(2 * GIB, 2 * GIB + 4 * PAGE, Backing::Anonymous);
    kernel.zap(mm, &moved, moved.range).free();
    assert_eq!(kernel.ledger().nr_held(), 0);
}

/// A kernel that catches its own unwinding and goes on with the gather.
#[test]
fn a_gather_that_is_used_again_after_its_freeing_unwound_frees_nothing_twice() {
    for (nr_pages, batch_pages) in [(3, 19), (40, 19), (40, 0)] {
        for again in 0..3 {
            let (kernel, pages) = kernel_in_use(nr_pages);
            let (mm, vma) = (kernel.mm(0), area(pages.start(), pages.end(), Backing::Anonymous));
            let limits = Limits::DEFAULT.with_batch_pages(batch_pages);
            let mut gather = kernel.gather(mm).with_limits(&limits);
            let at = |event: &Event| matches!(event, Event::PageFreed(_));
            unwinding(&kernel, at, || {
                gather.zap_vma_range(&vma, pages).expect("no leaf is cut");
                gather.flush_mmu();
            });
            match again {
                0 => gather.flush_mmu(),
                1 => gather.flush_tlb_only(),
                _ => {}
            }
            gather.flush().free();
            assert_eq!(mm.open_gathers(), 0);
            // The checker reports a page that is released twice.
            kernel.zap(mm, &vma, pages).free();
            assert_eq!(kernel.touch(CPU[1], GIB, Access::Write), Err(Fault::NotPresent));
            assert_eq!(kernel.take_violations(), [], "{nr_pages} pages");
        }
    }
}

/// Each time one step later, until a call comes to its end.
#[test]
fn a_gather_whose_kernel_unwinds_between_steps_is_closed_and_the_next_call_makes_up_for_it() {
    for nr_pages in [1, 2, 40] {
        let mut steps = 0;
        loop {
            let (kernel, pages) = kernel_in_use(nr_pages);
            let (mm, vma) = (kernel.mm(0), area(pages.start(), pages.end(), Backing::Anonymous));
            kernel.unwind_after_steps(steps);
            let call = AssertUnwindSafe(|| kernel.zap(mm, &vma, pages).free());
            let ended = catch_unwind(call).is_ok();
            assert_eq!(kernel.steps_go_on(), ended);
            assert_eq!(mm.open_gathers(), 0, "{nr_pages} pages, step {steps}");
            kernel.zap(mm, &vma, pages).free();
            for address in (pages.start()..pages.end()).step_by(4096) {
                let used = kernel.touch(CPU[1], address, Access::Write);
                assert_eq!(used, Err(Fault::NotPresent), "{nr_pages} pages, step {steps}, {address:#x}");
            }
            assert!(!mm.context().has_deferred_flushes());
            assert_eq!(kernel.take_violations(), []);
            if ended {
                break;
            }
            steps += 1;
        }
        assert!(steps >= 4, "{nr_pages} pages: only {steps} steps");
    }
}
