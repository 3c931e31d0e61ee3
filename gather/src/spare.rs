//! Slots in a row, filled from the front without looking at a length each time.
#![expect(unsafe_code, reason = "slots are memory that is not written before it is used")]

use core::mem::{self, MaybeUninit};
use core::slice;

use crate::slot::Slot;

/// How many slots are stored at a time where that can be: as many as entries share a cache line.
pub(crate) const LINE: usize = 8;

/// Room for `N` slots. INVARIANT: the first `len` of them are written, and `len` is at most `N`.
pub(crate) struct Slots<const N: usize> {
    len: usize,
    slots: [MaybeUninit<Slot>; N],
}

impl<const N: usize> Slots<N> {
    #[inline]
    pub(crate) const fn new() -> Self {
        Self { len: 0, slots: [const { MaybeUninit::uninit() }; N] }
    }

    #[inline]
    pub(crate) fn as_slice(&self) -> &[Slot] {
        let written = self.slots[..self.len].as_ptr().cast::<Slot>();
        // SAFETY: by the invariant the first `len` are written; a `MaybeUninit<Slot>` is laid out as a `Slot`.
        unsafe { slice::from_raw_parts(written, self.len) }
    }

    #[inline]
    pub(crate) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[inline]
    pub(crate) const fn clear(&mut self) {
        self.len = 0;
    }

    /// The room up to slot `limit`.
    #[inline]
    pub(crate) fn spare(&mut self, limit: usize) -> Spare<'_> {
        let limit = limit.min(N).max(self.len);
        Spare { free: &mut self.slots[self.len..limit], len: &mut self.len, limit }
    }

    /// Stores a record, for which there is room; returns how many slots are left below `limit`.
    #[inline]
    pub(crate) fn append(&mut self, record: &[Slot], limit: usize) -> usize {
        let mut spare = self.spare(limit);
        for slot in record {
            spare.push(*slot);
        }
        spare.free.len()
    }
}

/// Room that is being filled. The owner learns how much of it was used when it is dropped.
///
/// INVARIANT: every slot that has left `free` has been written.
pub(crate) struct Spare<'q> {
    free: &'q mut [MaybeUninit<Slot>],
    len: &'q mut usize,
    limit: usize,
}

impl Spare<'_> {
    #[inline]
    pub(crate) const fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Whether [`LINE`] slots fit.
    #[inline]
    pub(crate) const fn fits_line(&self) -> bool {
        self.free.len() >= LINE
    }

    /// Stores one slot. It fits.
    #[inline]
    pub(crate) fn push(&mut self, slot: Slot) {
        let (first, rest) =
            mem::take(&mut self.free).split_first_mut().expect("G5: stored where there is room");
        first.write(slot);
        self.free = rest;
    }

    /// Stores those of `slots` that are some, in order. All of them fit.
    #[inline(always)]
    pub(crate) fn push_some(&mut self, slots: [Option<Slot>; LINE]) {
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

impl Drop for Spare<'_> {
    #[inline]
    fn drop(&mut self) {
        // INVARIANT: what has left `free` was written, so the first `limit - free.len()` slots are.
        *self.len = self.limit - self.free.len();
    }
}
