//! One flush for pages unmapped from many address spaces: what reclaim needs.

use core::fmt;

use crate::cpuset::CpuSet;
use crate::generation::MmContext;
use crate::mmu::{Cpus, Flushed};
use crate::shootdown::flush_all_updated;

/// The CPUs that hold translations of pages unmapped since the last flush, over any number of address spaces.
///
/// Reclaim clears an entry, calls [`add_mm`](Self::add_mm) while it still holds the table lock, goes on to the next
/// page, and frees none of them before [`flush`](Self::flush) has returned. The generation of each address space is raised
/// when its entry is cleared, not when the flush is sent: a CPU that switches in between finds it.
///
/// Linux: struct arch_tlbflush_unmap_batch.
#[doc(alias = "arch_tlbflush_unmap_batch")]
pub struct UnmapBatch<C: Cpus> {
    cpumask: CpuSet<C::Bits>,
    pending: Pending,
}

#[derive(Debug, PartialEq, Eq)]
enum Pending {
    Nothing,
    Something,
}

impl<C: Cpus> UnmapBatch<C> {
    /// A batch in which nothing is pending.
    #[must_use]
    pub fn new() -> Self {
        Self { cpumask: CpuSet::empty(), pending: Pending::Nothing }
    }

    /// Notes that an entry of `mm` was cleared and will be flushed with the batch.
    ///
    /// # Context
    /// The lock of the table that held the entry is still held.
    ///
    /// # Source
    /// Linux: arch_tlbbatch_add_pending, set_tlb_ubc_flush_pending.
    #[doc(alias = "arch_tlbbatch_add_pending")]
    pub fn add_mm(&mut self, mm: &MmContext<C::Bits>) {
        mm.raise_tlb_gen();
        self.cpumask.insert_all(mm.cpumask());
        mm.note_batched();
        self.pending = Pending::Something;
    }

    /// Flushes every CPU that may hold a translation of a page in the batch; `None` if nothing was pending.
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
        self.cpumask.clear_all();
        self.pending = Pending::Nothing;
        Some(flushed)
    }
}

impl<C: Cpus> fmt::Debug for UnmapBatch<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnmapBatch").field("cpumask", &self.cpumask).field("pending", &self.pending).finish()
    }
}

impl<C: Cpus> Default for UnmapBatch<C> {
    fn default() -> Self {
        Self::new()
    }
}
