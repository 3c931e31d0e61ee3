//! Changing what programs may do with an area: mprotect.
#![expect(unsafe_code, reason = "changes entries under the map lock")]

use mmu_gather::MmuGather;
use mmu_gather::pagetable::{EntryValue, Level, VirtRange};
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

use crate::kernel::{Error, Kernel};
use crate::machine::{Machine, Note, UnderMapLock};
use crate::mm::Mm;
use crate::vma::{Area, Protection};

/// What a protection decides of an entry.
const RIGHTS: PageTableFlags = PageTableFlags::USER_ACCESSIBLE.union(PageTableFlags::WRITABLE);

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
            Protection::Nothing => PageTableFlags::empty(),
            Protection::Write if self.may_write_in_place(area, frame) => RIGHTS,
            Protection::Read | Protection::Write => PageTableFlags::USER_ACCESSIBLE,
        };
        if !(old.flags() & RIGHTS).difference(wanted).is_empty() {
            self.machine.note(Note::Restricted { address, level, frame });
        }
        if wanted.contains(PageTableFlags::WRITABLE) && !old.is_writable() {
            self.note_owned(mm, area, address, frame);
        }
        (old.flags() - RIGHTS) | wanted
    }
}
