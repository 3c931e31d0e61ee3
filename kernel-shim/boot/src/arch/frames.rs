//! Physical memory: which frames are RAM, and who owns them.
//!
//! A simple allocator for what the machine itself needs: page tables, stacks, the heap, the
//! self-test. The kernel above has an allocator of its own, which takes a whole range with
//! [`hand_over`] and keeps it.
//!
//! Frames never used come from the regions of the memory map, lowest first, which keeps early page
//! tables inside the 4 GiB that the boot tables map. Frames given back form a list through their
//! first word.

use core::ops::Range;

use arrayvec::ArrayVec;
use spin::Mutex;
use x86_64::PhysAddr;
use x86_64::structures::paging::frame::PhysFrameRange;
use x86_64::structures::paging::{FrameAllocator, PhysFrame, Size4KiB};

use crate::arch::phys_map::{FRAME_BYTES, phys_to_ptr};

/// The first megabyte belongs to the firmware, the boot information and the code that other CPUs
/// start with.
const LOW_MEMORY_END: u64 = 1 << 20;
/// Regions of RAM that are kept; each one cut by the image becomes two.
const MAX_REGIONS: usize = 34;

static FRAMES: Mutex<Frames> = Mutex::new(Frames { unused: ArrayVec::new_const(), free: None, nr_free: 0 });

/// All frames that are not in use.
#[derive(Debug)]
struct Frames {
    /// Never handed out, in ascending order, page-aligned, in bytes.
    unused: ArrayVec<Range<u64>, MAX_REGIONS>,
    /// Given back: the first of a list, each frame's first word holding the address of the next, or
    /// 0.
    free: Option<PhysFrame>,
    nr_free: u64,
}

/// Gives the allocator all of `ram` but the first megabyte and the frames of the `taken` ranges.
pub(crate) fn init(ram: &[Range<u64>], taken: &[Range<u64>]) {
    let mut frames = FRAMES.lock();
    frames.unused = usable(ram, taken);
}

/// Returns one frame, with whatever it contains.
#[must_use]
pub fn allocate() -> Option<PhysFrame> {
    let mut frames = FRAMES.lock();
    if let Some(frame) = frames.free {
        // SAFETY: a frame on the list belongs to the allocator, is mapped (B3), and its first word
        // is the link.
        let next = unsafe { phys_to_ptr::<u64>(frame.start_address()).read() };
        frames.free = (next != 0).then(|| PhysFrame::containing_address(PhysAddr::new(next)));
        frames.nr_free -= 1;
        return Some(frame);
    }
    take_contiguous(&mut frames.unused, 1)
}

/// Returns `nr_frames` frames that lie side by side and were never used before.
#[must_use]
pub fn allocate_contiguous(nr_frames: u64) -> Option<PhysFrameRange> {
    let start = take_contiguous(&mut FRAMES.lock().unused, nr_frames)?;
    Some(PhysFrame::range(start, start + nr_frames))
}

/// Hands over all of the largest unused range, except `nr_kept` frames at its bottom, to an
/// allocator of the kernel's own.
///
/// What this allocator has given out, or keeps, lies outside the range.
#[must_use]
pub fn hand_over(nr_kept: u64) -> Option<PhysFrameRange> {
    let mut frames = FRAMES.lock();
    let range = frames.unused.iter_mut().max_by_key(|range| range.end - range.start)?;
    let start =
        range.start.checked_add(nr_kept.checked_mul(FRAME_BYTES)?).filter(|start| *start < range.end)?;
    let end = core::mem::replace(&mut range.end, start);
    let frame_at = |address| PhysFrame::containing_address(PhysAddr::new(address));
    Some(PhysFrame::range(frame_at(start), frame_at(end)))
}

/// Returns how many frames are left, and how many of them lie side by side in the largest unused
/// range.
#[must_use]
pub fn available() -> (u64, u64) {
    let frames = FRAMES.lock();
    let lengths = frames.unused.iter().map(|range| (range.end - range.start) / FRAME_BYTES);
    (frames.nr_free + lengths.clone().sum::<u64>(), lengths.max().unwrap_or(0))
}

/// Takes a frame back.
///
/// # Safety
///
/// - The frame came from this allocator and is given back once.
/// - No CPU can reach it any more: no page table, no TLB entry, no pointer through the offset map.
pub unsafe fn free(frame: PhysFrame) {
    let mut frames = FRAMES.lock();
    let next = frames.free.map_or(0, |frame| frame.start_address().as_u64());
    // SAFETY: nobody else can reach the frame, and all RAM is mapped (B3).
    unsafe { phys_to_ptr::<u64>(frame.start_address()).write(next) };
    frames.free = Some(frame);
    frames.nr_free += 1;
}

/// The allocator as the page-table code of the `x86_64` crate wants it; a table frame must be
/// zeroed by its user.
#[derive(Debug)]
pub struct TableFrames;

// SAFETY: `allocate` hands out each frame to one owner only.
unsafe impl FrameAllocator<Size4KiB> for TableFrames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        allocate()
    }
}

/// Returns the usable parts of `ram`, page-aligned and in ascending order.
fn usable(ram: &[Range<u64>], taken: &[Range<u64>]) -> ArrayVec<Range<u64>, MAX_REGIONS> {
    let mut parts: ArrayVec<Range<u64>, MAX_REGIONS> = ram
        .iter()
        .take(MAX_REGIONS)
        .map(|region| {
            let start = region.start.max(LOW_MEMORY_END).next_multiple_of(FRAME_BYTES);
            start..region.end - region.end % FRAME_BYTES
        })
        .collect();
    for hole in taken {
        let (start, end) = (hole.start - hole.start % FRAME_BYTES, hole.end.next_multiple_of(FRAME_BYTES));
        let cut = core::mem::take(&mut parts);
        let pieces = cut.into_iter().flat_map(|part| {
            let below = part.start..part.end.min(start);
            [below, part.start.max(end)..part.end]
        });
        // A hole splits at most one part; a part for which there is no room is not used.
        parts = pieces.filter(|piece| piece.start < piece.end).take(MAX_REGIONS).collect();
    }
    parts.retain(|part| part.start < part.end);
    parts.sort_unstable_by_key(|part| part.start);
    parts
}

/// Cuts `nr_frames` frames off the first range that has them.
fn take_contiguous(unused: &mut ArrayVec<Range<u64>, MAX_REGIONS>, nr_frames: u64) -> Option<PhysFrame> {
    let length = nr_frames.checked_mul(FRAME_BYTES)?;
    let range = unused.iter_mut().find(|range| range.end - range.start >= length)?;
    let start = range.start;
    range.start += length;
    Some(PhysFrame::containing_address(PhysAddr::new(start)))
}

#[cfg(test)]
mod tests {
    use super::{MAX_REGIONS, take_contiguous, usable};

    const MIB: u64 = 1 << 20;

    #[test]
    fn low_memory_and_the_image_cannot_be_handed_out() {
        let ram = [0..0x9_fc00, MIB..128 * MIB];
        let parts = usable(&ram, &[2 * MIB..3 * MIB + 1, 100 * MIB..101 * MIB]);
        assert_eq!(parts.as_slice(), [MIB..2 * MIB, 3 * MIB + 0x1000..100 * MIB, 101 * MIB..128 * MIB]);
    }

    #[test]
    fn a_region_without_a_whole_frame_is_dropped() {
        let scrap = 4 * MIB + 1..4 * MIB + 0x1fff;
        let parts = usable(core::slice::from_ref(&scrap), &[]);
        assert!(parts.is_empty());
    }

    #[test]
    fn a_contiguous_run_is_taken_from_the_first_range_that_holds_it() {
        let mut unused = usable(&[MIB..2 * MIB, 8 * MIB..64 * MIB], &[]);
        assert!(unused.len() <= MAX_REGIONS);
        let first = take_contiguous(&mut unused, 1024).expect("56 MiB hold 4 MiB");
        assert_eq!(first.start_address().as_u64(), 8 * MIB);
        let second = take_contiguous(&mut unused, 1).expect("the first MiB is still whole");
        assert_eq!(second.start_address().as_u64(), MIB);
        assert_eq!(take_contiguous(&mut unused, 1 << 60), None);
    }
}
