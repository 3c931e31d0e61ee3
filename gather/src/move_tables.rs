//! Moving mapped pages to other addresses: what mremap and the exec stack move need.
#![expect(unsafe_code, reason = "walking follows links between tables")]

use mmu_pagetable::{Decoded, Level, MapError, TableView, VirtRange};

use crate::gather::MmuGather;
use crate::platform::{GatherEvent, Platform};

impl<K: Platform> MmuGather<'_, '_, K> {
    /// Moves every last-level entry of `old` to the same offset from `new_start`. First it links
    /// the tables that are needed there.
    ///
    /// A page keeps its frame, its counts, and its A/D bits. The old translations are flushed
    /// before the table locks drop: whoever takes the lock of the new table next owns the page, may
    /// unmap and free it, or call it clean, and knows nothing of the old address (CVE-2018-18281).
    ///
    /// Ranges may overlap if `new_start` is below.
    ///
    /// # Context
    /// No table lock is held. Sleeps if `allocate_table` does.
    ///
    /// # Errors
    /// [`MapError`] if a table could not be linked, if something is mapped at the new place, or if
    /// a large leaf (or what stands in its place) is in `old`: split those first, all of them.
    /// Nothing was moved then. Tables linked on the way stay:
    /// [`free_pgtables`](Self::free_pgtables) over the new place removes them, now or when its area
    /// goes.
    ///
    /// # Safety
    /// The map lock is held for writing, and the new place is part of an area or will be, so that
    /// nobody else maps there.
    ///
    /// # Source
    /// Linux: move_page_tables, mm/mremap.c.
    pub unsafe fn move_page_tables(&mut self, old: VirtRange, new_start: u64) -> Result<(), MapError> {
        let new_end = new_start.checked_add(old.len_bytes()).ok_or(MapError::NotUserSpace(new_start))?;
        for end in [old.end(), new_end] {
            if end > self.mm.space().mode().user_end() {
                return Err(MapError::NotUserSpace(end));
            }
        }
        self.for_each_table(old, |gather, _, part| {
            gather.prepare_place(old, part, part.start() - old.start() + new_start)
        })?;
        self.for_each_table(old, |gather, view, part| {
            gather.move_entries(view, part, part.start() - old.start() + new_start);
            Ok(())
        })
    }

    /// Calls `visit` for every last-level table that `range` uses, with the part of `range` that
    /// the table covers. Where there is no such table, the lock of the table that could have led to
    /// it is taken once: a large leaf may have been there that reclaim is still to flush.
    ///
    /// # Errors
    /// Those of `visit`; [`MapError::Large`] where there is something other than a table.
    fn for_each_table(
        &mut self,
        range: VirtRange,
        mut visit: impl FnMut(&mut Self, TableView<'_>, VirtRange) -> Result<(), MapError>,
    ) -> Result<(), MapError> {
        let (kernel, mm) = (self.kernel, self.mm);
        let mut address = range.start();
        while address < range.end() {
            // SAFETY: the constructor's caller holds the map lock.
            let view = unsafe { mm.space().lowest_table_of(kernel, range.within_entry(Level::Pte, address)) };
            let part = if view.level() == Level::Pte {
                let part = range.within_entry(Level::Pmd, address);
                visit(self, view, part)?;
                part
            } else {
                let (level, found) = (view.level(), view.load(address));
                // A table found here was linked after the walk, and has nothing to move.
                if !matches!(found.decode(level), Decoded::Empty | Decoded::Table(_)) {
                    return Err(MapError::Large(VirtRange::of_entry(level, address).start(), level, found));
                }
                self.note_deferred_flushes_of(view);
                range.within_entry(level, address)
            };
            kernel.cond_resched();
            address = part.end();
        }
        Ok(())
    }

    /// Links the one or two tables that the entries of `part` move into, and refuses if anything is
    /// mapped there but what is itself to move.
    fn prepare_place(&mut self, old: VirtRange, part: VirtRange, new_start: u64) -> Result<(), MapError> {
        let page = Level::Pte.entry_span();
        let mut address = new_start;
        while address < new_start + part.len_bytes() {
            // SAFETY: the constructor's caller holds the map lock.
            let view = unsafe { self.mm.space().ensure_table(self.kernel, address, Level::Pte) }?;
            let stop = (address | (Level::Pmd.entry_span() - 1)) + 1;
            while address < stop.min(new_start + part.len_bytes()) {
                let found = view.load(address);
                if !found.is_empty() && !old.contains(address) {
                    return Err(MapError::Occupied(address, Level::Pte, found));
                }
                address += page;
            }
        }
        Ok(())
    }

    fn move_entries(&mut self, old_table: TableView<'_>, part: VirtRange, new_start: u64) {
        let mut from = part;
        let mut to = new_start;
        loop {
            // A stretch ends where a table ends, on the new side, too.
            let room = (to | (Level::Pmd.entry_span() - 1)) + 1 - to;
            let stop = from.end().min(from.start() + room);
            let Ok(stretch) = VirtRange::new(from.start(), stop) else { return };
            self.move_stretch(old_table, stretch, to);
            to += stretch.len_bytes();
            match VirtRange::new(stop, from.end()) {
                Ok(rest) => from = rest,
                Err(_) => return,
            }
        }
    }

    /// Moves the entries of `stretch`, which one old and one new table cover.
    fn move_stretch(&mut self, old_table: TableView<'_>, stretch: VirtRange, new_start: u64) {
        let (kernel, mm) = (self.kernel, self.mm);
        // SAFETY: the constructor's caller holds the map lock; `prepare_place` linked the table.
        let Some(new_table) = (unsafe { mm.space().find_table(kernel, new_start, Level::Pte) }) else {
            // Where the places overlap, the old table may be one that was only just linked to move
            // into, and is empty.
            let empty =
                (stretch.start()..stretch.end()).step_by(4096).all(|page| old_table.load(page).is_empty());
            debug_assert!(empty, "no table was prepared at {new_start:#x} for what is mapped in {stretch}");
            return;
        };
        let both = old_table.lock_both(kernel, new_table);
        let (old_locked, new_locked) = (both.first(), both.second());
        self.note_deferred_flushes();
        let mut leaves = 0;
        for page in old_table.used_parts(kernel, stretch).addresses() {
            let entry = old_locked.entry(page);
            if entry.load().is_empty() {
                continue;
            }
            let target_page = page - stretch.start() + new_start;
            let target = new_locked.entry(target_page);
            if !target.load().is_empty() {
                debug_assert!(false, "something is mapped at {target_page:#x}");
                continue;
            }
            kernel.between_look_and_change();
            // SAFETY: its page is mapped again below, and flushed for under these locks.
            let value = unsafe { entry.get_and_clear() };
            if value.is_present() {
                leaves += 1;
                self.state.range.cleared(VirtRange::of_entry(Level::Pte, page), Level::Pte);
            }
            // SAFETY: the target is empty, and the page is not mapped at the old address any more.
            unsafe { target.store(value) };
        }
        kernel.between_look_and_change();
        old_locked.forget_empty_lines(
            &(Level::Pte.index(stretch.start())..Level::Pte.index(stretch.end() - 1) + 1),
        );
        if leaves > 0 {
            // The stated exception of G3: as soon as the locks drop, a page that was moved belongs
            // to whoever takes the lock of its new table.
            kernel.observe_gather(GatherEvent::DirtyFlush);
            self.flush_tlb_only();
        }
        drop(both);
        kernel.observe_gather(GatherEvent::LockDropped { leaves });
    }

    /// The first address in `range` that a large leaf maps:
    /// [`move_page_tables`](Self::move_page_tables) does not move such leaves.
    ///
    /// # Context
    /// No table lock is held; preemption points inside.
    #[must_use]
    pub fn find_large_leaf(&self, range: VirtRange) -> Option<u64> {
        let range = range.intersect(self.mm.space().user_range())?;
        // SAFETY: the constructor's caller holds the map lock.
        let view = unsafe { self.mm.space().lowest_table_of(self.kernel, range) };
        self.large_leaf_below(view, range)
    }

    /// The first address in `range`, inside the span of `view`, that a large leaf maps.
    fn large_leaf_below(&self, view: TableView<'_>, range: VirtRange) -> Option<u64> {
        let level = view.level();
        if level == Level::Pte {
            return None;
        }
        for address in view.used_parts(self.kernel, range).addresses() {
            if matches!(view.load(address).decode(level), Decoded::Leaf(_)) {
                return Some(address);
            }
            // SAFETY: the constructor's caller holds the map lock.
            let found = unsafe { view.child(self.kernel, address) }
                .and_then(|child| self.large_leaf_below(child, range.within_entry(level, address)));
            if found.is_some() {
                return found;
            }
        }
        self.kernel.cond_resched();
        None
    }
}
