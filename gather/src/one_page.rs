//! The path of one page in a table that stays. Many calls of munmap and madvise are for no more.
//!
//! It does what a gather does, in the same order; what must be flushed is decided by the same
//! functions (flush_policy.rs). But no queue can fill up, and nothing is remembered from one table
//! to the next, so what a gather keeps in memory stays in registers here. That halves the
//! instructions.
#![expect(unsafe_code, reason = "the map lock is taken on trust")]

use mmu_pagetable::{Bounds, Level, StaleWrites, TableView, VirtRange};
use mmu_tlb::{FreedTables, PageSpan};

use crate::entries::clearing::ProgramsMayRun;
use crate::entries::zap_loop::zap_one;
use crate::flush_policy::{
    Scope, flush, flush_dirty, scope_before_the_last, scope_of_the_last, stale_writes,
};
use crate::flushed_gather::FlushedGather;
use crate::levels::context::TlbContext;
use crate::mm::MmOf;
use crate::open_gather::OpenGather;
use crate::platform::{GatherEvent, Platform, Vma, VmaKind};
use crate::queue::freed_pages::{FreedPages, Which};
use crate::queue::waiting::Covered;
use crate::queue::word::{BatchWord, DelayedRmaps, Runs};
use crate::state::DeferredFlushes;

/// The page, not looked at yet.
pub(crate) struct OnePage<'k, 'm, K: Platform> {
    kernel: &'k K,
    mm: &'m MmOf<K::Context>,
    area: K::Area,
    address: u64,
    table: TableView<'k>,
}

/// The page, cleared and not flushed yet. It counts as an open gather.
///
/// If a call of the kernel unwinds while this is held, the page leaks; the gather is closed, and
/// the flush that it owes is left to whoever looks next.
#[must_use]
pub(crate) struct ClearedPage<'k, 'm, K: Platform> {
    kernel: &'k K,
    mm: &'m MmOf<K::Context>,
    open: OpenGather<'m, K::Context>,
    word: Option<BatchWord>,
    to_flush: ToFlush,
}

/// What CPUs must forget.
enum ToFlush {
    Nothing,
    Page(PageSpan),
    /// Already flushed; this is the receipt.
    Done(Covered),
}

impl<'k, 'm, K: Platform> OnePage<'k, 'm, K> {
    /// The page that `range` of `vma` is, if it is a single one, with counts, and not part of a
    /// large leaf.
    ///
    /// # Safety
    /// As for [`MmuGather::new`](crate::MmuGather::new).
    #[inline(always)]
    pub(crate) unsafe fn find(
        kernel: &'k K,
        mm: &'m MmOf<K::Context>,
        vma: &Vma<K::Area>,
        range: VirtRange,
    ) -> Option<Self> {
        let space = mm.space();
        if range.nr_pages() > 1 || vma.kind != VmaKind::Normal || !space.user_range().covers(range) {
            return None;
        }
        // SAFETY: passed on to our caller: no table inside an area is freed while we walk.
        let table = unsafe { space.last_level_table(kernel, range) }?;
        Some(Self { kernel, mm, area: vma.area, address: range.start(), table })
    }

    /// Whether `bounds` keep the table, and so all tables above it.
    #[inline(always)]
    pub(crate) fn table_stays(&self, bounds: Bounds) -> bool {
        !bounds.allow_unhooking(VirtRange::of_entry(Level::Pmd, self.address))
    }

    /// Clears the page. `None` if a gather has to do it: nothing was done then.
    #[inline(always)]
    pub(crate) fn clear(self) -> Option<ClearedPage<'k, 'm, K>> {
        let Self { kernel, mm, address, .. } = self;
        let open = OpenGather::new(mm);
        kernel.between_gather_steps();
        let locked = self.table.lock(kernel);
        // Before the look at what is owed: a gather that unwinds notes that, and then closes.
        let stale = stale_writes(mm, DeferredFlushes::NotSeen, StaleWrites::Impossible);
        kernel.between_gather_steps();
        if mm.context().has_deferred_flushes() {
            drop(locked);
            open.close_unused();
            return None;
        }
        let (done, word) = zap_one(kernel, self.area, &locked, address, ProgramsMayRun(stale));
        let mut to_flush = ToFlush::page(address, done.leaves);
        if done.rmaps == DelayedRmaps::Queued {
            to_flush = flush_dirty_page(kernel, mm, to_flush, word);
        }
        drop(locked);
        kernel.observe_gather(GatherEvent::LockDropped { leaves: u32::from(done.leaves > 0) });
        kernel.cond_resched();
        Some(ClearedPage { kernel, mm, open, word, to_flush })
    }
}

impl<'k, 'm, K: Platform> ClearedPage<'k, 'm, K> {
    /// Makes every CPU forget the page, and what other gathers that are open have cleared and not
    /// flushed.
    #[inline(always)]
    pub(crate) fn flush(self) -> FlushedGather<'k, K> {
        let Self { kernel, mm, open, word, to_flush } = self;
        let receipt = open.close_after(|| {
            let scope = scope_of_the_last(kernel, mm, to_flush.scope());
            let receipt = to_flush.carry_out(kernel, mm, scope);
            kernel.between_gather_steps();
            receipt
        });
        FlushedGather::of_page(kernel, word, receipt)
    }
}

/// [`flush_dirty`] for the page. Its word keeps the mark "delay rmap", which nobody reads again.
#[cold]
#[inline(never)]
fn flush_dirty_page<K: Platform>(
    kernel: &K,
    mm: &MmOf<K::Context>,
    to_flush: ToFlush,
    word: Option<BatchWord>,
) -> ToFlush {
    flush_dirty(
        kernel,
        || {
            let scope = scope_before_the_last(mm, to_flush.scope());
            to_flush.carry_out(kernel, mm, scope)
        },
        |receipt| {
            kernel.remove_rmaps(FreedPages::new(word.as_slice(), Which::DelayedRmap, Runs::Absent));
            receipt.map_or(ToFlush::Nothing, ToFlush::Done)
        },
    )
}

impl ToFlush {
    /// What is to be flushed for the page at `address`, if one was cleared there.
    #[inline(always)]
    const fn page(address: u64, leaves: usize) -> Self {
        const LEVEL: Level = Level::Pte;
        if leaves == 0 {
            return Self::Nothing;
        }
        let end = address + LEVEL.entry_span();
        Self::Page(PageSpan { start: address, end, stride_shift: LEVEL.entry_shift() })
    }

    /// The flush that is still needed for the page itself.
    #[inline(always)]
    const fn scope(&self) -> Scope {
        match self {
            Self::Page(_) => Scope::Range,
            Self::Nothing | Self::Done(_) => Scope::Nothing,
        }
    }

    #[inline(always)]
    fn carry_out<K: Platform>(self, kernel: &K, mm: &MmOf<K::Context>, scope: Scope) -> Option<Covered> {
        match (scope, self) {
            (Scope::WholeMm, _) => Some(flush(kernel, mm, scope, None, FreedTables::No)),
            (_, Self::Page(span)) => Some(flush(kernel, mm, Scope::Range, Some(span), FreedTables::No)),
            (_, Self::Done(receipt)) => Some(receipt),
            (_, Self::Nothing) => None,
        }
    }
}
