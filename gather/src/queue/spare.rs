//! Filling a row of slots from the front, without updating its length for each word.
#![expect(unsafe_code, reason = "slots are written first, and counted once afterwards")]

use core::mem::{self, MaybeUninit};

use arrayvec::ArrayVec;

use crate::queue::word::BatchWord;

/// How many words are stored at a time, where that is possible: as many as a cache line of a table
/// has entries.
pub(crate) const LINE: usize = 8;

/// Whether another page or run fits.
///
/// [`Full`](Self::Full) was answered to whoever queued the page that took the last room; the page
/// is queued. Linux: what __tlb_remove_page returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a full queue must be flushed before the next page"]
pub enum Room {
    /// One more fits.
    Left,
    /// No other fits before what waits is flushed for and freed.
    Full,
}

/// The unused slots at the end of a row, while [`lend_spare`] lends them to be filled.
///
/// INVARIANT: every slot that has left `free` has been written.
pub(crate) struct SpareSlots<'q> {
    free: &'q mut [MaybeUninit<BatchWord>],
}

/// Lets `store` store words at the end of `slots`, as many as fit below `limit`; returns whether
/// room is left there.
///
/// If `store` unwinds, what it stored is lost: pages leak, none is freed too early.
#[inline]
pub(crate) fn lend_spare<const N: usize, R>(
    slots: &mut ArrayVec<BatchWord, N>,
    limit: usize,
    store: impl FnOnce(&mut SpareSlots<'_>) -> R,
) -> (R, Room) {
    let limit = limit.min(N).max(slots.len());
    let room = limit - slots.len();
    let mut spare = SpareSlots { free: &mut slots.spare_capacity_mut()[..room] };
    let result = store(&mut spare);
    let left = spare.free.len();
    // SAFETY: by the invariant of `SpareSlots` all slots below `limit` but the last `left` are
    // written; `limit` is at most `N`.
    unsafe { slots.set_len(limit - left) };
    (result, if left == 0 { Room::Full } else { Room::Left })
}

/// What takes words one by one: slots of a batch, or a variable on the path of one page.
pub(crate) trait WordSink {
    fn is_full(&self) -> bool;
    /// Stores one word. It fits.
    fn push(&mut self, word: BatchWord);
}

impl WordSink for SpareSlots<'_> {
    #[inline]
    fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    #[inline]
    fn push(&mut self, word: BatchWord) {
        let (first, rest) =
            mem::take(&mut self.free).split_first_mut().expect("G5: stored where there is room");
        first.write(word);
        self.free = rest;
    }
}

impl<'q> SpareSlots<'q> {
    /// All of `slots`.
    #[inline(always)]
    pub(crate) const fn new(slots: &'q mut [MaybeUninit<BatchWord>]) -> Self {
        Self { free: slots }
    }

    /// How many slots are left: all others are written.
    #[inline(always)]
    pub(crate) const fn left(&self) -> usize {
        self.free.len()
    }

    /// Stores lines of words, until no line fits or `next` has no more; returns how many.
    #[inline(always)]
    pub(crate) fn push_lines(&mut self, mut next: impl FnMut() -> Option<[BatchWord; LINE]>) -> usize {
        let free = mem::take(&mut self.free);
        let mut stored = 0;
        for room in free.as_chunks_mut::<LINE>().0 {
            let Some(words) = next() else { break };
            *room = words.map(MaybeUninit::new);
            stored += 1;
        }
        self.free = &mut free[stored * LINE..];
        stored
    }

    /// Stores the words that are there, in order. There is room for all of them.
    #[inline(always)]
    pub(crate) fn push_each(&mut self, words: impl Iterator<Item = Option<BatchWord>>) {
        let free = mem::take(&mut self.free);
        let mut used = 0;
        for word in words {
            if let Some(word) = word
                && let Some(slot) = free.get_mut(used)
            {
                slot.write(word);
                used += 1;
            }
        }
        self.free = free.get_mut(used..).unwrap_or_default();
    }

    /// Stores the words that are there, in order. There is room for all eight.
    #[inline(always)]
    pub(crate) fn push_some(&mut self, words: [Option<BatchWord>; LINE]) {
        let free = mem::take(&mut self.free);
        let (line, _) = free.split_first_chunk_mut::<LINE>().expect("G5: stored where there is room");
        let mut used = 0;
        #[expect(clippy::manual_flatten, reason = "flatten is not unrolled: 15 instructions more a page")]
        for word in &words {
            if let Some(word) = word {
                line[used].write(*word);
                used += 1;
            }
        }
        self.free = &mut free[used..];
    }
}
