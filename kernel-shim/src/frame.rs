//! Frames: their metadata, and the lists of those that are free.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use crossbeam_utils::CachePadded;
use mmu_gather::pagetable::{TableLock, UsedLines};
use spin::RelaxStrategy;
use spin::mutex::SpinMutex;
use static_assertions::const_assert_eq;
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

/// Frames in a block of 2 MiB.
pub(crate) const BLOCK: u32 = 512;

/// Frames in a folio of 64 KiB.
pub(crate) const FOLIO: u32 = 16;

/// Where the memory of a device begins, beyond that of any machine, and how much of it there is.
const DEVICE: u64 = 1 << 38;
const DEVICE_BYTES: u64 = 1 << 32;

/// The frame of a device that a page of an area of device frames maps, if it is part of a large
/// one.
#[must_use]
pub(crate) fn device_page(page: u64) -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new_truncate(DEVICE + ((page << 12) & (DEVICE_BYTES - 1))))
}

/// What a frame is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// Nothing.
    Free = 0,
    /// Not this kernel's to give out: firmware, devices, the zero page.
    Reserved = 1,
    /// A page table.
    Table = 2,
    /// A batch page of a gather.
    Batch = 3,
    /// A program's page, counted.
    Page = 4,
    /// The first frame of a program's 2 MiB page, counted for all 512.
    Block = 5,
    /// A later frame of a block.
    Tail = 6,
}

impl FrameKind {
    const fn from_raw(raw: u8) -> Self {
        match raw {
            1 => Self::Reserved,
            2 => Self::Table,
            3 => Self::Batch,
            4 => Self::Page,
            5 => Self::Block,
            6 => Self::Tail,
            _ => Self::Free,
        }
    }
}

/// What the kernel keeps of one frame: 32 bytes.
#[derive(Debug)]
#[repr(C, align(32))]
pub struct FrameMeta<R> {
    /// Users (mappings, the page cache) in the low half, entries that map it in the high half: one
    /// locked instruction changes both, and one load finds both as they were at one moment.
    counts: AtomicU64,
    /// The next free frame, if this one is free.
    next: AtomicU32,
    kind: AtomicU8,
    dirty: AtomicU8,
    lock: TableLock<R>,
    /// Of a table: which of its lines are used.
    used_lines: UsedLines,
    /// Which page of which file it is, so that the page cache can let go of it; 0 for none.
    owner: AtomicU64,
}

const_assert_eq!(size_of::<FrameMeta<spin::Spin>>(), 32);

impl<R: RelaxStrategy> FrameMeta<R> {
    fn new(kind: FrameKind) -> Self {
        Self {
            counts: AtomicU64::new(0),
            next: AtomicU32::new(NO_FRAME),
            kind: AtomicU8::new(kind as u8),
            dirty: AtomicU8::new(0),
            lock: TableLock::new(()),
            used_lines: UsedLines::new(),
            owner: AtomicU64::new(0),
        }
    }

    /// What it is used for.
    #[must_use]
    #[inline]
    pub fn kind(&self) -> FrameKind {
        FrameKind::from_raw(self.kind.load(Ordering::Relaxed))
    }

    /// How many entries map it.
    #[must_use]
    #[inline]
    pub fn maps(&self) -> u32 {
        maps_of(self.counts.load(Ordering::Relaxed))
    }

    /// How many users it has.
    #[must_use]
    #[inline]
    pub fn refs(&self) -> u32 {
        refs_of(self.counts.load(Ordering::Relaxed))
    }

    /// Whether one entry maps it, and nobody else uses it.
    #[must_use]
    #[inline]
    pub fn is_exclusive(&self) -> bool {
        self.counts.load(Ordering::Relaxed) == ONE_MAP + ONE_REF
    }

    /// Whether its content must be written back.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Relaxed) != 0
    }

    pub(crate) fn mark_dirty(&self) {
        self.dirty.store(1, Ordering::Relaxed);
    }

    /// Its content is as good as written back; whether it had to be.
    pub(crate) fn take_dirty(&self) -> bool {
        self.dirty.swap(0, Ordering::Relaxed) != 0
    }

    pub(crate) const fn table_lock(&self) -> &TableLock<R> {
        &self.lock
    }

    pub(crate) const fn used_lines(&self) -> &UsedLines {
        &self.used_lines
    }

    /// One more mapping, and the reference that it holds.
    pub(crate) fn add_mapping(&self) {
        self.counts.fetch_add(ONE_MAP + ONE_REF, Ordering::Relaxed);
    }

    /// One mapping less; its reference stays until the flush.
    #[inline]
    pub(crate) fn remove_mapping(&self) -> Result<(), CountError> {
        if maps_of(self.counts.fetch_sub(ONE_MAP, Ordering::AcqRel)) == 0 {
            self.counts.fetch_add(ONE_MAP, Ordering::Relaxed);
            return Err(CountError);
        }
        Ok(())
    }

    pub(crate) fn add_ref(&self) {
        self.counts.fetch_add(ONE_REF, Ordering::Relaxed);
    }

    /// One reference less; whether it was the last.
    #[inline]
    pub(crate) fn drop_ref(&self) -> Result<Last, CountError> {
        match refs_of(self.counts.fetch_sub(ONE_REF, Ordering::AcqRel)) {
            0 => {
                self.counts.fetch_add(ONE_REF, Ordering::Relaxed);
                Err(CountError)
            }
            1 => Ok(Last::Yes),
            _ => Ok(Last::No),
        }
    }

    pub(crate) fn set_owner(&self, owner: u64) {
        self.owner.store(owner, Ordering::Relaxed);
    }

    pub(crate) fn owner(&self) -> u64 {
        self.owner.load(Ordering::Relaxed)
    }

    /// Whether it is a page of a file, of whichever.
    #[must_use]
    pub fn is_of_a_file(&self) -> bool {
        self.owner() != 0
    }

    /// Whether it is this page of this file.
    #[must_use]
    pub fn is_page_of(&self, file: u32, page: u64) -> bool {
        self.owner() == owner_of(file, page)
    }
}

/// Which page of which file a frame is. Any number but 0 says "a page of a file".
pub(crate) const fn owner_of(file: u32, page: u64) -> u64 {
    (file as u64) << 32 | page & 0xffff_ffff | 1 << 63
}

const ONE_REF: u64 = 1;
const ONE_MAP: u64 = 1 << 32;

const fn refs_of(counts: u64) -> u32 {
    (counts & 0xffff_ffff) as u32
}

const fn maps_of(counts: u64) -> u32 {
    (counts >> 32) as u32
}

/// A count went below zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CountError;

/// Whether a reference was the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Last {
    Yes,
    No,
}

/// Ends the free lists; no machine has this frame.
const NO_FRAME: u32 = u32::MAX;

/// All frames, and the free ones last in, first out: a frame freed too early is in other hands at
/// once.
#[derive(Debug)]
pub struct Frames<R> {
    metas: Box<[FrameMeta<R>]>,
    free: CachePadded<SpinMutex<FreeLists, R>>,
}

#[derive(Debug)]
struct FreeLists {
    frames: u32,
    blocks: u32,
    nr_free: u64,
    /// Frames from here to `fresh_end` were never used: single ones are taken from below, blocks
    /// from above.
    fresh: u32,
    fresh_end: u32,
}

impl<R: RelaxStrategy> Frames<R> {
    /// Metadata for `nr_frames` frames, of which the first `nr_reserved` are not to be given out.
    ///
    /// # Panics
    /// If there are 2^32 - 1 frames (16 TiB) or more.
    #[must_use]
    pub fn new(nr_frames: u64, nr_reserved: u64) -> Self {
        let nr_frames = u32::try_from(nr_frames).expect("less than 16 TiB of memory");
        let reserved = u32::try_from(nr_reserved).expect("less than 16 TiB of memory").min(nr_frames);
        let kind = |number| if number < reserved { FrameKind::Reserved } else { FrameKind::Free };
        Self {
            metas: (0..nr_frames).map(|number| FrameMeta::new(kind(number))).collect(),
            free: CachePadded::new(SpinMutex::new(FreeLists {
                frames: NO_FRAME,
                blocks: NO_FRAME,
                nr_free: u64::from(nr_frames - reserved),
                fresh: reserved,
                fresh_end: nr_frames,
            })),
        }
    }

    /// The metadata of a frame.
    ///
    /// # Panics
    /// If the machine has no such frame.
    #[must_use]
    #[inline]
    pub fn meta(&self, frame: PhysFrame) -> &FrameMeta<R> {
        &self.metas[index_of(frame)]
    }

    /// The metadata of a frame, if the machine has it.
    #[must_use]
    pub fn get(&self, frame: PhysFrame) -> Option<&FrameMeta<R>> {
        self.metas.get(index_of(frame))
    }

    /// How many frames are free now.
    #[must_use]
    pub fn nr_free(&self) -> u64 {
        self.free.lock().nr_free
    }

    /// How many frames are used for `kind` now. Looks at all of them.
    #[must_use]
    pub fn count(&self, kind: FrameKind) -> u64 {
        self.metas.iter().filter(|meta| meta.kind() == kind).count() as u64
    }

    /// Takes a frame.
    pub fn allocate(&self, kind: FrameKind) -> Option<PhysFrame> {
        let mut free = self.free.lock();
        let number = if free.frames != NO_FRAME {
            let number = free.frames;
            free.frames = self.metas[number as usize].next.load(Ordering::Relaxed);
            number
        } else if free.fresh < free.fresh_end {
            free.fresh += 1;
            free.fresh - 1
        } else {
            return None;
        };
        free.nr_free -= 1;
        drop(free);
        self.metas[number as usize].kind.store(kind as u8, Ordering::Relaxed);
        Some(frame_of(number))
    }

    /// Takes 16 frames in a row, aligned to as many, from those that were never used. Each is given
    /// back alone, and is a single frame from then on.
    pub(crate) fn allocate_folio(&self) -> Option<PhysFrame> {
        let mut free = self.free.lock();
        let number = free.fresh.next_multiple_of(FOLIO);
        if number + FOLIO > free.fresh_end {
            return None;
        }
        for spare in free.fresh..number {
            self.metas[spare as usize].next.store(free.frames, Ordering::Relaxed);
            free.frames = spare;
        }
        free.fresh = number + FOLIO;
        free.nr_free -= u64::from(FOLIO);
        drop(free);
        for page in number..number + FOLIO {
            self.metas[page as usize].kind.store(FrameKind::Page as u8, Ordering::Relaxed);
        }
        Some(frame_of(number))
    }

    /// Takes 512 frames in a row, aligned to 2 MiB; the first carries the counts.
    pub fn allocate_block(&self) -> Option<PhysFrame> {
        let mut free = self.free.lock();
        let number = if free.blocks != NO_FRAME {
            let number = free.blocks;
            free.blocks = self.metas[number as usize].next.load(Ordering::Relaxed);
            number
        } else {
            let number = free.fresh_end.checked_sub(BLOCK)? & !(BLOCK - 1);
            if number < free.fresh {
                return None;
            }
            // What lies between the block and the last one goes to the single frames.
            for spare in number + BLOCK..free.fresh_end {
                self.metas[spare as usize].next.store(free.frames, Ordering::Relaxed);
                free.frames = spare;
            }
            free.fresh_end = number;
            number
        };
        free.nr_free -= u64::from(BLOCK);
        drop(free);
        for tail in number..number + BLOCK {
            self.metas[tail as usize].kind.store(FrameKind::Tail as u8, Ordering::Relaxed);
        }
        self.metas[number as usize].kind.store(FrameKind::Block as u8, Ordering::Relaxed);
        Some(frame_of(number))
    }

    pub(crate) fn set_kind(&self, frame: PhysFrame, kind: FrameKind) {
        self.meta(frame).kind.store(kind as u8, Ordering::Relaxed);
    }

    /// Makes 512 single pages of a block, each with the counts that the block had.
    pub(crate) fn split_block(&self, first: PhysFrame) {
        let number = index_of(first);
        let counts = self.metas[number].counts.load(Ordering::Relaxed);
        let dirty = self.metas[number].is_dirty();
        let owner = self.metas[number].owner();
        for (page, meta) in (0..).zip(&self.metas[number..number + BLOCK as usize]) {
            meta.counts.store(counts, Ordering::Relaxed);
            meta.kind.store(FrameKind::Page as u8, Ordering::Relaxed);
            if owner != 0 {
                meta.set_owner(owner + page);
            }
            if dirty {
                meta.mark_dirty();
            }
        }
    }

    /// Gives frames back. A list is made of them first, so the lock is taken once.
    pub fn free(&self, frames: impl IntoIterator<Item = PhysFrame>) {
        let (mut first, mut last, mut count) = (NO_FRAME, NO_FRAME, 0);
        for frame in frames {
            let meta = self.meta(frame);
            meta.reset();
            meta.next.store(first, Ordering::Relaxed);
            first = number_of(frame);
            if last == NO_FRAME {
                last = first;
            }
            count += 1;
        }
        if last != NO_FRAME {
            let mut free = self.free.lock();
            self.metas[last as usize].next.store(free.frames, Ordering::Relaxed);
            free.frames = first;
            free.nr_free += count;
        }
    }

    /// Gives a block back.
    pub(crate) fn free_block(&self, first: PhysFrame) {
        let number = index_of(first);
        for meta in &self.metas[number..number + BLOCK as usize] {
            meta.reset();
        }
        let mut free = self.free.lock();
        self.metas[number].next.store(free.blocks, Ordering::Relaxed);
        free.blocks = number_of(first);
        free.nr_free += u64::from(BLOCK);
    }
}

impl<R> FrameMeta<R> {
    fn reset(&self) {
        self.counts.store(0, Ordering::Relaxed);
        self.dirty.store(0, Ordering::Relaxed);
        self.owner.store(0, Ordering::Relaxed);
        self.kind.store(FrameKind::Free as u8, Ordering::Relaxed);
    }
}

fn frame_of(number: u32) -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new_truncate(u64::from(number) << 12))
}

#[inline]
fn index_of(frame: PhysFrame) -> usize {
    // Frame numbers have at most 40 bits; usize has 64 on the only architecture this is for.
    (frame.start_address().as_u64() >> 12) as usize
}

fn number_of(frame: PhysFrame) -> u32 {
    // Frames come from this allocator, which has fewer than 2^32 of them.
    u32::try_from(index_of(frame)).unwrap_or(NO_FRAME)
}
