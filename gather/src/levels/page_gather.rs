//! The gather alone: for a kernel that walks and clears its page tables itself.
#![expect(unsafe_code, reason = "what is queued was cleared by the caller")]

use core::{fmt, mem};

use mmu_pagetable::{Level, VirtRange};
use x86_64::structures::paging::PhysFrame;

use crate::flush_policy::flush_context;
use crate::flushed_gather::FlushedGather;
use crate::levels::context::TlbContext as _;
use crate::levels::flush_tlb::FlushTlb;
use crate::limits::Limits;
use crate::platform::GatherEvent;
use crate::queue::release::Release;
use crate::queue::spare::Room;
use crate::queue::table_batch::TableQueued;
use crate::queue::waiting::{Covered, Waiting};
use crate::queue::word::BatchWord;
use crate::range::FlushRange;
use crate::state::Phase;

/// Collects pages and tables that a kernel's own code has unmapped, and frees them after a flush.
///
/// The kernel walks its tables and clears entries as it always did, under its own lock. It puts the
/// page of each into the gather instead of freeing it, and where it flushed and freed, it calls
/// [`flush`](Self::flush) and [`free`](FlushedGather::free).
///
/// ```text
/// new ─► lock, clear, queue_page .. ─► (lock dropped) ─► flush ─► FlushedGather::free
///           └── Room::Full: drop the lock, flush_mmu, take the lock, go on
/// ```
///
/// At most 256 bytes, on the stack. Dropped unfinished, it flushes and frees.
///
/// Each gather flushes for what it queued, whatever others do, so nothing is freed early (rule G1).
/// That the addresses are unusable when `flush` returns holds for entries that this gather cleared:
/// where another thread has cleared some and not flushed yet, this one finds them empty. A kernel
/// that holds its map lock exclusively until `flush` has returned has no such threads. Nor does an
/// [`MmuGather`](crate::MmuGather) of the same address space count this one as open (rule G6): two
/// of them, one of each kind, are not open at once.
///
/// Linux: struct mmu_gather, used without mm/memory.c.
///
/// # Example
/// `gather/examples/level_a.rs`.
#[doc(alias = "mmu_gather")]
pub struct PageGather<'k, 'c, K: Release + FlushTlb> {
    kernel: &'k K,
    context: &'c K::Context,
    range: FlushRange,
    limits: Limits,
    phase: Phase,
    /// The receipt of the last flush. INVARIANT: while `range` is empty it covers everything that
    /// waits.
    receipt: Option<Covered>,
    waiting: Waiting,
}

impl<'k, 'c, K: Release + FlushTlb> PageGather<'k, 'c, K> {
    /// Begins to unmap part of the address space that `context` stands for.
    #[must_use]
    pub fn new(kernel: &'k K, context: &'c K::Context) -> Self {
        const { assert!(size_of::<Self>() <= 256, "a gather lives on a kernel stack") };
        Self {
            kernel,
            context,
            range: FlushRange::empty(),
            limits: Limits::DEFAULT,
            phase: Phase::Open,
            receipt: None,
            waiting: Waiting::new(),
        }
    }

    /// The same gather, holding no more than `limits` allow. To be called before anything is
    /// queued.
    #[must_use]
    pub fn with_limits(mut self, limits: &Limits) -> Self {
        self.limits = limits.clamped();
        self
    }

    /// Queues the page at `frame`, whose `level` entry for `address` the caller has just cleared.
    /// Neither flushes nor frees.
    ///
    /// After [`Room::Full`] the caller drops its lock and calls [`flush_mmu`](Self::flush_mmu)
    /// before it queues more.
    ///
    /// # Context
    /// The caller's table lock may be held. Asks for a batch page, when it needs one.
    ///
    /// # Panics
    /// In a debug build, if the gather was full: a release build flushes and frees at once, under
    /// whatever lock is held. In a debug build, if `address` lies in the kernel's half.
    ///
    /// # Safety
    /// - The entry of a `level` table that mapped `frame` at `address`, in the address space of the
    ///   gather's context, is empty: the caller has cleared it. (In one step, an exchange, if
    ///   programs may run and the kernel looks at dirty bits: one that is set between a load and a
    ///   store is lost.)
    /// - nobody else queues or frees what the entry held: one reference on the page, which now
    ///   belongs to the gather.
    ///
    /// # Source
    /// Linux: __tlb_remove_page, mm/mmu_gather.c.
    #[doc(alias = "__tlb_remove_page")]
    pub unsafe fn queue_page(&mut self, frame: PhysFrame, address: u64, level: Level) -> Room {
        self.make_room();
        // Noted first: if the kernel's call unwinds, what is queued is flushed for.
        self.range.cleared(VirtRange::of_entry(level, address), level);
        self.waiting.pages.push(self.kernel, &self.limits, BatchWord::page(frame))
    }

    /// Queues `nr_pages` references on the frames from `frame` on, as one run, which takes two
    /// slots; otherwise as [`queue_page`](Self::queue_page).
    ///
    /// # Safety
    /// As for [`queue_page`](Self::queue_page), for each of the frames and the last-level entries
    /// of `cleared`.
    pub unsafe fn queue_pages(&mut self, frame: PhysFrame, nr_pages: u32, cleared: VirtRange) -> Room {
        self.make_room();
        self.range.cleared(cleared, Level::Pte);
        self.waiting.pages.push_run(self.kernel, &self.limits, BatchWord::run(frame, nr_pages))
    }

    /// Notes that entries of `level` tables covering `range` changed and no page goes with them:
    /// device frames were unmapped, or rights were taken away.
    ///
    /// # Context
    /// The caller's table lock is still held.
    pub fn changed(&mut self, range: VirtRange, level: Level) {
        self.range.cleared(range, level);
    }

    /// Queues a table of `level` that the caller has unhooked; `address` is one that was translated
    /// through it. If no batch page can be had, flushes and frees the table at once.
    ///
    /// # Context
    /// No table lock is held.
    ///
    /// # Safety
    /// - The caller has cleared the one entry that linked the table, in the address space of the
    ///   gather's context, and nobody walks to it any more, or puts an entry into it;
    /// - the table is empty, or what it maps goes with it, by other means;
    /// - nobody else queues or frees it.
    ///
    /// # Source
    /// Linux: tlb_remove_table, mm/mmu_gather.c.
    #[doc(alias = "tlb_remove_table")]
    pub unsafe fn queue_table(&mut self, table: PhysFrame, address: u64, level: Level) {
        self.kernel.observe_gather(GatherEvent::TableUnhooked(level));
        self.range.unhooked(level, address & !(Level::Pte.entry_span() - 1));
        match self.waiting.tables.push(self.kernel, &self.limits, table) {
            TableQueued::RoomLeft => {}
            TableQueued::Full => self.flush_mmu(),
            TableQueued::NoBatch(alone) => {
                self.kernel.observe_gather(GatherEvent::TableFallback);
                self.flush_tlb_only();
                // SAFETY: unhooked (our caller's promise), noted in `range` above, and flushed for
                // just now.
                unsafe { self.kernel.release_tables(&[alone]) };
                self.flush_mmu();
            }
        }
    }

    /// Makes every CPU forget what was cleared so far. Frees nothing.
    ///
    /// # Source
    /// Linux: tlb_flush_mmu_tlbonly, include/asm-generic/tlb.h.
    #[doc(alias = "tlb_flush_mmu_tlbonly")]
    pub fn flush_tlb_only(&mut self) {
        if let Some(span) = self.range.span() {
            self.phase = Phase::InKernel;
            let receipt = flush_context(self.kernel, self.context, Some(span), self.range.tables());
            self.phase = Phase::Open;
            // INVARIANT: G2, the range is emptied together with the flush, nowhere else.
            self.range.reset();
            self.receipt = Some(receipt);
        }
    }

    /// Flushes, then frees everything queued so far; the gather can be filled again.
    ///
    /// # Context
    /// No table lock is held; preemption points inside.
    ///
    /// # Source
    /// Linux: tlb_flush_mmu, mm/mmu_gather.c.
    #[doc(alias = "tlb_flush_mmu")]
    pub fn flush_mmu(&mut self) {
        self.flush_tlb_only();
        if let Some(receipt) = self.receipt.take()
            && !self.waiting.is_empty()
        {
            self.phase = Phase::InKernel;
            self.waiting.free_all(self.kernel, self.limits.free_chunk, receipt);
            self.phase = Phase::Open;
        }
    }

    /// Completes the unmapping: no CPU can use what was cleared when this returns. Frees nothing
    /// yet.
    ///
    /// # Context
    /// The map lock is still held; it may be dropped as soon as this returns.
    ///
    /// # Source
    /// Linux: the first half of tlb_finish_mmu, mm/mmu_gather.c.
    #[doc(alias = "tlb_finish_mmu")]
    #[must_use = "drop the locks, then free"]
    pub fn flush(mut self) -> FlushedGather<'k, K> {
        self.flush_tlb_only();
        let receipt = if self.waiting.is_empty() { None } else { self.receipt.take() };
        let held = self.waiting.release();
        let (kernel, free_chunk) = (self.kernel, self.limits.free_chunk);
        // Nothing waits in it any more: `drop` would have nothing left to do.
        mem::forget(self);
        FlushedGather { kernel, held, free_chunk, receipt }
    }

    /// Makes room for a page or run, if the caller went on though the gather was full.
    fn make_room(&mut self) {
        if self.waiting.pages.is_full(&self.limits)
            && self.waiting.pages.next_batch(self.kernel, &self.limits) == Room::Full
        {
            debug_assert!(
                false,
                "G3: the gather is full: drop the lock and call flush_mmu before the next page"
            );
            self.flush_mmu();
        }
    }
}

impl<K: Release + FlushTlb> Drop for PageGather<'_, '_, K> {
    fn drop(&mut self) {
        if self.phase == Phase::InKernel {
            // The kernel's own code has unwound: what waits leaks, as in a `MmuGather`, and the
            // flush is left to the next of those that looks.
            self.context.owe_flush();
            return;
        }
        self.flush_tlb_only();
        let receipt = if self.waiting.is_empty() { None } else { self.receipt.take() };
        self.waiting.finish(self.kernel, self.limits.free_chunk, receipt);
    }
}

impl<K: Release + FlushTlb> fmt::Debug for PageGather<'_, '_, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageGather")
            .field("range", &self.range)
            .field("waiting", &self.waiting)
            .finish_non_exhaustive()
    }
}
