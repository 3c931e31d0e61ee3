//! Which frames are free, and which caches still name them.
//!
//! A frame is *stale on a CPU* when it was freed while the CPU's caches named it. That is a
//! violation at once if the CPU can use the entry without running any more software: a page, while
//! it runs a program; a table, always (speculation walks on lazy CPUs too). Otherwise it becomes
//! one when the CPU enters user mode, or loads the PCID, with the entry still there.

use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mmu_gather::tlb::CpuId;
use rustc_hash::FxHashMap;
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

use crate::checker::kind::ViolationKind;
use crate::checker::violation::{Found, Violation};
use crate::memory::index;
use crate::mmu::arch::PageSize;
use crate::mmu::watch::{CachedEntry, FrameWatch, Held, Use};
use crate::options::Options;
use crate::vocabulary::{FrameRole, Moment};

/// How many violations of one kind are told in full; the others are counted.
const TOLD: usize = 2;

/// Frames that are looked through together.
const GROUP: usize = 64;

/// What a frame is in use for: nothing; a page; a table; whatever the kernel has taken before it
/// had booted; a page that is lent to a gather, if the kernel tells.
const FREE: u8 = 0;
const PAGE: u8 = 1;
const TABLE: u8 = 2;
const SINCE_BOOT: u8 = 3;
const LENT: u8 = 4;

/// The truth about frames, and the violations found.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// By frame: 0 if it was never freed or is in use again, else the step at which it was freed,
    /// plus one, and in the low 16 bits by which CPU.
    freed_at: Box<[AtomicU64]>,
    /// By frame: what it is in use for, as the kernel has told.
    in_use: Box<[AtomicU8]>,
    /// By group of frames: whether any of them was ever told to be in use. Few are.
    in_use_once: Box<[AtomicBool]>,
    double_frees: AtomicU64,
    holders: Arc<Holders>,
    /// By frame: whether a program wrote to it since it was given out.
    written: Box<[AtomicBool]>,
    /// By frame: when it was given out, or when the kernel last said that an entry maps it.
    mapped_at: Box<[AtomicU64]>,
    /// Whether the kernel says so.
    tells_of_mapping: AtomicBool,
    found: Mutex<Found>,
}

/// How many cached things name each frame, over all CPUs.
#[derive(Debug)]
pub(crate) struct Holders {
    pages: Box<[AtomicU32]>,
    blocks: Box<[AtomicU32]>,
    gigabytes: AtomicU32,
    /// Goes up by one whenever a call asks for a moment, so that what is cached before and after it
    /// can be told apart.
    clock: AtomicU64,
}

impl Holders {
    fn new(nr_frames: usize) -> Self {
        let zeroes = |count: usize| (0..count).map(|_| AtomicU32::new(0)).collect();
        Self {
            pages: zeroes(nr_frames),
            blocks: zeroes((nr_frames >> 9) + 1),
            gigabytes: AtomicU32::new(0),
            clock: AtomicU64::new(0),
        }
    }

    fn counter(&self, first: PhysFrame, held: Held) -> Option<&AtomicU32> {
        let number = number(first);
        match held.as_a {
            Use::Page(PageSize::Size2MiB) => self.blocks.get(number >> 9),
            // One that maps no memory of this machine, as of a device, does not matter when frames
            // are freed.
            Use::Page(PageSize::Size1GiB) => (number < self.pages.len()).then_some(&self.gigabytes),
            Use::Page(PageSize::Size4KiB) | Use::Table(_) | Use::Root => self.pages.get(number),
        }
    }

    /// Whether anything cached anywhere may name one of `count` frames from `first` on.
    fn any(&self, first: PhysFrame, count: usize) -> bool {
        let number = number(first);
        let used = |counter: &AtomicU32| counter.load(Ordering::Relaxed) != 0;
        used(&self.gigabytes)
            || self.blocks.get(number >> 9).is_some_and(used)
            || self.pages.iter().skip(number).take(count).any(used)
    }
}

impl Ledger {
    /// The ledger of a machine of `nr_frames`.
    #[must_use]
    pub(crate) fn new(nr_frames: u64) -> Self {
        let nr_frames = index(nr_frames);
        let numbers = || (0..nr_frames).map(|_| AtomicU64::new(0)).collect();
        let flags = |count: usize| (0..count).map(|_| AtomicBool::new(false)).collect();
        Self {
            freed_at: numbers(),
            in_use: (0..nr_frames).map(|_| AtomicU8::new(FREE)).collect(),
            in_use_once: flags(nr_frames.div_ceil(GROUP)),
            double_frees: AtomicU64::new(0),
            holders: Arc::new(Holders::new(nr_frames)),
            written: flags(nr_frames),
            mapped_at: numbers(),
            tells_of_mapping: AtomicBool::new(false),
            found: Mutex::new(Found::default()),
        }
    }

    /// The watch of one CPU's caches.
    #[must_use]
    pub(crate) fn watch(&self) -> CpuWatch {
        CpuWatch { holders: Arc::clone(&self.holders), stale: FxHashMap::default(), fills: None }
    }

    /// Whether anything cached anywhere may name the frame.
    pub(crate) fn is_cached(&self, frame: PhysFrame, role: FrameRole) -> bool {
        self.holders.any(frame, frames_of(frame, role).len())
    }

    /// The frame is in use from now on. Whether it was in use before.
    #[must_use]
    pub(crate) fn allocated(&self, frame: PhysFrame, role: FrameRole) -> bool {
        let mut was_in_use = false;
        let used = if role == FrameRole::Table { TABLE } else { PAGE };
        for number in frames_of(frame, role) {
            if let Some(freed) = self.freed_at.get(number) {
                freed.store(0, Ordering::Relaxed);
            }
            if let Some(in_use) = self.in_use.get(number) {
                was_in_use |= in_use.swap(used, Ordering::Relaxed) != FREE;
                // `lend` changes what was told of here before.
                self.in_use_once[number / GROUP].store(true, Ordering::Relaxed);
            }
            if let Some(written) = self.written.get(number) {
                written.store(false, Ordering::Relaxed);
            }
            self.set_mapped_at(number);
        }
        was_in_use
    }

    /// The frame is free from now on, since `step`. Whether any cache may still name it.
    #[must_use]
    pub(crate) fn freed(&self, frame: PhysFrame, role: FrameRole, step: u64, by: CpuId) -> bool {
        let mark = (step + 1) << 16 | u64::from(by.number() & 0xffff);
        for number in frames_of(frame, role) {
            if self.in_use.get(number).is_some_and(|in_use| in_use.swap(FREE, Ordering::Relaxed) == FREE) {
                self.double_frees.fetch_add(1, Ordering::Relaxed);
            }
            if let Some(freed) = self.freed_at.get(number) {
                freed.store(mark, Ordering::Relaxed);
            }
        }
        self.holders.any(frame, frames_of(frame, role).len())
    }

    /// The page is lent to a gather until it is freed; whether it was in use as a page.
    #[must_use]
    pub(crate) fn lend(&self, frame: PhysFrame) -> bool {
        let in_use = self.in_use.get(number(frame));
        in_use.is_some_and(|in_use| in_use.swap(LENT, Ordering::Relaxed) == PAGE)
    }

    /// Whether a gather has the page.
    pub(crate) fn is_lent(&self, frame: PhysFrame) -> bool {
        self.in_use.get(number(frame)).is_some_and(|in_use| in_use.load(Ordering::Relaxed) == LENT)
    }

    /// What is in use now stays in use: the kernel has booted.
    pub(crate) fn note_booted(&self) {
        for (_, in_use) in self.told_of().filter(|(_, in_use)| in_use.load(Ordering::Relaxed) != FREE) {
            in_use.store(SINCE_BOOT, Ordering::Relaxed);
        }
    }

    /// How often a frame was freed that was not in use.
    pub(crate) fn double_frees(&self) -> u64 {
        self.double_frees.load(Ordering::Relaxed)
    }

    /// The frames that were given out since the kernel had booted, and not freed; with what for.
    pub(crate) fn not_freed(&self) -> impl Iterator<Item = (PhysFrame, FrameRole)> + '_ {
        self.told_of().filter_map(|(number, in_use)| {
            let role = match in_use.load(Ordering::Relaxed) {
                PAGE | LENT => FrameRole::Page,
                TABLE => FrameRole::Table,
                _ => return None,
            };
            Some((frame_numbered(number), role))
        })
    }

    /// The frames that were ever told to be in use, and others near them; by number.
    fn told_of(&self) -> impl Iterator<Item = (usize, &AtomicU8)> {
        let groups = self.in_use.chunks(GROUP).zip(&self.in_use_once).enumerate();
        let used = groups.filter(|(_, (_, once))| once.load(Ordering::Relaxed));
        used.flat_map(|(group, (frames, _))| (group * GROUP..).zip(frames))
    }

    /// A moment that is later than everything so far.
    pub(crate) fn moment(&self) -> Moment {
        Moment(self.holders.clock.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// The moment of what happens now.
    pub(crate) fn now(&self) -> Moment {
        Moment(self.holders.clock.load(Ordering::Relaxed))
    }

    /// A program wrote to the frame.
    pub(crate) fn note_written(&self, frame: PhysFrame) {
        if let Some(written) = self.written.get(number(frame)) {
            written.store(true, Ordering::Relaxed);
        }
    }

    /// Whether a program wrote to the frame since it was given out.
    pub(crate) fn was_written(&self, frame: PhysFrame) -> bool {
        self.written.get(number(frame)).is_some_and(|written| written.load(Ordering::Relaxed))
    }

    /// The content of the frame was written back.
    pub(crate) fn note_written_back(&self, frame: PhysFrame) {
        if let Some(written) = self.written.get(number(frame)) {
            written.store(false, Ordering::Relaxed);
        }
    }

    /// An entry maps the frame from now on.
    pub(crate) fn note_mapped(&self, frame: PhysFrame) {
        self.tells_of_mapping.store(true, Ordering::Relaxed);
        self.set_mapped_at(number(frame));
    }

    fn set_mapped_at(&self, number: usize) {
        if let Some(mapped_at) = self.mapped_at.get(number) {
            mapped_at.store(self.holders.clock.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Whether the frame was mapped last at this moment or later.
    pub(crate) fn was_mapped_since(&self, frame: PhysFrame, moment: Moment) -> bool {
        let mapped_at = self.mapped_at.get(number(frame));
        mapped_at.is_some_and(|mapped_at| mapped_at.load(Ordering::Relaxed) >= moment.0)
    }

    /// Whether whatever maps the frame has done so since before this moment. Never, if the kernel
    /// does not say when frames are mapped.
    pub(crate) fn was_mapped_before(&self, frame: PhysFrame, moment: Moment) -> bool {
        let mapped_at = self.mapped_at.get(number(frame));
        self.tells_of_mapping.load(Ordering::Relaxed)
            && mapped_at.is_some_and(|mapped_at| mapped_at.load(Ordering::Relaxed) < moment.0)
    }

    /// If the frame is free: the step at which that happened, and the CPU.
    #[must_use]
    pub(crate) fn when_freed(&self, frame: PhysFrame) -> Option<(u64, CpuId)> {
        let mark = self.freed_at.get(number(frame))?.load(Ordering::Relaxed);
        let cpu = CpuId::new((mark & 0xffff) as u32);
        (mark != 0).then(|| ((mark >> 16) - 1, cpu))
    }

    /// Whether the kernel has never told of this frame, which it may give out.
    #[must_use]
    pub(crate) fn is_unknown(&self, frame: PhysFrame) -> bool {
        let number = number(frame);
        let is_zero = |in_use: &AtomicU8| in_use.load(Ordering::Relaxed) == FREE;
        number as u64 >= Options::RESERVED_FRAMES
            && self.in_use.get(number).is_some_and(is_zero)
            && self.when_freed(frame).is_none()
    }

    /// Notes a violation.
    pub(crate) fn report(&self, kind: ViolationKind, violation: impl FnOnce() -> Violation) {
        let mut found = self.lock();
        found.count += 1;
        if found.told.iter().filter(|told| told.kind == kind).count() < TOLD {
            found.told.push(violation());
        }
    }

    /// What was found so far, the worst kind first.
    #[must_use]
    pub(crate) fn found(&self) -> Found {
        let mut found = self.lock().clone();
        found.told.sort_by_key(|violation| violation.kind);
        found
    }

    fn lock(&self) -> MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Watches the caches of one CPU: counts what they name, and remembers what is stale there.
#[derive(Debug)]
pub(crate) struct CpuWatch {
    holders: Arc<Holders>,
    /// What named a frame when it was freed: first frame named, how, and how many such entries
    /// there are still.
    stale: FxHashMap<(PhysFrame, Held), u32>,
    /// What entered the caches since it was last taken, if a timeline wants it.
    fills: Option<Vec<(PhysFrame, Held)>>,
}

impl CpuWatch {
    /// These entries, which are all that name a frame just freed, are stale from now on.
    ///
    /// An entry may be stale already, because the frame was freed once before, or because another
    /// part of its large page was. It still leaves the cache only once, so it is counted once.
    pub(crate) fn mark_stale(&mut self, entries: impl IntoIterator<Item = CachedEntry>) {
        let mut counts = FxHashMap::default();
        for entry in entries {
            *counts.entry((entry.frame, entry.held)).or_insert(0) += 1;
        }
        self.stale.extend(counts);
    }

    /// Remembers what enters the caches from now on, for [`take_fills`](Self::take_fills).
    pub(crate) fn remember_fills(&mut self) {
        self.fills = Some(Vec::new());
    }

    /// What entered the caches since the last call.
    pub(crate) fn take_fills(&mut self) -> Vec<(PhysFrame, Held)> {
        self.fills.as_mut().map(core::mem::take).unwrap_or_default()
    }

    /// Frames that may be stale here, with how they are named.
    pub(crate) fn stale(&self) -> impl Iterator<Item = (PhysFrame, Held)> + '_ {
        self.stale.keys().copied()
    }

    /// Whether nothing is stale here.
    #[must_use]
    #[inline]
    pub(crate) fn is_clean(&self) -> bool {
        self.stale.is_empty()
    }

    /// Forgets what was stale: it has been reported.
    pub(crate) fn forget_stale(&mut self) {
        self.stale.clear();
    }
}

impl FrameWatch for CpuWatch {
    #[inline]
    fn hold(&mut self, first: PhysFrame, held: Held) {
        if let Some(fills) = &mut self.fills {
            fills.push((first, held));
        }
        if let Some(counter) = self.holders.counter(first, held) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[inline]
    fn release(&mut self, first: PhysFrame, held: Held) {
        if let Some(counter) = self.holders.counter(first, held) {
            counter.fetch_sub(1, Ordering::Relaxed);
        }
        if !self.stale.is_empty()
            && let Some(left) = self.stale.get_mut(&(first, held))
        {
            *left -= 1;
            if *left == 0 {
                self.stale.remove(&(first, held));
            }
        }
    }

    #[inline]
    fn now(&self) -> Moment {
        Moment(self.holders.clock.load(Ordering::Relaxed))
    }
}

fn number(frame: PhysFrame) -> usize {
    index(frame.start_address().as_u64() >> 12)
}

/// The numbers of the frames that go with `frame` in this role.
pub(crate) fn frames_of(frame: PhysFrame, role: FrameRole) -> core::ops::Range<usize> {
    let count = match role {
        FrameRole::Page | FrameRole::Table => 1,
        FrameRole::Block => 512,
    };
    number(frame)..number(frame) + count
}

/// The frame with this number.
pub(crate) fn frame_numbered(number: usize) -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new_truncate((number as u64) << 12))
}

/// Whether an entry names one of these frames.
pub(crate) fn overlaps(entry: &CachedEntry, frames: &core::ops::Range<usize>) -> bool {
    let first = frames_of(entry.frame, FrameRole::Page).start;
    let count = match entry.held.as_a {
        Use::Page(PageSize::Size2MiB) => 512,
        Use::Page(PageSize::Size1GiB) => 512 * 512,
        Use::Page(PageSize::Size4KiB) | Use::Table(_) | Use::Root => 1,
    };
    first < frames.end && frames.start < first + count
}

#[cfg(test)]
mod tests {
    use x86_64::instructions::tlb::Pcid;

    use super::*;
    use crate::mmu::arch::{LinearAddress, Rights};
    use crate::mmu::watch::Tag;

    fn entry(first: usize, size: PageSize) -> CachedEntry {
        let tag = Tag::Pcid(Pcid::new(2).expect("below 4096"));
        CachedEntry {
            held: Held { as_a: Use::Page(size), tag },
            address: LinearAddress::new(0x7000_0000_0000),
            span_shift: size.shift(),
            frame: frame_numbered(first),
            rights: Rights::ALL,
            dirty: false,
            at: Moment::START,
        }
    }

    #[test]
    fn an_entry_whose_frame_was_freed_twice_is_stale_until_it_is_gone_once() {
        let mut watch = Ledger::new(16).watch();
        let cached = entry(5, PageSize::Size4KiB);
        watch.hold(cached.frame, cached.held);
        // Freed, given out to another address space, freed there too: the entry of an address space
        // that ended waits for its PCID.
        watch.mark_stale([cached]);
        watch.mark_stale([cached]);
        assert!(!watch.is_clean());
        watch.release(cached.frame, cached.held);
        assert!(watch.is_clean(), "the next entry for this frame would be taken for the old one");
    }

    #[test]
    fn a_large_entry_whose_parts_are_freed_one_by_one_is_stale_until_it_is_gone_once() {
        let mut watch = Ledger::new(1024).watch();
        let (large, small) = (entry(512, PageSize::Size2MiB), entry(512, PageSize::Size4KiB));
        for cached in [large, small] {
            watch.hold(cached.frame, cached.held);
        }
        watch.mark_stale([large, small]);
        watch.mark_stale([large]);
        watch.release(large.frame, large.held);
        assert!(!watch.is_clean(), "the small one is still there");
        watch.release(small.frame, small.held);
        assert!(watch.is_clean());
    }
}
