//! What is left of a gather that has flushed, to be freed when the locks are dropped.
#![expect(unsafe_code, reason = "what is freed is moved out of a type with a destructor")]

use core::fmt;
use core::mem::ManuallyDrop;
use core::ptr;

use crate::queue::held::Held;
use crate::queue::release::Release;
use crate::queue::waiting::Covered;

/// The pages and tables of a gather whose flush has completed. Holding one proves that no CPU
/// holds a translation through them: they may be freed at any time.
///
/// It is made to be freed after the locks are dropped. Dropping it frees, too.
#[must_use = "drop the locks, then free"]
pub struct FlushedGather<'a, K: Release> {
    pub(crate) kernel: &'a K,
    pub(crate) held: Held,
    /// As [`Limits::free_chunk`].
    pub(crate) free_chunk: u16,
    /// INVARIANT: there is a receipt unless nothing waits.
    pub(crate) receipt: Option<Covered>,
}

impl<K: Release> FlushedGather<'_, K> {
    /// Hands the pages and tables to the kernel, a slice at a time.
    ///
    /// # Context
    /// No lock is held; preemption points inside.
    ///
    /// # Source
    /// Linux: the second half of tlb_finish_mmu, mm/mmu_gather.c.
    #[inline(always)]
    pub fn free(self) {
        // If a call of the kernel unwinds, the rest leaks: nobody knows how much of it was taken.
        // So nothing is left to be dropped, and the compiler need not keep this in memory.
        let mut this = ManuallyDrop::new(self);
        // SAFETY: read once: `this` is not used again but for its other fields, and not dropped.
        let held = unsafe { ptr::read(&raw const this.held) };
        held.free(this.kernel, this.free_chunk, this.receipt.take());
    }
}

impl<K: Release> Drop for FlushedGather<'_, K> {
    fn drop(&mut self) {
        self.held.take().free(self.kernel, self.free_chunk, self.receipt.take());
    }
}

impl<K: Release> fmt::Debug for FlushedGather<'_, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlushedGather").field("held", &self.held).finish_non_exhaustive()
    }
}
