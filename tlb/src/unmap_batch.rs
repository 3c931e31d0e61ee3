//! One flush for pages unmapped from many address spaces: what reclaim needs.

use core::fmt;

use arrayvec::ArrayVec;

use crate::cpuset::CpuSet;
use crate::generation::{CtxId, MmContext};
use crate::mmu::Cpus;
use crate::shootdown::{Flushed, flush_all_updated};

/// The CPUs that hold translations of pages unmapped since the last flush, over any number of
/// address spaces.
///
/// Reclaim clears an entry, calls [`add_mm`](Self::add_mm) while it still holds the table lock,
/// goes on to the next page, and frees no page before [`flush`](Self::flush) has returned. The
/// generation of each address space is raised when its entry is cleared, not when the flush is
/// sent, so a CPU that switches in between sees it.
///
/// Secondary TLBs are told of each context once a flush, and before the receipt is made, because an
/// IOMMU uses pages, too.
///
/// Linux: struct arch_tlbflush_unmap_batch.
#[doc(alias = "arch_tlbflush_unmap_batch")]
pub struct UnmapBatch<C: Cpus> {
    cpumask: CpuSet<C::Bits>,
    /// Contexts that secondary TLBs were not told of yet.
    contexts: ArrayVec<CtxId, CONTEXTS>,
    pending: Pending,
}

/// How many contexts wait for the flush; when one more comes, secondary TLBs are told of the oldest
/// at once.
///
/// Reclaim goes through the address spaces of one page, mostly a single one; a cache line holds
/// eight.
const CONTEXTS: usize = 8;

#[derive(Debug, PartialEq, Eq)]
enum Pending {
    Nothing,
    Something,
}

impl<C: Cpus> UnmapBatch<C> {
    /// A batch in which nothing is pending.
    #[must_use]
    pub fn new() -> Self {
        Self { cpumask: CpuSet::empty(), contexts: ArrayVec::new_const(), pending: Pending::Nothing }
    }

    /// Notes that an entry of `mm` was cleared and will be flushed with the batch.
    ///
    /// # Context
    /// The lock of the table that held the entry is still held. If the batch already has as many
    /// contexts as it can keep, [`invalidate_secondary`](Cpus::invalidate_secondary) is called.
    ///
    /// # Source
    /// Linux: arch_tlbbatch_add_pending, set_tlb_ubc_flush_pending.
    #[doc(alias = "arch_tlbbatch_add_pending")]
    pub fn add_mm(&mut self, cpus: &C, mm: &MmContext<C::Bits>) {
        mm.raise_tlb_gen();
        cpus.between_flush_steps();
        self.cpumask.insert_all(mm.cpumask());
        cpus.between_flush_steps();
        mm.note_deferred_flush();
        self.pending = Pending::Something;
        // Last, because it may call the kernel.
        self.note_context(cpus, mm.ctx_id());
    }

    /// Notes that secondary TLBs must forget what they have of this context, before the batch is
    /// flushed.
    fn note_context(&mut self, cpus: &C, ctx_id: CtxId) {
        // The newest first: pages of one address space follow one another.
        if self.contexts.iter().rev().any(|noted| *noted == ctx_id) {
            return;
        }
        // The entries of the oldest context were cleared before they were added. If more of it are
        // cleared later, the context is noted again.
        let oldest = if self.contexts.is_full() { self.contexts.pop_at(0) } else { None };
        self.contexts.push(ctx_id);
        if let Some(oldest) = oldest {
            cpus.invalidate_secondary(oldest, None);
        }
    }

    /// Flushes every CPU that may hold a translation of a page in the batch; `None` if nothing was
    /// pending.
    ///
    /// # Context
    /// As for [`flush_tlb_mm_range`](crate::flush_tlb_mm_range).
    ///
    /// # Source
    /// Linux: arch_tlbbatch_flush, arch/x86/mm/tlb.c.
    #[doc(alias = "arch_tlbbatch_flush")]
    pub fn flush(&mut self, cpus: &C) -> Option<Flushed> {
        if self.pending == Pending::Nothing {
            return None;
        }
        let flushed = flush_all_updated(cpus, &self.cpumask);
        cpus.between_flush_steps();
        // The entries were cleared long ago, so nothing is cached again, and either order of CPUs
        // and secondary TLBs would do. This order is that of `flush_tlb_mm_range`. The receipt is
        // handed out after both.
        while let Some(ctx_id) = self.contexts.last().copied() {
            cpus.invalidate_secondary(ctx_id, None);
            // After the call: if the kernel's call unwinds, the context is still to be told.
            self.contexts.pop();
        }
        self.cpumask.clear_all();
        self.pending = Pending::Nothing;
        Some(flushed)
    }
}

impl<C: Cpus> fmt::Debug for UnmapBatch<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnmapBatch")
            .field("cpumask", &self.cpumask)
            .field("contexts", &self.contexts)
            .field("pending", &self.pending)
            .finish()
    }
}

impl<C: Cpus> Default for UnmapBatch<C> {
    fn default() -> Self {
        Self::new()
    }
}
