//! The gather itself, on the stack of whoever unmaps: from the first entry cleared to the flush.
#![expect(unsafe_code, reason = "the constructors take the map lock on trust")]

use core::convert::Infallible;
use core::{fmt, mem};

use mmu_pagetable::{StaleWrites, TableView, VirtRange};

use crate::flush_policy::{Scope, flush, scope_before_the_last, scope_of_the_last};
use crate::flushed_gather::FlushedGather;
use crate::levels::context::TlbContext;
use crate::limits::{GatherMode, Limits};
use crate::mm::MmOf;
use crate::open_gather::{OpenGather, close_after};
use crate::overlap::reach::{Counted, Reach};
use crate::platform::{GatherEvent, Platform};
use crate::queue::waiting::{Covered, Waiting};
use crate::range::FlushRange;
use crate::state::{DeferredFlushes, PfnMaps, Phase, State};

/// Collects what one thread unmaps from one address space, and frees it after a flush.
///
/// At most 256 bytes, made to live on a kernel stack; not to be moved to another thread. Holding
/// one proves that nothing it collected has been freed before every CPU was told. Dropped
/// unfinished, it finishes itself (rule G5).
///
/// ```text
/// MmuGather::new ─► unmap_vmas ─► free_pgtables ─► flush ─► (locks dropped) ─► FlushedGather::free
///                      └── full: flush and free what is queued, without the table lock, then go on
/// ```
///
/// Linux: struct mmu_gather, where the variable is called `tlb`; here `tlb` means the hardware.
#[doc(alias = "mmu_gather")]
pub struct MmuGather<'k, 'm, K: Platform> {
    pub(crate) kernel: &'k K,
    pub(crate) mm: &'m MmOf<K::Context>,
    pub(crate) state: State,
    pub(crate) limits: Limits,
    pub(crate) waiting: Waiting,
}

impl<'k, 'm, K: Platform> MmuGather<'k, 'm, K> {
    /// Begins to unmap part of `mm`, whose programs may be running on other CPUs.
    ///
    /// # Safety
    /// - Until [`flush`](Self::flush) returns (or the gather is dropped) the caller holds the
    ///   embedder's map lock of `mm`, for reading at least (Linux: mmap_lock): no table below `mm`
    ///   is freed meanwhile but by this gather;
    /// - `mm` is an address space of `kernel`: its tables are in that memory, and those CPUs alone
    ///   load it.
    ///
    /// The promise covers whatever the gather is told to do, for its safe calls take any range. A
    /// kernel that frees tables under a lock held for reading (munmap after a downgrade) keeps the
    /// other gathers of that time to areas that are not detached.
    ///
    /// # Source
    /// Linux: tlb_gather_mmu, mm/mmu_gather.c.
    ///
    /// # Examples
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/small_kernel/machine.rs"));
    /// # fn main() -> Result<(), CutLeaf> {
    /// # let kernel = Kernel::new();
    /// # let mm = kernel.new_mm();
    /// let vma = area(0x1000, 0x5000);
    /// kernel.map(&mm, vma.range);
    /// // SAFETY: this thread alone unmaps, and `mm` is an address space of `kernel`.
    /// let mut gather = unsafe { MmuGather::new(&kernel, &mm) };
    /// gather.unmap_vmas([vma], vma.range)?;
    /// assert_eq!(kernel.freed_pages.get(), 0, "they wait for the flush");
    /// drop(gather); // flushes, and frees
    /// assert_eq!(kernel.freed_pages.get(), 4);
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "tlb_gather_mmu")]
    #[must_use]
    #[inline]
    pub unsafe fn new(kernel: &'k K, mm: &'m MmOf<K::Context>) -> Self {
        Self::begin(kernel, mm, GatherMode::Shared, Reach::Everywhere)
    }

    /// As [`new`](Self::new), for a gather that is to clear leaves of `range` alone, as a write to
    /// a page that is copied does.
    ///
    /// If `range` lies in one last-level table, or in two, a gather that is open on other tables
    /// makes neither of the two flush more (rule G6). If it is larger, this is [`new`](Self::new).
    ///
    /// # Safety
    /// - As for [`new`](Self::new);
    /// - the gather is told of nothing but leaves of `range` that were cleared: it unhooks no
    ///   table, moves no page, and takes no rights away.
    #[must_use]
    #[inline]
    pub unsafe fn new_within(kernel: &'k K, mm: &'m MmOf<K::Context>, range: VirtRange) -> Self {
        Self::begin(kernel, mm, GatherMode::Shared, Reach::of(range))
    }

    /// Begins to tear down all of `mm`: the last program has left it, and nobody can come back.
    ///
    /// If a program still ran there, dirty bits could be lost. Stale translations could not: the
    /// flush at the end reaches every CPU all the same.
    ///
    /// # Safety
    /// As for [`new`](Self::new); and no program runs in `mm` any more, nor comes back.
    ///
    /// # Source
    /// Linux: tlb_gather_mmu_fullmm, mm/mmu_gather.c.
    #[doc(alias = "tlb_gather_mmu_fullmm")]
    #[must_use]
    #[inline]
    pub unsafe fn new_fullmm(kernel: &'k K, mm: &'m MmOf<K::Context>) -> Self {
        Self::begin(kernel, mm, GatherMode::FullMm, Reach::Everywhere)
    }

    #[inline]
    fn begin(kernel: &'k K, mm: &'m MmOf<K::Context>, mode: GatherMode, reach: Reach) -> Self {
        // A `const` block, because the type is generic; sizes of other types are `const_assert`s.
        const { assert!(size_of::<Self>() <= 256, "a gather lives on a kernel stack") };
        reach.open(&mm.gathers());
        let gather = Self {
            kernel,
            mm,
            state: State {
                mode,
                reach,
                pfn_maps: PfnMaps::NotSeen,
                range: FlushRange::empty(),
                deferred: DeferredFlushes::NotSeen,
                rights: StaleWrites::Impossible,
                phase: Phase::Open,
                cut: None,
                receipt: None,
            },
            limits: Limits::DEFAULT.usable_in(mode),
            waiting: Waiting::new(),
        };
        // The gather is closed should this unwind.
        kernel.between_gather_steps();
        gather
    }

    /// The same gather, holding no more than `limits` allow. To be called before anything is
    /// queued.
    #[must_use]
    #[inline]
    pub fn with_limits(mut self, limits: &Limits) -> Self {
        self.limits = limits.clamped().usable_in(self.state.mode);
        self
    }

    /// What it assumes about others.
    #[must_use]
    pub const fn mode(&self) -> GatherMode {
        self.state.mode
    }

    /// Makes every CPU forget what was cleared so far. Frees nothing.
    ///
    /// # Context
    /// As for [`flush_tlb_mm_range`](mmu_tlb::flush_tlb_mm_range); under a table lock only for
    /// dirty pages and moved ones (rule G3).
    ///
    /// # Source
    /// Linux: tlb_flush_mmu_tlbonly, include/asm-generic/tlb.h.
    #[doc(alias = "tlb_flush_mmu_tlbonly")]
    #[inline(never)]
    pub fn flush_tlb_only(&mut self) {
        if !self.state.range.is_empty() {
            self.flush_scope(scope_before_the_last(self.mm, self.state.reach, self.own_scope()));
        }
    }

    /// Flushes, then frees everything queued so far; the gather can be filled again.
    ///
    /// # Context
    /// No table lock is held; preemption points inside.
    ///
    /// # Source
    /// Linux: tlb_flush_mmu, mm/mmu_gather.c.
    ///
    /// # Examples
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/small_kernel/machine.rs"));
    /// # fn main() -> Result<(), CutLeaf> {
    /// # let kernel = Kernel::new();
    /// # let mm = kernel.new_mm();
    /// # let (low, high) = (area(0x1000, 0x5000), area(0x8000, 0x9000));
    /// # kernel.map(&mm, low.range);
    /// # kernel.map(&mm, high.range);
    /// # // SAFETY: this thread alone unmaps, and `mm` is an address space of `kernel`.
    /// # let mut gather = unsafe { MmuGather::new(&kernel, &mm) };
    /// gather.unmap_vmas([low], low.range)?;
    /// gather.flush_mmu();
    /// assert_eq!(kernel.freed_pages.get(), 4);
    /// gather.unmap_vmas([high], high.range)?;
    /// gather.flush().free();
    /// assert_eq!(kernel.freed_pages.get(), 5);
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "tlb_flush_mmu")]
    pub fn flush_mmu(&mut self) {
        self.flush_tlb_only();
        if !self.waiting.is_empty() {
            let receipt = self.take_receipt();
            self.free_all(receipt);
        }
    }

    /// Completes the unmapping: when this returns, no CPU can use any address that was unmapped.
    /// Frees nothing yet.
    ///
    /// If another gather was open on the same tables meanwhile, the whole address space is flushed,
    /// tables included: entries that this one found empty may have been cleared by the other, which
    /// has not flushed yet (rule G6). A gather begun by [`new`](Self::new) may look into any table;
    /// [`zap_page_range`](crate::zap_page_range) of at most 2 MiB looks into two.
    ///
    /// # Context
    /// The map lock is still held; it may be dropped as soon as this returns.
    ///
    /// # Source
    /// Linux: the first half of tlb_finish_mmu, mm/mmu_gather.c.
    ///
    /// # Examples
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/small_kernel/machine.rs"));
    /// # fn main() -> Result<(), CutLeaf> {
    /// # let kernel = Kernel::new();
    /// # let mm = kernel.new_mm();
    /// # let vma = area(0x1000, 0x5000);
    /// # kernel.map(&mm, vma.range);
    /// # kernel.run(CPU[1], Some(&mm));
    /// # assert!(kernel.touch(CPU[1], &mm, 0x1000));
    /// # // SAFETY: this thread alone unmaps, and `mm` is an address space of `kernel`.
    /// # let mut gather = unsafe { MmuGather::new(&kernel, &mm) };
    /// gather.unmap_vmas([vma], vma.range)?;
    /// assert!(kernel.touch(CPU[1], &mm, 0x1000), "the other CPU still has it in its TLB");
    /// let flushed = gather.flush();
    /// assert!(!kernel.touch(CPU[1], &mm, 0x1000));
    /// // Here the locks are dropped.
    /// flushed.free();
    /// assert_eq!(kernel.freed_pages.get(), 4);
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "tlb_finish_mmu")]
    #[must_use = "drop the locks, then free"]
    #[inline]
    pub fn flush(self) -> FlushedGather<'k, K> {
        match self.flush_after(|_| Ok::<(), Infallible>(())) {
            Ok(flushed) => flushed,
        }
    }

    /// Calls `unmap`, then flushes as [`flush`](Self::flush) does.
    ///
    /// The gather is not moved between the two, and afterwards only what waits moves on, field by
    /// field. A copy of the whole gather, sixteen bytes at a time, would wait for the narrower
    /// stores that filled it: that took longer (11 ns) than beginning and finishing a gather takes
    /// now.
    ///
    /// If `unmap` fails, what waits is flushed for and freed at once, and the error comes back.
    #[inline]
    pub(crate) fn flush_after<E>(
        mut self,
        unmap: impl FnOnce(&mut Self) -> Result<(), E>,
    ) -> Result<FlushedGather<'k, K>, E> {
        unmap(&mut self)?;
        let (mm, reach) = (self.mm, self.state.reach);
        let receipt = close_after(mm, reach, || self.last_flush());
        let held = self.waiting.release();
        let (kernel, free_chunk) = (self.kernel, self.limits.free_chunk);
        // Closed, and nothing waits in it: `drop` would have nothing left to do.
        mem::forget(self);
        Ok(FlushedGather { kernel, free_chunk, held, receipt })
    }

    /// Notes that reclaim may have cleared entries here and not flushed yet; the next flush makes
    /// up for it.
    ///
    /// The engine calls it wherever it looks at entries. An embedder calls it where it looks
    /// itself (mprotect, fork), if its call promises that no CPU uses what was there: an entry
    /// that is not present may be one that a CPU still uses.
    ///
    /// # Context
    /// The lock of the table that the entries are in is held, or was since they were read. For
    /// tables above the last level, whose entries are read without their lock, call
    /// [`note_deferred_flushes_of`](Self::note_deferred_flushes_of), which takes it.
    ///
    /// # Source
    /// Linux: flush_tlb_batched_pending, mm/rmap.c.
    #[doc(alias = "flush_tlb_batched_pending")]
    #[inline]
    pub fn note_deferred_flushes(&mut self) {
        if self.mm.context().has_deferred_flushes() {
            self.kernel.observe_gather(GatherEvent::DeferredFlushSeen);
            self.state.deferred = DeferredFlushes::Seen;
        }
    }

    /// As [`note_deferred_flushes`](Self::note_deferred_flushes), after entries of `view` were
    /// found empty without its lock, and passed over.
    ///
    /// Reclaim clears an entry and then notes that its flush is to come, both under the lock of
    /// the table: whoever takes that lock after having seen the entry empty sees the note, too.
    /// Reading the note without the lock is not enough.
    ///
    /// # Context
    /// No table lock is held.
    pub fn note_deferred_flushes_of(&mut self, view: TableView<'_>) {
        let locked = view.lock(self.kernel);
        self.note_deferred_flushes();
        drop(locked);
    }

    /// The gather is full: flushes and frees, so that it can go on.
    pub(crate) fn forced_flush(&mut self) {
        self.kernel.observe_gather(GatherEvent::ForcedFlush);
        self.flush_mmu();
    }

    /// Makes every CPU forget what this gather cleared, and what other gathers that are open have
    /// cleared and not flushed.
    #[inline(always)]
    pub(crate) fn flush_for_all_gathers(&mut self) {
        let nothing = self.state.range.is_empty() && self.state.deferred == DeferredFlushes::NotSeen;
        let own = if nothing { Scope::Nothing } else { self.own_scope() };
        let scope = scope_of_the_last(self.kernel, self.mm, self.state.reach, own);
        if scope != Scope::Nothing {
            self.flush_scope(scope);
        }
    }

    /// Flushes for the last time; returns the receipt, if anything waits for it.
    #[inline(always)]
    fn last_flush(&mut self) -> Option<Covered> {
        self.flush_for_all_gathers();
        self.kernel.between_gather_steps();
        if self.waiting.is_empty() { None } else { Some(self.take_receipt()) }
    }

    /// How much is to be flushed when no other gather is open, if anything is.
    #[inline]
    fn own_scope(&self) -> Scope {
        if self.state.mode == GatherMode::FullMm || self.state.deferred == DeferredFlushes::Seen {
            Scope::WholeMm
        } else {
            Scope::Range
        }
    }

    #[inline(never)]
    fn flush_scope(&mut self, scope: Scope) {
        self.state.phase = Phase::InKernel;
        let (span, tables) = (self.state.range.span(), self.state.range.tables());
        let receipt = flush(self.kernel, self.mm, scope, span, tables);
        self.state.phase = Phase::Open;
        if scope == Scope::WholeMm {
            // It made up for every flush that was owed when it began.
            self.state.deferred = DeferredFlushes::NotSeen;
        }
        // INVARIANT: G2, the range is emptied together with the flush, nowhere else.
        self.state.range.reset();
        self.state.rights = StaleWrites::Impossible;
        self.state.receipt = Some(receipt);
    }

    /// Frees everything that waits.
    pub(crate) fn free_all(&mut self, receipt: Covered) {
        self.state.phase = Phase::InKernel;
        self.waiting.free_all(self.kernel, self.limits.free_chunk, receipt);
        self.state.phase = Phase::Open;
    }

    /// The receipt of the last flush, which covers everything queued.
    #[inline]
    pub(crate) fn take_receipt(&mut self) -> Covered {
        debug_assert!(self.state.range.is_empty(), "G1: {:?} not flushed before freeing", self.state.range);
        if self.state.receipt.is_none() {
            // Something was queued and nothing flushed since. That cannot be; if it is, flush all.
            self.flush_scope(Scope::WholeMm);
        }
        self.state.receipt.take().expect("a flush leaves one")
    }
}

impl<K: Platform> Drop for MmuGather<'_, '_, K> {
    fn drop(&mut self) {
        let open = OpenGather::taken_over(self.mm, self.state.reach);
        if self.state.phase == Phase::InKernel {
            // What waits leaks. Dropping `open` leaves the flush to whoever looks next.
            return;
        }
        // The visit of a table that unwound owes a flush of entries that `range` does not know.
        self.note_deferred_flushes();
        // If the flush unwinds, `drop` is not run again: `open` is dropped then.
        let receipt = open.close_after(|| self.last_flush());
        self.waiting.finish(self.kernel, self.limits.free_chunk, receipt);
    }
}

impl<K: Platform> fmt::Debug for MmuGather<'_, '_, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmuGather")
            .field("mode", &self.state.mode)
            .field("range", &self.state.range)
            .field("waiting", &self.waiting)
            .finish_non_exhaustive()
    }
}
