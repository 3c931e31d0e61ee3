//! Rules T1 to T6, each by its sentence.

use mmu_gather::Limits;
use mmu_gather::pagetable::{Bounds, Level};
use mmu_gather::tlb::{
    CachedTranslations, Concern, Cpus, FreedTables, PageSpan, PcidSupport, UnmapBatch, flush_tlb_mm,
    flush_tlb_mm_range,
};
use mmu_tests::{Access, Backing, CPU, Event, Fault, GIB, Options, PaperKernel, area, range};

const PAGE: u64 = 4096;

fn kernel_with_pages(options: Options, nr_pages: u64) -> PaperKernel {
    let kernel = PaperKernel::new(options);
    let mm = kernel.new_mm();
    kernel.map_range(mm, range(GIB, GIB + nr_pages * PAGE));
    kernel
}

const fn page_at(address: u64) -> PageSpan {
    PageSpan { start: address, end: address + PAGE, stride_shift: 12 }
}

#[test]
fn t1_order_is_change_the_page_table_raise_tlb_gen_then_look_who_must_be_told_tlb_gen_rises_even_if_nobody_must()
 {
    let kernel = kernel_with_pages(Options::default(), 2);
    let mm = kernel.mm(0);
    let vma = area(GIB, GIB + 2 * PAGE, Backing::Anonymous);
    kernel.zap(mm, &vma, range(GIB, GIB + PAGE)).free();
    assert_eq!(mm.context().tlb_gen().get(), 1, "no CPU ever loaded it, and yet");

    kernel.run(CPU[1], mm);
    kernel.take_events();
    kernel.once(
        |event| *event == Event::StateRead(CPU[1]),
        |kernel| {
            let mm = kernel.mm(0);
            assert!(kernel.lookup(mm, GIB + PAGE).value.is_empty(), "first the page table");
            assert_eq!(mm.context().tlb_gen().get(), 2, "then the generation");
        },
    );
    kernel.zap(mm, &vma, vma.range).free();
    assert_eq!(kernel.nr_hooks_waiting(), 0);
}

/// Compares the promise of every slot with what the pretend TLB really holds.
fn assert_slots_are_true(kernel: &PaperKernel, nr_mms: usize) {
    for cpu in kernel.cpu_ids() {
        for (asid, slot) in kernel.state(cpu).slots() {
            let mm = (0..nr_mms)
                .map(|index| kernel.mm(index))
                .find(|mm| slot.ctx_id == Some(mm.context().ctx_id()));
            let Some(mm) = mm else { continue };
            assert!(slot.tlb_gen <= mm.context().tlb_gen());
            if slot.tlb_gen < mm.context().tlb_gen() {
                continue;
            }
            for leaf in kernel.cached_under(cpu, asid.pcid(kernel.pcid_support()).value()) {
                let now = kernel.lookup(mm, leaf.address).translate(leaf.address);
                assert_eq!(now, Some(leaf.frame.start_address()), "{cpu} claims to be up to date");
            }
        }
    }
}

#[test]
fn t2_nothing_older_than_gen_is_cached_in_a_slot_flushing_without_raising_is_legal_raising_without_flushing_is_not()
 {
    // A small random generator; the constants are Knuth's.
    let mut random = 1u64;
    let mut below = |bound: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % bound
    };
    for _ in 0..200 {
        let kernel = PaperKernel::new(Options { cpus: 3, flush_ceiling: 2, ..Options::default() });
        for _ in 0..8 {
            kernel.new_mm();
        }
        for _ in 0..60 {
            let index = usize::try_from(below(8)).expect("small");
            let mm = kernel.mm(index);
            let cpu = CPU[usize::try_from(below(3)).expect("small")];
            let address = GIB + below(6) * PAGE;
            match below(8) {
                0 | 1 => kernel.run(cpu, mm),
                2 => kernel.go_lazy(cpu),
                3 => kernel.stop(cpu),
                4 | 5 => kernel.speculate(cpu, address),
                // Flushing without raising: always legal.
                6 => kernel.on(cpu, || kernel.invlpg(address)),
                _ if kernel.lookup(mm, address).value.is_empty() => {
                    kernel.map(mm, address, Level::Pte);
                }
                _ => {
                    let vma = area(GIB, GIB + 6 * PAGE, Backing::Anonymous);
                    let end = (address + (1 + below(4)) * PAGE).min(vma.range.end());
                    kernel.on(cpu, || kernel.zap(mm, &vma, range(address, end)).free());
                }
            }
            assert_slots_are_true(&kernel, 8);
        }
    }
}

#[test]
fn t3_a_ranged_flush_is_enough_only_when_it_takes_the_slot_from_gen_minus_1_to_gen_otherwise_flush_all() {
    let kernel = kernel_with_pages(Options::default(), 8);
    let mm = kernel.mm(0);
    kernel.run(CPU[1], mm);
    for page in 0..8 {
        kernel.touch(CPU[1], GIB + page * PAGE, Access::Write).expect("mapped");
    }
    let _flushed = flush_tlb_mm_range(&kernel, mm.context(), page_at(GIB), FreedTables::No);
    assert_eq!(kernel.cached(CPU[1], GIB), None);
    assert!(kernel.cached(CPU[1], GIB + PAGE).is_some(), "from one generation to the next: the page alone");

    // Reclaim raises the generation and tells nobody yet. The next ranged flush skips that
    // generation.
    let mut batch = UnmapBatch::new();
    let frame = kernel.reclaim(&mut batch, mm, GIB + PAGE);
    let _flushed = flush_tlb_mm_range(&kernel, mm.context(), page_at(GIB + 2 * PAGE), FreedTables::No);
    assert_eq!(kernel.touch(CPU[1], GIB + PAGE, Access::Write), Err(Fault::NotPresent));
    assert_eq!(kernel.cached(CPU[1], GIB + 3 * PAGE), None, "all was dropped");
    kernel.release(frame, 1);
    let _flushed = batch.flush(&kernel);
}

#[test]
fn t4_a_switch_announces_itself_joins_the_cpumask_reads_tlb_gen_then_loads_cr3() {
    for pcid in [PcidSupport::Off, PcidSupport::On] {
        let kernel = kernel_with_pages(Options { pcid, ..Options::default() }, 1);
        let mm = kernel.mm(0);
        let other = kernel.new_mm();
        kernel.run(CPU[1], other);
        let _flushed = flush_tlb_mm(&kernel, mm.context());
        let root = mm.space().root();
        kernel.once(
            move |event| matches!(event, Event::Cr3 { root: loaded, .. } if *loaded == root),
            |kernel| {
                let (mm, other) = (kernel.mm(0).context(), kernel.mm(1).context());
                let state = kernel.state(CPU[1]);
                assert!(!state.has_loaded(mm) && !state.has_loaded(other), "SWITCHING");
                assert_eq!(state.concern(Some(mm)), Concern::MustFlush);
                assert_eq!(state.concern(Some(other)), Concern::MustFlush);
                assert!(mm.cpumask().contains(CPU[1]) && other.cpumask().contains(CPU[1]));
                let slot = state.slots().find(|(_, slot)| slot.ctx_id == Some(mm.ctx_id()));
                assert_eq!(slot.map(|(_, slot)| slot.tlb_gen), Some(mm.tlb_gen()));
            },
        );
        kernel.run(CPU[1], mm);
        assert_eq!(kernel.nr_hooks_waiting(), 0);
        assert!(kernel.state(CPU[1]).has_loaded(mm.context()));
        // The fence between joining and reading is model-checked in the tlb crate, under loom.
    }
}

#[test]
fn t5_a_lazy_cpu_may_skip_page_flushes_never_the_flush_of_freed_tables() {
    let kernel = kernel_with_pages(Options::default(), 2);
    let mm = kernel.mm(0);
    kernel.run(CPU[1], mm);
    kernel.touch(CPU[1], GIB, Access::Write).expect("mapped");
    kernel.go_lazy(CPU[1]);
    let vma = area(GIB, GIB + 2 * PAGE, Backing::Anonymous);
    kernel.take_events();
    kernel.zap(mm, &vma, vma.range).free();
    assert_eq!(kernel.count(|event| matches!(event, Event::Ipi { .. })), 0, "pages only");
    assert!(kernel.state(CPU[1]).has_loaded(mm.context()));
    kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
    assert_eq!(kernel.count(|event| *event == Event::Ipi { to: CPU[1] }), 1, "tables");
    assert!(!kernel.state(CPU[1]).has_loaded(mm.context()));
}

#[test]
fn t6_a_pcid_names_one_context_on_one_cpu_until_it_is_flushed_reuse_flushes_first() {
    let kernel = PaperKernel::new(Options { cpus: 2, ..Options::default() });
    let mut names = [[None; 7]; 2];
    for round in 0..200usize {
        if round < 16 {
            let mm = kernel.new_mm();
            kernel.map(mm, GIB, Level::Pte);
        }
        let index = (round * 7 + round / 3) % (round + 1).min(16);
        let cpu = round % 2;
        kernel.take_events();
        kernel.run(CPU[cpu], kernel.mm(index));
        let frame = kernel.touch(CPU[cpu], GIB, Access::Read).expect("mapped");
        let own = kernel.lookup(kernel.mm(index), GIB).translate(GIB);
        assert_eq!(own, Some(frame.start_address()), "another context's page, in round {round}");
        for noted in kernel.take_events() {
            let Event::Cr3 { pcid, cached, .. } = noted.event else { continue };
            let named = &mut names[cpu][usize::from(pcid)];
            let new = Some(kernel.mm(index).context().ctx_id());
            assert!(*named == new || cached == CachedTranslations::Flush, "round {round}: {named:?}");
            *named = new;
        }
    }
}
