//! Clearing leaves: `zap` removes pages, and keeps the tables.
#![expect(unsafe_code, reason = "walking follows links between tables")]

use core::mem;

use mmu_pagetable::{Decoded, Level, LockedTable, StaleWrites, TableView, VirtRange};

use crate::cut_leaf::CutLeaf;
use crate::entries::clearing::{Clear, NoProgramRuns, ProgramsMayRun};
use crate::entries::leaf_size::{Large, Leaves, Small};
use crate::entries::part::TablePart;
use crate::entries::progress::{Kept, Stop};
use crate::entries::zap_loop::zap_entries;
use crate::flush_policy::{flush_dirty, stale_writes};
use crate::gather::MmuGather;
use crate::limits::{GatherMode, Limits};
use crate::open_gather::OwesFlush;
use crate::overlap::reach::Counted;
use crate::platform::{GatherEvent, Platform, Vma, VmaKind};
use crate::queue::spare::Room;
use crate::queue::word::DelayedRmaps;
use crate::state::{DeferredFlushes, PfnMaps};

/// A table is fetched so many tables before its turn: in sparse memory each has a line of entries
/// that is in no cache.
const FETCH_AHEAD: u64 = 16;

/// How one visit under a table lock ended.
struct Visit {
    /// The first address not visited.
    next: u64,
    /// Leaves cleared.
    leaves: usize,
    /// Whether pages were queued that lose their rmaps only after a flush under this lock.
    rmaps: DelayedRmaps,
    room: Room,
}

/// Whether entries above the last level were found empty, without their lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Passed {
    Nothing,
    Empty,
}

impl<'k, K: Platform> MmuGather<'k, '_, K> {
    /// Clears every leaf of `vmas` that lies in `range`, and queues the pages.
    ///
    /// `vmas` comes in ascending order. There is no flush at the end: the caller finishes the
    /// gather.
    ///
    /// # Context
    /// No table lock is held; preemption points inside.
    ///
    /// # Errors
    /// [`CutLeaf`] if the range, or an area, ends in the middle of a large leaf. That leaf is still
    /// mapped, and everything else is not. The error cannot come back after
    /// [`split_leaf`](crate::MmuGather::split_leaf) at both ends, nor from a gather of a dying
    /// address space, which unmaps the whole leaf.
    ///
    /// # Source
    /// Linux: unmap_vmas, mm/memory.c.
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
    /// // Part of the first area, and all of the second.
    /// gather.unmap_vmas([low, high], area(0x3000, 0x10_0000).range)?;
    /// gather.flush().free();
    /// assert_eq!(kernel.freed_pages.get(), 3);
    /// assert!(kernel.touch(CPU[0], &mm, 0x1000) && !kernel.touch(CPU[0], &mm, 0x3000));
    /// # Ok(())
    /// # }
    /// ```
    pub fn unmap_vmas(
        &mut self,
        vmas: impl IntoIterator<Item = Vma<K::Area>>,
        range: VirtRange,
    ) -> Result<(), CutLeaf> {
        self.zap_vmas(vmas, range);
        self.report_cut_leaf()
    }

    fn zap_vmas(&mut self, vmas: impl IntoIterator<Item = Vma<K::Area>>, range: VirtRange) {
        let Some(range) = range.intersect(self.mm.space().user_range()) else { return };
        let mut vmas = vmas.into_iter().filter_map(|vma| Some((vma, vma.range.intersect(range)?)));
        let Some((mut vma, mut part)) = vmas.next() else { return };
        let mut table = self.last_level_table(part);
        // The walk is one area ahead: while this one is cleared, the caches fetch the entries that
        // the next one needs.
        for (next_vma, next_part) in vmas {
            let next_table = self.last_level_table(next_part);
            if let Some(table) = next_table {
                table.prefetch_entries(self.kernel, next_part);
            }
            self.zap_user_range(&vma, part, table);
            (vma, part, table) = (next_vma, next_part, next_table);
        }
        self.zap_user_range(&vma, part, table);
    }

    /// Clears every leaf of `vma` in `range`, which lies inside it.
    ///
    /// # Errors
    /// As for [`unmap_vmas`](Self::unmap_vmas).
    ///
    /// # Source
    /// Linux: unmap_page_range (`__zap_vma_range` since 7.1), mm/memory.c.
    #[doc(alias = "unmap_page_range")]
    pub fn zap_vma_range(&mut self, vma: &Vma<K::Area>, range: VirtRange) -> Result<(), CutLeaf> {
        if let Some(range) = range.intersect(self.mm.space().user_range()) {
            self.zap_user_range(vma, range, self.last_level_table(range));
        }
        self.report_cut_leaf()
    }

    /// Reports a leaf that was kept because a range cut it, if there is one; no leaf is reported
    /// twice.
    #[inline]
    fn report_cut_leaf(&mut self) -> Result<(), CutLeaf> {
        self.state.cut.take().map_or(Ok(()), Err)
    }

    /// `table` is the [`last_level_table`](Self::last_level_table) of `range`. It stays a table
    /// until the map lock is dropped.
    #[inline]
    fn zap_user_range(&mut self, vma: &Vma<K::Area>, range: VirtRange, table: Option<TableView<'k>>) {
        if vma.kind == VmaKind::PfnMap {
            self.state.pfn_maps = PfnMaps::Seen;
        }
        if let Some(view) = table {
            self.zap_pte_range(vma, view, range);
            return;
        }
        // SAFETY: the constructor's caller holds the map lock: no table inside an area is freed
        // while we walk.
        let view = unsafe { self.mm.space().lowest_table_of(self.kernel, range) };
        self.zap_table(vma, view, range);
    }

    #[inline]
    fn last_level_table(&self, range: VirtRange) -> Option<TableView<'k>> {
        // SAFETY: as in `zap_user_range`.
        unsafe { self.mm.space().last_level_table(self.kernel, range) }
    }

    /// Clears the leaves below `view` in `range`, which lies inside the span of `view`.
    #[doc(alias = "zap_pud_range")]
    #[doc(alias = "zap_pmd_range")]
    fn zap_table(&mut self, vma: &Vma<K::Area>, view: TableView<'_>, range: VirtRange) {
        let level = view.level();
        let Some(below) = level.below() else {
            self.zap_pte_range(vma, view, range);
            return;
        };
        let kernel = self.kernel;
        // The end of what was looked at: the next part begins there if nothing was passed over.
        let mut seen_up_to = range.start();
        let mut passed_over = Passed::Nothing;
        for used in view.used_parts(kernel, range) {
            let mut address = used.start();
            if address != seen_up_to {
                passed_over = Passed::Empty;
            }
            seen_up_to = used.end();
            while address < used.end() {
                let part = used.within_entry(level, address);
                address = match view.load(address).decode(level) {
                    Decoded::Empty => {
                        passed_over = Passed::Empty;
                        part.end()
                    }
                    Decoded::Table(frame) => {
                        self.prefetch_table(view, address + FETCH_AHEAD * level.entry_span(), used);
                        // SAFETY: as in `zap_user_range`; by P2 the link leads to a live table of
                        // the level below.
                        let child = unsafe { TableView::new(kernel, frame, below) };
                        self.zap_table(vma, child, part);
                        part.end()
                    }
                    Decoded::Leaf(_) | Decoded::NonPresent(_) => {
                        self.zap_large(vma, view, address, used.end())
                    }
                };
            }
        }
        if passed_over == Passed::Empty || seen_up_to != range.end() {
            // An entry may be empty because reclaim has just cleared a large leaf there, and has
            // not flushed yet.
            self.note_deferred_flushes_of(view);
        }
        kernel.cond_resched();
    }

    /// Has the cache fetch what is looked at first in the table that the entry for `address` points
    /// to, if `address` lies in `range`.
    #[inline]
    fn prefetch_table(&self, view: TableView<'_>, address: u64, range: VirtRange) {
        if range.contains(address) {
            // SAFETY: as in `zap_user_range`.
            if let Some(child) = unsafe { view.child(self.kernel, address) } {
                child.prefetch(self.kernel);
            }
        }
    }

    /// Clears the entries of `range` in one last-level table, which covers all of it.
    ///
    /// It works through the table in visits. A visit ends at the end of the range, or when the
    /// queue is full: then the lock is dropped, what waits is flushed for and freed, and the next
    /// visit begins where the last one stopped.
    #[inline(never)]
    fn zap_pte_range(&mut self, vma: &Vma<K::Area>, view: TableView<'_>, range: VirtRange) {
        let mut rest = range;
        loop {
            let next = self.visit(vma, view, rest, Small);
            match VirtRange::new(next, range.end()) {
                Ok(left) => rest = left,
                Err(_) => break,
            }
        }
    }

    /// Clears the 2 MiB or 1 GiB leaves, and what stands in their place and is not present, from
    /// `address` on until `end`, or until an entry points to a table; returns where that is.
    ///
    /// A leaf that reaches beyond either end is kept, and noted. In a dying address space the whole
    /// leaf is unmapped.
    #[doc(alias = "zap_huge_pmd")]
    #[doc(alias = "zap_huge_pud")]
    fn zap_large(&mut self, vma: &Vma<K::Area>, view: TableView<'_>, address: u64, end: u64) -> u64 {
        let level = view.level();
        let span = level.entry_span();
        let (mut whole_start, mut whole_end) = (address, end & !(span - 1));
        if self.unmaps_whole_leaves() {
            whole_start &= !(span - 1);
            whole_end = (end + (span - 1)) & !(span - 1);
            whole_end = whole_end.min(whole_start.saturating_add(span * Limits::EXIT_LARGE_LEAVES as u64));
        }
        match VirtRange::new(whole_start, whole_end) {
            // Never back to before `address`: the entry that the start was rounded down to may
            // point to a table by now.
            Ok(whole) if whole_start.is_multiple_of(span) => {
                self.visit(vma, view, whole, Large(level)).max(address)
            }
            _ => {
                let range = VirtRange::of_entry(level, address);
                if matches!(view.load(address).decode(level), Decoded::Leaf(_)) {
                    self.state.cut.get_or_insert(CutLeaf { address: range.start(), level });
                } else {
                    // It may have been a leaf a moment ago, which reclaim has just cleared.
                    self.note_deferred_flushes_of(view);
                }
                range.end().min(end)
            }
        }
    }

    /// Takes the lock of `view` and clears entries of `range` until its end, until the queue is
    /// full, or until an entry points to a table. Then it flushes and frees if need be, with no
    /// lock held, and returns the first address not visited.
    fn visit(
        &mut self,
        vma: &Vma<K::Area>,
        view: TableView<'_>,
        range: VirtRange,
        leaves: impl Leaves,
    ) -> u64 {
        let kernel = self.kernel;
        let locked = view.lock(kernel);
        // Before the look at what is owed: a gather that unwinds notes that, and then closes.
        // Nobody looks at it where no program runs.
        let others = self.state.mode == GatherMode::Shared && self.has_others_in(leaves.level(), range);
        let others = stale_writes(others, self.state.deferred, self.state.rights);
        kernel.between_gather_steps();
        // An empty entry may have been cleared by reclaim, whose flush is still to come.
        self.note_deferred_flushes();
        let visit = match self.state.mode {
            GatherMode::Shared => {
                let stale = match self.state.deferred {
                    DeferredFlushes::Seen => StaleWrites::Possible,
                    DeferredFlushes::NotSeen => others,
                };
                let clear = ProgramsMayRun(stale);
                self.clear_entries(vma, &locked, range, leaves, clear)
            }
            GatherMode::FullMm => self.clear_entries(vma, &locked, range, leaves, NoProgramRuns),
        };
        if visit.rmaps == DelayedRmaps::Queued {
            // The stated exception of G3.
            let gather = &mut *self;
            flush_dirty(
                kernel,
                || {
                    gather.flush_tlb_only();
                    gather
                },
                |gather| gather.waiting.pages.remove_delayed_rmaps(kernel),
            );
        }
        drop(locked);
        // At most 512 a table.
        let leaves = u32::try_from(visit.leaves).unwrap_or(u32::MAX);
        kernel.observe_gather(GatherEvent::LockDropped { leaves });
        self.flush_after_visit(visit.room, visit.rmaps);
        kernel.cond_resched();
        visit.next
    }

    /// Whether large leaves are unmapped whole, and freed [`Limits::EXIT_LARGE_LEAVES`] at a time:
    /// in a dying address space, where a flush costs next to nothing.
    /// Whether another gather is open that may have changed an entry of `range`, which one table of
    /// `level` covers.
    #[inline(never)]
    fn has_others_in(&self, level: Level, range: VirtRange) -> bool {
        let (reach, gathers) = (self.state.reach, self.mm.gathers());
        if level == Level::Pte {
            reach.has_others_in_table(&gathers, range.start())
        } else {
            reach.has_others(&gathers)
        }
    }

    fn unmaps_whole_leaves(&self) -> bool {
        self.state.mode == GatherMode::FullMm
    }

    /// Flushes and frees after a visit, if need be, with no lock held.
    fn flush_after_visit(&mut self, room: Room, rmaps: DelayedRmaps) {
        if room == Room::Full {
            self.forced_flush();
        } else if rmaps == DelayedRmaps::Queued {
            // A page must not wait any longer with its mark "delay rmap": it would lose its rmap
            // twice.
            self.flush_mmu();
        }
    }

    /// Clears the entries of `range`, batch by batch, and notes what must be flushed.
    #[inline]
    fn clear_entries(
        &mut self,
        vma: &Vma<K::Area>,
        locked: &LockedTable<'_, impl Sized>,
        range: VirtRange,
        leaves: impl Leaves,
        clear: impl Clear,
    ) -> Visit {
        let kernel = self.kernel;
        let level = leaves.level();
        let part = TablePart::new(locked, range, level);
        let mut next = part.first;
        let mut kept = Kept::Nothing;
        let mut visit = Visit { next: range.end(), leaves: 0, rmaps: DelayedRmaps::Absent, room: Room::Left };
        // If a call of the kernel unwinds, what was cleared is not noted: the flush is left to
        // whoever looks next.
        let owes_flush = OwesFlush(self.mm.context());
        loop {
            let (done, room) = self.waiting.pages.fill_batch(&self.limits, |spare| {
                zap_entries(kernel, vma.area, &part, next, spare, leaves, clear)
            });
            next = done.next;
            visit.leaves += done.leaves;
            if let Some(cleared) = done.cleared(&part, level) {
                // INVARIANT: G2, before the lock drops.
                self.state.range.cleared(cleared, level);
            }
            if done.kept == Kept::Something {
                kept = Kept::Something;
            }
            if done.rmaps == DelayedRmaps::Queued {
                visit.rmaps = DelayedRmaps::Queued;
                self.waiting.pages.note_delayed_rmaps();
            }
            // At the end of the range a new batch page is not asked for, until there is something
            // to put into it.
            if room == Room::Full && (next != part.end || !self.waiting.pages.needs_new_page(&self.limits)) {
                visit.room = self.waiting.pages.next_batch(kernel, &self.limits);
            }
            if next == part.end || visit.room == Room::Full || done.stop == Stop::Table {
                break;
            }
        }
        mem::forget(owes_flush);
        if level > Level::Pte && visit.leaves >= Limits::EXIT_LARGE_LEAVES && self.unmaps_whole_leaves() {
            visit.room = Room::Full;
        }
        if next != part.end {
            visit.next = part.address(next, level);
        }
        if kept == Kept::Nothing {
            kernel.between_look_and_change();
            // SAFETY: the loop has passed these entries under the lock that is still held, and kept
            // none of them.
            unsafe { locked.forget_cleared_lines(&(part.first..next)) };
        }
        visit
    }
}
