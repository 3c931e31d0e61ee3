//! Guard pages: addresses of an area that nobody may use; madvise(MADV_GUARD_INSTALL,
//! MADV_GUARD_REMOVE).
#![expect(unsafe_code, reason = "walks tables under the map lock")]

use core::sync::atomic::Ordering;

use mmu_gather::MmuGather;
use mmu_gather::pagetable::{Decoded, EntryValue, Level, MapError, Marker, NonPresent, TableView, VirtRange};

use crate::kernel::{Error, Kernel};
use crate::machine::{Contents, Machine, Moment, Note, UnderMapLock};
use crate::mm::Mm;
use crate::vma::{AreaKind, Vma, VmaTree};

const GUARD: NonPresent = NonPresent::Marker(Marker::Guard);

/// So often guards are put in while faults may come in between; then faults are kept out.
///
/// Linux: MAX_MADVISE_GUARD_RETRIES, after which the call is begun anew, without an end if faults
/// are that fast.
const TRIES: u32 = 3;

/// What became of the guards of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Installed {
    All,
    /// Faults were faster each time: pages are in some of the places.
    Outrun,
}

/// How one try to fill a range with guards ended.
enum Filled {
    /// Every entry is a guard. What a CPU had cached of the range by this moment was cached from
    /// entries that were cleared before.
    Wholly(Moment),
    /// An entry maps a page: a fault was faster.
    Partly,
}

impl<M: Machine> Kernel<M> {
    /// Drops the pages in `range` and puts guards in their place: faults are refused there,
    /// whatever the area allows; madvise(MADV_GUARD_INSTALL). Several of these, and of other calls
    /// like it, may run at once.
    ///
    /// When this returns no program can use what a CPU had cached of the range. Guards outlive
    /// MADV_DONTNEED, are copied by fork and moved by mremap; they go with their area, or by
    /// [`guard_remove`](Self::guard_remove). Where no area is, nothing happens. Where a fault puts
    /// a page in before the guard comes, all is tried again; the fourth time with the map lock held
    /// for writing, so that no fault is answered.
    ///
    /// # Errors
    /// [`Error::NotPrivate`] if an area in the range is not the program's own; nothing was changed.
    /// [`Error::NoMemory`] if a large page at one end cannot be split, or for want of a page table;
    /// pages may be gone and some guards be in place then.
    ///
    /// # Source
    /// Linux: madvise_guard_install, mm/madvise.c.
    #[doc(alias = "madvise_guard_install")]
    pub fn guard_install(&self, mm: &Mm<M>, range: VirtRange) -> Result<(), Error> {
        let vmas = self.lock_with_whole_ends(mm, range, UnderMapLock::Frees)?;
        if self.install(mm, &vmas, range, TRIES)? == Installed::All {
            return Ok(());
        }
        drop(vmas);
        let vmas = mm.write(&self.machine, UnderMapLock::Frees);
        self.split_ends(mm, &vmas, range)?;
        let installed = self.install(mm, &vmas, range, 1)?;
        debug_assert_eq!(
            installed,
            Installed::All,
            "nobody answers a fault while the map lock is held for writing"
        );
        Ok(())
    }

    /// Takes the guards in `range` out: the next fault there is answered again;
    /// madvise(MADV_GUARD_REMOVE).
    ///
    /// # Errors
    /// [`Error::NotPrivate`], as for [`guard_install`](Self::guard_install).
    ///
    /// # Source
    /// Linux: madvise_guard_remove, mm/madvise.c.
    #[doc(alias = "madvise_guard_remove")]
    pub fn guard_remove(&self, mm: &Mm<M>, range: VirtRange) -> Result<(), Error> {
        let vmas = mm.read(&self.machine, UnderMapLock::WaitsForNobody);
        all_private(&vmas, range)?;
        for vma in vmas.iter() {
            let Some(mut rest) = vma.range.intersect(range) else { continue };
            loop {
                let part = rest.within_entry(Level::Pmd, rest.start());
                // SAFETY: the map lock is held for reading, and no area in the range is detached:
                // its tables stay.
                if let Some(view) = unsafe { mm.engine.space().find_table(self, part.start(), Level::Pte) } {
                    self.take_guards(view, part);
                }
                self.machine.cond_resched();
                let Ok(next) = VirtRange::new(part.end(), rest.end()) else { break };
                rest = next;
            }
        }
        Ok(())
    }

    /// Guards there are now, over all address spaces.
    pub fn guards(&self) -> i64 {
        self.guards.load(Ordering::Relaxed)
    }

    /// Puts guards into the parts of `range` that areas have, in so many tries each. The map lock
    /// is held, for reading at least.
    fn install(&self, mm: &Mm<M>, vmas: &VmaTree, range: VirtRange, tries: u32) -> Result<Installed, Error> {
        all_private(vmas, range)?;
        for vma in vmas.iter() {
            if let Some(part) = vma.range.intersect(range)
                && self.install_in_area(mm, vma, part, tries)? == Installed::Outrun
            {
                return Ok(Installed::Outrun);
            }
        }
        Ok(Installed::All)
    }

    fn install_in_area(
        &self,
        mm: &Mm<M>,
        vma: &Vma,
        part: VirtRange,
        tries: u32,
    ) -> Result<Installed, Error> {
        let mut since = self.machine.moment();
        let began = since;
        self.note_contents(Contents::Discarding { root: mm.root(), range: part, began });
        // SAFETY: the map lock is held until the flush is done; if for reading, other calls like
        // this one may run too.
        let mut gather = unsafe { MmuGather::new(self, &mm.engine) }.with_limits(&self.config.limits);
        let mut result = Ok(Installed::Outrun);
        for _ in 0..tries {
            if let Err(cut) = gather.zap_vma_range(&vma.staying(), part) {
                result = Err(cut.into());
                break;
            }
            match self.fill_with_guards(mm, part) {
                Ok(Filled::Wholly(moment)) => {
                    since = moment;
                    result = Ok(Installed::All);
                    break;
                }
                Ok(Filled::Partly) => self.count().guard_outrun(),
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        // One gather, which flushes after the last guard. An entry that was found empty may have
        // been cleared by another gather: that one has flushed, or it is still open and makes this
        // flush a whole one (rule G6).
        let flushed = gather.flush();
        let caller = self.laziness_here();
        self.machine.note(Note::Discarded { root: mm.root(), range: part, since, caller });
        self.note_contents(Contents::Discarded { root: mm.root(), range: part, began });
        flushed.free();
        result
    }

    /// Puts a guard into every empty entry of `range`, until an entry is found that maps something.
    /// An entry that is another marker stays: it refuses every fault, too, and outlives a discard.
    fn fill_with_guards(&self, mm: &Mm<M>, range: VirtRange) -> Result<Filled, Error> {
        let mut since = None;
        let mut rest = range;
        loop {
            let part = rest.within_entry(Level::Pmd, rest.start());
            // SAFETY: the map lock is held, and the area is not detached: its tables stay.
            let view = match unsafe { mm.engine.space().ensure_table(self, part.start(), Level::Pte) } {
                Ok(view) => view,
                Err(MapError::Occupied(..)) => return Ok(Filled::Partly),
                Err(_) => return Err(Error::NoMemory),
            };
            let locked = view.lock(self);
            let moment = *since.get_or_insert_with(|| self.machine.moment());
            for address in (part.start()..part.end()).step_by(4096) {
                let entry = locked.entry(address);
                match entry.load().decode(Level::Pte) {
                    Decoded::Empty => {
                        self.guards.fetch_add(1, Ordering::Relaxed);
                        // SAFETY: the entry is empty, and a guard maps nothing.
                        unsafe { entry.store(GUARD.encode()) };
                    }
                    Decoded::NonPresent(NonPresent::Marker(_)) => {}
                    _ => return Ok(Filled::Partly),
                }
            }
            drop(locked);
            self.machine.cond_resched();
            let Ok(next) = VirtRange::new(part.end(), rest.end()) else { return Ok(Filled::Wholly(moment)) };
            rest = next;
        }
    }

    /// Clears the guards in `part` of a last-level table. Nothing is cached of them: no flush.
    fn take_guards(&self, view: TableView<'_>, part: VirtRange) {
        let locked = view.lock(self);
        for address in (part.start()..part.end()).step_by(4096) {
            let entry = locked.entry(address);
            if entry.load() == GUARD.encode() {
                // SAFETY: a guard maps nothing: nobody loses anything.
                unsafe { entry.store(EntryValue::EMPTY) };
                self.guards.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let first = Level::Pte.index(part.start());
        // A part of one table: at most 512 entries.
        let entries = locked.entries(part).len();
        locked.forget_empty_lines(&(first..first + entries));
    }
}

/// Guards are for private memory: a shared page would be there for others all the same.
fn all_private(vmas: &VmaTree, range: VirtRange) -> Result<(), Error> {
    let is_private = |vma: &Vma| matches!(vma.area.kind, AreaKind::Anon | AreaKind::FilePrivate(_));
    let parts = vmas.iter().filter_map(|vma| vma.range.intersect(range).filter(|_| !is_private(vma)));
    parts.map(|part| Error::NotPrivate(part.start())).next().map_or(Ok(()), Err)
}
