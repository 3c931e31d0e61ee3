//! Clearing leaves: `zap` removes pages, and leaves the tables where they are.
#![expect(unsafe_code, reason = "walking follows links between tables")]

use mmu_pagetable::{Decoded, Entry, EntryValue, Level, LockedTable, TableView, VirtRange};
use x86_64::structures::paging::PhysFrame;

use crate::batch::Room;
use crate::gather::{GatherMode, MmuGather, PfnMaps};
use crate::platform::{Disposition, Fate, GatherEvent, Platform, UnmappedLeaf, Vma, VmaKind};
use crate::slot::Slot;

/// How one visit under a table lock ended.
struct Visit {
    /// The first address not visited.
    next: u64,
    /// Leaves cleared.
    leaves: u32,
    /// Whether a page must not lose its rmap before a flush under this lock.
    rmaps: DelayedRmaps,
    room: Room,
}

/// What stood, under the lock, where a large leaf had been seen.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    /// The leaf, or whatever else needs no second look.
    Entry,
    /// A table: to be looked into.
    Table,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum DelayedRmaps {
    None,
    Some,
}

impl<K: Platform> MmuGather<'_, K> {
    /// Clears every leaf of `vmas` that lies in `range`, and queues the pages.
    ///
    /// `vmas` comes in ascending order. Does not flush at the end; whoever calls it finishes the gather. A large leaf that
    /// the range cuts is left alone: [`split_leaf`](crate::MmuGather::split_leaf) at both ends of the range first.
    ///
    /// # Context
    /// No table lock is held; preemption points inside.
    ///
    /// # Source
    /// Linux: unmap_vmas, mm/memory.c.
    pub fn unmap_vmas(&mut self, vmas: impl IntoIterator<Item = Vma<K::Area>>, range: VirtRange) {
        for vma in vmas {
            if let Some(part) = vma.range.intersect(range) {
                self.zap_vma_range(&vma, part);
            }
        }
    }

    /// Clears every leaf of `vma` in `range`, which lies inside it.
    ///
    /// # Source
    /// Linux: unmap_page_range (`__zap_vma_range` since 7.1), mm/memory.c.
    #[doc(alias = "unmap_page_range")]
    pub fn zap_vma_range(&mut self, vma: &Vma<K::Area>, range: VirtRange) {
        let Some(range) = range.intersect(self.mm.space().user_range()) else { return };
        if vma.kind == VmaKind::PfnMap {
            self.state.pfn_maps = PfnMaps::Seen;
        }
        let kernel = self.kernel;
        // SAFETY: the constructor's caller holds the map lock: no table inside an area is freed while we walk.
        let root = unsafe { self.mm.space().root_table(kernel) };
        self.zap_table(vma, root, range);
    }

    /// Clears the leaves below `view` in `range`, which lies inside its span.
    #[doc(alias = "zap_pud_range")]
    #[doc(alias = "zap_pmd_range")]
    fn zap_table(&mut self, vma: &Vma<K::Area>, view: TableView<'_>, range: VirtRange) {
        let level = view.level();
        let Some(below) = level.below() else {
            self.zap_pte_range(vma, view, range);
            return;
        };
        let kernel = self.kernel;
        let mut address = range.start();
        while address < range.end() {
            let part = range.within_entry(level, address);
            loop {
                match view.load(address).decode(level) {
                    Decoded::None => break,
                    Decoded::Table(frame) => {
                        // SAFETY: as in `zap_vma_range`; P2: the link leads to a live table of the level below.
                        let child = unsafe { TableView::new(kernel, frame, below) };
                        self.zap_table(vma, child, part);
                        break;
                    }
                    Decoded::Leaf(_) | Decoded::NonPresent(_) => {
                        if self.zap_large(vma, view, part) == Found::Entry {
                            break;
                        }
                    }
                }
            }
            address = part.end();
        }
        kernel.cond_resched();
    }

    /// Clears the entries of `range` in one last-level table, which covers all of it.
    ///
    /// Works through the table in visits: a visit ends at the end of the range or when the queue is full. The forced flush
    /// and the freeing come after the lock was dropped, then the next visit begins where the last one stopped.
    fn zap_pte_range(&mut self, vma: &Vma<K::Area>, view: TableView<'_>, range: VirtRange) {
        let kernel = self.kernel;
        let mut address = range.start();
        while address < range.end() {
            let locked = view.lock(kernel);
            // An entry that is none may have been cleared by reclaim, whose flush is still to come.
            self.note_deferred_flushes();
            let visit = match self.state.mode {
                GatherMode::Shared => {
                    self.zap_visit(vma, &locked, address, range.end(), Entry::get_and_clear)
                }
                GatherMode::SingleCpu | GatherMode::FullMm => {
                    self.zap_visit(vma, &locked, address, range.end(), Entry::get_and_clear_exclusive)
                }
            };
            if visit.rmaps == DelayedRmaps::Some {
                // The stated exception of G3: once the lock drops, writeback may take the page for clean while another
                // CPU still writes to it through an old entry.
                kernel.observe_gather(GatherEvent::DirtyFlush);
                self.flush_tlb_only();
                self.state.pages.remove_delayed_rmaps(kernel);
            }
            drop(locked);
            kernel.observe_gather(GatherEvent::LockDropped { leaves: visit.leaves });
            self.carry_on(visit.room, visit.rmaps);
            address = visit.next;
            kernel.cond_resched();
        }
    }

    /// What must be done between two visits, with no lock held.
    fn carry_on(&mut self, room: Room, rmaps: DelayedRmaps) {
        if room == Room::Full {
            self.forced_flush();
        } else if rmaps == DelayedRmaps::Some {
            // Nothing may wait on with its "delay" mark: it would lose its rmap twice.
            self.flush_mmu();
        }
    }

    /// Clears entries from `address` on until `end` or until the queue is full.
    #[inline]
    fn zap_visit(
        &mut self,
        vma: &Vma<K::Area>,
        locked: &LockedTable<'_, K::Relax>,
        mut address: u64,
        end: u64,
        clear: impl Fn(&Entry) -> EntryValue,
    ) -> Visit {
        let page = Level::Pte.entry_span();
        let mut cleared: Option<VirtRange> = None;
        let mut visit = Visit { next: end, leaves: 0, rmaps: DelayedRmaps::None, room: Room::Left };
        while address < end {
            let entry = locked.entry(address);
            let value = entry.load();
            if value.is_present() {
                // A/D from the exchange, never from the read before it.
                let leaf = unmapped(address, Level::Pte, clear(entry));
                let here = VirtRange::of_entry(Level::Pte, address);
                cleared = Some(cleared.map_or(here, |before| before.union(here)));
                visit.leaves += 1;
                let room = match self.kernel.unmap_page(vma.area, &leaf) {
                    Disposition::Keep => Room::Left,
                    Disposition::Free => {
                        self.state.pages.push(self.kernel, &self.state.limits, Slot::page(leaf.frame))
                    }
                    Disposition::FreeAfterRmap => {
                        visit.rmaps = DelayedRmaps::Some;
                        let slot = Slot::page(leaf.frame);
                        self.state.pages.push_delaying_rmap(self.kernel, &self.state.limits, slot)
                    }
                };
                address += page;
                if room == Room::Full {
                    visit.room = room;
                    visit.next = address;
                    break;
                }
                continue;
            }
            if let Decoded::NonPresent(meaning) = value.decode(Level::Pte)
                && self.kernel.unmap_non_present(vma.area, address, Level::Pte, meaning) == Fate::Clear
            {
                // Nothing is cached from an entry that is not present: no range, no flush.
                entry.store(EntryValue::NONE);
            }
            address += page;
        }
        if let Some(range) = cleared {
            // INVARIANT: G2, before the lock drops.
            self.state.range.cleared(range, Level::Pte);
        }
        visit
    }

    /// Clears a 2 MiB or 1 GiB leaf, or a non-present meaning in its place, if `part` covers all of it.
    #[doc(alias = "zap_huge_pmd")]
    #[doc(alias = "zap_huge_pud")]
    fn zap_large(&mut self, vma: &Vma<K::Area>, view: TableView<'_>, part: VirtRange) -> Found {
        let kernel = self.kernel;
        let level = view.level();
        let whole = VirtRange::of_entry(level, part.start());
        if part != whole {
            debug_assert!(false, "{part} cuts the leaf at {whole}: split it first");
            return Found::Entry;
        }
        let locked = view.lock(kernel);
        self.note_deferred_flushes();
        let entry = locked.entry(part.start());
        let mut room = Room::Left;
        let mut rmaps = DelayedRmaps::None;
        let mut found = Found::Entry;
        match entry.load().decode(level) {
            Decoded::Leaf(_) => {
                let old = match self.state.mode {
                    GatherMode::Shared => entry.get_and_clear(),
                    GatherMode::SingleCpu | GatherMode::FullMm => entry.get_and_clear_exclusive(),
                };
                self.state.range.cleared(whole, level);
                let leaf = unmapped(whole.start(), level, old);
                let slot = Slot::page(leaf.frame);
                match kernel.unmap_page(vma.area, &leaf) {
                    Disposition::Keep => {}
                    Disposition::Free => room = self.state.pages.push(kernel, &self.state.limits, slot),
                    Disposition::FreeAfterRmap => {
                        room = self.state.pages.push_delaying_rmap(kernel, &self.state.limits, slot);
                        kernel.observe_gather(GatherEvent::DirtyFlush);
                        self.flush_tlb_only();
                        self.state.pages.remove_delayed_rmaps(kernel);
                        rmaps = DelayedRmaps::Some;
                    }
                }
            }
            Decoded::NonPresent(meaning) => {
                if kernel.unmap_non_present(vma.area, whole.start(), level, meaning) == Fate::Clear {
                    entry.store(EntryValue::NONE);
                }
            }
            // Somebody else took the page before we had the lock.
            Decoded::None => {}
            // Somebody split it before we had the lock: its pages are still to go.
            Decoded::Table(_) => found = Found::Table,
        }
        drop(locked);
        kernel.observe_gather(GatherEvent::LockDropped { leaves: 1 });
        self.carry_on(room, rmaps);
        found
    }
}

#[inline]
fn unmapped(address: u64, level: Level, value: EntryValue) -> UnmappedLeaf {
    UnmappedLeaf { address, level, value, frame: PhysFrame::containing_address(value.leaf_address(level)) }
}
