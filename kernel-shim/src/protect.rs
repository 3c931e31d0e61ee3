//! Changing what programs may do with an area: mprotect.
#![expect(unsafe_code, reason = "changes entries under the map lock")]

use mmu_gather::pagetable::{Decoded, EntryValue, Level, TableMemory, VirtRange};
use mmu_gather::{FlushedGather, MmuGather, zap_page_range};
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

use crate::kernel::{Discarding, Error, Kernel};
use crate::machine::{Machine, Note, UnderMapLock};
use crate::mm::Mm;
use crate::vma::{Area, Granule, Protection, Vma};

/// What a protection decides of an entry.
const RIGHTS: PageTableFlags =
    PageTableFlags::USER_ACCESSIBLE.union(PageTableFlags::WRITABLE).union(PageTableFlags::NO_EXECUTE);

/// The most pages of one discard whose right to write is taken away first: it is done page by page.
const PROTECTED_FIRST: u64 = 2048;

impl<M: Machine> Kernel<M> {
    /// Sets the protection of every area in `range`; mprotect(2).
    ///
    /// # Errors
    /// [`Error::NoMemory`] if a large page at one end cannot be split; nothing was changed then.
    pub fn mprotect(&self, mm: &Mm<M>, range: VirtRange, protection: Protection) -> Result<(), Error> {
        let mut vmas = mm.write(&self.machine, UnderMapLock::Flushes);
        self.split_ends(mm, &vmas, range)?;
        vmas.cut(range.start());
        vmas.cut(range.end());
        vmas.update(range, |area| area.protection = protection);
        // SAFETY: the map lock is held for writing until the gather is finished.
        let mut gather = unsafe { MmuGather::new(self, &mm.engine) }.with_limits(&self.config.limits);
        let parts = vmas.iter().filter(|vma| vma.range.intersect(range).is_some());
        self.machine.note(Note::Areas(parts.count()));
        for vma in vmas.iter() {
            if let Some(part) = vma.range.intersect(range) {
                let area = vma.area;
                let mut last = None;
                // SAFETY: the area allows what `rights_of` answers, and no fault comes before the
                // map lock is dropped.
                let changed = unsafe {
                    gather.change_protection(part, |address, level, old| {
                        if last.replace(address) == Some(address) {
                            self.count().protect_retried();
                        }
                        self.rights_of(mm, area, address, level, old)
                    })
                };
                debug_assert!(changed.is_ok(), "large pages were split at both ends: {changed:?}");
            }
        }
        let flushed = gather.flush();
        self.note_protected(mm, range, protection);
        drop(vmas);
        flushed.free();
        Ok(())
    }

    /// Clears what a discard takes out of `part` of an area, and flushes for it. The map lock is
    /// held for reading.
    pub(crate) fn zap_discarded(
        &self,
        mm: &Mm<M>,
        vma: &Vma,
        part: VirtRange,
    ) -> Result<FlushedGather<'_, Self>, Error> {
        if self.config.discarding == Discarding::WriteProtectedFirst
            && (2..=PROTECTED_FIRST).contains(&part.nr_pages())
        {
            return self.write_protect_and_zap(mm, vma, part);
        }
        if vma.area.granule == Granule::Folio {
            return self.zap_folios(mm, vma, part);
        }
        // SAFETY: the map lock is held for reading until the flush is done; other calls like this
        // one may run too.
        Ok(unsafe { zap_page_range(self, &mm.engine, &self.config.limits, &vma.staying(), part) }?)
    }

    /// Takes the right to write away from the small pages of `part`, which lies in `vma`, and then
    /// clears them, in one gather: [`Discarding::WriteProtectedFirst`].
    ///
    /// A program that writes meanwhile gets the right back from its fault.
    ///
    /// # Context
    /// The map lock is held for reading.
    ///
    /// [`Discarding::WriteProtectedFirst`]: crate::Discarding::WriteProtectedFirst
    fn write_protect_and_zap(
        &self,
        mm: &Mm<M>,
        vma: &Vma,
        part: VirtRange,
    ) -> Result<FlushedGather<'_, Self>, Error> {
        // SAFETY: the map lock is held for reading until the gather is flushed.
        let mut gather = unsafe { MmuGather::new(self, &mm.engine) }.with_limits(&self.config.limits);
        let mut next = part.start();
        while next < part.end() {
            // Few at a time: other calls get in between, which is what this is for.
            let few = part.within_entry(Level::Pmd, next);
            let few = VirtRange::new(next, few.end().min(next + 4 * 4096)).unwrap_or(few);
            self.write_protect(mm, &mut gather, few);
            self.machine.cond_resched();
            next = few.end();
        }
        gather.zap_vma_range(&vma.staying(), part)?;
        Ok(gather.flush())
    }

    /// Takes the right to write away from the small pages of `range`, which one table maps.
    fn write_protect(&self, mm: &Mm<M>, gather: &mut MmuGather<'_, '_, Self>, range: VirtRange) {
        // SAFETY: the map lock is held for reading, and the area is not detached: its tables stay.
        let view = unsafe { mm.engine.space().find_table(self, range.start(), Level::Pte) };
        let Some(view) = view else { return };
        let locked = view.lock(self);
        for address in (range.start()..range.end()).step_by(4096) {
            let old = locked.entry(address).load();
            if !matches!(old.decode(Level::Pte), Decoded::Leaf(_)) || !old.is_writable() {
                continue;
            }
            let new = EntryValue::from_bits(old.bits() & !PageTableFlags::WRITABLE.bits());
            self.between_look_and_change();
            // If hardware sets A or D meanwhile, the page stays writable for now.
            // SAFETY: the gather is told before the lock drops.
            if unsafe { locked.entry(address).compare_exchange(old, new) }.is_ok() {
                gather.changed(VirtRange::of_entry(Level::Pte, address), Level::Pte);
            }
        }
    }

    /// What programs may do with the page that `old` maps, as its area says now.
    fn rights_of(
        &self,
        mm: &Mm<M>,
        area: Area,
        address: u64,
        level: Level,
        old: EntryValue,
    ) -> PageTableFlags {
        let frame = PhysFrame::containing_address(old.leaf_address(level));
        let wanted = match area.protection {
            Protection::Write if !self.may_write_in_place(area, frame) => area.protection.without_write(),
            wanted => wanted,
        };
        let wanted = self.flags_of(wanted);
        let gives = |flags: PageTableFlags| (flags & RIGHTS).symmetric_difference(PageTableFlags::NO_EXECUTE);
        if !gives(old.flags()).difference(gives(wanted)).is_empty() {
            self.machine.note(Note::Restricted { address, level, frame });
        }
        if wanted.contains(PageTableFlags::WRITABLE) && !old.is_writable() {
            self.note_owned(mm, area, address, frame);
        }
        (old.flags() - RIGHTS) | wanted
    }
}
