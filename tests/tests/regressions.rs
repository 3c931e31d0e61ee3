//! Bugs that real kernels had, tried on this engine: none of them may happen here.
//!
//! The ordering bugs among them (CVE-2016-2069, CVE-2025-37964, CVE-2025-40174) need more than one
//! thread; they are model-checked in the tlb crate. Those of device frames (CVE-2022-39188 and its
//! sequels) are in `pfn_maps.rs`.

use mmu_gather::pagetable::{Bounds, Level};
use mmu_gather::tlb::{Concern, Cpus, FreedTables, PageSpan, TlbEvent, UnmapBatch, flush_tlb_mm_range};
use mmu_gather::{GatherEvent, Limits};
use mmu_tests::{
    Access, Backing, CPU, Event, Fault, GIB, GatherOnPaper, MIB, Options, PaperKernel, Supply, area, range,
};

const PAGE: u64 = 4096;

/// `nr_pages` pages at 1 GiB, in use on CPU 1.
fn kernel_in_use(nr_pages: u64) -> PaperKernel {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map_range(mm, range(GIB, GIB + nr_pages * PAGE));
    kernel.run(CPU[1], mm);
    for page in 0..nr_pages {
        kernel.touch(CPU[1], GIB + page * PAGE, Access::Write).expect("mapped");
    }
    kernel.take_events();
    kernel
}

/// Linux "mremap: properly flush TLB before releasing the page", 2018, CVE-2018-18281: moved, and
/// freed at the new address by somebody else before the mover had flushed the old one.
#[test]
fn a_page_that_moves_is_not_freed_at_its_new_address_before_the_old_one_is_flushed() {
    for access in [Access::Read, Access::Write] {
        let kernel = PaperKernel::new(Options::default());
        let mm = kernel.new_mm();
        let frame = kernel.map(mm, GIB, Level::Pte);
        kernel.run(CPU[1], mm);
        kernel.touch(CPU[1], GIB, access).expect("mapped");
        let mut mover = kernel.gather(mm);
        mover.move_pages(range(GIB, GIB + PAGE), 2 * GIB).expect("memory");
        // Truncation, before the mover has finished: the checker looks when the page is freed.
        let vma = area(2 * GIB, 2 * GIB + PAGE, Backing::Anonymous);
        kernel.zap(mm, &vma, vma.range).free();
        assert!(kernel.ledger().is_freed(frame, PAGE));
        assert_eq!(kernel.touch(CPU[1], GIB, access), Err(Fault::NotPresent));
        mover.flush().free();
    }
}

/// The same with reclaim instead of truncation.
#[test]
fn a_page_that_moves_is_not_reclaimed_at_its_new_address_before_the_old_one_is_flushed() {
    let kernel = kernel_in_use(1);
    let mm = kernel.mm(0);
    kernel.on(CPU[1], || kernel.invlpg(GIB));
    kernel.zap(mm, &area(GIB, GIB + PAGE, Backing::Anonymous), range(GIB, GIB + PAGE)).free();
    let frame = kernel.map(mm, GIB, Level::Pte);
    kernel.touch(CPU[1], GIB, Access::Read).expect("mapped");
    let mut mover = kernel.gather(mm);
    mover.move_pages(range(GIB, GIB + PAGE), 2 * GIB).expect("memory");
    let mut batch = UnmapBatch::new();
    assert_eq!(kernel.reclaim(&mut batch, mm, 2 * GIB), frame);
    let _flushed = batch.flush(&kernel);
    kernel.release(frame, 1);
    drop(mover);
}

/// Linux "mm: always flush VMA ranges affected by zap_page_range" and "fix MADV_[FREE|DONTNEED] TLB
/// flush miss", 2017: the second zapper of a page finds nothing there, and returns before the first
/// has flushed.
#[test]
fn the_second_zapper_of_a_page_does_not_return_while_the_page_is_usable() {
    // One page is unmapped in a shorter way than several.
    for second_zaps in [1, 2, 3] {
        let kernel = kernel_in_use(3);
        let mm = kernel.mm(0);
        let vma = area(GIB, GIB + 3 * PAGE, Backing::Anonymous);
        let mut first = kernel.gather(mm);
        first.zap_vma_range(&vma, vma.range).expect("no leaf is cut");
        assert!(kernel.touch(CPU[1], GIB, Access::Write).is_ok(), "the first has told nobody");
        kernel.zap(mm, &vma, range(GIB, GIB + second_zaps * PAGE)).free();
        assert_eq!(kernel.touch(CPU[1], GIB, Access::Write), Err(Fault::NotPresent));
        drop(first);
    }
}

/// Linux "mm: mmu_gather: remove __tlb_reset_range() for force flush", 2019: the flush forced by
/// nesting had lost the marks of freed tables.
#[test]
fn a_nested_unmapping_that_frees_tables_tells_lazy_cpus() {
    let kernel = kernel_in_use(3);
    let mm = kernel.mm(0);
    kernel.go_lazy(CPU[1]);
    let other = kernel.gather(mm);
    let vma = area(GIB, GIB + 3 * PAGE, Backing::Anonymous);
    kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
    assert!(!kernel.state(CPU[1]).has_loaded(mm.context()));
    drop(other);
}

/// Linux "mm: fix the TLB range flushed when __tlb_remove_page() runs out of slots" and "Fix TLB
/// gather virtual address range invalidation corner cases", 2013: the flush in the middle of a
/// table covered a wrong part of it.
#[test]
fn a_flush_in_the_middle_of_a_table_covers_what_is_freed_with_it_and_no_more_is_lost() {
    for bundle_slots in 2..=8 {
        let kernel = kernel_in_use(64);
        let mm = kernel.mm(0);
        let limits = Limits::DEFAULT.with_bundle_slots(bundle_slots).with_batch_pages(0);
        let vma = area(GIB, GIB + 64 * PAGE, Backing::Anonymous);
        // Between two forced flushes the program uses what is still mapped.
        for _ in 0..8 {
            kernel.once(
                |event| *event == Event::Resched,
                |kernel| {
                    for page in 0..64 {
                        let _ = kernel.touch(CPU[1], GIB + page * PAGE, Access::Write);
                    }
                },
            );
        }
        let mut gather = kernel.gather(mm).with_limits(&limits);
        gather.zap_vma_range(&vma, vma.range).expect("no leaf is cut");
        gather.flush().free();
        for page in 0..64 {
            assert_eq!(kernel.touch(CPU[1], GIB + page * PAGE, Access::Read), Err(Fault::NotPresent));
        }
    }
}

/// Linux "mm: split tlb_flush_mmu() into flush and free", 2014: a write through an old entry after
/// the page was declared clean is lost. The checker looks, when an rmap goes, that no CPU can
/// write.
#[test]
fn no_cpu_writes_to_a_dirty_page_once_its_rmap_is_gone() {
    let kernel = kernel_in_use(3);
    let mm = kernel.mm(0);
    kernel.once(
        |event| matches!(event, Event::RmapRemoved(_)),
        |kernel| assert!(kernel.touch(CPU[1], GIB, Access::Write).is_err(), "writeback may have begun"),
    );
    let vma = area(GIB, GIB + 3 * PAGE, Backing::File);
    kernel.zap(mm, &vma, vma.range).free();
    assert_eq!(kernel.nr_hooks_waiting(), 0);
}

/// Linux "x86/mm: Flush more aggressively in lazy TLB mode", 2017: machine checks, because a lazy
/// CPU speculated through tables that had been freed and used for something else.
#[test]
fn a_lazy_cpu_never_speculates_through_a_freed_table() {
    let kernel = kernel_in_use(3);
    let mm = kernel.mm(0);
    kernel.go_lazy(CPU[1]);
    let vma = area(GIB, GIB + 3 * PAGE, Backing::Anonymous);
    kernel.once(
        |event| matches!(event, Event::TableFreed(_)),
        |kernel| kernel.speculate(CPU[1], GIB + 2 * PAGE),
    );
    kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
    assert_eq!(kernel.nr_hooks_waiting(), 0);
    kernel.speculate(CPU[1], GIB);
}

/// Linux "mm/tlb, x86/mm: Support invalidating TLB caches for RCU_TABLE_FREE", 2018, and
/// "mmu_gather: invalidate TLB correctly on batch allocation failure and flush", 2020: without
/// memory, tables were freed before the flush.
#[test]
fn without_a_page_for_the_batch_a_table_is_still_flushed_before_it_is_freed() {
    for lazy in [false, true] {
        let kernel = kernel_in_use(3);
        let mm = kernel.mm(0);
        if lazy {
            kernel.go_lazy(CPU[1]);
        }
        kernel.supply_batches(Supply::Left(0));
        let vma = area(GIB, GIB + 3 * PAGE, Backing::Anonymous);
        kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
        // One table waits without a batch page, the second cannot, and the third waits again.
        assert_eq!(kernel.count(|event| *event == Event::Gather(GatherEvent::TableFallback)), 1);
        assert_eq!(kernel.nr_tables(mm), [0; 4]);
    }
}

/// Linux "x86/mm/tlb: Ignore f->new_tlb_gen when zero", 2022: the flush of a reclaim batch carries
/// no generation, which was taken for an old one, and nothing was flushed.
#[test]
fn the_flush_of_a_reclaim_batch_happens_on_a_cpu_of_any_generation() {
    for before in [0, 1, 5] {
        let kernel = kernel_in_use(1);
        let mm = kernel.mm(0);
        for _ in 0..before {
            let span = PageSpan { start: 2 * GIB, end: 2 * GIB + PAGE, stride_shift: 12 };
            let _flushed = flush_tlb_mm_range(&kernel, mm.context(), span, FreedTables::No);
        }
        assert!(kernel.cached(CPU[1], GIB).is_some());
        let mut batch = UnmapBatch::new();
        let frame = kernel.reclaim(&mut batch, mm, GIB);
        let _flushed = batch.flush(&kernel);
        kernel.release(frame, 1);
        assert_eq!(kernel.cached(CPU[1], GIB), None);
    }
}

/// Linux "x86/mm: Eliminate window where TLB flushes may be inadvertently skipped", 2025,
/// CVE-2025-37964: a CPU between two address spaces was taken for one that is elsewhere.
#[test]
fn a_cpu_in_the_middle_of_a_switch_is_told() {
    let kernel = kernel_in_use(1);
    let other = kernel.new_mm();
    kernel.run(CPU[1], other);
    kernel.once(
        |event| matches!(event, Event::Cr3 { .. }),
        |kernel| {
            let concern = kernel.state(CPU[1]).concern(Some(kernel.mm(0).context()));
            assert_eq!(concern, Concern::MustFlush);
        },
    );
    kernel.run(CPU[1], kernel.mm(0));
    assert_eq!(kernel.nr_hooks_waiting(), 0);
}

/// Linux "x86/mm: Fix flush_tlb_range() when used for zapping normal PMDs", 2025: a flush for a
/// removed table that was taken for one of leaves.
#[test]
fn a_ranged_flush_for_tables_reaches_lazy_cpus() {
    let kernel = kernel_in_use(1);
    let mm = kernel.mm(0);
    kernel.go_lazy(CPU[1]);
    let span = PageSpan { start: GIB, end: GIB + 2 * MIB, stride_shift: 21 };
    let _flushed = flush_tlb_mm_range(&kernel, mm.context(), span, FreedTables::No);
    assert!(kernel.state(CPU[1]).has_loaded(mm.context()));
    let _flushed = flush_tlb_mm_range(&kernel, mm.context(), span, FreedTables::Yes);
    assert!(!kernel.state(CPU[1]).has_loaded(mm.context()));
}

/// Linux "free from FIRST_USER_ADDRESS", 2005, and the top of user space: a neighbour that is not
/// there is not address 0.
#[test]
fn the_first_and_the_last_page_of_user_space_give_up_all_their_tables() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let top = 1 << 47;
    let vmas = [area(0, PAGE, Backing::Anonymous), area(top - PAGE, top, Backing::Anonymous)];
    for vma in &vmas {
        kernel.map_range(mm, vma.range);
    }
    kernel.run(CPU[1], mm);
    kernel.touch(CPU[1], 0, Access::Write).expect("mapped");
    kernel.touch(CPU[1], top - PAGE, Access::Write).expect("mapped");
    kernel.unmap(mm, &Limits::DEFAULT, &vmas[1..], Bounds::between(Some(PAGE), None));
    assert_eq!(kernel.nr_tables(mm), [1, 1, 1, 0]);
    kernel.unmap(mm, &Limits::DEFAULT, &vmas[..1], Bounds::whole());
    assert_eq!(kernel.nr_tables(mm), [0; 4]);
}

/// OpenBSD and Linux on powerpc ("mm_cpumask trimming race", 2020): the bit was cleared while the
/// CPU had the address space in CR3. The checker looks at every free.
#[test]
fn a_cpu_that_comes_back_is_in_the_cpumask_again_before_it_loads_cr3() {
    let kernel = kernel_in_use(2);
    let mm = kernel.mm(0);
    let vma = area(GIB, GIB + 2 * PAGE, Backing::Anonymous);
    kernel.stop(CPU[1]);
    kernel.once(
        |event| matches!(event, Event::Cr3 { .. }),
        |kernel| assert!(kernel.mm(0).context().cpumask().contains(CPU[1])),
    );
    // A flush of tables finds that the CPU has left, and takes it out of the cpumask; then the CPU
    // comes back.
    let span = PageSpan { start: GIB, end: GIB + PAGE, stride_shift: 12 };
    let _flushed = flush_tlb_mm_range(&kernel, mm.context(), span, FreedTables::Yes);
    assert!(!mm.context().cpumask().contains(CPU[1]));
    kernel.run(CPU[1], mm);
    kernel.touch(CPU[1], GIB, Access::Write).expect("mapped");
    kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
}

/// Linux "mm: limit mmu_gather batching", 2013, and "cond_resched with large folios", 2024: soft
/// lockups while freeing.
#[test]
fn freeing_a_full_gather_is_preempted_every_512_records() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let vma = area(GIB, GIB + 9000 * PAGE, Backing::Anonymous);
    kernel.map_range(mm, vma.range);
    let flushed = kernel.zap(mm, &vma, vma.range);
    kernel.take_events();
    flushed.free();
    let mut since = 0;
    for noted in kernel.take_events() {
        match noted.event {
            Event::PageFreed(_) => since += 1,
            Event::Resched => since = 0,
            _ => {}
        }
        assert!(since <= 512);
    }
}

/// Motor OS: a root freed while a CPU still had it in CR3.
#[test]
fn no_cpu_has_a_dead_root_in_cr3() {
    let kernel = kernel_in_use(1);
    let mm = kernel.mm(0);
    kernel.go_lazy(CPU[1]);
    kernel.exit(mm, &Limits::DEFAULT, &[area(GIB, GIB + PAGE, Backing::Anonymous)]);
    kernel.free_one_table(mm.space().root());
}

/// Nanos: a flush was skipped because "there was no old mapping" at the address of a new one; the
/// old mapping had been unmapped and not flushed.
#[test]
fn an_address_mapped_again_after_a_zap_never_shows_the_old_page() {
    let kernel = kernel_in_use(1);
    let mm = kernel.mm(0);
    let vma = area(GIB, GIB + PAGE, Backing::Anonymous);
    for _ in 0..4 {
        kernel.zap(mm, &vma, vma.range).free();
        let frame = kernel.map(mm, GIB, Level::Pte);
        assert_eq!(kernel.touch(CPU[1], GIB, Access::Write), Ok(frame));
    }
}

/// Redox: two flushes counted their acknowledgements in one place. Here a flush begins while
/// another one waits.
#[test]
fn a_flush_that_begins_while_another_waits_loses_neither() {
    let kernel = kernel_in_use(2);
    let mm = kernel.mm(0);
    kernel.run(CPU[2], mm);
    kernel.touch(CPU[2], GIB, Access::Write).expect("mapped");
    kernel.touch(CPU[2], GIB + PAGE, Access::Write).expect("mapped");
    let vma = area(GIB, GIB + 2 * PAGE, Backing::Anonymous);
    kernel.once(
        |event| *event == Event::Ipi { to: CPU[1] },
        |kernel| {
            // CPU 2, which is the next to be told, unmaps the other page first.
            let vma = area(GIB, GIB + 2 * PAGE, Backing::Anonymous);
            kernel.on(CPU[2], || {
                kernel.zap(kernel.mm(0), &vma, range(GIB + PAGE, GIB + 2 * PAGE)).free();
            });
        },
    );
    kernel.zap(mm, &vma, range(GIB, GIB + PAGE)).free();
    assert_eq!(kernel.nr_hooks_waiting(), 0);
    for cpu in [CPU[1], CPU[2]] {
        assert_eq!(kernel.cached(cpu, GIB), None, "{cpu}");
        assert_eq!(kernel.cached(cpu, GIB + PAGE), None, "{cpu}");
    }
}

/// When the range did not begin at a multiple of the stride, the flush skipped the last of the
/// freed tables.
#[test]
fn tables_freed_for_a_range_that_begins_in_mid_table_are_all_flushed() {
    let kernel = PaperKernel::new(Options { flush_ceiling: u64::MAX, ..Options::default() });
    let mm = kernel.new_mm();
    let vma = area(GIB + MIB, GIB + 5 * MIB, Backing::Anonymous);
    kernel.run(CPU[1], mm);
    for address in [GIB + MIB, GIB + 2 * MIB, GIB + 4 * MIB] {
        kernel.map(mm, address, Level::Pte);
        kernel.touch(CPU[1], address, Access::Read).expect("mapped");
    }
    // The pages go first, in a gather of their own, so the flush of the second gather is for tables
    // alone, 2 MiB at a time.
    kernel.zap(mm, &vma, vma.range).free();
    kernel.take_events();
    kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
    assert_eq!(
        kernel.count(|event| matches!(event, Event::Tlb(TlbEvent::Requested { pages: Some(3), .. }))),
        1
    );
}
