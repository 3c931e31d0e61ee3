//! Changing what programs may do with an area: mprotect.
#![expect(unsafe_code, reason = "walks tables under the map lock")]

use mmu_gather::MmuGather;
use mmu_gather::pagetable::{Decoded, EntryValue, Level, LockedTable, TableView, VirtRange};
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

use crate::kernel::{Error, Kernel};
use crate::machine::{Machine, Note, UnderMapLock};
use crate::mm::Mm;
use crate::vma::{Area, Protection, Vma};

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
        for vma in vmas.iter() {
            if let Some(part) = vma.range.intersect(range) {
                // SAFETY: the map lock is held for writing.
                let root = unsafe { mm.engine.space().root_table(self) };
                self.protect_table(&mut gather, vma, root, part);
            }
        }
        let flushed = gather.flush();
        self.note_protected(mm, range, protection);
        drop(vmas);
        flushed.free();
        Ok(())
    }

    fn protect_table(
        &self,
        gather: &mut MmuGather<'_, '_, Self>,
        vma: &Vma,
        view: TableView<'_>,
        range: VirtRange,
    ) {
        let level = view.level();
        if level == Level::Pte {
            let locked = view.lock(self);
            gather.note_deferred_flushes();
            for address in view.used_parts(self, range).addresses() {
                self.protect_leaf(gather, vma.area, &locked, address);
            }
            drop(locked);
            self.machine.cond_resched();
            return;
        }
        for address in view.used_parts(self, range).addresses() {
            match view.load(address).decode(level) {
                Decoded::Table(_) => {
                    // SAFETY: the map lock is held for writing.
                    if let Some(child) = unsafe { view.child(self, address) } {
                        self.protect_table(gather, vma, child, range.within_entry(level, address));
                    }
                }
                Decoded::Leaf(_) => {
                    self.protect_leaf(gather, vma.area, &view.lock(self), address);
                    self.machine.cond_resched();
                }
                Decoded::Empty | Decoded::NonPresent(_) => {}
            }
        }
        // What was passed over may be empty because reclaim is still to flush it.
        gather.note_deferred_flushes_of(view);
    }

    fn protect_leaf(
        &self,
        gather: &mut MmuGather<'_, '_, Self>,
        area: Area,
        locked: &LockedTable<'_, impl Sized>,
        address: u64,
    ) {
        let level = locked.view().level();
        let entry = locked.entry(address);
        let mut old = entry.load();
        while let Decoded::Leaf(page) = old.decode(level) {
            let rights = PageTableFlags::USER_ACCESSIBLE | PageTableFlags::WRITABLE;
            let frame = PhysFrame::containing_address(page);
            let wanted = match area.protection {
                Protection::Nothing => PageTableFlags::empty(),
                Protection::Write if self.may_write_in_place(area, frame) => rights,
                Protection::Read | Protection::Write => PageTableFlags::USER_ACCESSIBLE,
            };
            let new = EntryValue::from_bits(old.bits() & !rights.bits() | wanted.bits());
            // Hardware may set A/D meanwhile; then look again.
            // SAFETY: the area allows what is put in, of the same page, and the gather is told of
            // what is lost before the lock drops.
            match unsafe { entry.compare_exchange(old, new) } {
                Ok(()) => {
                    let lost = old.bits() & !new.bits() & rights.bits();
                    if lost != 0 {
                        self.machine.note(Note::Restricted { address, level, frame });
                        gather.changed(VirtRange::of_entry(level, address), level);
                    }
                    return;
                }
                Err(found) => old = found,
            }
        }
    }
}

/// The last level of every walk here is one that has leaves.
const _: () = assert!(Level::Pte.may_be_leaf());
