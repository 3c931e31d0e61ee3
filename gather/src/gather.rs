//! The gather itself: on the stack of whoever unmaps, from the first entry cleared to the last page freed.
#![expect(
    unsafe_code,
    reason = "the constructors take the map lock on trust; a flushed gather leaves its queues behind"
)]

use core::convert::Infallible;
use core::{fmt, mem};

use mmu_pagetable::{Level, StaleWrites, TableView, UnhookedTable, VirtRange};
use mmu_tlb::{Flushed, flush_tlb_mm, flush_tlb_mm_range};
use x86_64::structures::paging::PhysFrame;

use crate::limits::Limits;
use crate::mm::{Mm, OpenGather};
use crate::platform::{GatherEvent, Platform};
use crate::queue::batch::{PageQueue, Room};
use crate::queue::table_batch::{Queued, TableQueue};
use crate::queue::waiting::{Covered, Waiting};
use crate::queue::word::Slot;
use crate::range::FlushRange;
use crate::zap::CutLeaf;

/// What a gather may assume about other users of the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GatherMode {
    /// Other CPUs may run programs in it: entries are cleared with a locked exchange, unless hardware has nothing left to set
    /// in them ([`EntryValue::is_settled`](mmu_pagetable::EntryValue::is_settled)).
    ///
    /// There is no mode of its own for a single CPU. Were entries cleared there with plain stores, a program that preempts in
    /// between could set a dirty bit that is then lost; were pages freed at once, it could use a stale entry (such a mode was
    /// removed from Linux for that reason). That flushes are local, [`OnlineCpus::One`](mmu_tlb::OnlineCpus::One) says.
    Shared,
    /// The whole address space is dying and no program runs in it any more, though lazy CPUs may have it loaded: plain
    /// stores, full flushes. The first makes the lazy CPUs leave, so the later ones find nobody to interrupt, and nothing is
    /// gained by holding much: a gather in this mode takes one batch page at the most
    /// ([`Limits::EXIT_BATCH_PAGES`]), whatever its limits.
    FullMm,
}

/// Collects what one thread unmaps from one address space, and frees it after a flush.
///
/// At most 256 bytes, made to live on a kernel stack; not to be moved to another thread. Holding one proves that nothing
/// it collected has been freed before every CPU was told. Dropped unfinished, it finishes itself (rule G5).
///
/// ```text
/// MmuGather::new ─► unmap_vmas ─► free_pgtables ─► flush ─► (locks dropped) ─► FlushedGather::free
///                      └── full: flush and free what is queued, outside the table lock, then carry on
/// ```
///
/// Linux: struct mmu_gather, where the variable is called `tlb`; here `tlb` means the hardware.
#[doc(alias = "mmu_gather")]
pub struct MmuGather<'a, K: Platform> {
    pub(crate) kernel: &'a K,
    pub(crate) mm: &'a Mm<K::Bits>,
    pub(crate) state: State,
    pub(crate) limits: Limits,
    pub(crate) waiting: Waiting,
}

/// What is known until the flush.
pub(crate) struct State {
    pub(crate) mode: GatherMode,
    pub(crate) pfn_maps: PfnMaps,
    pub(crate) range: FlushRange,
    /// Whether flushes that others owe were seen under a table lock: the next flush is of the whole address space.
    pub(crate) deferred: DeferredFlushes,
    /// Whether this gather took rights away since its last flush ([`MmuGather::changed`]): CPUs may write still.
    pub(crate) rights: StaleWrites,
    pub(crate) phase: Phase,
    /// A large leaf that a range cut, and that was left alone.
    pub(crate) cut: Option<CutLeaf>,
    /// The last flush. INVARIANT: while `range` is empty it covers everything that waits.
    receipt: Option<Covered>,
}

/// Whether flushes of reclaim, or of a call that unwound, were seen to be owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeferredFlushes {
    NotSeen,
    Seen,
}

/// Whether the gather can finish itself when it is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Yes: entries are cleared and noted, and what waits is in the queues.
    Open,
    /// The kernel is carrying out a flush, or is being handed what waits. If the gather is dropped now the kernel's own code
    /// has unwound: doing it again might unwind again, which aborts, and would free some of it twice. What waits leaks.
    InKernel,
}

/// Whether entries of a [`PfnMap`](crate::VmaKind::PfnMap) area were cleared. Sticky: a later area does not undo it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PfnMaps {
    NotSeen,
    Seen,
}

impl<'a, K: Platform> MmuGather<'a, K> {
    /// Begins to unmap part of `mm`, whose programs may be running on other CPUs.
    ///
    /// # Safety
    /// - Until [`flush`](Self::flush) returns (or the gather is dropped) the caller holds the embedder's map lock of `mm`, for
    ///   reading at least (Linux: mmap_lock): no table below `mm` is freed meanwhile but by this gather;
    /// - `mm` is an address space of `kernel`: its tables are in that memory, and those CPUs alone load it.
    ///
    /// That is promised of whatever the gather is told to do: its safe calls take any range. A kernel that frees tables under a
    /// lock held for reading (munmap after a downgrade) keeps the other gathers of that time to areas that are not detached.
    ///
    /// # Source
    /// Linux: tlb_gather_mmu, mm/mmu_gather.c.
    #[doc(alias = "tlb_gather_mmu")]
    #[must_use]
    #[inline]
    pub unsafe fn new(kernel: &'a K, mm: &'a Mm<K::Bits>) -> Self {
        Self::begin(kernel, mm, GatherMode::Shared)
    }

    /// Begins to tear down all of `mm`: the last program has left it, and nobody can come back.
    ///
    /// Were a program still running there, dirty bits could be lost; stale translations could not: the flush at the end
    /// reaches every CPU all the same.
    ///
    /// # Safety
    /// As for [`new`](Self::new); and no program runs in `mm` any more, nor comes back.
    ///
    /// # Source
    /// Linux: tlb_gather_mmu_fullmm, mm/mmu_gather.c.
    #[doc(alias = "tlb_gather_mmu_fullmm")]
    #[must_use]
    #[inline]
    pub unsafe fn new_fullmm(kernel: &'a K, mm: &'a Mm<K::Bits>) -> Self {
        Self::begin(kernel, mm, GatherMode::FullMm)
    }

    #[inline]
    fn begin(kernel: &'a K, mm: &'a Mm<K::Bits>, mode: GatherMode) -> Self {
        const { assert!(size_of::<Self>() <= 256, "a gather lives on a kernel stack") };
        mm.open_gather();
        Self {
            kernel,
            mm,
            state: State {
                mode,
                pfn_maps: PfnMaps::NotSeen,
                range: FlushRange::empty(),
                deferred: DeferredFlushes::NotSeen,
                rights: StaleWrites::Impossible,
                phase: Phase::Open,
                cut: None,
                receipt: None,
            },
            limits: Limits::DEFAULT.of(mode),
            waiting: Waiting::new(),
        }
    }

    /// The same gather, holding no more than `limits` allow. Before anything is queued.
    #[must_use]
    #[inline]
    pub fn with_limits(mut self, limits: &Limits) -> Self {
        self.limits = limits.clamped().of(self.state.mode);
        self
    }

    /// What it assumes about others.
    #[must_use]
    pub const fn mode(&self) -> GatherMode {
        self.state.mode
    }

    /// Notes that entries of `level` tables covering `range` lost rights, or changed otherwise in a way that CPUs must not
    /// miss; for mprotect and its like, which queue no page. The gather is begun before the first entry changes: another that
    /// clears such an entry relies on it (an entry that is read-only now may still get its dirty bit set until the flush).
    ///
    /// # Context
    /// The lock of the table is still held.
    ///
    /// # Source
    /// Linux: tlb_flush_pte_range, include/asm-generic/tlb.h.
    #[doc(alias = "tlb_flush_pte_range")]
    pub fn changed(&mut self, range: VirtRange, level: Level) {
        self.state.range.cleared(range, level);
        self.state.rights = StaleWrites::Possible;
    }

    /// Queues the page at `frame`, whose `level` entry covering `cleared` the caller has just cleared. Flushes and frees if
    /// that fills the gather.
    ///
    /// # Context
    /// No table lock is held.
    ///
    /// # Safety
    /// - The entry of a `level` table of this address space that mapped `frame` at `cleared` is empty, cleared by the caller
    ///   in one step ([`LockedEntry::get_and_clear`](mmu_pagetable::LockedEntry::get_and_clear)), and nobody else queues or
    ///   frees what it held: one reference on the page, which now belongs to the gather;
    /// - no other mapping relies on that reference.
    ///
    /// # Source
    /// Linux: tlb_remove_page, include/asm-generic/tlb.h.
    #[doc(alias = "tlb_remove_page")]
    pub unsafe fn remove_page(&mut self, frame: PhysFrame, cleared: VirtRange, level: Level) {
        self.make_room();
        self.state.range.cleared(cleared, level);
        if self.waiting.pages.push(self.kernel, &self.limits, Slot::page(frame)) == Room::Full {
            self.forced_flush();
        }
    }

    /// Queues `nr_pages` references on the frames from `frame` on, as one record of two slots; otherwise as
    /// [`remove_page`](Self::remove_page).
    ///
    /// # Safety
    /// As for [`remove_page`](Self::remove_page), for each of the `nr_pages` frames and the last-level entries of `cleared`.
    ///
    /// # Source
    /// Linux: tlb_remove_page with encoded nr_pages, since folios are unmapped in runs.
    #[doc(alias = "__tlb_remove_folio_pages")]
    pub unsafe fn remove_pages(&mut self, frame: PhysFrame, nr_pages: u32, cleared: VirtRange) {
        self.make_room();
        self.state.range.cleared(cleared, Level::Pte);
        let run = Slot::run(frame, nr_pages);
        if self.waiting.pages.push_run(self.kernel, &self.limits, run) == Room::Full {
            self.forced_flush();
        }
    }

    /// Queues a table that was unhooked. `address` lies in its span and was given up by the caller.
    ///
    /// If no batch page can be had, the table is flushed for and freed at once, alone (rule G4).
    ///
    /// # Context
    /// No table lock is held.
    ///
    /// # Panics
    /// If the table was part of another address space, or does not cover `address`: the flush would not be one for it.
    ///
    /// # Source
    /// Linux: tlb_remove_table, mm/mmu_gather.c.
    #[doc(alias = "tlb_remove_table")]
    pub fn remove_table(&mut self, table: UnhookedTable, address: u64) {
        assert!(table.root() == self.mm.space().root(), "G1: {table:?} belongs to another address space");
        assert!(table.span().contains(address), "G2: {address:#x} was not translated through {table:?}");
        self.queue_table(&table, address);
    }

    /// As [`remove_table`](Self::remove_table), of a table of this address space that covers `address`.
    #[inline]
    pub(crate) fn queue_table(&mut self, table: &UnhookedTable, address: u64) {
        self.kernel.observe_gather(GatherEvent::TableUnhooked(table.level()));
        self.state.range.unhooked(table.level(), address);
        match self.waiting.tables.push(self.kernel, &self.limits, table.frame()) {
            Queued::Room => {}
            Queued::Full => self.forced_flush(),
            Queued::NoBatch(alone) => {
                self.kernel.observe_gather(GatherEvent::TableFallback);
                self.flush_tlb_only();
                // INVARIANT: G1, `range` held this table, so the flush just done was made for it too.
                let receipt = self.take_receipt();
                // SAFETY: an `UnhookedTable` was taken in, of which there is one, and its flush was made just now.
                unsafe { self.kernel.free_tables(&[alone]) };
                self.free_all(receipt);
            }
        }
    }

    /// Makes every CPU forget what was cleared so far. Frees nothing.
    ///
    /// # Context
    /// As for [`flush_tlb_mm_range`]; under a table lock only for dirty pages and moved ones (rule G3).
    ///
    /// # Source
    /// Linux: tlb_flush_mmu_tlbonly, include/asm-generic/tlb.h.
    #[doc(alias = "tlb_flush_mmu_tlbonly")]
    pub fn flush_tlb_only(&mut self) {
        if !self.state.range.is_empty() {
            let scope = if self.is_nested() { Scope::Whole } else { self.scope() };
            self.shoot_down(scope);
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
        self.release();
    }

    /// Completes the unmapping: when this returns, no CPU can use any address that was unmapped. Frees nothing yet.
    ///
    /// If another gather was open on the address space meanwhile, all of it is flushed, tables included: entries this one
    /// found none may have been cleared by the other, which has not flushed yet (rule G6).
    ///
    /// # Context
    /// The map lock is still held; it may be dropped as soon as this returns.
    ///
    /// # Source
    /// Linux: the first half of tlb_finish_mmu, mm/mmu_gather.c.
    #[doc(alias = "tlb_finish_mmu")]
    #[must_use = "drop the locks, then free"]
    #[inline]
    pub fn flush(self) -> FlushedGather<'a, K> {
        match self.flush_after(|_| Ok::<(), Infallible>(())) {
            Ok(flushed) => flushed,
        }
    }

    /// Does `work`, then flushes: as [`flush`](Self::flush), with nothing moved between the two.
    ///
    /// Only what waits moves on, field by field: a copy of all of it, sixteen bytes at a time, waits for the narrow stores that
    /// filled them, which took longer (11 ns) than beginning and finishing a gather takes now.
    ///
    /// If `work` fails, what waits is flushed for and freed at once, and the error comes back.
    #[inline]
    pub(crate) fn flush_after<E>(
        mut self,
        work: impl FnOnce(&mut Self) -> Result<(), E>,
    ) -> Result<FlushedGather<'a, K>, E> {
        work(&mut self)?;
        let receipt = self.finish_flush();
        let waiting = self.waiting.leave();
        let (kernel, free_chunk) = (self.kernel, self.limits.free_chunk);
        // Closed, and nothing waits in it: there is nothing left for it to do when dropped.
        mem::forget(self);
        Ok(FlushedGather { kernel, free_chunk, waiting, receipt })
    }

    /// Reclaim may have cleared entries here and not flushed yet; the next flush makes up for it.
    ///
    /// The engine calls it wherever it looks at entries. An embedder that looks itself (mprotect, fork), and whose call promises
    /// that no CPU uses what was there, does too: an entry that is not present may be one that a CPU still uses.
    ///
    /// # Context
    /// The lock of the table that the entries are in is held, or was since they were read. Of tables above the last level, whose
    /// entries are read without it, [`note_deferred_flushes_of`](Self::note_deferred_flushes_of) takes it.
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

    /// As [`note_deferred_flushes`](Self::note_deferred_flushes), after entries of `view` were found empty without its lock,
    /// and passed over.
    ///
    /// Reclaim clears an entry and then notes that its flush is to come, both under the lock of the table: whoever takes the
    /// lock after having seen the entry empty sees the note, too. Reading the note alone is not enough.
    ///
    /// # Context
    /// No table lock is held.
    pub fn note_deferred_flushes_of(&mut self, view: TableView<'_>) {
        let locked = view.lock(self.kernel);
        self.note_deferred_flushes();
        drop(locked);
    }

    /// Makes room for a record, if the visit of a table ended with none and nothing was queued since.
    #[inline]
    fn make_room(&mut self) {
        if self.waiting.pages.is_full(&self.limits)
            && self.waiting.pages.next_batch(self.kernel, &self.limits) == Room::Full
        {
            self.forced_flush();
        }
    }

    /// The gather is full: flushes and frees, then it can go on.
    pub(crate) fn forced_flush(&mut self) {
        self.kernel.observe_gather(GatherEvent::ForcedFlush);
        self.flush_mmu();
    }

    #[inline]
    pub(crate) fn is_nested(&self) -> bool {
        self.mm.open_gathers() > 1
    }

    /// Makes every CPU forget what this gather cleared, and what others that are open cleared and have not flushed.
    #[inline(always)]
    pub(crate) fn flush_for_all_gathers(&mut self) {
        if self.is_nested() {
            self.kernel.observe_gather(GatherEvent::NestedFlush);
            self.shoot_down(Scope::Whole);
        } else if self.state.deferred == DeferredFlushes::Seen || !self.state.range.is_empty() {
            self.shoot_down(self.scope());
        }
    }

    /// Flushes for the last time and closes the gather; returns the receipt, if anything waits for it.
    #[inline(always)]
    fn finish_flush(&mut self) -> Option<Covered> {
        self.flush_for_all_gathers();
        let receipt = if self.waiting.is_empty() { None } else { Some(self.take_receipt()) };
        // INVARIANT: G6, the count goes down only after the flush.
        self.mm.close_gather();
        receipt
    }

    /// How much must be flushed when no other gather is open.
    #[inline]
    fn scope(&self) -> Scope {
        if self.state.mode == GatherMode::FullMm || self.state.deferred == DeferredFlushes::Seen {
            Scope::Whole
        } else {
            Scope::Range
        }
    }

    #[inline(never)]
    fn shoot_down(&mut self, scope: Scope) {
        let (kernel, context) = (self.kernel, self.mm.context());
        self.state.phase = Phase::InKernel;
        let receipt = match (scope, self.state.range.span()) {
            (Scope::Range, Some(span)) => {
                flush_tlb_mm_range(kernel, context, span, self.state.range.tables())
            }
            _ => flush_tlb_mm(kernel, context),
        };
        self.state.phase = Phase::Open;
        self.note_flushed(receipt, scope);
    }

    fn note_flushed(&mut self, receipt: Flushed, scope: Scope) {
        if scope == Scope::Whole {
            // Whatever was owed when it began has been made up for.
            self.state.deferred = DeferredFlushes::NotSeen;
        }
        // INVARIANT: G2, the range is emptied together with the flush, nowhere else.
        self.state.range.reset();
        self.state.rights = StaleWrites::Impossible;
        self.state.receipt = Some(Covered::by(self.mm.context(), receipt));
    }

    /// Frees everything that waits, on the strength of the last flush.
    fn release(&mut self) {
        if !self.waiting.is_empty() {
            let receipt = self.take_receipt();
            self.free_all(receipt);
        }
    }

    fn free_all(&mut self, receipt: Covered) {
        self.state.phase = Phase::InKernel;
        self.waiting.free_all(self.kernel, self.limits.free_chunk, receipt);
        self.state.phase = Phase::Open;
    }

    /// The receipt of the last flush, which covers everything queued.
    #[inline]
    fn take_receipt(&mut self) -> Covered {
        debug_assert!(self.state.range.is_empty(), "G1: {:?} not flushed before freeing", self.state.range);
        if self.state.receipt.is_none() {
            // Nothing was flushed since something was queued. That cannot be; if it is, flush all.
            self.shoot_down(Scope::Whole);
        }
        self.state.receipt.take().expect("a flush leaves one")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Range,
    Whole,
}

impl<K: Platform> Drop for MmuGather<'_, K> {
    fn drop(&mut self) {
        if self.state.phase == Phase::InKernel {
            // What waits leaks. What was not flushed is flushed by whoever looks next.
            self.mm.context().owe_flush();
            self.mm.close_gather();
            return;
        }
        // A visit that unwound owes a flush of entries that `range` does not know.
        self.note_deferred_flushes();
        // Should the flush unwind: this is not run again.
        let open = OpenGather::taken_over(self.mm);
        self.flush_for_all_gathers();
        let receipt = if self.waiting.is_empty() { None } else { Some(self.take_receipt()) };
        open.close();
        self.waiting.finish(self.kernel, self.limits.free_chunk, receipt);
    }
}

/// A gather whose flush has completed: what it holds may be freed, and need not be yet.
///
/// Made to be freed after the locks are dropped; dropping it frees too.
#[must_use = "drop the locks, then free"]
pub struct FlushedGather<'a, K: Platform> {
    kernel: &'a K,
    waiting: Waiting,
    /// [`Limits::free_chunk`].
    free_chunk: u16,
    /// INVARIANT: there is one unless nothing waits.
    receipt: Option<Covered>,
}

impl<'a, K: Platform> FlushedGather<'a, K> {
    /// What is left of unmapping one page; `receipt` is that of its flush, if there was one.
    #[inline(always)]
    pub(crate) fn of_page(kernel: &'a K, slot: Option<Slot>, receipt: Option<Covered>) -> Self {
        let waiting = Waiting { pages: PageQueue::of(slot), tables: TableQueue::new() };
        let receipt = if slot.is_some() { receipt } else { None };
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

impl<K: Platform> Drop for FlushedGather<'_, K> {
    fn drop(&mut self) {
        // The receipt is gone if the kernel's own code unwound while it was handed what waits: the rest of that leaks.
        if self.receipt.is_some() || self.waiting.is_empty() {
            self.finish();
        }
    }
}

impl<K: Platform> fmt::Debug for MmuGather<'_, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmuGather")
            .field("mode", &self.state.mode)
            .field("range", &self.state.range)
            .field("waiting", &self.waiting)
            .finish_non_exhaustive()
    }
}

impl<K: Platform> fmt::Debug for FlushedGather<'_, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlushedGather").field("waiting", &self.waiting).finish_non_exhaustive()
    }
}
