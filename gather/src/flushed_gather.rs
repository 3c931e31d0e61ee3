//! What is left of a gather that has flushed, to be freed when the locks are dropped.

use core::{fmt, mem};

use crate::limits::Limits;
use crate::queue::batch::PageQueue;
use crate::queue::release::Release;
use crate::queue::table_batch::TableQueue;
use crate::queue::waiting::{Covered, Waiting};
use crate::queue::word::BatchWord;

/// The pages and tables of a gather whose flush has completed. Holding one proves that no CPU
/// holds a translation through them: they may be freed at any time.
///
/// It is made to be freed after the locks are dropped. Dropping it frees, too.
#[must_use = "drop the locks, then free"]
pub struct FlushedGather<'a, K: Release> {
    pub(crate) kernel: &'a K,
    pub(crate) waiting: Waiting,
    /// As [`Limits::free_chunk`].
    pub(crate) free_chunk: u16,
    /// INVARIANT: there is a receipt unless nothing waits.
    pub(crate) receipt: Option<Covered>,
}

impl<'a, K: Release> FlushedGather<'a, K> {
    /// What is left of unmapping one page; `receipt` is that of the flush, if there was one.
    #[inline(always)]
    pub(crate) fn of_page(kernel: &'a K, word: Option<BatchWord>, receipt: Option<Covered>) -> Self {
        let waiting = Waiting { pages: PageQueue::of_page(word), tables: TableQueue::new() };
        let receipt = if word.is_some() { receipt } else { None };
        Self { kernel, waiting, free_chunk: Limits::DEFAULT.free_chunk, receipt }
    }

    /// Hands the pages and tables to the kernel, a slice at a time.
    ///
    /// # Context
    /// No lock is held; preemption points inside.
    ///
    /// # Source
    /// Linux: the second half of tlb_finish_mmu, mm/mmu_gather.c.
    #[inline(always)]
    pub fn free(mut self) {
        self.finish();
        // `forget`: drop glue would become an out-of-line call.
        mem::forget(self);
    }

    #[inline(always)]
    fn finish(&mut self) {
        let receipt = self.receipt.take();
        self.waiting.finish(self.kernel, self.free_chunk, receipt);
    }
}

impl<K: Release> Drop for FlushedGather<'_, K> {
    fn drop(&mut self) {
        // The receipt is gone if the kernel's own code unwound while it was handed what waits. The
        // rest of that leaks.
        if self.receipt.is_some() || self.waiting.is_empty() {
            self.finish();
        }
    }
}

impl<K: Release> fmt::Debug for FlushedGather<'_, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlushedGather").field("waiting", &self.waiting).finish_non_exhaustive()
    }
}
