//! Pages waiting for a flush: eight slots on the stack, then pages of 510 slots, chained.
#![expect(unsafe_code, reason = "batch pages are linked by pointer")]

use core::mem::MaybeUninit;
use core::ptr::NonNull;
use core::{fmt, mem};

use arrayvec::ArrayVec;
use static_assertions::const_assert_eq;

use crate::limits::Limits;
use crate::platform::{BatchPage, GatherEvent, Pages};
use crate::queue::freed_pages::{FreedPages, Which};
use crate::queue::release::Release;
use crate::queue::spare::{Room, SpareSlots, lend_spare};
use crate::queue::word::{BatchWord, DelayedRmaps, Runs};

/// One batch page. Linux: struct mmu_gather_batch.
pub(crate) struct Batch {
    next: Option<NonNull<Batch>>,
    slots: ArrayVec<BatchWord, { Limits::BATCH_SLOTS }>,
}

const_assert_eq!(size_of::<Batch>(), 4096);
const_assert_eq!(align_of::<Batch>(), 8);

/// Slots on the stack, of which the first so many are written.
pub(crate) type Slots = [MaybeUninit<BatchWord>; Limits::BUNDLE_SLOTS];

/// Slots on the stack that nothing was written to.
pub(crate) const NO_WORDS: Slots = [const { MaybeUninit::uninit() }; Limits::BUNDLE_SLOTS];

/// The queue. Batch pages are kept and used again after a flush;
/// [`give_back`](Self::give_back) returns them.
///
/// INVARIANT: `first` starts a list of pages that only this queue knows; `active` is one of them,
/// or `None` while the bundle is in use; batches after `active` are empty.
pub(crate) struct PageQueue {
    bundle: ArrayVec<BatchWord, { Limits::BUNDLE_SLOTS }>,
    delayed_rmaps: DelayedRmaps,
    /// Whether a run was queued since the last time everything was freed.
    runs: Runs,
    batch_pages: u16,
    first: Option<NonNull<Batch>>,
    active: Option<NonNull<Batch>>,
}

/// A batch page just lent, with nothing in it. It goes back if a call of the kernel unwinds.
pub(crate) struct NewBatch<'k, K: Release> {
    kernel: &'k K,
    page: NonNull<Batch>,
}

impl<'k, K: Release> NewBatch<'k, K> {
    #[inline(always)]
    pub(crate) fn made_of(kernel: &'k K, page: BatchPage) -> Self {
        kernel.observe_gather(GatherEvent::BatchTaken);
        let page = page.into_inner().cast::<Batch>();
        // SAFETY: the page is 4096 writable bytes, aligned to 8 (contract of `BatchPage::new`); a
        // `Batch` has that size and alignment (asserted above).
        unsafe { page.write(Batch { next: None, slots: ArrayVec::new_const() }) };
        Self { kernel, page }
    }

    /// Lends the slots to be filled.
    #[inline(always)]
    pub(crate) fn lend(&mut self) -> SpareSlots<'_> {
        // SAFETY: the page is ours alone, and `&mut self` is the only way to it.
        SpareSlots::new(unsafe { self.page.as_mut() }.slots.spare_capacity_mut())
    }

    /// Notes that all slots but the last `unused` are filled.
    ///
    /// # Safety
    /// That many were [left](SpareSlots::left) of what [`lend`](Self::lend) lent, which was once.
    #[inline(always)]
    pub(crate) unsafe fn filled(&mut self, unused: usize) {
        // SAFETY: as in `lend`.
        let batch = unsafe { self.page.as_mut() };
        // SAFETY: by the invariant of `SpareSlots` they are written.
        unsafe { batch.slots.set_len(Limits::BATCH_SLOTS - unused) };
    }

    /// What was stored.
    pub(crate) fn words(&self) -> &[BatchWord] {
        // SAFETY: the page is ours alone.
        &unsafe { self.page.as_ref() }.slots
    }

    /// The page, for the queue that returns it.
    #[inline(always)]
    pub(crate) fn keep(self) -> NonNull<Batch> {
        let page = self.page;
        mem::forget(self);
        page
    }
}

impl<K: Release> Drop for NewBatch<'_, K> {
    #[cold]
    fn drop(&mut self) {
        // SAFETY: this is the page that `allocate_batch` lent; nobody knows it from here on.
        self.kernel.free_batch(unsafe { BatchPage::new(self.page.cast()) });
    }
}

impl PageQueue {
    #[inline]
    pub(crate) fn new() -> Self {
        Self {
            bundle: ArrayVec::new(),
            delayed_rmaps: DelayedRmaps::Absent,
            runs: Runs::Absent,
            batch_pages: 0,
            first: None,
            active: None,
        }
    }

    /// Lets `store` fill the batch in use with single pages; returns whether room is left. There
    /// may be none to begin with.
    ///
    /// One slot stays unused, so that a run, which takes two, always fits into the batch that is
    /// not full. Whoever used up the room calls [`next_batch`](Self::next_batch).
    #[inline]
    pub(crate) fn fill_batch<R>(
        &mut self,
        limits: &Limits,
        store: impl FnOnce(&mut SpareSlots<'_>) -> R,
    ) -> (R, Room) {
        match self.active {
            None => lend_spare(&mut self.bundle, usize::from(limits.bundle_slots) - 1, store),
            Some(mut batch) => {
                // SAFETY: by the invariant the page is ours alone, and `&mut self` is the only way
                // to it.
                let batch = unsafe { batch.as_mut() };
                lend_spare(&mut batch.slots, usize::from(limits.batch_slots) - 1, store)
            }
        }
    }

    /// Stores one page. There is room: the batch is not [full](Self::is_full).
    #[inline]
    pub(crate) fn push<K: Release>(&mut self, kernel: &K, limits: &Limits, page: BatchWord) -> Room {
        self.store(kernel, limits, &[page])
    }

    /// Notes that pages just stored lose their rmaps after a flush under the same table lock.
    #[inline]
    pub(crate) const fn note_delayed_rmaps(&mut self) {
        self.delayed_rmaps = DelayedRmaps::Queued;
    }

    /// Stores a run of pages: two words that stay in one batch.
    pub(crate) fn push_run<K: Release>(&mut self, kernel: &K, limits: &Limits, run: [BatchWord; 2]) -> Room {
        self.runs = Runs::Queued;
        self.store(kernel, limits, &run)
    }

    #[inline]
    fn store<K: Release>(&mut self, kernel: &K, limits: &Limits, record: &[BatchWord]) -> Room {
        // A batch counts as full one slot early, so that a run never has to be cut in two.
        let nearly_full = match self.active {
            None => {
                append(&mut self.bundle, record);
                self.bundle.len() + 1 >= usize::from(limits.bundle_slots)
            }
            Some(mut batch) => {
                // SAFETY: by the invariant the page is ours alone, and `&mut self` is the only way
                // to it.
                let batch = unsafe { batch.as_mut() };
                append(&mut batch.slots, record);
                batch.slots.len() + 1 >= usize::from(limits.batch_slots)
            }
        };
        if nearly_full { self.next_batch(kernel, limits) } else { Room::Left }
    }

    /// Goes on to the next batch page: one kept from before the last flush, or a new one.
    #[cold]
    pub(crate) fn next_batch<K: Release>(&mut self, kernel: &K, limits: &Limits) -> Room {
        // Removing rmaps walks the bundle and the active batch only, for it is done under a lock.
        // Pages whose rmaps are delayed must not spread over more batches.
        if self.delayed_rmaps == DelayedRmaps::Queued && self.active.is_some() {
            return Room::Full;
        }
        let kept = self.kept();
        if kept.is_some() {
            self.active = kept;
            return Room::Left;
        }
        if self.batch_pages >= limits.batch_pages {
            return Room::Full;
        }
        let Some(page) = kernel.allocate_batch() else {
            kernel.observe_gather(GatherEvent::BatchRefused);
            return Room::Full;
        };
        let new = NewBatch::made_of(kernel, page).keep();
        match self.active {
            None => self.first = Some(new),
            Some(mut active) => {
                // SAFETY: by the invariant the page is ours alone.
                unsafe { active.as_mut() }.next = Some(new);
            }
        }
        self.batch_pages += 1;
        self.active = Some(new);
        Room::Left
    }

    /// Lets the kernel remove the rmaps that were delayed. The flush has completed, and the table
    /// lock is still held.
    ///
    /// Pages whose rmaps are delayed are in the bundle and the active batch at the most: the queue
    /// was flushed before, or counted as full, whenever it would have needed another batch.
    pub(crate) fn remove_delayed_rmaps<K: Pages>(&mut self, kernel: &K) {
        if self.delayed_rmaps == DelayedRmaps::Absent {
            return;
        }
        // Noted before the call: if that unwinds, no rmap is removed twice.
        self.delayed_rmaps = DelayedRmaps::Absent;
        kernel.remove_rmaps(FreedPages::new(&self.bundle, Which::DelayedRmap, self.runs));
        if let Some(active) = self.active {
            // SAFETY: by the invariant the page is ours alone.
            let batch = unsafe { active.as_ref() };
            kernel.remove_rmaps(FreedPages::new(&batch.slots, Which::DelayedRmap, self.runs));
        }
    }

    /// Moves the queue out of here, word by word, into what is freed later; what stays behind is
    /// empty. Everything has been flushed for.
    ///
    /// `mem::replace` would be slower: it loads sixteen bytes at a time what was stored eight at a
    /// time just before, and the CPU cannot forward such stores to the load but waits for them.
    #[inline]
    pub(crate) fn release(&mut self) -> (Slots, u32, Runs, Option<NonNull<Batch>>) {
        let mut few = NO_WORDS;
        for (slot, word) in few.iter_mut().zip(&self.bundle) {
            slot.write(*word);
        }
        let nr_few = u32::try_from(self.bundle.len()).unwrap_or(0);
        self.bundle.clear();
        (self.active, self.batch_pages) = (None, 0);
        (few, nr_few, self.runs, self.first.take())
    }

    /// Hands everything to the kernel, chunk by chunk with a preemption point after each; returns
    /// how many slots that were.
    pub(crate) fn free_all<K: Release>(&mut self, kernel: &K, free_chunk: u16) -> u64 {
        let slots = free_slots(kernel, free_chunk, &self.bundle, self.runs);
        self.bundle.clear();
        let slots = slots + free_chain(kernel, free_chunk, self.first, self.runs);
        self.active = None;
        self.runs = Runs::Absent;
        slots
    }

    /// Returns the batch pages; called when nothing is queued any more.
    #[inline]
    pub(crate) fn give_back<K: Release>(&mut self, kernel: &K) {
        debug_assert!(self.is_empty(), "G5: pages queued and never freed");
        if self.first.is_some() {
            self.give_back_pages(kernel);
        }
    }

    #[inline(never)]
    fn give_back_pages<K: Release>(&mut self, kernel: &K) {
        (self.active, self.batch_pages) = (None, 0);
        give_back_chain(kernel, self.first.take());
    }

    /// Whether the batch in use has no room for another page or run, because the visit of a table
    /// ended with the last slot that could be used.
    #[inline]
    pub(crate) fn is_full(&self, limits: &Limits) -> bool {
        let (used, slots) = match self.active {
            None => (self.bundle.len(), limits.bundle_slots),
            // SAFETY: by the invariant the page is ours alone.
            Some(active) => (unsafe { active.as_ref() }.slots.len(), limits.batch_slots),
        };
        used + 1 >= usize::from(slots)
    }

    /// Whether going on to the next batch would ask the kernel for a page.
    #[inline]
    pub(crate) fn needs_new_page(&self, limits: &Limits) -> bool {
        self.kept().is_none() && self.batch_pages < limits.batch_pages
    }

    /// The batch page after the one in use, if one was kept from before the last flush.
    #[inline]
    fn kept(&self) -> Option<NonNull<Batch>> {
        match self.active {
            None => self.first,
            // SAFETY: by the invariant the page is ours alone.
            Some(active) => unsafe { active.as_ref() }.next,
        }
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        // The bundle fills first.
        self.bundle.is_empty()
    }
}

#[inline]
fn append<const N: usize>(slots: &mut ArrayVec<BatchWord, N>, record: &[BatchWord]) {
    // Two words fit, because a batch counts as full one slot early. An error would be a page lost.
    let stored = slots.try_extend_from_slice(record);
    debug_assert!(stored.is_ok(), "G5: a record was pushed into a full batch");
}

/// Hands `slots` to the kernel, at most `free_chunk` pages at a time (rule G7), or a single run of
/// more; returns how many slots those were.
#[inline]
pub(crate) fn free_slots<K: Release>(kernel: &K, free_chunk: u16, slots: &[BatchWord], runs: Runs) -> u64 {
    if runs == Runs::Queued || slots.len() > usize::from(free_chunk) {
        free_in_chunks(kernel, free_chunk, slots, runs);
    } else if !slots.is_empty() {
        kernel.release_pages(FreedPages::new(slots, Which::All, runs));
        kernel.cond_resched();
    }
    slots.len() as u64
}

/// Hands to the kernel what is in the batches from `first` on, up to the first that is empty, and
/// empties them; returns how many slots that were. The caller alone knows the batches.
#[inline]
pub(crate) fn free_chain<K: Release>(
    kernel: &K,
    free_chunk: u16,
    first: Option<NonNull<Batch>>,
    runs: Runs,
) -> u64 {
    let mut freed = 0;
    let mut next = first;
    while let Some(mut batch) = next {
        // SAFETY: our caller alone knows the page.
        let batch = unsafe { batch.as_mut() };
        if batch.slots.is_empty() {
            break;
        }
        freed += free_slots(kernel, free_chunk, &batch.slots, runs);
        batch.slots.clear();
        next = batch.next;
    }
    freed
}

/// Returns the batch pages from `first` on. The caller alone knew them, and has forgotten them.
#[inline]
pub(crate) fn give_back_chain<K: Release>(kernel: &K, first: Option<NonNull<Batch>>) {
    let mut next = first;
    while let Some(batch) = next {
        // SAFETY: our caller alone knows the page; it is read for the last time.
        next = unsafe { batch.as_ref() }.next;
        // SAFETY: this is the page `allocate_batch` lent; the list that led to it is gone.
        kernel.free_batch(unsafe { BatchPage::new(batch.cast()) });
    }
}

#[inline(never)]
fn free_in_chunks<K: Release>(kernel: &K, free_chunk: u16, slots: &[BatchWord], runs: Runs) {
    let mut rest = slots;
    while !rest.is_empty() {
        let chunk = match runs {
            Runs::Absent => usize::from(free_chunk).min(rest.len()),
            Runs::Queued => chunk_with_runs(rest, u64::from(free_chunk)),
        };
        let (now, later) = rest.split_at(chunk);
        kernel.release_pages(FreedPages::new(now, Which::All, runs));
        kernel.cond_resched();
        rest = later;
    }
}

/// How many slots to hand over so that they come to no more than `nr_pages` pages, but at least
/// those of the first page or run. It reads from the front, because the length of a run may look
/// like any other word.
fn chunk_with_runs(slots: &[BatchWord], nr_pages: u64) -> usize {
    let (mut used, mut pages) = (0, 0);
    while let Some(word) = slots.get(used) {
        let (record, length) = match slots.get(used + 1) {
            Some(length) if word.length_follows() => (2, length.length()),
            _ => (1, 1),
        };
        pages += u64::from(length);
        if pages > nr_pages && used > 0 {
            break;
        }
        used += record;
    }
    used
}

impl fmt::Debug for PageQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageQueue")
            .field("bundle", &FreedPages::new(&self.bundle, Which::All, self.runs))
            .field("batch_pages", &self.batch_pages)
            .finish_non_exhaustive()
    }
}
