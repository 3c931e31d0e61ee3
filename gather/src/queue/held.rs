//! What waits after the last flush, to be freed when the locks are dropped: what was queued, in as
//! few words as possible, for it is moved from hand to hand.
#![expect(unsafe_code, reason = "slots on the stack are read as far as they were written")]

use core::fmt;
use core::ptr::NonNull;
use core::slice;

use static_assertions::{assert_not_impl_any, const_assert};

use crate::platform::GatherEvent;
use crate::queue::batch::{Batch, Slots, free_chain, free_slots, give_back_chain};
use crate::queue::release::Release;
use crate::queue::table_batch::{TableBatch, TableQueue, release_tables};
use crate::queue::waiting::{Covered, Waiting};
use crate::queue::word::{BatchWord, Runs};

/// Pages and tables that have been flushed for, or nothing.
///
/// INVARIANT: the first `nr_few` of `few` are written; `first` starts a list of batch pages that
/// only this knows, of which those after the first empty one are empty; only this knows
/// `table_batch`.
pub(crate) struct Held {
    pub(crate) few: Slots,
    pub(crate) nr_few: u32,
    pub(crate) runs: Runs,
    pub(crate) first: Option<NonNull<Batch>>,
    /// One table, if there is no batch of them. (As a word it stays in a register; a `PhysFrame` is
    /// `repr(C)`.)
    pub(crate) table: Option<BatchWord>,
    pub(crate) table_batch: Option<NonNull<TableBatch>>,
}

assert_not_impl_any!(Held: Send, Sync, Clone);
// Copied with the widest moves that every x86_64 has; more would be a call of `memcpy`.
const_assert!(size_of::<Held>() + 2 * size_of::<usize>() <= 128);

impl Held {
    /// Frees everything, and returns the batch pages. `receipt` is that of a flush for everything
    /// here; there need not be one if nothing is.
    ///
    /// It takes all of it by value, and in pieces, of which only the slots are looked at by
    /// pointer: so the compiler can keep the rest in registers.
    #[inline(always)]
    pub(crate) fn free<K: Release>(self, kernel: &K, free_chunk: u16, receipt: Option<Covered>) {
        let Self { few, nr_few, runs, first, table, table_batch } = self;
        if let (1, None, None, [word, ..]) = (nr_few, first, table_batch, few) {
            if receipt.is_some() {
                // SAFETY: by the invariant it is written.
                let word = unsafe { word.assume_init() };
                // SAFETY: the receipt is of a flush for everything here.
                let tables = unsafe { release_tables(kernel, table.map(BatchWord::frame).as_slice()) };
                let slots = free_slots(kernel, free_chunk, &[word], runs);
                kernel.observe_gather(GatherEvent::Released { slots, tables });
            }
            return;
        }
        let few = written(&few, nr_few);
        if first.is_some() || table_batch.is_some() {
            let tables = TableQueue::of_flushed(table.map(BatchWord::frame), table_batch);
            free_batches(kernel, free_chunk, receipt, few, runs, first, tables);
        } else if receipt.is_some() {
            // SAFETY: the receipt is of a flush for everything here.
            let tables = unsafe { release_tables(kernel, table.map(BatchWord::frame).as_slice()) };
            let slots = free_slots(kernel, free_chunk, few, runs);
            kernel.observe_gather(GatherEvent::Released { slots, tables });
        }
    }

    /// Moves everything out of here; what stays behind is empty.
    pub(crate) fn take(&mut self) -> Self {
        let (nr_few, first) = (self.nr_few, self.first.take());
        let (table, table_batch) = (self.table.take(), self.table_batch.take());
        self.nr_few = 0;
        Self { few: self.few, nr_few, runs: self.runs, first, table, table_batch }
    }
}

#[inline(never)]
fn free_batches<K: Release>(
    kernel: &K,
    free_chunk: u16,
    receipt: Option<Covered>,
    few: &[BatchWord],
    runs: Runs,
    first: Option<NonNull<Batch>>,
    mut tables: TableQueue,
) {
    if receipt.is_some() {
        // SAFETY: the receipt is of a flush for everything here.
        let nr_tables = unsafe { tables.free_all(kernel) };
        let slots = free_slots(kernel, free_chunk, few, runs) + free_chain(kernel, free_chunk, first, runs);
        kernel.observe_gather(GatherEvent::Released { slots, tables: nr_tables });
    }
    give_back_chain(kernel, first);
    tables.give_back(kernel);
}

/// The slots that are written.
///
/// INVARIANT: `nr` of them are: by the invariant of [`Held`].
#[inline(always)]
pub(crate) fn written(slots: &Slots, nr: u32) -> &[BatchWord] {
    let nr = (nr as usize).min(slots.len());
    // SAFETY: written by the invariant, and inside the array.
    unsafe { slice::from_raw_parts(slots.as_ptr().cast(), nr) }
}

impl Waiting {
    /// Moves everything that waits out of here, to be freed later; what stays behind is empty.
    /// Everything has been flushed for.
    #[inline]
    pub(crate) fn release(&mut self) -> Held {
        let (few, nr_few, runs, first) = self.pages.release();
        let (table, table_batch) = self.tables.release();
        Held { few, nr_few, runs, first, table: table.map(BatchWord::page), table_batch }
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held")
            .field("pages", &self.nr_few)
            .field("batches", &self.first)
            .field("table", &self.table.map(BatchWord::frame))
            .field("tables", &self.table_batch)
            .finish()
    }
}
