//! One address space, as the engine sees it.
#![expect(unsafe_code, reason = "takes a root table on trust")]

#[cfg(not(mmu_loom))]
use core::sync::atomic::{AtomicU32, Ordering};
#[cfg(mmu_loom)]
use loom::sync::atomic::{AtomicU32, Ordering};

use mmu_pagetable::{AddressSpace, PagingMode};
use mmu_tlb::{CpuBits, CtxIds, MmContext};
use x86_64::structures::paging::PhysFrame;

/// What an embedder puts in its mm structure: the paging structures, the TLB context, and the gathers that are open.
///
/// It must not move while a CPU has it loaded. Linux: the parts of mm_struct that mm/mmu_gather.c and arch/x86/mm/tlb.c
/// use.
#[derive(Debug)]
pub struct Mm<B: CpuBits> {
    space: AddressSpace,
    context: MmContext<B>,
    /// Gathers begun and not yet flushed. Linux: tlb_flush_pending.
    open_gathers: AtomicU32,
}

impl<B: CpuBits> Mm<B> {
    /// A new address space whose top table is `root`.
    ///
    /// # Safety
    /// As for [`AddressSpace::new`].
    #[must_use]
    pub unsafe fn new(ids: &CtxIds, root: PhysFrame, mode: PagingMode) -> Self {
        Self {
            // SAFETY: passed on to our caller.
            space: unsafe { AddressSpace::new(root, mode) },
            context: MmContext::new(ids, root),
            open_gathers: AtomicU32::new(0),
        }
    }

    /// The paging structures.
    #[must_use]
    #[inline]
    pub const fn space(&self) -> &AddressSpace {
        &self.space
    }

    /// The TLB context.
    #[must_use]
    #[inline]
    pub const fn context(&self) -> &MmContext<B> {
        &self.context
    }

    /// Gathers begun on this address space and not yet flushed.
    ///
    /// Whoever finds an entry none or write-protected under its table lock while this is not zero cannot conclude that
    /// no CPU uses the old translation. Linux: mm_tlb_flush_pending.
    #[doc(alias = "mm_tlb_flush_pending")]
    #[must_use]
    #[inline]
    pub fn open_gathers(&self) -> u32 {
        self.open_gathers.load(Ordering::Acquire)
    }

    #[inline]
    pub(crate) fn open_gather(&self) {
        // ORDERING: made visible by the unlock of the first table lock the gather takes, to whoever locks it next: a
        // gather that skips an entry this one cleared also sees the count (rule G6).
        self.open_gathers.fetch_add(1, Ordering::AcqRel);
    }

    #[inline]
    pub(crate) fn close_gather(&self) {
        // ORDERING: release: comes after the flush.
        self.open_gathers.fetch_sub(1, Ordering::AcqRel);
    }
}
