//! Physical memory: frames of ordinary memory, and the poison in those that are free.

use core::sync::atomic::{AtomicU64, Ordering};

use x86_64::PhysAddr;
use x86_64::structures::paging::{PageTable, PhysFrame};

/// Bytes of a page, as an address counts them.
pub(crate) const PAGE: u64 = 4096;

/// What the upper half of every word of a free frame says. Bit 0 stays clear, so that a walk that
/// takes it for an entry finds nothing present.
const POISON: u64 = 0x5afe_dead_0000_0000;
const POISON_MASK: u64 = 0xffff_ffff_0000_0001;

/// How many words of a page the programs use. Only these are zeroed when a page is given out: the
/// rest of it nobody reads.
pub(crate) const USED_WORDS: usize = 8;

/// The words of one frame.
#[derive(Debug)]
#[repr(C, align(4096))]
pub(crate) struct Frame([AtomicU64; 512]);

/// All frames, by number.
///
/// Every access to one is atomic, whoever makes it (rule F1).
#[derive(Debug)]
pub(crate) struct Memory {
    frames: Box<[Frame]>,
}

impl Memory {
    pub(crate) fn new(nr_frames: usize) -> Self {
        Self { frames: (0..nr_frames).map(|_| Frame([const { AtomicU64::new(0) }; 512])).collect() }
    }

    pub(crate) fn nr_frames(&self) -> u64 {
        self.frames.len() as u64
    }

    /// Where the frame with number 0 starts.
    pub(crate) fn start(&self) -> *const Frame {
        self.frames.as_ptr()
    }

    /// The words of the frame at this physical address, if there is one.
    #[inline]
    pub(crate) fn words(&self, address: u64) -> Option<&[AtomicU64; 512]> {
        let number = usize::try_from(address / PAGE).ok()?;
        self.frames.get(number).map(|frame| &frame.0)
    }

    /// The bytes of a frame, for the kernel.
    ///
    /// # Panics
    /// If there is no such frame.
    #[inline]
    pub(crate) fn pointer(&self, frame: PhysFrame) -> *mut PageTable {
        let words = self.words(frame.start_address().as_u64()).expect("the kernel names frames that exist");
        // The words are atomics: they may be written through what was a shared reference.
        core::ptr::from_ref(words).cast_mut().cast()
    }

    /// The frame whose bytes start at `pointer`.
    pub(crate) fn frame_at(&self, pointer: *const PageTable) -> PhysFrame {
        let distance = pointer.addr() - self.start().addr();
        PhysFrame::containing_address(PhysAddr::new(distance as u64))
    }

    /// Writes poison, with the number of the frame, into every word.
    pub(crate) fn poison(&self, frame: PhysFrame) {
        let address = frame.start_address().as_u64();
        let word = POISON | (address / PAGE) << 1;
        for at in self.words(address).into_iter().flatten() {
            at.store(word, Ordering::Relaxed);
        }
    }

    /// Zeroes what programs use of a page.
    pub(crate) fn zero_used_words(&self, frame: PhysFrame) {
        let words = self.words(frame.start_address().as_u64());
        for at in words.into_iter().flatten().take(USED_WORDS) {
            at.store(0, Ordering::Relaxed);
        }
    }
}

/// Whether a word was read from a frame that is free.
#[inline]
pub(crate) const fn is_poison(word: u64) -> bool {
    word & POISON_MASK == POISON
}

/// The number of the frame that this poison is in.
pub(crate) const fn poisoned_frame(word: u64) -> u64 {
    (word & !POISON_MASK) >> 1
}
