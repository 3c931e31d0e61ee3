//! Rules G1 to G7, each by its sentence.

use std::collections::BTreeMap;

use mmu_gather::pagetable::{Bounds, Level};
use mmu_gather::tlb::PcidSupport;
use mmu_gather::{GatherEvent, Limits, MmuGather, Vma};
use mmu_tests::{
    Access, Backing, CPU, Event, Fault, GIB, GatherOnPaper, MIB, Noted, Options, PaperKernel, Supply, area,
    range,
};
use static_assertions::const_assert;
use x86_64::structures::paging::PhysFrame;

const PAGE: u64 = 4096;

const_assert!(size_of::<MmuGather<'_, '_, PaperKernel>>() <= 256);

/// The smallest capacities: every batch boundary is met within a few pages.
const SMALL: Limits = Limits::DEFAULT
    .with_bundle_slots(3)
    .with_batch_slots(4)
    .with_batch_pages(2)
    .with_table_slots(2)
    .with_free_chunk(2);

/// Small pages, dirty pages of a file, a large page, and a frame of a device. All were in use on
/// CPUs 0 to 3; CPU 1 is lazy by now, and CPU 2 runs something else.
fn busy_kernel(options: Options) -> (PaperKernel, Vec<Vma<Backing>>) {
    let kernel = PaperKernel::new(options);
    let mm = kernel.new_mm();
    let vmas = vec![
        area(GIB, GIB + 20 * PAGE, Backing::Anonymous),
        area(GIB + 20 * PAGE, GIB + 30 * PAGE, Backing::File),
        area(2 * GIB, 2 * GIB + 2 * MIB, Backing::Anonymous),
        area(600 * GIB, 600 * GIB + 5 * PAGE, Backing::Anonymous),
    ];
    kernel.map_range(mm, vmas[0].range);
    kernel.map_range(mm, vmas[1].range);
    kernel.map(mm, 2 * GIB, Level::Pmd);
    kernel.map_range(mm, vmas[3].range);
    for cpu in kernel.cpu_ids() {
        kernel.run(cpu, mm);
        for vma in &vmas {
            for address in (vma.range.start()..vma.range.end()).step_by(4096).take(32) {
                kernel.touch(cpu, address, Access::Write).expect("mapped");
            }
        }
    }
    kernel.go_lazy(CPU[1]);
    kernel.run(CPU[2], kernel.new_mm());
    kernel.take_events();
    (kernel, vmas)
}

fn assert_gone(kernel: &PaperKernel, vmas: &[Vma<Backing>]) {
    let mm = kernel.mm(0);
    for cpu in kernel.cpu_ids() {
        kernel.run(cpu, mm);
        for vma in vmas {
            for address in (vma.range.start()..vma.range.end()).step_by(4096).take(32) {
                assert_eq!(kernel.touch(cpu, address, Access::Read), Err(Fault::NotPresent), "{cpu}");
            }
        }
    }
    assert_eq!(kernel.nr_tables(mm), [0; 4]);
    assert_eq!(kernel.ledger().nr_held(), 0);
    assert_eq!(kernel.batches_lent(), 0);
}

#[test]
fn g1_a_frame_or_table_reaches_the_allocator_only_after_every_cpu_that_may_hold_a_translation_through_it_has_flushed()
 {
    for pcid in [PcidSupport::Off, PcidSupport::On] {
        for limits in [Limits::DEFAULT, SMALL] {
            let (kernel, vmas) = busy_kernel(Options { pcid, ..Options::default() });
            // The checker looks at every TLB whenever something is freed.
            kernel.unmap(kernel.mm(0), &limits, &vmas, Bounds::whole());
            assert!(kernel.count(|event| matches!(event, Event::PageFreed(_))) == 36);
            assert!(kernel.count(|event| matches!(event, Event::TableFreed(_))) == 7);
            assert_gone(&kernel, &vmas);
        }
    }
}

#[test]
fn g2_the_flush_covers_every_address_cleared_since_the_last_flush_and_its_stride_is_the_smallest_level_cleared()
 {
    let invalidated = |kernel: &PaperKernel| -> Vec<u64> {
        let on_cpu_1 = |noted: &Noted| match noted.event {
            Event::Invlpg { cpu, address } if cpu == CPU[1] => Some(address),
            _ => None,
        };
        kernel.take_events().iter().filter_map(on_cpu_1).collect()
    };
    let kernel = PaperKernel::new(Options { flush_ceiling: u64::MAX, ..Options::default() });
    let mm = kernel.new_mm();
    let vma = area(GIB, 2 * GIB, Backing::Anonymous);
    for page in [3, 4, 9] {
        kernel.map(mm, GIB + page * PAGE, Level::Pte);
    }
    for large in [4, 5] {
        kernel.map(mm, GIB + large * 2 * MIB, Level::Pmd);
    }
    kernel.run(CPU[1], mm);
    let mut gather = kernel.gather(mm);
    gather.zap_vma_range(&vma, range(GIB, GIB + 5 * PAGE)).expect("no leaf is cut");
    gather.zap_vma_range(&vma, range(GIB + 9 * PAGE, GIB + 10 * PAGE)).expect("no leaf is cut");
    gather.flush_mmu();
    let pages: Vec<u64> = (3..10).map(|page| GIB + page * PAGE).collect();
    assert_eq!(invalidated(&kernel), pages, "from the first cleared to the last, 4 KiB at a time");

    gather.zap_vma_range(&vma, range(GIB + 8 * MIB, GIB + 12 * MIB)).expect("no leaf is cut");
    gather.flush_mmu();
    assert_eq!(
        invalidated(&kernel),
        [GIB + 8 * MIB, GIB + 10 * MIB],
        "2 MiB at a time, the old range forgotten"
    );

    // A table counts as the entry that linked it, and one page beside it makes the stride small
    // again.
    gather.unhook_tables([vma], Bounds::whole());
    gather.flush().free();
    let tables = invalidated(&kernel);
    assert_eq!(tables.first(), Some(&GIB));
    assert!(tables.windows(2).all(|pair| pair[1] - pair[0] == 2 * MIB), "{tables:?}");
}

#[test]
fn g3_nothing_is_freed_and_no_ipi_is_waited_for_under_a_page_table_lock_but_for_dirty_pages_which_frees_nothing()
 {
    let (kernel, vmas) = busy_kernel(Options::default());
    kernel.unmap(kernel.mm(0), &SMALL, &vmas, Bounds::whole());
    let (mut locked_ipis, mut dirty) = (0, false);
    for noted in kernel.take_events() {
        match noted.event {
            Event::Gather(GatherEvent::DirtyFlush) => dirty = true,
            Event::Gather(GatherEvent::LockDropped { .. }) => dirty = false,
            Event::Ipi { .. } if noted.under_lock => {
                assert!(dirty, "{noted:?}");
                locked_ipis += 1;
            }
            Event::PageFreed(_) | Event::TableFreed(_) | Event::FreeChunk { .. } | Event::Resched => {
                assert!(!noted.under_lock, "{noted:?}");
            }
            _ => {}
        }
    }
    assert!(locked_ipis > 0, "dirty pages were there");
}

/// What can be seen from outside; the same, whatever memory there was.
fn visible_result(kernel: &PaperKernel, vmas: &[Vma<Backing>]) -> (Vec<PhysFrame>, [u64; 4]) {
    let mut freed: Vec<PhysFrame> = kernel
        .take_events()
        .iter()
        .filter_map(|noted| match noted.event {
            Event::PageFreed(frame) => Some(frame),
            _ => None,
        })
        .collect();
    freed.sort_unstable();
    let tables = kernel.nr_tables(kernel.mm(0));
    assert_gone(kernel, vmas);
    (freed, tables)
}

#[test]
fn g4_allocation_failure_changes_speed_never_the_visible_result() {
    let unmap = |supply: Supply, limits: &Limits| {
        let (kernel, vmas) = busy_kernel(Options::default());
        kernel.supply_batches(supply);
        kernel.unmap(kernel.mm(0), limits, &vmas, Bounds::whole());
        let fallbacks = kernel.count(|event| *event == Event::Gather(GatherEvent::TableFallback));
        (visible_result(&kernel, &vmas), fallbacks)
    };
    let (expected, _) = unmap(Supply::Unlimited, &Limits::DEFAULT);
    let mut fallbacks = 0;
    for pattern in 0..1u64 << 8 {
        // The eight bits, repeated.
        let pattern = pattern * 0x0101_0101_0101_0101;
        for limits in [Limits::DEFAULT, SMALL] {
            let (found, fell_back) = unmap(Supply::Pattern(pattern), &limits);
            assert_eq!(found, expected, "{pattern:#x}, {limits:?}");
            fallbacks += fell_back;
        }
    }
    for left in 0..12 {
        assert_eq!(unmap(Supply::Left(left), &SMALL).0, expected);
    }
    assert!(fallbacks > 0, "the single-table fallback was used");
}

#[test]
fn g5_everything_queued_is_released_exactly_once_an_unfinished_gather_finishes_itself_when_dropped() {
    for limits in [Limits::DEFAULT, SMALL] {
        for stop_after in 0..4 {
            let (kernel, vmas) = busy_kernel(Options::default());
            let mm = kernel.mm(0);
            let mut gather = kernel.gather(mm).with_limits(&limits);
            if stop_after > 0 {
                gather.unmap_vmas(vmas.iter().copied(), mm.space().user_range()).expect("no leaf is cut");
            }
            if stop_after > 1 {
                gather.unhook_tables(vmas.iter().copied(), Bounds::whole());
            }
            if stop_after > 2 {
                gather.flush_mmu();
            }
            drop(gather);
            let mut freed: BTreeMap<PhysFrame, u32> = BTreeMap::new();
            for noted in kernel.take_events() {
                if let Event::PageFreed(frame) | Event::TableFreed(frame) = noted.event {
                    *freed.entry(frame).or_default() += 1;
                }
            }
            assert!(freed.values().all(|times| *times == 1));
            let (pages, tables) = ([0, 36, 36, 36][stop_after], [0, 0, 7, 7][stop_after]);
            assert_eq!(freed.len(), pages + tables, "stopped after step {stop_after}");
            assert_eq!(mm.open_gathers(), 0);
            assert_eq!(kernel.batches_lent(), 0);
        }
    }
}

#[test]
fn g6_if_another_gather_ran_on_the_same_tables_meanwhile_finish_flushes_the_whole_mm_tables_included() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let vma = area(GIB, GIB + 4 * PAGE, Backing::Anonymous);
    kernel.map_range(mm, vma.range);
    for cpu in [CPU[1], CPU[2]] {
        kernel.run(cpu, mm);
        kernel.touch(cpu, GIB, Access::Write).expect("mapped");
    }
    kernel.go_lazy(CPU[2]);
    let mut first = kernel.gather(mm);
    first.unmap_vmas([vma], vma.range).expect("no leaf is cut");
    // All entries are empty, so this gather has nothing of its own to flush. When it returns,
    // nobody may use the page.
    kernel.zap(mm, &vma, range(GIB, GIB + PAGE)).free();
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Write), Err(Fault::NotPresent));
    assert!(!kernel.state(CPU[2]).has_loaded(mm.context()), "tables included: lazy CPUs were told");
    first.flush().free();
    assert_eq!(
        kernel.count(|event| *event == Event::Gather(GatherEvent::NestedFlush)),
        1,
        "the last is alone"
    );
}

#[test]
fn g7_the_work_between_two_preemption_points_is_bounded_whatever_the_range() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let vmas = [
        area(GIB, GIB + 24 * MIB, Backing::Anonymous),
        area(GIB + 24 * MIB, GIB + 28 * MIB, Backing::File),
        area(1 << 40, 1 << 46, Backing::Anonymous),
    ];
    kernel.map_range(mm, vmas[0].range);
    kernel.map_range(mm, vmas[1].range);
    for sparse in 0..600u64 {
        kernel.map(mm, (1 << 40) + sparse * 3 * GIB, Level::Pte);
    }
    kernel.run(CPU[0], mm);
    for address in (vmas[1].range.start()..vmas[1].range.end()).step_by(4096) {
        kernel.touch(CPU[0], address, Access::Write).expect("mapped");
    }
    kernel.take_events();
    kernel.unmap(mm, &Limits::DEFAULT, &vmas, Bounds::whole());
    assert_eq!(kernel.ledger().nr_held(), 0);
    let (mut cleared, mut freed, mut tables, mut locks) = (0, 0, 0, 0);
    for noted in kernel.take_events() {
        match noted.event {
            Event::LeafCleared(_) => cleared += 1,
            Event::FreeChunk { slots } => freed += slots,
            Event::TableFreed(_) => tables += 1,
            Event::LockAsked(_) => locks += 1,
            Event::Resched => (cleared, freed, tables, locks) = (0, 0, 0, 0),
            _ => {}
        }
        assert!(cleared <= 512, "{cleared} leaves cleared");
        assert!(freed <= 513, "{freed} slots freed");
        assert!(tables <= 511, "{tables} tables freed");
        assert!(locks <= 2, "{locks} locks taken");
    }
}

/// Who clears `first` has not flushed yet when another call looks at `second`.
#[test]
fn g6_calls_of_few_pages_flush_all_where_another_is_open_on_their_tables_and_their_own_elsewhere() {
    const EDGE: u64 = GIB + 2 * MIB;
    let (one, few) = (range(GIB, GIB + PAGE), range(GIB, GIB + 9 * PAGE));
    let two_tables = range(EDGE - 4 * PAGE, EDGE + 4 * PAGE);
    let (last, next) = (range(EDGE - 4 * PAGE, EDGE - 3 * PAGE), range(EDGE, EDGE + PAGE));
    let far = range(EDGE + 2 * MIB, EDGE + 2 * MIB + 9 * PAGE);
    let all = range(GIB, GIB + 16 * MIB);
    let cases = [
        (one, one, true),
        (one, few, true),
        (few, one, true),
        (few, few, true),
        (one, range(GIB + 8 * PAGE, GIB + 9 * PAGE), true),
        (two_tables, last, true),
        (two_tables, next, true),
        (next, two_tables, true),
        (last, two_tables, true),
        (one, all, true),
        (far, all, true),
        (all, one, true),
        (all, far, true),
        (one, next, false),
        (next, one, false),
        (few, far, false),
        (far, few, false),
        (two_tables, far, false),
        (far, two_tables, false),
    ];
    for (first, second, all_is_flushed) in cases {
        let kernel = PaperKernel::new(Options::default());
        let mm = kernel.new_mm();
        let vma = area(GIB, GIB + 16 * MIB, Backing::Anonymous);
        kernel.map_range(mm, vma.range);
        kernel.run(CPU[1], mm);
        for page in [first.start(), second.start()] {
            kernel.touch(CPU[1], page, Access::Write).expect("mapped");
        }
        kernel.once(
            |event| matches!(event, Event::Gather(GatherEvent::LockDropped { .. })),
            move |kernel| {
                let mm = kernel.mm(0);
                kernel.zap(mm, &vma, second).free();
                let of_second = kernel.touch(CPU[1], second.start(), Access::Write);
                assert_eq!(of_second, Err(Fault::NotPresent), "{second} beside {first}");
                let nested = kernel.count(|event| *event == Event::Gather(GatherEvent::NestedFlush));
                assert_eq!(nested, usize::from(all_is_flushed), "{second} beside {first}");
                if all_is_flushed {
                    assert_eq!(kernel.cached(CPU[1], first.start()), None, "{second} beside {first}");
                } else {
                    assert!(kernel.cached(CPU[1], first.start()).is_some(), "no more than its own");
                }
            },
        );
        kernel.zap(mm, &vma, first).free();
        assert_eq!(kernel.nr_hooks_waiting(), 0);
        assert_eq!(kernel.touch(CPU[1], first.start(), Access::Write), Err(Fault::NotPresent));
        assert_eq!(mm.open_gathers(), 0);
    }
}

/// One page is unmapped without a gather; several pages, or no page, with one.
#[test]
fn g6_holds_for_calls_of_any_size_short_way_or_long() {
    for (nr_pages, unmap) in [(1, false), (2, false), (9, false), (1, true), (2, true), (9, true)] {
        let kernel = PaperKernel::new(Options::default());
        let mm = kernel.new_mm();
        let vma = area(GIB, GIB + 16 * PAGE, Backing::Anonymous);
        kernel.map_range(mm, vma.range);
        for cpu in [CPU[1], CPU[2]] {
            kernel.run(cpu, mm);
            for page in 0..16 {
                kernel.touch(cpu, GIB + page * PAGE, Access::Write).expect("mapped");
            }
        }
        kernel.go_lazy(CPU[2]);
        let mut first = kernel.gather(mm);
        first.unmap_vmas([vma], range(GIB, GIB + nr_pages * PAGE)).expect("no leaf is cut");
        let part = area(GIB, GIB + nr_pages * PAGE, Backing::Anonymous);
        if unmap {
            kernel.unmap(mm, &Limits::DEFAULT, &[part], Bounds::between(None, Some(part.range.end())));
        } else {
            kernel.zap(mm, &part, part.range).free();
        }
        for page in 0..nr_pages {
            let found = kernel.touch(CPU[1], GIB + page * PAGE, Access::Write);
            assert_eq!(found, Err(Fault::NotPresent), "{nr_pages} pages, page {page}");
        }
        assert!(!kernel.state(CPU[2]).has_loaded(mm.context()), "tables included: lazy CPUs were told");
        assert_eq!(kernel.count(|event| *event == Event::Gather(GatherEvent::NestedFlush)), 1);
        drop(first);
    }
}

/// Linux "x86/mm/tlb: Unify flush_tlb_func_local() and flush_tlb_func_remote()" and the flushes
/// made concurrent with it, 2021.
#[test]
fn the_initiator_flushes_while_the_others_do_and_not_after_they_have_answered() {
    for nr_pages in [1, 5, 100] {
        let kernel = PaperKernel::new(Options::default());
        let mm = kernel.new_mm();
        let vma = area(GIB, GIB + nr_pages * PAGE, Backing::Anonymous);
        kernel.map_range(mm, vma.range);
        for cpu in [CPU[0], CPU[1]] {
            kernel.run(cpu, mm);
            kernel.touch(cpu, GIB, Access::Write).expect("mapped");
        }
        kernel.take_events();
        kernel.zap(mm, &vma, vma.range).free();
        let events: Vec<Noted> = kernel.take_events();
        let place = |pick: &dyn Fn(&Event) -> bool| events.iter().position(|noted| pick(&noted.event));
        let own = place(&|event| match *event {
            Event::Invlpg { cpu, .. } | Event::Cr3 { cpu, .. } => cpu == CPU[0],
            _ => false,
        });
        let meanwhile = place(&|event| *event == Event::Meanwhile);
        let answered = place(&|event| *event == Event::Answered);
        assert!(meanwhile.is_some() && meanwhile < own && own < answered, "{nr_pages}: {events:?}");
    }
}

/// Areas that are closer together than the span of a table are taken in one walk: the parent is
/// locked once, not once for each area.
#[test]
fn areas_that_lie_close_together_are_taken_in_one_walk() {
    let locks = |gap: u64| {
        let kernel = PaperKernel::new(Options::default());
        let mm = kernel.new_mm();
        let vmas: Vec<_> = (0..20)
            .map(|number| {
                let start = GIB + number * gap;
                kernel.map(mm, start, Level::Pte);
                area(start, start + PAGE, Backing::Anonymous)
            })
            .collect();
        let pmd = kernel.find_table(mm, GIB, Level::Pmd).expect("linked").frame();
        let mut gather = kernel.gather(mm);
        gather.unmap_vmas(vmas.iter().copied(), mm.space().user_range()).expect("no leaf is cut");
        kernel.take_events();
        gather.unhook_tables(vmas, Bounds::whole());
        let locks = kernel.count(|event| *event == Event::LockAsked(pmd));
        drop(gather);
        assert_eq!(kernel.nr_tables(mm), [0; 4]);
        locks
    };
    assert_eq!(locks(64 * 1024), 1, "within one table");
    assert_eq!(locks(2 * MIB), 1, "20 tables, 32 at a time");
    assert_eq!(locks(6 * MIB), 20, "too far apart");
}

/// The ceiling decides between single INVLPGs and a full flush, on every CPU, whatever its value
/// is.
#[test]
fn more_pages_than_the_ceiling_are_flushed_as_a_whole_and_no_more_than_it_one_by_one() {
    for ceiling in [0, 1, 7, 33, 511] {
        for nr_pages in [ceiling, ceiling + 1] {
            if nr_pages == 0 {
                continue;
            }
            let kernel = PaperKernel::new(Options { flush_ceiling: ceiling, ..Options::default() });
            let mm = kernel.new_mm();
            let vma = area(GIB, GIB + nr_pages * PAGE, Backing::Anonymous);
            kernel.map_range(mm, vma.range);
            for cpu in [CPU[0], CPU[1]] {
                kernel.run(cpu, mm);
            }
            kernel.take_events();
            kernel.zap(mm, &vma, vma.range).free();
            let one_by_one = kernel.count(|event| matches!(event, Event::Invlpg { .. })) as u64;
            let whole = kernel.count(|event| matches!(event, Event::Cr3 { .. }));
            let expected = if nr_pages > ceiling { (0, 2) } else { (2 * nr_pages, 0) };
            assert_eq!((one_by_one, whole), expected, "{nr_pages} pages, ceiling {ceiling}");
        }
    }
}
