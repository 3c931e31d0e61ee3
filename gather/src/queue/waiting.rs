//! What a gather has unhooked and not freed yet: the pages and the tables.
#![expect(unsafe_code, reason = "on a receipt, tables are freed")]

use core::mem;

use static_assertions::assert_not_impl_any;

use crate::platform::GatherEvent;
use crate::queue::batch::PageQueue;
use crate::queue::release::Release;
use crate::queue::table_batch::TableQueue;

/// Proof that everything that waits has been flushed for: the receipt of that flush. It takes no
/// room.
#[derive(Debug)]
pub(crate) struct Covered(());

impl Covered {
    /// The receipt of a flush of everything that waits, which
    /// [`flush_tlb`](crate::FlushTlb::flush_tlb) has just completed.
    #[inline(always)]
    pub(crate) const fn after_flush() -> Self {
        Self(())
    }
}

/// What is being handed to the kernel.
///
/// If a call of the kernel unwinds, nobody knows how much of it was taken, so none of it may be
/// handed over again: the rest leaks.
struct HandedOver<'w>(&'w mut Waiting);

impl Drop for HandedOver<'_> {
    fn drop(&mut self) {
        let _leaked = self.0.release();
    }
}

/// The two queues. They outlive the gather: they move into the [`FlushedGather`], which frees what
/// is in them when the locks are dropped.
///
/// [`FlushedGather`]: crate::FlushedGather
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) pages: PageQueue,
    pub(crate) tables: TableQueue,
}

assert_not_impl_any!(Waiting: Send, Sync, Clone);

impl Waiting {
    #[inline]
    pub(crate) fn new() -> Self {
        Self { pages: PageQueue::new(), tables: TableQueue::new() }
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.pages.is_empty() && self.tables.is_empty()
    }

    /// Hands everything to the kernel: the one way from waiting to free.
    ///
    /// INVARIANT: G1, it takes the receipt of a flush for everything here.
    #[inline(never)]
    pub(crate) fn free_all<K: Release>(&mut self, kernel: &K, free_chunk: u16, _receipt: Covered) {
        let handed_over = HandedOver(self);
        // SAFETY: the receipt is of a flush for everything that waits here.
        let tables = unsafe { handed_over.0.tables.free_all(kernel) };
        let slots = handed_over.0.pages.free_all(kernel, free_chunk);
        mem::forget(handed_over);
        kernel.observe_gather(GatherEvent::Released { slots, tables });
    }

    /// Frees everything, for the last time, and returns the batch pages. `receipt` is that of a
    /// flush for everything here; there need not be one if nothing is.
    pub(crate) fn finish<K: Release>(&mut self, kernel: &K, free_chunk: u16, receipt: Option<Covered>) {
        debug_assert!(receipt.is_some() || self.is_empty(), "G1: freed without a flush");
        if let Some(receipt) = receipt {
            self.free_all(kernel, free_chunk, receipt);
        }
        self.pages.give_back(kernel);
        self.tables.give_back(kernel);
    }
}
