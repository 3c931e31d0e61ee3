//! The kernel half of every address space: all RAM at one offset, the image with page rights,
//! stacks with guard pages.
//!
//! ```text
//! 0xffff_8000_0000_0000   PHYS_OFFSET: every byte of RAM, writable, never executable
//! 0xffff_c000_0000_0000   stacks, each below an unmapped page
//! 0xffff_ffff_8000_0000   the image: code, constants, data, each with its own rights
//! ```
//!
//! Three top-level entries, made once, before the second CPU starts, and copied into every root
//! (invariant B3). The pages are global, so a CR3 load leaves them in the TLB.

use core::ops::Range;

use spin::Mutex;
use x86_64::structures::paging::mapper::{MapToError, MapperFlush};
use x86_64::structures::paging::{
    Mapper, OffsetPageTable, Page, PageSize, PageTable, PageTableFlags, PhysFrame, Size2MiB, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use crate::arch::frames::{self, TableFrames};
use crate::arch::mmu;
use crate::arch::phys_map::{ADDRESS_BITS, FRAME_BYTES, PHYS_OFFSET, phys_to_ptr};
use crate::arch::symbols::{ImageLayout, image_layout};

/// Where the image is mapped, less its physical address; the same number stands in `image.ld`.
const IMAGE_OFFSET: u64 = 0xffff_ffff_8000_0000;
/// Where stacks are mapped.
const STACKS: u64 = 0xffff_c000_0000_0000;
/// First top-level entry of the upper half.
const KERNEL_HALF: usize = 256;

static KERNEL: Mutex<Option<KernelSpace>> = Mutex::new(None);

/// The kernel's own root, and where the next stack goes.
#[derive(Debug)]
struct KernelSpace {
    root: PhysFrame,
    next_stack: u64,
}

/// Returns the root that maps the kernel half and nothing else; what a CPU without a process runs
/// on.
///
/// # Panics
///
/// Before the machine is up.
#[must_use]
pub fn kernel_root() -> PhysFrame {
    KERNEL.lock().as_ref().expect("the kernel half exists before anyone asks for it").root
}

/// Copies the kernel half into the root of a new address space.
///
/// # Safety
///
/// `root` is a page-table page that no CPU has loaded and nobody else uses.
pub unsafe fn share_kernel_half(root: PhysFrame) {
    let kernel: *const PageTable = phys_to_ptr(kernel_root().start_address());
    // SAFETY: the kernel's root is mapped (B3), lives for ever, and its upper half does not change
    // any more.
    let kernel = unsafe { &*kernel };
    let table: *mut PageTable = phys_to_ptr(root.start_address());
    // SAFETY: the caller owns the page alone; it is mapped (B3).
    let table = unsafe { &mut *table };
    for index in KERNEL_HALF..512 {
        table[index] = kernel[index].clone();
    }
}

/// Returns a view of the tables below `root` through which the `x86_64` crate maps and unmaps
/// pages.
///
/// # Safety
///
/// `root` is the root of a page-table hierarchy that nobody changes meanwhile, and that outlives
/// the view.
#[must_use]
pub unsafe fn mapper(root: PhysFrame) -> OffsetPageTable<'static> {
    let table: *mut PageTable = phys_to_ptr(root.start_address());
    // SAFETY: the caller vouches for the page; it is mapped (B3).
    let table = unsafe { &mut *table };
    // SAFETY: all RAM, so every table, is mapped at this offset (B3).
    unsafe { OffsetPageTable::new(table, PHYS_OFFSET) }
}

/// Returns a zeroed frame for a page table.
#[must_use]
pub fn zeroed_frame() -> Option<PhysFrame> {
    let frame = frames::allocate()?;
    let page: *mut u8 = phys_to_ptr(frame.start_address());
    // SAFETY: the frame was just handed out, so it is ours alone; it is mapped (B3).
    unsafe { page.write_bytes(0, 4096) };
    Some(frame)
}

/// Builds the kernel half over `ram` and switches this CPU to it.
///
/// # Panics
///
/// When memory is too short for the tables.
pub(crate) fn init(ram: &[Range<u64>], apic: PhysAddr) {
    let root = zeroed_frame().expect("memory holds a page table");
    // SAFETY: the root is new and empty, and only this CPU runs.
    let mut tables = unsafe { mapper(root) };
    map_ram(&mut tables, ram);
    map_image(&mut tables, &image_layout());
    let page = Page::containing_address(PHYS_OFFSET + apic.as_u64());
    let uncached = DATA | PageTableFlags::NO_CACHE | PageTableFlags::WRITE_THROUGH;
    assert_mapped(map_page::<Size4KiB>(&mut tables, page, PhysFrame::containing_address(apic), uncached));
    // The stacks' top-level entry has to exist before any root copies it.
    let mut space = KernelSpace { root, next_stack: STACKS };
    map_stack(&mut space, 1);
    *KERNEL.lock() = Some(space);
    // SAFETY: the new root maps the image, the boot stack inside it, and all RAM, at the addresses
    // they have now.
    unsafe { mmu::load_root_flush(root) };
}

/// Maps a stack of `nr_pages` pages above an unmapped page, and returns its top.
///
/// # Panics
///
/// When memory is short.
pub(crate) fn new_stack(nr_pages: u64) -> VirtAddr {
    let mut kernel = KERNEL.lock();
    map_stack(kernel.as_mut().expect("stacks are made after the kernel half"), nr_pages)
}

/// Returns the physical range that the image occupies, its low boot code included.
pub(crate) fn image_frames() -> Range<u64> {
    let layout = image_layout();
    layout.physical_start..layout.image_end - IMAGE_OFFSET
}

/// Reads a word of the kernel half if it is mapped; for printing a stack that may be damaged.
pub(crate) fn read_kernel_word(address: u64) -> Option<u64> {
    let address = VirtAddr::try_new(address).ok()?;
    if address < VirtAddr::new(STACKS) || !address.is_aligned(8_u64) {
        return None;
    }
    let indices = [address.p4_index(), address.p3_index(), address.p2_index(), address.p1_index()];
    let mut table = mmu::current_root();
    for index in indices {
        let entries: *const u64 = phys_to_ptr(table.start_address());
        // SAFETY: a table of the loaded root is mapped (B3); above `STACKS` all leaves are small
        // pages, so every entry followed leads to a table or, last, to the page.
        let entry = unsafe { entries.wrapping_add(usize::from(index)).read_volatile() };
        if entry & PageTableFlags::PRESENT.bits() == 0 {
            return None;
        }
        table = PhysFrame::containing_address(PhysAddr::new(entry & ADDRESS_BITS));
    }
    // SAFETY: the page is mapped, and the word is aligned.
    Some(unsafe { address.as_ptr::<u64>().read_volatile() })
}

const DATA: PageTableFlags = PageTableFlags::PRESENT
    .union(PageTableFlags::WRITABLE)
    .union(PageTableFlags::NO_EXECUTE)
    .union(PageTableFlags::GLOBAL);
const CONSTANTS: PageTableFlags =
    PageTableFlags::PRESENT.union(PageTableFlags::NO_EXECUTE).union(PageTableFlags::GLOBAL);
const CODE: PageTableFlags = PageTableFlags::PRESENT.union(PageTableFlags::GLOBAL);

fn map_ram(tables: &mut OffsetPageTable<'static>, ram: &[Range<u64>]) {
    for region in ram {
        let first = PhysFrame::<Size2MiB>::containing_address(PhysAddr::new(region.start));
        let last = PhysFrame::containing_address(PhysAddr::new(region.end - 1));
        for frame in PhysFrame::range_inclusive(first, last) {
            let page = Page::containing_address(PHYS_OFFSET + frame.start_address().as_u64());
            match map_page(tables, page, frame, DATA) {
                // Two regions may share a large page.
                Err(MapToError::PageAlreadyMapped(_)) => {}
                result => assert_mapped(result),
            }
        }
    }
}

fn map_image(tables: &mut OffsetPageTable<'static>, layout: &ImageLayout) {
    let parts = [
        (layout.text_start..layout.text_end, CODE),
        (layout.text_end..layout.rodata_end, CONSTANTS),
        (layout.rodata_end..layout.image_end, DATA),
    ];
    for (part, flags) in parts {
        let first = Page::<Size4KiB>::containing_address(VirtAddr::new(part.start));
        let end = Page::containing_address(VirtAddr::new(part.end));
        for page in Page::range(first, end) {
            let physical = PhysAddr::new(page.start_address().as_u64() - IMAGE_OFFSET);
            assert_mapped(map_page(tables, page, PhysFrame::containing_address(physical), flags));
        }
    }
}

fn map_stack(space: &mut KernelSpace, nr_pages: u64) -> VirtAddr {
    // SAFETY: a caller that has `space` holds the lock around it, or is the only CPU; the kernel's
    // root lives for ever.
    let mut tables = unsafe { mapper(space.root) };
    let bottom = VirtAddr::new(space.next_stack + FRAME_BYTES);
    let top = bottom + nr_pages * FRAME_BYTES;
    space.next_stack = top.as_u64();
    for page in Page::range(Page::containing_address(bottom), Page::containing_address(top)) {
        let frame = frames::allocate().expect("memory holds the stacks");
        assert_mapped(map_page::<Size4KiB>(&mut tables, page, frame, DATA));
    }
    top
}

/// Maps one page of the kernel half.
fn map_page<S: PageSize>(
    tables: &mut OffsetPageTable<'static>,
    page: Page<S>,
    frame: PhysFrame<S>,
    flags: PageTableFlags,
) -> Result<(), MapToError<S>>
where
    OffsetPageTable<'static>: Mapper<S>,
{
    // SAFETY: called from this file only, which maps RAM, the image, the APIC and new stacks, each
    // at a place of its own in the kernel half. A second mapping of the same frame is the offset
    // map only, and whoever uses that one proves the use.
    let flush = unsafe { tables.map_to(page, frame, flags, &mut TableFrames) }?;
    // The entry was not present before, so no TLB can hold it (Intel SDM vol. 3A, 4.10.2.3).
    MapperFlush::ignore(flush);
    Ok(())
}

fn assert_mapped<S: PageSize>(result: Result<(), MapToError<S>>) {
    assert!(result.is_ok(), "the kernel half cannot be mapped: memory is short, or two parts of it overlap");
}
