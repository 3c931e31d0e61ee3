//! Pages of 2 MiB and 1 GiB: unmapped whole, split at the ends of a range, and what happens when
//! they cannot be split.

use mmu_gather::pagetable::{Bounds, EntryValue, Level, Marker, MigrationAccess, NonPresent};
use mmu_gather::tlb::PageSpan;
use mmu_gather::{CutLeaf, FlushedGather, Limits, SplitError, Vma, unmap_region, zap_page_range};
use mmu_tests::{
    Access, Backing, CPU, Event, Fault, GIB, GatherOnPaper, MIB, Options, PaperKernel, Supply, area, range,
};
use x86_64::PhysAddr;
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

const PAGE: u64 = 4096;
const AT: u64 = 4 * GIB;

/// A page of the size of `level` entries at 4 GiB, which CPU 1 runs and has written to.
fn kernel_with_large_page(level: Level) -> PaperKernel {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map(mm, AT, level);
    kernel.run(CPU[1], mm);
    kernel.touch(CPU[1], AT, Access::Write).expect("mapped");
    kernel.touch(CPU[1], AT + level.entry_span() - 1, Access::Write).expect("mapped");
    kernel.take_events();
    kernel
}

#[test]
fn a_large_page_goes_with_one_invlpg_and_its_tables() {
    for (level, tables) in [(Level::Pmd, [0, 1, 1, 0]), (Level::Pud, [0, 0, 1, 0])] {
        let kernel = kernel_with_large_page(level);
        let mm = kernel.mm(0);
        assert_eq!(kernel.nr_tables(mm), tables);
        let vma = area(AT, AT + level.entry_span(), Backing::Anonymous);
        kernel.zap(mm, &vma, vma.range).free();
        assert_eq!(
            kernel.count(|event| matches!(event, Event::Invlpg { address: AT, .. })),
            1,
            "{level:?}: one stride is the whole page"
        );
        assert_eq!(kernel.touch(CPU[1], AT + PAGE, Access::Read), Err(Fault::NotPresent));
        assert_eq!(kernel.ledger().nr_held(), 0);
        kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
        assert_eq!(kernel.nr_tables(mm), [0; 4]);
    }
}

/// With small pages beside it the stride is that of the small pages, and the whole span of the
/// large page is still covered.
#[test]
fn a_large_page_beside_small_ones_is_flushed_at_the_small_stride() {
    let kernel = kernel_with_large_page(Level::Pmd);
    let mm = kernel.mm(0);
    kernel.map_range(mm, range(AT + 2 * MIB, AT + 2 * MIB + PAGE));
    kernel.touch(CPU[1], AT + 2 * MIB, Access::Write).expect("mapped");
    let vma = area(AT, AT + 2 * MIB + PAGE, Backing::Anonymous);
    kernel.zap(mm, &vma, vma.range).free();
    assert_eq!(kernel.touch(CPU[1], AT + MIB, Access::Read), Err(Fault::NotPresent));
    assert_eq!(kernel.touch(CPU[1], AT + 2 * MIB, Access::Read), Err(Fault::NotPresent));
}

#[test]
fn splitting_maps_the_same_memory_in_smaller_pages() {
    for (level, cut, tables) in [
        (Level::Pmd, AT + 7 * PAGE, [1, 1, 1, 0]),
        (Level::Pud, AT + 6 * MIB, [0, 1, 1, 0]),
        (Level::Pud, AT + 6 * MIB + PAGE, [1, 1, 1, 0]),
    ] {
        let kernel = kernel_with_large_page(level);
        let mm = kernel.mm(0);
        let before = kernel.lookup(mm, AT).translate(AT).expect("mapped");
        let mut gather = kernel.gather(mm);
        gather.split(Backing::Anonymous, cut).expect("memory");
        gather.flush().free();
        assert_eq!(kernel.nr_tables(mm), tables, "{level:?} cut at {cut:#x}");
        for address in [AT, AT + 5 * PAGE, cut - PAGE, cut, AT + level.entry_span() - PAGE] {
            let found = kernel.lookup(mm, address);
            assert_eq!(found.translate(address), Some(before + (address - AT)), "{address:#x}");
            assert!(found.value.is_writable() && found.value.is_dirty() && found.value.is_accessed());
            kernel.touch(CPU[1], address, Access::Write).expect("still mapped");
        }
    }
}

/// Once, a range that cuts a large page left all of the page mapped, and its table could not be
/// freed.
#[test]
fn a_migration_entry_or_marker_of_a_large_page_is_split_where_a_range_cuts_it() {
    let frame = PhysFrame::containing_address(PhysAddr::new(4 << 20));
    let migration = NonPresent::Migration { frame, access: MigrationAccess::Writable };
    for whole in [migration, NonPresent::Marker(Marker::Poison)] {
        let kernel = PaperKernel::new(Options::default());
        let mm = kernel.new_mm();
        kernel.put_non_present(mm, AT, Level::Pmd, whole);
        if whole == migration {
            kernel.ledger().add_mapping(frame);
        }
        let cut = AT + 7 * PAGE;
        let mut gather = kernel.gather(mm);
        gather.split(Backing::Anonymous, cut).expect("memory");
        gather.flush().free();
        for page in [0, 6, 7, 511] {
            let expected = match whole {
                NonPresent::Migration { frame, access } => {
                    NonPresent::Migration { frame: frame + page, access }
                }
                other => other,
            };
            let found = kernel.lookup(mm, AT + page * PAGE);
            assert_eq!((found.level, found.value), (Level::Pte, expected.encode()), "page {page}");
        }
        assert_eq!(
            kernel.count(|event| matches!(event, Event::LeafSplit(_))),
            usize::from(whole == migration)
        );
        assert_eq!(kernel.count(|event| matches!(event, Event::Ipi { .. })), 0, "nothing was cached from it");
        let vma = area(AT, cut, Backing::Anonymous);
        kernel.zap(mm, &vma, vma.range).free();
        assert!(kernel.lookup(mm, cut - PAGE).value.is_empty());
        assert!(!kernel.lookup(mm, cut).value.is_empty(), "beyond the range");
    }
}

#[test]
fn splitting_at_the_edge_of_a_large_page_does_nothing() {
    let kernel = kernel_with_large_page(Level::Pmd);
    let mm = kernel.mm(0);
    let mut gather = kernel.gather(mm);
    for edge in [AT, AT + 2 * MIB, AT + 4 * MIB, AT + GIB] {
        gather.split(Backing::Anonymous, edge).expect("nothing to do");
    }
    drop(gather);
    assert_eq!(kernel.nr_tables(mm), [0, 1, 1, 0]);
    assert_eq!(kernel.count(|event| matches!(event, Event::LeafSplit(_) | Event::Ipi { .. })), 0);
}

#[test]
fn unmapping_the_middle_splits_both_ends_and_frees_only_the_middle() {
    for level in [Level::Pmd, Level::Pud] {
        let kernel = kernel_with_large_page(level);
        let mm = kernel.mm(0);
        let (start, end) = (AT + 3 * PAGE, AT + level.entry_span() - 5 * PAGE);
        let mut gather = kernel.gather(mm);
        gather.split(Backing::Anonymous, start).expect("memory");
        gather.split(Backing::Anonymous, end).expect("memory");
        drop(gather);
        let held = kernel.ledger().nr_held();
        let vma = area(start, end, Backing::Anonymous);
        kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::between(Some(start), Some(end)));
        assert_eq!(kernel.ledger().nr_held(), 3 + 5, "{held} before");
        for address in [start, start + MIB, end - PAGE] {
            assert_eq!(kernel.touch(CPU[1], address, Access::Read), Err(Fault::NotPresent), "{address:#x}");
        }
        for address in [AT, start - PAGE, end, AT + level.entry_span() - PAGE] {
            assert!(kernel.touch(CPU[1], address, Access::Write).is_ok(), "{address:#x}");
        }
    }
}

/// Zircon's rule: an unmapping that cannot finish must not have begun.
#[test]
fn a_split_without_memory_changes_nothing() {
    for level in [Level::Pmd, Level::Pud] {
        let kernel = kernel_with_large_page(level);
        let mm = kernel.mm(0);
        let before = kernel.lookup(mm, AT);
        kernel.supply_tables(Supply::Left(0));
        let mut gather = kernel.gather(mm);
        let cut = AT + 3 * PAGE;
        assert_eq!(gather.split(Backing::Anonymous, cut), Err(SplitError::NoTable(cut)));
        drop(gather);
        assert_eq!(kernel.lookup(mm, AT), before, "{level:?}");
        assert_eq!(kernel.count(|event| matches!(event, Event::LeafSplit(_) | Event::Ipi { .. })), 0);
        assert_eq!(kernel.ledger().nr_held(), 1);
        assert!(kernel.cached(CPU[1], AT).is_some(), "nothing was flushed either");
    }
}

/// With one table 1 GiB can be split into 2 MiB pages and no further; those map the same memory.
#[test]
fn a_split_that_stops_half_way_still_maps_the_same_memory() {
    let kernel = kernel_with_large_page(Level::Pud);
    let mm = kernel.mm(0);
    let before = kernel.lookup(mm, AT).translate(AT).expect("mapped");
    kernel.supply_tables(Supply::Left(1));
    let mut gather = kernel.gather(mm);
    let cut = AT + 3 * PAGE;
    assert_eq!(gather.split(Backing::Anonymous, cut), Err(SplitError::NoTable(cut)));
    drop(gather);
    assert_eq!(kernel.lookup(mm, cut).level, Level::Pmd);
    for address in [AT, cut, AT + 5 * MIB, AT + GIB - PAGE] {
        assert_eq!(kernel.lookup(mm, address).translate(address), Some(before + (address - AT)));
    }
    kernel.supply_tables(Supply::Unlimited);
    kernel.gather(mm).split(Backing::Anonymous, cut).expect("memory now");
    assert_eq!(kernel.lookup(mm, cut).translate(cut), Some(before + (cut - AT)));
}

/// On real CPUs it is undefined what happens when both sizes are cached, so the old one is flushed
/// everywhere before the new one appears.
#[test]
fn while_a_leaf_is_split_its_entry_holds_a_migration_entry_and_the_old_size_is_flushed() {
    let kernel = kernel_with_large_page(Level::Pmd);
    let mm = kernel.mm(0);
    let frame = kernel.touch(CPU[1], AT, Access::Read).expect("mapped");
    kernel.once(
        |event| matches!(event, Event::Ipi { .. }),
        move |kernel| {
            let entry = kernel.lookup(kernel.mm(0), AT);
            assert_eq!(entry.level, Level::Pmd);
            let meanwhile = NonPresent::Migration { frame, access: MigrationAccess::Writable };
            assert_eq!(entry.value, meanwhile.encode());
            assert!(!kernel.is_locked_now(), "no lock is held while CPUs are waited for");
        },
    );
    let mut gather = kernel.gather(mm);
    gather.split(Backing::Anonymous, AT + PAGE).expect("memory");
    assert_eq!(kernel.nr_hooks_waiting(), 0);
    assert_eq!(kernel.cached(CPU[1], AT), None, "flushed before the table was linked");
    drop(gather);
    kernel.touch(CPU[1], AT, Access::Write).expect("in 4 KiB pages now");
    assert_eq!(kernel.cached(CPU[1], AT).map(|leaf| leaf.len_bytes), Some(PAGE));
}

/// A leaf turns into a table after the zapper has read it and before it has the lock: the pages
/// below are unmapped all the same.
#[test]
fn a_leaf_that_is_split_under_the_zappers_eyes_is_zapped_in_pieces() {
    let kernel = kernel_with_large_page(Level::Pmd);
    let mm = kernel.mm(0);
    let pmd = kernel.find_table(mm, AT, Level::Pmd).expect("linked").frame();
    kernel.once(
        move |event| *event == Event::LockAsked(pmd),
        |kernel| {
            let mut other = kernel.gather(kernel.mm(0));
            other.split(Backing::Anonymous, AT + PAGE).expect("memory");
        },
    );
    let vma = area(AT, AT + 2 * MIB, Backing::Anonymous);
    kernel.zap(mm, &vma, vma.range).free();
    assert_eq!(kernel.ledger().nr_held(), 0);
    assert_eq!(kernel.touch(CPU[1], AT, Access::Read), Err(Fault::NotPresent));
}

/// The memory type is part of the mapping: a device's memory must not become cacheable by being
/// split.
#[test]
fn splitting_keeps_the_memory_type() {
    let large_pat = 1 << 12;
    let small_pat = PageTableFlags::HUGE_PAGE.bits();
    for (level, cut) in [(Level::Pmd, AT + PAGE), (Level::Pud, AT + 2 * MIB), (Level::Pud, AT + PAGE)] {
        for pat in [0, large_pat] {
            let kernel = PaperKernel::new(Options::default());
            let mm = kernel.new_mm();
            kernel.map(mm, AT, level);
            let view = kernel.find_table(mm, AT, level).expect("linked");
            let entry = view.table().entry(level.index(AT));
            // SAFETY: one thread; nobody has used the page yet.
            unsafe { entry.store(EntryValue::from_bits(entry.load().bits() | pat)) };
            let first = kernel.lookup(mm, AT).translate(AT).expect("mapped");
            kernel.gather(mm).split(Backing::Anonymous, cut).expect("memory");
            for address in [AT, AT + 2 * MIB - PAGE, cut] {
                let found = kernel.lookup(mm, address);
                assert_eq!(found.translate(address), Some(first + (address - AT)));
                let here = if found.level == Level::Pte { small_pat } else { large_pat };
                assert_eq!(
                    found.value.bits() & here != 0,
                    pat != 0,
                    "{level:?}, {:?} at {address:#x}",
                    found
                );
            }
        }
    }
}

#[test]
fn many_large_pages_are_flushed_in_few_steps_or_all_at_once() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    for page in 0..40u64 {
        kernel.map(mm, AT + page * 2 * MIB, Level::Pmd);
    }
    kernel.run(CPU[1], mm);
    let few = area(AT, AT + 33 * 2 * MIB, Backing::Anonymous);
    kernel.zap(mm, &few, few.range).free();
    assert_eq!(kernel.count(|event| matches!(event, Event::Invlpg { .. })), 33);
    kernel.take_events();
    let rest = area(AT, AT + 40 * 2 * MIB, Backing::Anonymous);
    kernel.map(mm, AT, Level::Pmd);
    kernel.zap(mm, &rest, rest.range).free();
    assert_eq!(kernel.count(|event| matches!(event, Event::Invlpg { .. })), 0, "40 are above the ceiling");
    let span = PageSpan { start: AT, end: AT + 40 * 2 * MIB, stride_shift: 21 };
    assert_eq!(span.nr_pages(), 40);
}

/// What a driver returns if the leaf was not split before.
#[expect(unsafe_code, reason = "one thread stands in for the map lock")]
fn unmap_or_zap(kernel: &PaperKernel, vma: &Vma<Backing>, zap: bool) -> Result<(), CutLeaf> {
    let (mm, limits) = (kernel.mm(0), &Limits::DEFAULT);
    if zap {
        // SAFETY: one thread.
        unsafe { zap_page_range(kernel, mm, limits, vma, vma.range) }.map(FlushedGather::free)
    } else {
        // SAFETY: one thread.
        unsafe { unmap_region(kernel, mm, limits, [*vma], Bounds::whole(), || {}) }.map(FlushedGather::free)
    }
}

/// In every build, what is still mapped is never reported as unmapped.
#[test]
fn a_large_leaf_that_a_range_cuts_and_nobody_split_is_an_error_and_stays_mapped_with_its_tables() {
    for level in [Level::Pmd, Level::Pud] {
        let span = level.entry_span();
        let cut = [
            range(AT, AT + span / 2),
            range(AT + span / 2, AT + span),
            range(AT + PAGE, AT + 2 * PAGE),
            range(AT - 8 * PAGE, AT + PAGE),
            range(AT + span - PAGE, AT + span + 8 * PAGE),
        ];
        for (unmapped, zap) in cut.into_iter().flat_map(|range| [(range, false), (range, true)]) {
            let kernel = kernel_with_large_page(level);
            let mm = kernel.mm(0);
            let leaf = kernel.lookup(mm, AT);
            let small =
                [AT - 2 * PAGE, AT + span + 2 * PAGE].into_iter().filter(|page| unmapped.contains(*page));
            let small: Vec<u64> = small.collect();
            for page in &small {
                kernel.map(mm, *page, Level::Pte);
            }
            let vma = area(unmapped.start(), unmapped.end(), Backing::Anonymous);
            let error = unmap_or_zap(&kernel, &vma, zap).expect_err("a leaf is cut");
            assert_eq!((error.address, error.level), (AT, level), "{unmapped} {zap}");
            assert!(error.to_string().contains("was not split before"), "{error}");
            assert_eq!(kernel.lookup(mm, AT), leaf, "still mapped");
            for page in small {
                assert!(kernel.lookup(mm, page).value.is_empty(), "all else is gone");
            }
            let all = area(AT - GIB, AT + 2 * GIB, Backing::Anonymous);
            kernel.unmap(mm, &Limits::DEFAULT, &[all], Bounds::whole());
            assert_eq!(kernel.ledger().nr_held(), 0);
            assert_eq!(mm.open_gathers(), 0);
        }
    }
}

/// Two areas meet in the middle of a leaf that was not split. At exit that is allowed: nobody uses
/// either half any more.
#[test]
fn an_exit_takes_a_leaf_that_areas_cut_as_a_whole() {
    for level in [Level::Pmd, Level::Pud] {
        for first_page in [0, 1] {
            let kernel = kernel_with_large_page(level);
            let (start, end) = (AT + first_page * PAGE, AT + level.entry_span());
            let middle = AT + level.entry_span() / 2;
            let vmas = [
                area(start, middle, Backing::Anonymous),
                area(middle, end - first_page * PAGE, Backing::Anonymous),
            ];
            for cpu in kernel.cpu_ids() {
                kernel.stop(cpu);
            }
            kernel.exit(kernel.mm(0), &Limits::DEFAULT, &vmas);
            assert_eq!(kernel.ledger().nr_held(), 0);
            assert_eq!(kernel.nr_tables(kernel.mm(0)), [0; 4]);
        }
    }
}

/// A split must not make anything executable that was not executable before.
#[test]
fn splitting_keeps_every_right_and_every_bit_that_software_uses() {
    let kept = PageTableFlags::NO_EXECUTE
        | PageTableFlags::WRITE_THROUGH
        | PageTableFlags::NO_CACHE
        | PageTableFlags::GLOBAL
        | PageTableFlags::BIT_9
        | PageTableFlags::BIT_10
        | PageTableFlags::BIT_11
        | PageTableFlags::BIT_52
        | PageTableFlags::BIT_58;
    // Protection key 9, in bits 59 to 62.
    let key = 9 << 59;
    for level in [Level::Pmd, Level::Pud] {
        for bits in [kept.bits() | key, 0] {
            let kernel = kernel_with_large_page(level);
            let mm = kernel.mm(0);
            let view = kernel.find_table(mm, AT, level).expect("linked");
            let entry = view.table().entry(level.index(AT));
            let old = entry.load().bits() & !(kept.bits() | 0xf << 59) | bits;
            // SAFETY: one thread; nobody uses the page meanwhile.
            unsafe { entry.store(EntryValue::from_bits(old)) };
            kernel.gather(mm).split(Backing::Anonymous, AT + PAGE).expect("memory");
            for address in [AT, AT + PAGE, AT + 2 * MIB - PAGE] {
                let small = kernel.lookup(mm, address).value.bits();
                let rights = kept.bits()
                    | 0xf << 59
                    | PageTableFlags::WRITABLE.bits()
                    | PageTableFlags::USER_ACCESSIBLE.bits();
                assert_eq!(small & rights, old & rights, "{level:?} {address:#x}");
            }
        }
    }
}
