//! The checker itself: each thing it must see, done wrong on purpose.
//!
//! Every other test relies on these: a checker that sees nothing would let everything pass.

use core::sync::atomic::{AtomicU64, Ordering};

use mmu_gather::pagetable::{Bounds, EntryValue, Level};
use mmu_gather::tlb::{CpuSet, Cpus};
use mmu_gather::{Limits, Pages};
use mmu_tests::{Access, Backing, Bits, CPU, Fault, GIB, Options, PaperKernel, PaperMm, Violation, area};

/// Clears the entry at `address`, as the engine would, and tells nobody.
fn clear_and_tell_nobody(kernel: &PaperKernel, mm: &PaperMm, address: u64) {
    let view = kernel.find_table(mm, address, Level::Pte).expect("mapped");
    // SAFETY: no memory is behind the page; the checker must see the stale translation.
    let _ = unsafe { view.lock(kernel).entry(address).get_and_clear() };
}

#[test]
fn a_page_freed_while_a_cpu_can_reach_it_is_seen() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let frame = kernel.map(mm, GIB, Level::Pte);
    kernel.run(CPU[1], mm);
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Write), Ok(frame));
    clear_and_tell_nobody(&kernel, mm, GIB);
    kernel.ledger().remove_rmap(frame);
    kernel.release(frame, 1);
    assert_eq!(kernel.take_violations(), [Violation::PageFreedTooEarly(frame, CPU[1], GIB)]);
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Write), Ok(frame), "the CPU still believes");
    assert_eq!(kernel.take_violations(), [Violation::FreedPageUsed(frame, CPU[1], GIB)]);
}

#[test]
fn a_lazy_cpu_that_wakes_without_looking_is_seen() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let frame = kernel.map(mm, GIB, Level::Pte);
    kernel.run(CPU[1], mm);
    kernel.speculate(CPU[1], GIB);
    kernel.go_lazy(CPU[1]);
    clear_and_tell_nobody(&kernel, mm, GIB);
    kernel.ledger().remove_rmap(frame);
    kernel.release(frame, 1);
    assert_eq!(kernel.take_violations(), [], "lazy CPUs may keep leaves");
    kernel.run(CPU[1], mm);
    assert_eq!(
        kernel.take_violations(),
        [Violation::FreedPageUsed(frame, CPU[1], GIB)],
        "no generation was raised"
    );
}

#[test]
fn a_table_freed_while_even_a_lazy_cpu_can_walk_on_from_it_is_seen() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let _page = kernel.map(mm, GIB, Level::Pte);
    kernel.run(CPU[1], mm);
    kernel.speculate(CPU[1], GIB);
    kernel.go_lazy(CPU[1]);
    let table = kernel.find_table(mm, GIB, Level::Pte).expect("linked").frame();
    kernel.free_one_table(table);
    assert_eq!(
        kernel.take_violations(),
        [
            Violation::TableFreedFull(table),
            Violation::TableFreedWhileLinked(table),
            Violation::TableFreedTooEarly(table, CPU[1], GIB)
        ]
    );
    kernel.free_one_table(table);
    assert!(kernel.take_violations().contains(&Violation::TableFreedTwice(table)));
    kernel.speculate(CPU[1], GIB + 0x1000);
    assert_eq!(kernel.take_violations(), [Violation::FreedTableWalked(table, CPU[1], GIB + 0x1000)]);
}

#[test]
fn a_page_released_once_too_often_is_seen() {
    let kernel = PaperKernel::new(Options::default());
    let frame = kernel.ledger().new_page(4096);
    kernel.ledger().add_reference(frame);
    kernel.release(frame, 1);
    assert_eq!(kernel.take_violations(), []);
    kernel.release(frame, 1);
    assert_eq!(kernel.take_violations(), [Violation::PageReleasedTwice(frame)]);
    kernel.release(frame + 1, 1);
    assert_eq!(kernel.take_violations(), [Violation::UnknownPageReleased(frame + 1)]);
}

#[test]
fn a_page_freed_while_it_is_still_mapped_is_seen() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let frame = kernel.map(mm, GIB, Level::Pte);
    kernel.release(frame, 1);
    assert_eq!(kernel.take_violations(), [Violation::PageFreedWhileMapped(frame)]);
}

#[test]
fn work_under_a_table_lock_is_seen() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let _page = kernel.map(mm, GIB, Level::Pte);
    let locked = kernel.find_table(mm, GIB, Level::Pte).expect("linked").lock(&kernel);
    kernel.cond_resched();
    assert_eq!(kernel.take_violations(), [Violation::UnderALock("cond_resched")]);
    drop(locked);
    kernel.cond_resched();
    assert_eq!(kernel.take_violations(), []);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_lock_taken_twice_is_seen() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let _page = kernel.map(mm, GIB, Level::Pte);
    let view = kernel.find_table(mm, GIB, Level::Pte).expect("linked");
    let _held = view.lock(&kernel);
    let _again = view.lock(&kernel);
}

const _: () = assert!(size_of::<CpuSet<Bits>>() == 16);

#[test]
fn a_cpu_outside_the_cpumask_of_what_it_has_loaded_is_seen() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let _page = kernel.map(mm, GIB, Level::Pte);
    kernel.run(CPU[1], mm);
    // No call does that, so the bit is cleared by force, in whichever of the two words it is.
    let words = core::ptr::from_ref(mm.context().cpumask()).cast::<AtomicU64>();
    for index in 0..2 {
        let word = words.wrapping_add(index);
        // SAFETY: a set of one word is two atomic numbers (asserted above), which anybody may
        // change.
        unsafe { &*word }.fetch_and(!(1 << CPU[1].number()), Ordering::Relaxed);
    }
    kernel.unmap(mm, &Limits::DEFAULT, &[area(GIB, GIB + 4096, Backing::Anonymous)], Bounds::whole());
    assert!(kernel.take_violations().contains(&Violation::LoadedButNotInCpumask(CPU[1])));
}

#[test]
fn a_pretend_tlb_keeps_everything_until_it_is_told() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let first = kernel.map(mm, GIB, Level::Pte);
    kernel.run(CPU[0], mm);
    assert_eq!(kernel.touch(CPU[0], GIB, Access::Read), Ok(first));
    assert_eq!(kernel.touch(CPU[0], GIB + 0x1000, Access::Read), Err(Fault::NotPresent));
    assert_eq!(kernel.cached(CPU[0], GIB).map(|leaf| leaf.dirty), Some(false));
    assert_eq!(kernel.touch(CPU[0], GIB, Access::Write), Ok(first));
    assert_eq!(kernel.cached(CPU[0], GIB).map(|leaf| leaf.dirty), Some(true));
    assert!(kernel.lookup(mm, GIB).value.is_dirty() && kernel.lookup(mm, GIB).value.is_accessed());

    clear_and_tell_nobody(&kernel, mm, GIB);
    assert_eq!(kernel.touch(CPU[0], GIB, Access::Write), Ok(first));
    kernel.invlpg(GIB);
    assert_eq!(kernel.touch(CPU[0], GIB, Access::Write), Err(Fault::NotPresent));

    // The link to the table is cached, too, so an entry that is put back is found without a walk
    // from the root.
    let view = kernel.find_table(mm, GIB, Level::Pte).expect("linked");
    let value = EntryValue::leaf(
        Level::Pte,
        first.start_address(),
        x86_64::structures::paging::PageTableFlags::USER_ACCESSIBLE,
    );
    // SAFETY: the entry is empty, and the page is still the program's.
    unsafe { view.lock(&kernel).entry(GIB).store(value) };
    assert_eq!(kernel.touch(CPU[0], GIB, Access::Write), Err(Fault::ReadOnly));
    assert_eq!(kernel.touch(CPU[0], GIB, Access::Read), Ok(first));
}
