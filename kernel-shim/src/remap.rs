//! Resizing and moving areas: mremap.
#![expect(unsafe_code, reason = "the engine takes the map lock on trust")]

use mmu_gather::pagetable::VirtRange;
use mmu_gather::{MmuGather, unmap_region};

use crate::kernel::{Error, Kernel};
use crate::machine::{Contents, Machine, UnderMapLock};
use crate::mm::Mm;
use crate::vma::{Area, Vma, VmaTree};

impl<M: Machine> Kernel<M> {
    /// Moves what is mapped in `old`, which lies in one area, to `new`, unmapping what was there;
    /// mremap(2) with MREMAP_FIXED. A shorter `new` drops the rest, a longer one adds an empty
    /// tail.
    ///
    /// # Errors
    /// [`Error::NoArea`] if `old` is not inside one area; [`Error::Overlap`] if the two overlap;
    /// [`Error::NoMemory`]. The target may be unmapped already in the last case, and if another
    /// call has changed the areas meanwhile.
    pub fn mremap(&self, mm: &Mm<M>, old: VirtRange, new: VirtRange) -> Result<(), Error> {
        if old.intersect(new).is_some() {
            return Err(Error::Overlap(new));
        }
        if !mm.engine.space().user_range().covers(new) {
            return Err(Error::NotUserSpace(new.end()));
        }
        let find_source = |vmas: &VmaTree| {
            let vma = vmas.find(old.start()).copied().filter(|vma| vma.range.covers(old));
            vma.ok_or(Error::NoArea(old.start()))
        };
        // Before anything is unmapped; and again below, for other calls may come in between.
        find_source(&mm.read(&self.machine, UnderMapLock::WaitsForNobody))?;
        self.munmap(mm, new)?;
        let mut vmas = mm.write(&self.machine, UnderMapLock::FreesEarly);
        let vma = find_source(&vmas)?;
        if vmas.overlaps(new) {
            return Err(Error::Overlap(new));
        }
        self.split_ends(mm, &vmas, old)?;
        // SAFETY: the map lock is held for writing until the gather has flushed.
        let mut gather = unsafe { MmuGather::new(self, &mm.engine) }.with_limits(&self.config.limits);
        self.split_all(&mut gather, &vma, old)?;
        let moved_bytes = old.len_bytes().min(new.len_bytes());
        let moving =
            VirtRange::new(old.start(), old.start() + moved_bytes).map_err(|_| Error::NoArea(old.start()))?;
        let root = mm.root();
        self.note_contents(Contents::Moving { root, from: moving, to: new.start() });
        // SAFETY: the map lock is held for writing, and nothing is mapped at the new place.
        let moved = unsafe { gather.move_page_tables(moving, new.start()) };
        drop(gather.flush());
        self.note_contents(Contents::Moved { root, from: moving, to: new.start() });
        if moved.is_err() {
            if let Ok(back) = VirtRange::new(new.start(), new.start() + moved_bytes) {
                self.note_moved(mm, back, old.start());
            }
            let flushed = self.drop_empty_tables(mm, &vmas, new);
            drop(vmas);
            drop(flushed);
            return Err(Error::NoMemory);
        }

        let detached = vmas.detach(old);
        let shift = (old.start() >> 12).wrapping_sub(new.start() >> 12);
        let area = Area { file_base: vma.area.file_base.wrapping_add(shift), ..vma.area };
        let inserted = vmas.insert(Vma { range: new, area });
        debug_assert!(inserted.is_ok(), "nothing was mapped at {new}");
        if let Ok(more) = VirtRange::new(new.start() + moved_bytes, new.end()) {
            self.note_shown(mm, Vma { range: more, area });
        }
        let bounds = vmas.bounds_around(old);
        let vmas = vmas.downgrade(UnderMapLock::FreesEarly);
        let going = detached.iter().map(Vma::going_away);
        // SAFETY: as in `munmap`: the areas are detached, and the map lock is held, for reading,
        // until the flush is done.
        let flushed = unsafe { unmap_region(self, &mm.engine, &self.config.limits, going, bounds, || {}) }?;
        self.note_unmapped(mm, old);
        drop(vmas);
        flushed.free();
        Ok(())
    }

    /// Lets an area that ends at `old_end` end at `new_end` instead, if nothing is in the way;
    /// brk(2), mremap(2) in place.
    ///
    /// # Errors
    /// [`Error::NoArea`], [`Error::Overlap`]; [`Error::NoMemory`] if a large page at the new end
    /// cannot be split.
    pub fn resize(&self, mm: &Mm<M>, old_end: u64, new_end: u64) -> Result<(), Error> {
        if let Ok(tail) = VirtRange::new(new_end, old_end) {
            return self.munmap(mm, tail);
        }
        let Ok(more) = VirtRange::new(old_end, new_end) else { return Ok(()) };
        if !mm.engine.space().user_range().covers(more) {
            return Err(Error::NotUserSpace(new_end));
        }
        let mut vmas = mm.write(&self.machine, UnderMapLock::WaitsForNobody);
        let below = old_end.checked_sub(4096).and_then(|last| vmas.find(last).copied());
        let vma = below.filter(|vma| vma.range.end() == old_end).ok_or(Error::NoArea(old_end))?;
        if vmas.overlaps(more) {
            return Err(Error::Overlap(more));
        }
        vmas.detach(vma.range);
        let inserted = vmas.insert(Vma { range: vma.range.union(more), ..vma });
        debug_assert!(inserted.is_ok(), "nothing was mapped at {more}");
        self.note_shown(mm, Vma { range: more, ..vma });
        Ok(())
    }
}
