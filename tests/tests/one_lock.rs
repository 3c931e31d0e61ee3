//! A kernel that keeps the areas and the engine's `Mm` of an address space behind one lock.
#![expect(unsafe_code, reason = "unmaps, which takes the map lock on trust")]

use core::pin::Pin;

use mmu_gather::pagetable::Bounds;
use mmu_gather::{Limits, MmuGather, Vma, unmap_region};
use mmu_tests::{Backing, GIB, MIB, Options, PaperKernel, PaperMm, area, range};
use spin::{Mutex, MutexGuard};

/// All that is known of an address space.
struct AddressSpace<'k> {
    areas: Vec<Vma<Backing>>,
    mm: Pin<&'k PaperMm>,
}

fn space(kernel: &PaperKernel) -> Mutex<AddressSpace<'_>> {
    let mm = kernel.new_mm();
    kernel.map_range(mm, range(GIB, GIB + MIB));
    // SAFETY: the kernel keeps it in a box until the kernel goes.
    let mm = unsafe { Pin::new_unchecked(mm) };
    Mutex::new(AddressSpace { areas: vec![area(GIB, GIB + MIB, Backing::Anonymous)], mm })
}

/// A borrow that lasts as long as the lock is held, as that of an `Mm` inside the guard.
fn mm_of<'g>(guard: &'g MutexGuard<'_, AddressSpace<'_>>) -> &'g PaperMm {
    &guard.mm
}

#[test]
fn what_is_flushed_outlives_the_lock_that_the_address_space_is_behind() {
    let kernel = PaperKernel::new(Options::default());
    let space = space(&kernel);
    let mut guard = space.lock();
    let areas = core::mem::take(&mut guard.areas);
    let mm = mm_of(&guard);
    // SAFETY: the lock is held until the flush has returned, and no other area is there.
    let flushed =
        unsafe { unmap_region(&kernel, mm, &Limits::DEFAULT, areas.iter().copied(), Bounds::whole(), || {}) };
    let flushed = flushed.expect("no large leaf");
    drop(guard);
    flushed.free();
    assert!(space.lock().areas.is_empty());
}

#[test]
fn a_gather_made_by_hand_is_freed_after_that_lock_too() {
    let kernel = PaperKernel::new(Options::default());
    let space = space(&kernel);
    let guard = space.lock();
    // SAFETY: as above.
    let mut gather = unsafe { MmuGather::new(&kernel, mm_of(&guard)) };
    gather.unmap_vmas(guard.areas.iter().copied(), range(GIB, GIB + MIB)).expect("no large leaf");
    let flushed = gather.flush();
    drop(guard);
    flushed.free();
}
