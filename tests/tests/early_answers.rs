//! A flush that was answered but not made: a debug build of the engine names it, whatever the
//! kernel did wrong.
#![cfg(debug_assertions)]

use core::panic::AssertUnwindSafe;
use std::panic::catch_unwind;

use mmu_gather::pagetable::{Bounds, Level};
use mmu_gather::tlb::{FreedTables, PageSpan, flush_tlb_mm, flush_tlb_mm_range};
use mmu_gather::{Limits, MmuGather};
use mmu_tests::{Access, Answers, Backing, CPU, GIB, GatherOnPaper, Options, PaperKernel, area, range};

const PAGE: u64 = 4096;

/// One page, in use on CPUs 0 and 1.
fn kernel_that_answers(answers: Answers) -> PaperKernel {
    let kernel = PaperKernel::new(Options { answers, ..Options::default() });
    let mm = kernel.new_mm();
    kernel.map(mm, GIB, Level::Pte);
    for cpu in [CPU[0], CPU[1]] {
        kernel.run(cpu, mm);
        kernel.touch(cpu, GIB, Access::Read).expect("mapped");
    }
    kernel
}

/// What the engine says when `flush` is answered.
fn said(kernel: &PaperKernel, flush: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(flush)).expect_err("it must be named");
    kernel.take_violations();
    *panic.downcast::<String>().expect("a text")
}

const SPAN: PageSpan = PageSpan { start: GIB, end: GIB + PAGE, stride_shift: 12 };

#[test]
fn a_target_that_did_not_flush_is_named_whether_the_request_was_lost_or_carried_out_as_another_cpu() {
    for answers in [Answers::AtOnce, Answers::ForAnother] {
        for whole in [false, true] {
            let kernel = kernel_that_answers(answers);
            let context = kernel.mm(0).context();
            let said = said(&kernel, || {
                let _receipt = if whole {
                    flush_tlb_mm(&kernel, context)
                } else {
                    flush_tlb_mm_range(&kernel, context, SPAN, FreedTables::No)
                };
            });
            for words in ["T2: CPU 1 runs context 2", "generation 0", "up to 1", "handler named another CPU"]
            {
                assert!(said.contains(words), "{answers:?}: {said}");
            }
        }
    }
}

#[test]
fn a_meanwhile_that_is_not_called_is_named() {
    let kernel = kernel_that_answers(Answers::WithoutMeanwhile);
    let said = said(&kernel, || {
        let _receipt = flush_tlb_mm(&kernel, kernel.mm(0).context());
    });
    assert!(said.contains("T2: CPU 0 runs context 2"), "{said}");
    assert!(said.contains("has not called `meanwhile`"), "{said}");
}

#[test]
fn nothing_is_freed_where_a_flush_was_answered_for_too_early() {
    for (answers, nr_pages) in
        [(Answers::AtOnce, 1), (Answers::ForAnother, 3), (Answers::WithoutMeanwhile, 3)]
    {
        let kernel = PaperKernel::new(Options { answers, ..Options::default() });
        let mm = kernel.new_mm();
        kernel.map_range(mm, range(GIB, GIB + nr_pages * PAGE));
        for cpu in [CPU[0], CPU[1]] {
            kernel.run(cpu, mm);
            kernel.touch(cpu, GIB, Access::Write).expect("mapped");
        }
        let vma = area(GIB, GIB + nr_pages * PAGE, Backing::Anonymous);
        let said = said(&kernel, || {
            kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::between(Some(GIB), None));
        });
        assert!(said.contains("T2"), "{said}");
        assert_eq!(kernel.ledger().nr_held() as u64, nr_pages, "{answers:?}: what waited leaks");
        assert_eq!(mm.open_gathers(), 0, "{answers:?}");
        assert!(mm.context().has_deferred_flushes(), "{answers:?}: whoever looks next makes up for it");
    }
}

/// With right answers the check raises no false alarm, also where CPUs are lazy, elsewhere, or off.
#[test]
fn honest_answers_are_never_named() {
    let kernel = PaperKernel::new(Options { cpus: 8, ..Options::default() });
    let (mm, other) = (kernel.new_mm(), kernel.new_mm());
    kernel.map_range(mm, range(GIB, GIB + 64 * PAGE));
    for round in 0..16 {
        for (number, cpu) in kernel.cpu_ids().enumerate() {
            match (number + round) % 4 {
                0 => kernel.run(cpu, mm),
                1 => kernel.run(cpu, other),
                2 => kernel.go_lazy(cpu),
                _ => kernel.stop(cpu),
            }
        }
        let mut gather: MmuGather<'_, '_, PaperKernel> = kernel.gather(mm);
        gather.changed(range(GIB, GIB + PAGE), Level::Pte);
        gather.flush().free();
        let _receipt = flush_tlb_mm(&kernel, mm.context());
    }
    let mut gather = kernel.gather(mm);
    let vma = area(GIB, GIB + 64 * PAGE, Backing::Anonymous);
    gather.unmap_vmas([vma], vma.range).expect("no leaf is cut");
    gather.unhook_tables([vma], Bounds::whole());
    gather.flush().free();
}
