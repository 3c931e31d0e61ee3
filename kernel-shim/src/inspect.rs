//! What a checker asks of the kernel when nothing is going on.

use alloc::vec::Vec;

use x86_64::structures::paging::PhysFrame;

use crate::frame::{BLOCK, device_page};
use crate::kernel::Kernel;
use crate::machine::Machine;

/// Frames that areas share although no count says how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedFrames {
    /// The page of zeroes.
    pub zero_page: PhysFrame,
    /// The first frame of the 2 MiB page of zeroes, if there is one.
    pub zero_block: Option<PhysFrame>,
    /// The frame of the device, if there is one.
    pub device: Option<PhysFrame>,
}

impl SharedFrames {
    /// Whether a program reads zeroes there, and others do, too.
    #[must_use]
    pub fn are_zeroes(&self, frame: PhysFrame) -> bool {
        let is_in_block = |first| frame >= first && frame - first < u64::from(BLOCK);
        frame == self.zero_page || self.zero_block.is_some_and(is_in_block)
    }

    /// Whether an area of device frames may map this frame for the page that it shows there, by a
    /// leaf of any size.
    #[must_use]
    pub fn is_of_device(&self, frame: PhysFrame, page: u64) -> bool {
        self.device == Some(frame) || device_page(page) == frame
    }

    /// How many frames of the kernel's own memory these are.
    #[must_use]
    pub fn nr_allocated(&self) -> u64 {
        let block = if self.zero_block.is_some() { u64::from(BLOCK) } else { 0 };
        block + u64::from(self.device.is_some())
    }
}

impl<M: Machine> Kernel<M> {
    /// The frames in the page cache now.
    pub fn cached_pages(&self) -> Vec<PhysFrame> {
        self.page_cache.lock().values().copied().collect()
    }

    /// The frames that are shared and not counted.
    pub fn shared_frames(&self) -> SharedFrames {
        SharedFrames {
            zero_page: self.zero_page(),
            zero_block: *self.zero_block.lock(),
            device: *self.device_frame.lock(),
        }
    }

    /// How many entries name this place in swap, as is counted.
    pub fn entries_of_swap_slot(&self, slot: u64) -> u32 {
        self.swap.entries_of(slot)
    }

    /// How many places in swap are in use.
    pub fn nr_swap_slots_in_use(&self) -> u64 {
        self.swap.nr_in_use()
    }

    /// How many frames are in use, of those that this kernel gives out.
    pub fn nr_frames_in_use(&self) -> u64 {
        let all = self.machine.nr_frames() - self.machine.nr_reserved_frames();
        all - self.frames.nr_free()
    }
}
