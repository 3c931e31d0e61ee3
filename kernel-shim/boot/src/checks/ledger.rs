//! The frames of the kernel between two uses: filled with poison when they are freed, checked when
//! they are given out again.
//!
//! ```text
//!   in use ── freed ──► every word says "this frame is free"  a program that reads it is caught
//!     ▲                            │
//!     └────── given out ◄──────────┘  every word must still   a program that wrote to it is caught
//!                                     say so
//! ```
//!
//! So a frame that is freed too early is noticed without luck: one access through one stale
//! translation is enough, if the MMU keeps that translation.

use alloc::boxed::Box;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arrayvec::ArrayVec;
use mmu_gather::pagetable::VirtRange;
use mmu_kernel_shim::FrameRole;
use spin::mutex::SpinMutex;
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

use crate::arch::paging::kernel_root;
use crate::arch::phys_map::{FRAME_WORDS, phys_to_ptr};
use crate::checks::stamp::{Word, poison};
use crate::cpu::ipi::TakeMail;
use crate::cpu::percpu::this_index;

/// Unmappings remembered.
const UNMAPS: usize = 128;

/// The states of all frames.
#[derive(Debug)]
pub(crate) struct Ledger {
    entries: Box<[AtomicU64]>,
    steps: AtomicU64,
    /// Whether frames are poisoned and checked; off while something is measured.
    checking: AtomicBool,
    /// The last unmappings, in a ring.
    unmaps: SpinMutex<Unmaps, TakeMail>,
}

#[derive(Debug)]
struct Unmaps {
    last: ArrayVec<Unmap, UNMAPS>,
    next: usize,
}

/// An unmapping that was about to return.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unmap {
    root: PhysFrame,
    range: VirtRange,
    step: u64,
    cpu: usize,
}

/// What the ledger says of one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Record {
    state: FrameState,
    role: FrameRole,
    cpu: usize,
    step: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FrameState {
    /// Never given out.
    Fresh,
    InUse,
    /// Free, and every word is poison.
    Poisoned,
    /// Free, and left as it was.
    Free,
}

/// What is wrong with a frame that was freed or given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// It was given out while in use.
    GivenOutTwice,
    /// It was freed while free.
    FreedTwice,
    /// A word changed while the frame was free: its index, and what it holds now.
    WrittenWhileFree(usize, u64),
    /// A table was freed with an entry that is not empty: its index, and what it holds.
    TableNotEmpty(usize, u64),
}

impl Ledger {
    /// A ledger for frames `0..nr_frames`, none of them given out yet.
    pub(crate) fn new(nr_frames: u64) -> Self {
        Self {
            entries: (0..nr_frames).map(|_| AtomicU64::new(0)).collect(),
            steps: AtomicU64::new(1),
            checking: AtomicBool::new(true),
            unmaps: SpinMutex::new(Unmaps { last: ArrayVec::new_const(), next: 0 }),
        }
    }

    /// Switches poisoning and checking on, as at first, or off.
    pub(crate) fn set_checking(&self, on: bool) {
        self.checking.store(on, Ordering::Relaxed);
    }

    /// The frame (or the 512 of a block) is given out: checks that nobody has written to it, and
    /// clears it for a program.
    ///
    /// # Errors
    /// The frame, and what is wrong with it.
    pub(crate) fn given_out(&self, first: PhysFrame, role: FrameRole) -> Result<(), (PhysFrame, Wrong)> {
        let step = self.step();
        for frame in frames_of(first, role) {
            let Some(entry) = self.entry(frame) else { continue };
            let new = Record { state: FrameState::InUse, role, cpu: this_index().get(), step };
            let old = Record::decode(entry.swap(new.encode(), Ordering::Relaxed));
            if old.state == FrameState::InUse {
                return Err((frame, Wrong::GivenOutTwice));
            }
            let words = frame_words(frame);
            if old.state == FrameState::Poisoned {
                let expected = poison(frame);
                let changed = words.iter().position(|word| word.load(Ordering::Relaxed) != expected);
                if let Some(index) = changed {
                    return Err((
                        frame,
                        Wrong::WrittenWhileFree(index, words[index].load(Ordering::Relaxed)),
                    ));
                }
            }
            if role != FrameRole::Table && self.checking.load(Ordering::Relaxed) {
                fill_words(words, 0);
            }
        }
        Ok(())
    }

    /// The frame (or the 512 of a block) is free from now on: fills it with poison.
    ///
    /// # Errors
    /// The frame, and what is wrong with it.
    pub(crate) fn freed(&self, first: PhysFrame, role: FrameRole) -> Result<(), (PhysFrame, Wrong)> {
        let step = self.step();
        let checking = self.checking.load(Ordering::Relaxed);
        for frame in frames_of(first, role) {
            let Some(entry) = self.entry(frame) else { continue };
            let words = frame_words(frame);
            if checking {
                if role == FrameRole::Table
                    && let Some((index, value)) = first_not_empty(words)
                {
                    return Err((frame, Wrong::TableNotEmpty(index, value)));
                }
                fill_words(words, poison(frame));
            }
            let state = if checking { FrameState::Poisoned } else { FrameState::Free };
            let new = Record { state, role, cpu: this_index().get(), step };
            let old = Record::decode(entry.swap(new.encode(), Ordering::Relaxed));
            if old.state != FrameState::InUse {
                return Err((frame, Wrong::FreedTwice));
            }
        }
        Ok(())
    }

    /// An unmapping is about to return.
    pub(crate) fn unmapped(&self, root: PhysFrame, range: VirtRange) {
        let unmap = Unmap { root, range, step: self.step(), cpu: this_index().get() };
        let mut unmaps = self.unmaps.lock();
        if unmaps.last.is_full() {
            let place = unmaps.next;
            unmaps.last[place] = unmap;
        } else {
            unmaps.last.push(unmap);
        }
        unmaps.next = (unmaps.next + 1) % UNMAPS;
    }

    /// The last unmapping of an address that is still remembered, in the address space that has
    /// this root now.
    pub(crate) fn last_unmap(&self, root: PhysFrame, address: u64) -> Option<Unmap> {
        let born = Record::decode(self.entry(root)?.load(Ordering::Relaxed)).step;
        let unmaps = self.unmaps.lock();
        let about = |unmap: &&Unmap| unmap.root == root && unmap.step > born && unmap.range.contains(address);
        unmaps.last.iter().filter(about).max_by_key(|unmap| unmap.step).copied()
    }

    /// The number of the next event.
    pub(crate) fn step(&self) -> u64 {
        self.steps.fetch_add(1, Ordering::Relaxed)
    }

    /// What is known of a frame, as words to be printed.
    pub(crate) fn history(&self, frame: PhysFrame) -> History {
        History { frame, entry: self.entry(frame).map(|entry| Record::decode(entry.load(Ordering::Relaxed))) }
    }

    fn entry(&self, frame: PhysFrame) -> Option<&AtomicU64> {
        self.entries.get(usize::try_from(frame.start_address().as_u64() >> 12).ok()?)
    }
}

/// What happened to a frame last.
#[derive(Debug, Clone, Copy)]
pub(crate) struct History {
    frame: PhysFrame,
    entry: Option<Record>,
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "frame {:#x}: ", self.frame.start_address())?;
        let Some(Record { state, role, cpu, step }) = self.entry else {
            return f.write_str("not the kernel's to give out");
        };
        let role = match role {
            FrameRole::Page => "a page",
            FrameRole::Block => "part of a large page",
            FrameRole::Table => "a page table",
        };
        match state {
            FrameState::Fresh => f.write_str("never given out"),
            FrameState::InUse => write!(f, "given out as {role} at step {step} by cpu {cpu}, and in use"),
            FrameState::Poisoned | FrameState::Free => {
                write!(f, "freed at step {step} by cpu {cpu}, when it was {role}, and free since")
            }
        }
    }
}

impl fmt::Display for Unmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the unmapping of {} returned at step {} on cpu {}", self.range, self.step, self.cpu)
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::GivenOutTwice => f.write_str("a frame was given out while it was in use"),
            Self::FreedTwice => f.write_str("a frame was freed that was free"),
            Self::WrittenWhileFree(index, word) => write!(
                f,
                "a frame was written to while it was free: word {index} holds {word:#018x}, {}",
                Word::decode(word)
            ),
            Self::TableNotEmpty(index, word) => {
                write!(
                    f,
                    "a page table was freed whose entry {index} holds {word:#018x}, {}",
                    Word::decode(word)
                )
            }
        }
    }
}

impl Record {
    fn encode(self) -> u64 {
        let state = match self.state {
            FrameState::Fresh => 0,
            FrameState::InUse => 1,
            FrameState::Poisoned => 2,
            FrameState::Free => 3,
        };
        let role = match self.role {
            FrameRole::Page => 0,
            FrameRole::Block => 1,
            FrameRole::Table => 2,
        };
        self.step << 16 | (self.cpu as u64 & 0xff) << 8 | role << 2 | state
    }

    fn decode(word: u64) -> Self {
        let state = match word & 3 {
            0 => FrameState::Fresh,
            1 => FrameState::InUse,
            2 => FrameState::Poisoned,
            _ => FrameState::Free,
        };
        let role = match word >> 2 & 3 {
            0 => FrameRole::Page,
            1 => FrameRole::Block,
            _ => FrameRole::Table,
        };
        Self { state, role, cpu: usize::from(word.to_le_bytes()[1]), step: word >> 16 }
    }
}

/// The words of a frame. Programs may write to them at any time, through stale translations.
pub(crate) fn frame_words(frame: PhysFrame) -> &'static [AtomicU64; FRAME_WORDS] {
    let words: *const [AtomicU64; FRAME_WORDS] = phys_to_ptr(frame.start_address());
    // SAFETY: all RAM is mapped for ever (B3), and the frames of the ledger are RAM; atomics may be
    // read and written by anybody at any time.
    unsafe { &*words }
}

fn fill_words(words: &[AtomicU64; FRAME_WORDS], value: u64) {
    for word in words {
        word.store(value, Ordering::Relaxed);
    }
}

/// The first entry of a table that is not empty; the kernel half of a root does not count.
fn first_not_empty(table: &[AtomicU64; FRAME_WORDS]) -> Option<(usize, u64)> {
    let kernel = frame_words(kernel_root());
    table.iter().zip(kernel).enumerate().find_map(|(index, (entry, kernel))| {
        let value = entry.load(Ordering::Relaxed);
        // The accessed bit of either may have been set since one was copied from the other.
        let is_shared = index >= FRAME_WORDS / 2 && (value ^ kernel.load(Ordering::Relaxed)) & !0x20 == 0;
        (value != 0 && !is_shared).then_some((index, value))
    })
}

fn frames_of(first: PhysFrame, role: FrameRole) -> impl Iterator<Item = PhysFrame> {
    let count = if role == FrameRole::Block { FRAME_WORDS as u64 } else { 1 };
    let start = first.start_address().as_u64();
    (0..count).map(move |index| PhysFrame::containing_address(PhysAddr::new(start + (index << 12))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read_as_it_was_written() {
        for state in [FrameState::Fresh, FrameState::InUse, FrameState::Poisoned, FrameState::Free] {
            for role in [FrameRole::Page, FrameRole::Block, FrameRole::Table] {
                let entry = Record { state, role, cpu: 63, step: 1 << 40 };
                assert_eq!(Record::decode(entry.encode()), entry);
            }
        }
    }
}
