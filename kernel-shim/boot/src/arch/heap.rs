//! The heap behind `alloc`: one run of frames, managed by `talc` under a spin lock.
//!
//! Interrupt handlers must not allocate (B4): they may have interrupted the holder of the lock.

use spin::Mutex;
use talc::TalcLock;
use talc::source::Manual;

use crate::arch::frames;
use crate::arch::phys_map::{FRAME_BYTES, phys_to_ptr};

/// The heap gets one frame in this many,
const SHARE: u64 = 8;
/// but no more frames than this: 256 MiB.
const MAX_FRAMES: u64 = 64 * 1024;

// On a host, where the library is only tested, the heap is that of std.
#[cfg_attr(bare, global_allocator)]
static HEAP: TalcLock<Mutex<()>, Manual> = TalcLock::new(Manual);

/// Gives the heap its memory and returns its size in bytes.
///
/// # Panics
///
/// When not enough memory lies side by side.
pub(crate) fn init() -> u64 {
    let (available, largest) = frames::available();
    let nr_frames = (available / SHARE).min(MAX_FRAMES).min(largest);
    let range = frames::allocate_contiguous(nr_frames).expect("the largest range holds its own length");
    let size = nr_frames * FRAME_BYTES;
    let length = usize::try_from(size).expect("usize has 64 bits");
    // SAFETY: the frames were just handed out, lie side by side, are mapped (B3), and are never
    // given back.
    let claimed = unsafe { HEAP.lock().claim(phys_to_ptr(range.start.start_address()), length) };
    assert!(claimed.is_some(), "{length} bytes are too few for a heap");
    size
}
