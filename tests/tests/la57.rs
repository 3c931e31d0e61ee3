//! Five levels of tables: the same walks, and addresses that four levels do not have.

use mmu_gather::Limits;
use mmu_gather::pagetable::{Bounds, Level, MapError, PagingMode};
use mmu_gather::tlb::PcidSupport;
use mmu_tests::{
    Access, Backing, CPU, Event, Fault, GIB, GatherOnPaper, MIB, Options, PaperKernel, TIB, area, range,
};

const PAGE: u64 = 4096;

fn five_levels() -> Options {
    Options { mode: PagingMode::FiveLevel, ..Options::default() }
}

#[test]
fn pages_above_2_to_the_47_are_zapped_flushed_and_freed() {
    for start in [1 << 47, (1 << 48) - 3 * PAGE, (1 << 48) + GIB, (1 << 56) - 6 * PAGE] {
        let kernel = PaperKernel::new(five_levels());
        let mm = kernel.new_mm();
        let vma = area(start, start + 6 * PAGE, Backing::Anonymous);
        kernel.map_range(mm, vma.range);
        kernel.run(CPU[1], mm);
        for page in 0..6 {
            kernel.touch(CPU[1], start + page * PAGE, Access::Write).expect("mapped");
        }
        kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
        for page in 0..6 {
            assert_eq!(kernel.touch(CPU[1], start + page * PAGE, Access::Read), Err(Fault::NotPresent));
        }
        assert!(
            kernel.count(|event| matches!(event, Event::Invlpg { address, .. } if *address == start)) == 1
        );
        assert_eq!(kernel.nr_tables(mm), [0; 4]);
        assert_eq!(kernel.ledger().nr_held(), 0);
    }
}

#[test]
fn the_fifth_level_is_one_more_table_and_it_stays_while_a_neighbour_needs_it() {
    let kernel = PaperKernel::new(five_levels());
    let mm = kernel.new_mm();
    let low = area(GIB, GIB + PAGE, Backing::Anonymous);
    let high = area(200 * TIB, 200 * TIB + PAGE, Backing::Anonymous);
    let far = area(1024 * TIB, 1024 * TIB + PAGE, Backing::Anonymous);
    for vma in [low, high, far] {
        kernel.map_range(mm, vma.range);
    }
    assert_eq!(kernel.nr_tables(mm), [3, 3, 3, 2], "256 TiB to a P4D table");
    kernel.unmap(mm, &Limits::DEFAULT, &[high], Bounds::between(Some(GIB + PAGE), Some(1024 * TIB)));
    assert_eq!(kernel.nr_tables(mm), [2, 2, 2, 2]);
    kernel.unmap(mm, &Limits::DEFAULT, &[far], Bounds::between(Some(GIB + PAGE), None));
    assert_eq!(kernel.nr_tables(mm), [1, 1, 1, 1]);
    kernel.unmap(mm, &Limits::DEFAULT, &[low], Bounds::whole());
    assert_eq!(kernel.nr_tables(mm), [0; 4]);
}

#[test]
fn a_lazy_cpu_is_told_when_a_p4d_table_goes() {
    for pcid in [PcidSupport::Off, PcidSupport::On] {
        let kernel = PaperKernel::new(Options { pcid, ..five_levels() });
        let mm = kernel.new_mm();
        let at = 3 << 50;
        kernel.map(mm, at, Level::Pud);
        kernel.run(CPU[1], mm);
        kernel.touch(CPU[1], at, Access::Write).expect("mapped");
        kernel.go_lazy(CPU[1]);
        kernel.unmap(mm, &Limits::DEFAULT, &[area(at, at + GIB, Backing::Anonymous)], Bounds::whole());
        assert!(!kernel.state(CPU[1]).has_loaded(mm.context()));
    }
}

#[test]
fn large_pages_split_and_move_above_2_to_the_47() {
    let kernel = PaperKernel::new(five_levels());
    let mm = kernel.new_mm();
    let at = (1 << 50) + GIB;
    kernel.map(mm, at, Level::Pmd);
    kernel.run(CPU[1], mm);
    kernel.touch(CPU[1], at, Access::Write).expect("mapped");
    let mut gather = kernel.gather(mm);
    gather.split(Backing::Anonymous, at + MIB).expect("memory");
    gather.move_pages(range(at, at + MIB), 1 << 55).expect("memory");
    gather.flush().free();
    assert_eq!(kernel.touch(CPU[1], at, Access::Read), Err(Fault::NotPresent));
    assert!(kernel.touch(CPU[1], (1 << 55) + MIB - PAGE, Access::Write).is_ok());
    assert!(kernel.touch(CPU[1], at + MIB, Access::Write).is_ok());
}

#[test]
fn four_levels_refuse_the_addresses_that_five_have() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let mut gather = kernel.gather(mm);
    kernel.map(mm, GIB, Level::Pte);
    let moved = gather.move_pages(range(GIB, GIB + PAGE), 1 << 48);
    assert!(matches!(moved, Err(MapError::NotUserSpace(_))));
    // There is nothing to zap or to free there.
    gather
        .zap_vma_range(&area(1 << 48, (1 << 48) + GIB, Backing::Anonymous), range(1 << 48, (1 << 48) + GIB))
        .expect("no leaf is cut");
    gather.unhook_tables([area(1 << 48, (1 << 48) + GIB, Backing::Anonymous)], Bounds::whole());
    drop(gather);
    assert!(kernel.lookup(mm, GIB).value.is_present());
}
