//! What a gather has unhooked and not freed yet: the pages and the tables.
#![expect(unsafe_code, reason = "on a receipt, tables are freed")]

use core::mem;

use mmu_tlb::{CpuBits, Flushed, MmContext};
use static_assertions::assert_not_impl_any;

use crate::platform::{GatherEvent, Platform};
use crate::queue::batch::PageQueue;
use crate::queue::table_batch::TableQueue;

/// What is left of the receipt of a flush, once it is known to be one of everything that waits: the proof, which takes no room.
#[derive(Debug)]
pub(crate) struct Covered(());

impl Covered {
    #[inline]
    pub(crate) fn from_receipt<B: CpuBits>(mm: &MmContext<B>, receipt: Flushed) -> Self {
        debug_assert!(receipt.is_of(mm), "G1: {receipt:?} is of another address space");
        Self(())
    }
}

/// What is being handed to the kernel. If a call of the kernel's unwinds, nobody knows how much of it was taken: none of it may be
/// handed over again, and the rest leaks.
struct HandedOver<'w>(&'w mut Waiting);

impl Drop for HandedOver<'_> {
    fn drop(&mut self) {
        let _leaked = self.0.take();
    }
}

/// The two queues. They outlive the flush: whoever flushed moves them on, and frees them when the locks are dropped.
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

    /// Everything that waits, moved out of here; what stays behind is empty.
    #[inline]
    pub(crate) fn take(&mut self) -> Self {
        Self { pages: self.pages.take(), tables: self.tables.take() }
    }

    /// The one way from pending to free. INVARIANT: G1, it takes the receipt of a flush of everything here.
    #[inline(never)]
    pub(crate) fn free_all<K: Platform>(&mut self, kernel: &K, free_chunk: u16, _receipt: Covered) {
        let handed_over = HandedOver(self);
        // SAFETY: the receipt is of a flush of everything that waits here.
        let tables = unsafe { handed_over.0.tables.free_all(kernel) };
        let slots = handed_over.0.pages.free_all(kernel, free_chunk);
        mem::forget(handed_over);
        kernel.observe_gather(GatherEvent::Released { slots, tables });
    }

    /// Frees everything, for the last time, and returns the batch pages. `receipt` is that of a flush of everything here; none if
    /// nothing is.
    #[inline(always)]
    pub(crate) fn finish<K: Platform>(&mut self, kernel: &K, free_chunk: u16, receipt: Option<Covered>) {
        debug_assert!(receipt.is_some() || self.is_empty(), "G1: freed without a flush");
        if self.pages.has_batches() || self.tables.has_batch() {
            self.finish_batches(kernel, free_chunk, receipt);
        } else if receipt.is_some() {
            let slots = self.pages.free_bundle(kernel, free_chunk);
            kernel.observe_gather(GatherEvent::Released { slots, tables: 0 });
        }
    }

    #[inline(never)]
    fn finish_batches<K: Platform>(&mut self, kernel: &K, free_chunk: u16, receipt: Option<Covered>) {
        if let Some(receipt) = receipt {
            self.free_all(kernel, free_chunk, receipt);
        }
        self.pages.give_back(kernel);
        self.tables.give_back(kernel);
    }
}
