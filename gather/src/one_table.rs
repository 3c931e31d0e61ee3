//! The path of pages in one table: few of them, or many that are all the same. Most calls of munmap
//! and madvise are for no more.
//!
//! It does what a gather does, in the same order; what must be flushed is decided by the same
//! functions (flush_policy.rs). But all of the pages fit where they wait, so no queue can fill up,
//! and nothing is remembered from one table to the next. So what a gather keeps in memory stays in
//! registers here, and the words of the pages are stored at once where they are freed from. Less
//! than half the instructions of a gather are left of a call of few pages.
#![expect(unsafe_code, reason = "the map lock is taken on trust; slots are written by pointer")]

use core::slice;

use mmu_pagetable::{
    Bounds, Entry, GuardOf, Level, LockedTable, StaleWrites, TableView, UnhookedTable, VirtRange,
};
use mmu_tlb::{FreedTables, PageSpan};

use crate::entries::clearing::ProgramsMayRun;
use crate::entries::leaf_size::Small;
use crate::entries::part::TablePart;
use crate::entries::zap_loop::{are_plain, zap_entries, zap_plain};
use crate::flush_policy::{
    Scope, flush, flush_dirty, scope_before_the_last, scope_of_the_last, stale_writes,
};
use crate::flushed_gather::FlushedGather;
use crate::levels::context::TlbContext;
use crate::limits::Limits;
use crate::mm::MmOf;
use crate::open_gather::OpenGather;
use crate::overlap::reach::{Counted, InTable};
use crate::platform::{GatherEvent, Platform, Vma, VmaKind};
use crate::queue::batch::{NewBatch, Slots};
use crate::queue::freed_pages::{FreedPages, Which};
use crate::queue::held::{Held, written};
use crate::queue::spare::SpareSlots;
use crate::queue::waiting::Covered;
use crate::queue::word::{BatchWord, DelayedRmaps, Runs};
use crate::range::FlushRange;
use crate::state::DeferredFlushes;

/// The pages, not looked at yet.
pub(crate) struct OneTable<'k, 'm, K: Platform> {
    kernel: &'k K,
    mm: &'m MmOf<K::Context>,
    area: K::Area,
    range: VirtRange,
    table: TableView<'k>,
}

/// What becomes of the last-level table.
#[derive(Clone, Copy)]
pub(crate) enum TableGoes {
    No,
    /// These let it go, and keep the tables above.
    Yes(Bounds),
}

/// The table, locked, while no flush is owed. It counts as an open gather.
struct Locked<'k, 'm, K: Platform + 'k>
where
    K::Lock: 'k,
{
    open: OpenGather<'m, K::Context, InTable<'m>>,
    table: LockedTable<'k, GuardOf<'k, K>>,
    clear: ProgramsMayRun,
}

/// Cleared pages, for which nobody has flushed yet. It counts as an open gather.
///
/// If a call of the kernel unwinds while this is held, the pages leak; the gather is closed, and
/// the flush that it owes is left to whoever looks next.
///
/// No function that is called out of line gets a reference to it, so that it stays in registers;
/// the words of the pages lie in a variable of the driver.
#[must_use]
pub(crate) struct Cleared<'k, 'm, K: Platform> {
    kernel: &'k K,
    mm: &'m MmOf<K::Context>,
    open: OpenGather<'m, K::Context, InTable<'m>>,
    range: VirtRange,
    /// How many words the slots on the stack have.
    nr_few: u32,
    batch: Option<NewBatch<'k, K>>,
    /// What CPUs must forget.
    to_flush: Option<VirtRange>,
    /// That of a flush under the lock.
    receipt: Option<Covered>,
}

impl<'k, 'm, K: Platform> OneTable<'k, 'm, K> {
    /// The pages that `range` of `vma` is, if they have counts, lie in one table, and are not part
    /// of a large leaf.
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
        if vma.kind != VmaKind::Normal || !space.user_range().covers(range) {
            return None;
        }
        // SAFETY: passed on to our caller: no table inside an area is freed while we walk.
        let table = unsafe { space.last_level_table(kernel, range) }?;
        Some(Self { kernel, mm, area: vma.area, range, table })
    }

    /// Whether `bounds` let the last-level table go, or keep all tables. `None` if they let tables
    /// above it go, too.
    #[inline(always)]
    pub(crate) fn fate_of_table(&self, bounds: Bounds) -> Option<TableGoes> {
        let goes = |level| bounds.allow_unhooking(VirtRange::of_entry(level, self.range.start()));
        match (goes(Level::Pmd), goes(Level::Pud)) {
            (false, _) => Some(TableGoes::No),
            (true, false) => Some(TableGoes::Yes(bounds)),
            (true, true) => None,
        }
    }

    /// Clears the pages, which are [few](Limits::are_few), and stores their words in `few`. `None`
    /// if a gather has to do it: nothing was done then.
    #[inline(always)]
    pub(crate) fn clear_few(self, few: &mut Slots) -> Option<Cleared<'k, 'm, K>> {
        let Self { kernel, mm, area, range, table } = self;
        let Locked { open, table, clear } = Locked::take(kernel, mm, table, range.start())?;
        let entries = entries(&table, range);
        let (nr_few, leaves, rmaps, mut to_flush);
        if let [entry] = entries
            && are_plain(slice::from_ref(entry), clear)
        {
            // The same as below, without loops.
            let mut spare = SpareSlots::new(few);
            rmaps = zap_plain(kernel, area, slice::from_ref(entry), range.start(), &mut spare, clear);
            (nr_few, leaves) = (as_u32(Limits::BUNDLE_SLOTS - spare.left()), 1);
            to_flush = Some(range);
        } else if entries.len() > 1 && are_plain(entries, clear) {
            let mut spare = SpareSlots::new(few);
            rmaps = zap_plain(kernel, area, entries, range.start(), &mut spare, clear);
            (nr_few, leaves) = (as_u32(Limits::BUNDLE_SLOTS - spare.left()), as_u32(entries.len()));
            to_flush = Some(range);
        } else {
            let done = zap_one_by_one(kernel, area, TablePart::new(&table, range, Level::Pte), few, clear);
            (nr_few, leaves, rmaps, to_flush) = (done.nr_few, done.leaves, done.rmaps, done.cleared);
        }
        let mut receipt = None;
        if rmaps == DelayedRmaps::Queued {
            receipt = flush_dirty_pages(kernel, mm, open.reach(), to_flush, written(few, nr_few));
            to_flush = None;
        }
        drop(table);
        kernel.observe_gather(GatherEvent::LockDropped { leaves });
        kernel.cond_resched();
        Some(Cleared { kernel, mm, open, range, nr_few, batch: None, to_flush, receipt })
    }

    /// Clears the pages, which [fit into a batch page](Limits::fit_into_batch), if all of them are
    /// leaves that plain stores can clear. `None` if a gather has to do it: nothing was done then.
    #[inline(always)]
    pub(crate) fn clear_many(self) -> Option<Cleared<'k, 'm, K>> {
        let Self { kernel, mm, area, range, table } = self;
        let Locked { open, table, clear } = Locked::take(kernel, mm, table, range.start())?;
        let entries = entries(&table, range);
        let page = if are_plain(entries, clear) { kernel.allocate_batch() } else { None };
        let Some(page) = page else {
            drop(table);
            open.close_unused();
            return None;
        };
        let mut batch = NewBatch::made_of(kernel, page);
        let mut spare = batch.lend();
        let rmaps = zap_plain(kernel, area, entries, range.start(), &mut spare, clear);
        let unused = spare.left();
        // SAFETY: they were left just now.
        unsafe { batch.filled(unused) };
        let (mut to_flush, mut receipt) = (Some(range), None);
        if rmaps == DelayedRmaps::Queued {
            receipt = flush_dirty_pages(kernel, mm, open.reach(), to_flush, batch.words());
            to_flush = None;
        }
        kernel.between_look_and_change();
        let first = Level::Pte.index(range.start());
        // SAFETY: all of these entries were cleared under the lock that is still held.
        unsafe { table.forget_cleared_lines(&(first..first + entries.len())) };
        let leaves = as_u32(entries.len());
        drop(table);
        kernel.observe_gather(GatherEvent::LockDropped { leaves });
        kernel.cond_resched();
        let batch = Some(batch);
        Some(Cleared { kernel, mm, open, range, nr_few: 0, batch, to_flush, receipt })
    }
}

impl<'k, 'm, K: Platform> Locked<'k, 'm, K> {
    /// Takes the lock of `table`; `None` if a flush is owed, for which a gather makes up.
    #[inline(always)]
    fn take(kernel: &'k K, mm: &'m MmOf<K::Context>, table: TableView<'k>, address: u64) -> Option<Self> {
        // INVARIANT: G6, the stripe of the table is enough where the table is unhooked, too.
        // Whoever finds the entry empty that has led to it looks into the same 2 MiB, or
        // everywhere.
        let open = OpenGather::new(mm, InTable::of(&mm.gathers(), address));
        kernel.between_gather_steps();
        let table = table.lock(kernel);
        // Before the look at what is owed: a gather that unwinds notes that, and then closes.
        let others = open.reach().has_others(&mm.gathers());
        let stale = stale_writes(others, DeferredFlushes::NotSeen, StaleWrites::Impossible);
        kernel.between_gather_steps();
        if mm.context().has_deferred_flushes() {
            drop(table);
            open.close_unused();
            return None;
        }
        Some(Self { open, table, clear: ProgramsMayRun(stale) })
    }
}

/// The entries of `range` in the last-level table that covers it.
#[inline(always)]
fn entries<'l>(table: &'l LockedTable<'_, impl Sized>, range: VirtRange) -> &'l [Entry] {
    let rest = table.view().table().entries().get(Level::Pte.index(range.start())..).unwrap_or_default();
    // At most 512.
    let nr_pages = usize::try_from(range.nr_pages()).unwrap_or(0);
    rest.get(..nr_pages).unwrap_or_default()
}

impl<'k, K: Platform> Cleared<'k, '_, K> {
    /// Calls `unlink`, unhooks the table if it goes, and makes every CPU forget the pages, and what
    /// other gathers that are open have cleared and not flushed. `few` are the words that
    /// [`clear_few`](OneTable::clear_few) stored.
    ///
    /// # Safety
    /// If the table goes, as for [`MmuGather::free_pgtables`](crate::MmuGather::free_pgtables).
    #[inline(always)]
    pub(crate) unsafe fn finish(
        self,
        limits: &Limits,
        few: &Slots,
        goes: TableGoes,
        unlink: impl FnOnce(),
    ) -> FlushedGather<'k, K> {
        let Self { kernel, mm, open, range, nr_few, batch, to_flush, mut receipt } = self;
        unlink();
        let mut table = None;
        if let TableGoes::Yes(bounds) = goes {
            // SAFETY: passed on to our caller.
            table = unsafe { unhook(kernel, mm, range, bounds) };
        }
        let (span, tables) = match table {
            None => (to_flush.map(span_of), FreedTables::No),
            Some(_) => (Some(span_with_table(to_flush, range.start())), FreedTables::Yes),
        };
        let own = if span.is_none() { Scope::Nothing } else { Scope::Range };
        let scope = scope_of_the_last(kernel, mm, open.reach(), own);
        if scope != Scope::Nothing {
            receipt = Some(flush(kernel, mm, scope, span, tables));
        }
        kernel.between_gather_steps();
        let first = batch.map(NewBatch::keep);
        // INVARIANT: G6, after the flush.
        open.close_unused();
        let waits = nr_few > 0 || first.is_some() || table.is_some();
        let receipt = if waits { receipt } else { None };
        let held = Held { few: *few, nr_few, runs: Runs::Absent, first, table, table_batch: None };
        FlushedGather { kernel, held, free_chunk: limits.free_chunk.max(1), receipt }
    }
}

/// A number of entries of one table.
#[expect(clippy::cast_possible_truncation, reason = "at most 512")]
#[inline(always)]
const fn as_u32(entries: usize) -> u32 {
    (entries & 0xfff) as u32
}

/// What was done under the lock.
struct Done {
    nr_few: u32,
    leaves: u32,
    rmaps: DelayedRmaps,
    /// What CPUs must forget.
    cleared: Option<VirtRange>,
}

/// The general loop, for entries that are not all alike.
#[inline(never)]
fn zap_one_by_one<K: Platform>(
    kernel: &K,
    area: K::Area,
    part: TablePart<'_>,
    few: &mut Slots,
    clear: ProgramsMayRun,
) -> Done {
    let mut spare = SpareSlots::new(few);
    let done = zap_entries(kernel, area, &part, part.first, &mut spare, Small, clear);
    debug_assert!(done.next == part.end, "G5: few pages, and no room for them");
    Done {
        nr_few: as_u32(Limits::BUNDLE_SLOTS - spare.left()),
        leaves: as_u32(done.leaves),
        rmaps: done.rmaps,
        cleared: done.cleared(&part, Level::Pte),
    }
}

/// [`flush_dirty`] for the pages. Their words keep the mark "delay rmap", which nobody reads again.
#[cold]
#[inline(never)]
fn flush_dirty_pages<K: Platform>(
    kernel: &K,
    mm: &MmOf<K::Context>,
    reach: InTable<'_>,
    cleared: Option<VirtRange>,
    words: &[BatchWord],
) -> Option<Covered> {
    flush_dirty(
        kernel,
        || {
            let scope = scope_before_the_last(mm, reach, Scope::Range);
            cleared.map(|range| flush(kernel, mm, scope, Some(span_of(range)), FreedTables::No))
        },
        |receipt| {
            kernel.remove_rmaps(FreedPages::new(words, Which::DelayedRmap, Runs::Absent));
            receipt
        },
    )
}

#[inline(always)]
const fn span_of(pages: VirtRange) -> PageSpan {
    PageSpan { start: pages.start(), end: pages.end(), stride_shift: Level::Pte.entry_shift() }
}

/// What is to be flushed if the table went, too, which covered `address`.
#[cold]
fn span_with_table(pages: Option<VirtRange>, address: u64) -> PageSpan {
    let mut range = FlushRange::empty();
    if let Some(pages) = pages {
        range.cleared(pages, Level::Pte);
    }
    range.unhooked(Level::Pte, address);
    range.span_of_some()
}

/// Unhooks the last-level table of `range`, if there is one.
///
/// # Safety
/// As for [`OneTable::unmap`], with bounds that let it go, and none above it.
#[inline(never)]
unsafe fn unhook<K: Platform>(
    kernel: &K,
    mm: &MmOf<K::Context>,
    range: VirtRange,
    bounds: Bounds,
) -> Option<BatchWord> {
    let mut unhooked = None;
    let sink = |table: UnhookedTable| {
        kernel.observe_gather(GatherEvent::TableUnhooked(table.level()));
        unhooked = Some(BatchWord::page(table.frame()));
        kernel.cond_resched();
    };
    // SAFETY: passed on to our caller, who queues the table, and flushes for it.
    unsafe { mm.space().unhook_tables(kernel, range, bounds, sink) };
    unhooked
}
