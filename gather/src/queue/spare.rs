//! Filling a row of slots from the front without looking at its length each time.
#![expect(unsafe_code, reason = "slots are written first, and counted once afterwards")]

use core::mem::{self, MaybeUninit};

use arrayvec::ArrayVec;

use crate::queue::word::BatchWord;

/// How many slots are stored at a time where that can be: as many as entries share a cache line.
pub(crate) const LINE: usize = 8;

/// Whether another record fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a full queue must be flushed before the next record"]
pub(crate) enum Room {
    Left,
    Full,
}

/// Room at the end of a row of slots, while [`lend_spare`] lets somebody fill it.
///
/// INVARIANT: every slot that has left `free` has been written.
pub(crate) struct SpareSlots<'q> {
    free: &'q mut [MaybeUninit<BatchWord>],
}

/// Lets `store` store slots at the end of `slots`, as many as fit below `limit`; says whether room is left there.
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
    // SAFETY: by the invariant of `SpareSlots` all slots below `limit` but the last `left` are written; `limit` is at most `N`.
    unsafe { slots.set_len(limit - left) };
    (result, if left == 0 { Room::Full } else { Room::Left })
}

/// What takes slots one by one.
pub(crate) trait WordSink {
    fn is_full(&self) -> bool;
    /// Stores one slot. It fits.
    fn push(&mut self, slot: BatchWord);
}

impl WordSink for SpareSlots<'_> {
    #[inline]
    fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    #[inline]
    fn push(&mut self, slot: BatchWord) {
        let (first, rest) =
            mem::take(&mut self.free).split_first_mut().expect("G5: stored where there is room");
        first.write(slot);
        self.free = rest;
    }
}

impl WordSink for Option<BatchWord> {
    #[inline]
    fn is_full(&self) -> bool {
        self.is_some()
    }

    #[inline]
    fn push(&mut self, slot: BatchWord) {
        *self = Some(slot);
    }
}

impl SpareSlots<'_> {
    /// Stores lines of slots, as many as fit and `next` has; returns how many.
    #[inline(always)]
    pub(crate) fn push_lines(&mut self, mut next: impl FnMut() -> Option<[BatchWord; LINE]>) -> usize {
        let free = mem::take(&mut self.free);
        let mut stored = 0;
        for room in free.as_chunks_mut::<LINE>().0 {
            let Some(slots) = next() else { break };
            *room = slots.map(MaybeUninit::new);
            stored += 1;
        }
        self.free = &mut free[stored * LINE..];
        stored
    }

    /// Stores those of `slots` that are some, in order. All of them fit.
    #[inline(always)]
    pub(crate) fn push_some(&mut self, slots: [Option<BatchWord>; LINE]) {
        let free = mem::take(&mut self.free);
        let (line, _) = free.split_first_chunk_mut::<LINE>().expect("G5: stored where there is room");
        let mut used = 0;
        #[expect(clippy::manual_flatten, reason = "flatten is not unrolled: 15 instructions more a page")]
        for slot in &slots {
            if let Some(slot) = slot {
                line[used].write(*slot);
                used += 1;
            }
        }
        self.free = &mut free[used..];
    }
}
