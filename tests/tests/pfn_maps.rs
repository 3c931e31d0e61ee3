//! Frames that do not belong to the kernel: nothing is queued, and yet the flush must come before
//! the area is unlinked.

use mmu_gather::Limits;
use mmu_gather::pagetable::{Bounds, Level};
use mmu_gather::{Vma, VmaKind, unmap_region};
use mmu_tests::{Access, Backing, CPU, Event, GIB, MIB, Options, PaperKernel, PaperMm, Violation, area};
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

const PAGE: u64 = 4096;

/// Maps a device's frame at `address`, which CPU 1 writes to.
fn map_device_frame(kernel: &PaperKernel, mm: &PaperMm, address: u64) -> PhysFrame {
    let frame = kernel.ledger().new_page(PAGE);
    kernel.map_page(mm, address, Level::Pte, frame, PageTableFlags::WRITABLE);
    kernel.run(CPU[1], mm);
    kernel.touch(CPU[1], address, Access::Write).expect("mapped");
    frame
}

/// Unmaps `vmas`; when they are unlinked, the driver finds no area with `frame` and frees it.
#[expect(unsafe_code, reason = "one thread stands in for the map lock")]
fn unmap_while_the_driver_waits_for_the_unlink(
    kernel: &PaperKernel,
    limits: &Limits,
    vmas: &[Vma<Backing>],
    frame: PhysFrame,
) {
    let vmas = vmas.iter().copied();
    // SAFETY: one thread; the areas are the caller's.
    let flushed = unsafe {
        unmap_region(kernel, kernel.mm(0), limits, vmas, Bounds::whole(), || kernel.driver_frees(frame))
    };
    flushed.expect("no leaf is cut").free();
}

#[test]
fn device_frames_are_flushed_before_their_area_is_unlinked() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let frame = map_device_frame(&kernel, mm, GIB);
    let vma = area(GIB, GIB + PAGE, Backing::Device);
    unmap_while_the_driver_waits_for_the_unlink(&kernel, &Limits::DEFAULT, &[vma], frame);
    assert_eq!(kernel.count(|event| matches!(event, Event::FreeChunk { .. })), 0, "not ours to free");
    assert_eq!(kernel.nr_tables(mm), [0; 4]);
}

/// The mark for device frames must not be overwritten by the kind of a later area (drafts of
/// Linux's tlb_free_vmas, 2025).
#[test]
fn an_ordinary_area_after_a_device_area_does_not_undo_the_flush() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let frame = map_device_frame(&kernel, mm, GIB);
    kernel.map(mm, GIB + PAGE, Level::Pte);
    let vmas = [area(GIB, GIB + PAGE, Backing::Device), area(GIB + PAGE, GIB + 2 * PAGE, Backing::Anonymous)];
    unmap_while_the_driver_waits_for_the_unlink(&kernel, &Limits::DEFAULT, &vmas, frame);
    assert_eq!(kernel.ledger().page(frame).map(|page| page.references), Some(1), "the device's own count");
}

/// After a forced flush in the middle, device frames that were cleared since still need a flush.
#[test]
fn a_forced_flush_half_way_does_not_undo_the_flush() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let small = Limits::DEFAULT.with_bundle_slots(2).with_batch_pages(0);
    let pages = area(GIB, GIB + 3 * PAGE, Backing::Anonymous);
    kernel.map_range(mm, pages.range);
    let first = area(2 * MIB, 2 * MIB + PAGE, Backing::Device);
    map_device_frame(&kernel, mm, 2 * MIB);
    let last = area(2 * GIB, 2 * GIB + PAGE, Backing::Device);
    let frame = map_device_frame(&kernel, mm, 2 * GIB);
    // The forced flushes drop everything; CPU 1 uses the last area again just before that one is
    // unmapped.
    let table = kernel.find_table(mm, 2 * GIB, Level::Pte).expect("linked").frame();
    kernel.once(
        move |event| *event == Event::LockAsked(table),
        |kernel| {
            kernel.touch(CPU[1], 2 * GIB, Access::Write).expect("still mapped");
        },
    );
    unmap_while_the_driver_waits_for_the_unlink(&kernel, &small, &[first, pages, last], frame);
    assert_eq!(kernel.nr_hooks_waiting(), 0);
}

/// An area with both kinds (Linux: VM_MIXEDMAP), larger than a batch: what is cleared in it after
/// the forced flush needs a flush, too.
#[test]
fn a_forced_flush_inside_an_area_does_not_undo_the_flush_for_the_rest_of_it() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let mixed = Vma { kind: VmaKind::PfnMap, ..area(GIB, GIB + 5 * PAGE, Backing::Anonymous) };
    let frames = kernel.map_range(mm, mixed.range);
    kernel.run(CPU[1], mm);
    for page in 0..5 {
        kernel.touch(CPU[1], GIB + page * PAGE, Access::Write).expect("mapped");
    }
    // Two records fill the gather; the fifth page is cleared after the last forced flush.
    let small = Limits::DEFAULT.with_bundle_slots(3).with_batch_pages(0);
    unmap_while_the_driver_waits_for_the_unlink(&kernel, &small, &[mixed], frames[4]);
}

#[test]
fn without_device_frames_there_is_one_flush_and_it_comes_last() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map(mm, GIB, Level::Pte);
    kernel.run(CPU[1], mm);
    kernel.touch(CPU[1], GIB, Access::Write).expect("mapped");
    kernel.unmap(mm, &Limits::DEFAULT, &[area(GIB, GIB + PAGE, Backing::Anonymous)], Bounds::whole());
    assert_eq!(kernel.count(|event| matches!(event, Event::Ipi { .. })), 1);
}

/// The checker sees the mistake: a driver that frees before anything was flushed.
#[test]
fn a_driver_that_frees_before_the_flush_is_seen() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let frame = map_device_frame(&kernel, mm, GIB);
    kernel.driver_frees(frame);
    assert_eq!(kernel.take_violations(), [Violation::PageFreedTooEarly(frame, CPU[1], GIB)]);
}

#[test]
fn a_zapped_device_area_is_flushed_when_the_zap_returns() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let frame = map_device_frame(&kernel, mm, GIB);
    let vma = area(GIB, GIB + PAGE, Backing::Device);
    let flushed = kernel.zap(mm, &vma, vma.range);
    kernel.driver_frees(frame);
    flushed.free();
}

/// Another gather has cleared the entries of the device and has not flushed yet: this one finds
/// them empty, and unlinks the area.
#[test]
#[expect(unsafe_code, reason = "one thread stands in for the map lock")]
fn device_entries_another_gather_cleared_are_flushed_before_the_area_is_unlinked() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let frame = map_device_frame(&kernel, mm, GIB);
    let vma = area(GIB, GIB + PAGE, Backing::Device);
    // SAFETY: one thread; both hold the map lock for reading, as two calls of madvise would.
    let mut first = unsafe { mmu_gather::MmuGather::new(&kernel, mm) };
    first.zap_vma_range(&vma, vma.range).expect("no leaf is cut");
    unmap_while_the_driver_waits_for_the_unlink(&kernel, &Limits::DEFAULT, &[vma], frame);
    first.flush().free();
}
