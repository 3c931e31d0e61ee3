//! Moving mapped pages: mremap, and the stack of a new program.

use mmu_gather::pagetable::{Level, MapError, Marker, NonPresent, VirtRange};
use mmu_gather::tlb::CpuId;
use mmu_gather::{GatherEvent, Limits, shift_arg_pages};
use mmu_tests::{
    Access, Backing, CPU, Event, Fault, GIB, GatherOnPaper, MIB, Options, PaperKernel, Supply, area, range,
};
use x86_64::structures::paging::PhysFrame;

const PAGE: u64 = 4096;

fn kernel_with_pages(start: u64, nr_pages: u64) -> (PaperKernel, Vec<PhysFrame>) {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let frames = kernel.map_range(mm, range(start, start + nr_pages * PAGE));
    kernel.run(CPU[1], mm);
    kernel.take_events();
    (kernel, frames)
}

fn touch_all(
    kernel: &PaperKernel,
    cpu: CpuId,
    at: VirtRange,
    access: Access,
) -> Vec<Result<PhysFrame, Fault>> {
    (at.start()..at.end()).step_by(4096).map(|address| kernel.touch(cpu, address, access)).collect()
}

#[test]
fn pages_keep_their_frames_and_marks_and_the_old_addresses_are_gone() {
    for (from, to) in [(GIB, 3 * GIB), (GIB + 7 * PAGE, 3 * GIB + 500 * PAGE), (3 * GIB, GIB + PAGE)] {
        let (kernel, frames) = kernel_with_pages(from, 600);
        let mm = kernel.mm(0);
        let old = range(from, from + 600 * PAGE);
        let new = range(to, to + 600 * PAGE);
        touch_all(&kernel, CPU[1], old, Access::Write);
        let mut gather = kernel.gather(mm);
        gather.move_pages(old, to).expect("memory");
        gather.flush().free();
        let found = touch_all(&kernel, CPU[1], new, Access::Read);
        assert_eq!(found, frames.iter().map(|frame| Ok(*frame)).collect::<Vec<_>>());
        assert!(touch_all(&kernel, CPU[1], old, Access::Read).iter().all(Result::is_err));
        assert!(kernel.lookup(mm, to).value.is_dirty(), "the dirty bit moves along");
        assert_eq!(kernel.ledger().nr_held(), 600, "nothing is freed");
    }
}

#[test]
fn meanings_move_too_and_holes_stay_holes() {
    let (kernel, _) = kernel_with_pages(GIB, 2);
    let mm = kernel.mm(0);
    let swap = NonPresent::Swap { device: 1, slot: 99 };
    kernel.put_non_present(mm, GIB + 4 * PAGE, Level::Pte, swap);
    kernel.put_non_present(mm, GIB + 5 * PAGE, Level::Pte, NonPresent::Marker(Marker::Guard));
    kernel.gather(mm).move_pages(range(GIB, GIB + 8 * PAGE), 2 * GIB).expect("memory");
    assert_eq!(kernel.lookup(mm, 2 * GIB + 4 * PAGE).value, swap.encode());
    assert_eq!(kernel.lookup(mm, 2 * GIB + 5 * PAGE).value, NonPresent::Marker(Marker::Guard).encode());
    assert!(kernel.lookup(mm, 2 * GIB + 3 * PAGE).value.is_empty());
    assert!(kernel.lookup(mm, GIB + 4 * PAGE).value.is_empty());
}

#[test]
fn moving_without_memory_moves_nothing() {
    // From one last-level table into two others, for which four tables are needed in all.
    let (from, to) = (GIB, 600 * GIB - 4 * PAGE);
    for left in 0..4 {
        let (kernel, frames) = kernel_with_pages(from, 8);
        let mm = kernel.mm(0);
        let old = range(from, from + 8 * PAGE);
        touch_all(&kernel, CPU[1], old, Access::Write);
        kernel.take_events();
        kernel.supply_tables(Supply::Left(left));
        let mut gather = kernel.gather(mm);
        let refused = gather.move_pages(old, to);
        assert!(matches!(refused, Err(MapError::NoTable(_))), "{left} tables: {refused:?}");
        drop(gather);
        assert_eq!(kernel.count(|event| matches!(event, Event::Ipi { .. })), 0);
        let found = touch_all(&kernel, CPU[1], old, Access::Write);
        assert_eq!(found, frames.iter().map(|frame| Ok(*frame)).collect::<Vec<_>>());
        assert!(kernel.lookup(mm, to).value.is_empty() && kernel.lookup(mm, 600 * GIB).value.is_empty());
    }
}

#[test]
fn moving_onto_something_mapped_moves_nothing() {
    let (kernel, frames) = kernel_with_pages(GIB, 8);
    let mm = kernel.mm(0);
    let in_the_way = kernel.map(mm, 2 * GIB + 5 * PAGE, Level::Pte);
    let refused = kernel.gather(mm).move_pages(range(GIB, GIB + 8 * PAGE), 2 * GIB);
    assert!(matches!(refused, Err(MapError::Occupied(at, Level::Pte, _)) if at == 2 * GIB + 5 * PAGE));
    assert_eq!(kernel.touch(CPU[1], 2 * GIB + 5 * PAGE, Access::Read), Ok(in_the_way));
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Read), Ok(frames[0]));
}

#[test]
fn moving_out_of_user_space_is_refused() {
    let (kernel, frames) = kernel_with_pages(GIB, 2);
    let mm = kernel.mm(0);
    let top = 1 << 47;
    for to in [top, top - PAGE, u64::MAX - 4095] {
        let refused = kernel.gather(mm).move_pages(range(GIB, GIB + 2 * PAGE), to);
        assert!(matches!(refused, Err(MapError::NotUserSpace(_))), "{to:#x}");
    }
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Read), Ok(frames[0]));
}

#[test]
fn moved_pages_are_flushed_before_the_locks_drop_dirty_or_not() {
    for access in [Access::Read, Access::Write] {
        let (kernel, _) = kernel_with_pages(GIB, 4);
        let mm = kernel.mm(0);
        touch_all(&kernel, CPU[1], range(GIB, GIB + 4 * PAGE), access);
        kernel.take_events();
        let mut gather = kernel.gather(mm);
        gather.move_pages(range(GIB, GIB + 4 * PAGE), 2 * GIB).expect("memory");
        assert_eq!(kernel.cached(CPU[1], GIB), None, "whoever owns the new place knows nothing of the old");
        let events = kernel.take_events();
        let ipi = events.iter().find(|noted| matches!(noted.event, Event::Ipi { .. }));
        assert_eq!(ipi.map(|noted| noted.under_lock), Some(true));
        assert!(events.iter().any(|noted| noted.event == Event::Gather(GatherEvent::DirtyFlush)));
        gather.flush().free();
        assert_eq!(kernel.count(|event| matches!(event, Event::Ipi { .. })), 0, "once is enough");
    }
}

#[test]
fn a_large_leaf_is_refused_before_anything_is_moved_and_can_be_found() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map(mm, GIB, Level::Pte);
    kernel.map(mm, GIB + 4 * MIB, Level::Pmd);
    let mut gather = kernel.gather(mm);
    assert_eq!(gather.find_large_leaf(range(GIB, GIB + 4 * MIB)), None);
    assert_eq!(gather.find_large_leaf(range(GIB, 2 * GIB)), Some(GIB + 4 * MIB));
    let leaf = kernel.lookup(mm, GIB + 4 * MIB).value;
    let refused = gather.move_pages(range(GIB, GIB + 6 * MIB), 8 * GIB);
    assert_eq!(refused, Err(MapError::Large(GIB + 4 * MIB, Level::Pmd, leaf)));
    drop(gather);
    assert_eq!(kernel.lookup(mm, GIB + 4 * MIB).value, leaf);
    assert!(kernel.lookup(mm, GIB).value.is_present());
    assert!(kernel.lookup(mm, 8 * GIB).value.is_empty());
    kernel.map(mm, 20 * GIB, Level::Pud);
    assert_eq!(kernel.gather(mm).find_large_leaf(range(10 * GIB, 30 * GIB)), Some(20 * GIB));
}

#[test]
fn looking_for_large_leaves_can_be_preempted_once_a_table() {
    let (kernel, _) = kernel_with_pages(GIB, 1);
    let mm = kernel.mm(0);
    for table in 0..20 {
        kernel.map(mm, 10 * GIB + table * GIB + 300 * MIB, Level::Pte);
    }
    kernel.map(mm, 40 * GIB, Level::Pmd);
    kernel.take_events();
    assert_eq!(kernel.gather(mm).find_large_leaf(range(GIB, 1 << 40)), Some(40 * GIB));
    assert_eq!(
        kernel.count(|event| *event == Event::Resched),
        21,
        "one for each PMD table without a large leaf"
    );
}

/// The new stack's area spans both places: `shift` down from `old`.
#[expect(unsafe_code, reason = "one thread stands in for the map lock")]
fn shift(kernel: &PaperKernel, old: VirtRange, shift: u64, next_area: Option<u64>) -> Result<(), MapError> {
    // SAFETY: one thread.
    unsafe { shift_arg_pages(kernel, kernel.mm(0), &Limits::DEFAULT, old, shift, next_area) }
        .map(mmu_gather::FlushedGather::free)
}

#[test]
fn a_stack_moved_clear_of_its_old_place_frees_the_old_tables() {
    let (kernel, frames) = kernel_with_pages(GIB, 16);
    let mm = kernel.mm(0);
    let old = range(GIB, GIB + 16 * PAGE);
    touch_all(&kernel, CPU[1], old, Access::Write);
    shift(&kernel, old, 512 * MIB, None).expect("memory");
    assert_eq!(kernel.nr_tables(mm), [1, 1, 1, 0]);
    assert!(touch_all(&kernel, CPU[1], old, Access::Read).iter().all(Result::is_err));
    let new = range(512 * MIB, 512 * MIB + 16 * PAGE);
    let found = touch_all(&kernel, CPU[1], new, Access::Write);
    assert_eq!(found, frames.iter().map(|frame| Ok(*frame)).collect::<Vec<_>>());
}

#[test]
fn a_stack_moved_onto_part_of_its_old_place_keeps_every_page() {
    // Shifts of pages and of tables, in ranges that cross table edges.
    for by in [PAGE, 3 * PAGE, 700 * PAGE, 2 * MIB, 2 * MIB + PAGE] {
        let (kernel, frames) = kernel_with_pages(GIB - 300 * PAGE, 1000);
        let mm = kernel.mm(0);
        let old = range(GIB - 300 * PAGE, GIB + 700 * PAGE);
        touch_all(&kernel, CPU[1], old, Access::Write);
        shift(&kernel, old, by, None).expect("memory");
        let new = range(old.start() - by, old.end() - by);
        let found = touch_all(&kernel, CPU[1], new, Access::Write);
        assert_eq!(found, frames.iter().map(|frame| Ok(*frame)).collect::<Vec<_>>(), "by {by:#x}");
        let given_up = range(new.end().max(old.start()), old.end());
        assert!(touch_all(&kernel, CPU[1], given_up, Access::Read).iter().all(Result::is_err));
        for (level, frame) in kernel.tables(mm) {
            assert!(level > Level::Pte || kernel.has_entries(frame), "an empty table was left, by {by:#x}");
        }
    }
}

#[test]
fn a_stack_shift_spares_the_tables_of_the_area_above() {
    let (kernel, _) = kernel_with_pages(GIB, 16);
    let mm = kernel.mm(0);
    let above = kernel.map(mm, GIB + 20 * PAGE, Level::Pte);
    shift(&kernel, range(GIB, GIB + 16 * PAGE), 512 * MIB, Some(GIB + 20 * PAGE)).expect("memory");
    assert_eq!(kernel.touch(CPU[1], GIB + 20 * PAGE, Access::Read), Ok(above));
}

#[test]
fn a_stack_shift_that_fails_moves_nothing() {
    let (kernel, frames) = kernel_with_pages(GIB, 16);
    let old = range(GIB, GIB + 16 * PAGE);
    kernel.supply_tables(Supply::Left(0));
    assert!(matches!(shift(&kernel, old, 512 * MIB, None), Err(MapError::NoTable(_))));
    assert!(matches!(shift(&kernel, old, 2 * GIB, None), Err(MapError::NotUserSpace(_))));
    let found = touch_all(&kernel, CPU[1], old, Access::Write);
    assert_eq!(found, frames.iter().map(|frame| Ok(*frame)).collect::<Vec<_>>());
    let vma = area(GIB, GIB + 16 * PAGE, Backing::Anonymous);
    kernel.stop(CPU[1]);
    kernel.exit(kernel.mm(0), &Limits::DEFAULT, &[vma]);
}
