//! Folios: 16 pages in a row that one fault brings, and that go as one record.
//!
//! They are single pages to everything else: each has its own counts, and reclaim, fork and
//! munmap take them one by one.
#![expect(unsafe_code, reason = "walks tables under the map lock")]

use mmu_gather::pagetable::{Decoded, EntryValue, Level, LockedTable, TableMemory, VirtRange};
use mmu_gather::{Disposition, FlushedGather, GatherEvent, MmuGather, Pages, UnmappedLeaf};
use x86_64::structures::paging::PhysFrame;

use crate::frame::{FOLIO, FrameKind};
use crate::kernel::{Error, Kernel};
use crate::machine::{FrameRole, Machine, Note};
use crate::mm::Mm;
use crate::supply::Site;
use crate::vma::{AreaKind, Granule, Vma};

/// Bytes of a folio.
const BYTES: u64 = FOLIO as u64 * 4096;

const FOLIOS_OF_A_TABLE: usize = 512 / FOLIO as usize;

impl<M: Machine> Kernel<M> {
    /// Maps 16 new pages around `page` in the table that is locked, if the area wants it, nothing
    /// is there, and there are 16 frames in a row. Whether it did.
    pub(crate) fn map_folio<G>(&self, mm: &Mm<M>, vma: &Vma, locked: &LockedTable<'_, G>, page: u64) -> bool {
        let Some(around) = folio_at(page).filter(|around| vma.range.covers(*around)) else { return false };
        let addresses = || (around.start()..around.end()).step_by(4096);
        if vma.area.granule != Granule::Folio
            || vma.area.kind != AreaKind::Anon
            || addresses().any(|address| !locked.entry(address).load().is_empty())
        {
            return false;
        }
        if !self.may_have_frame(Site::Folio) {
            return false;
        }
        let Some(first) = self.frames.allocate_folio() else { return false };
        for frame in (0..u64::from(FOLIO)).map(|number| first + number) {
            self.frames.meta(frame).add_mapping();
            self.machine.note(Note::Allocated(frame, FrameRole::Page));
        }
        self.machine.zero_frames(first, u64::from(FOLIO));
        for (number, address) in (0..).zip(addresses()) {
            let frame = first + number;
            // SAFETY: the entry is empty, and the page is new.
            unsafe { locked.entry(address).store(self.leaf(frame, vma.area)) };
            self.note_mapped(mm, address, frame);
        }
        true
    }

    /// Clears `part` of an area of folios, and flushes for it: folios that lie whole in it go as
    /// one record each, and then what is left, page by page. The map lock is held for reading.
    pub(crate) fn zap_folios(
        &self,
        mm: &Mm<M>,
        vma: &Vma,
        part: VirtRange,
    ) -> Result<FlushedGather<'_, Self>, Error> {
        // SAFETY: the map lock is held for reading until the gather is flushed.
        let mut gather = unsafe { MmuGather::new(self, &mm.engine) }.with_limits(&self.config.limits);
        let mut next = part.start().next_multiple_of(BYTES);
        while next < part.end() {
            let here = part.within_entry(Level::Pmd, next);
            let here = VirtRange::new(next, here.end()).unwrap_or(here);
            self.zap_folios_of_a_table(mm, &mut gather, vma, here);
            next = here.end();
        }
        gather.zap_vma_range(&vma.staying(), part)?;
        Ok(gather.flush())
    }

    /// Clears the entries of each folio that lies whole in `range`, which one table maps, and
    /// queues its pages. What is not a folio, or no longer, is left.
    fn zap_folios_of_a_table(
        &self,
        mm: &Mm<M>,
        gather: &mut MmuGather<'_, '_, Self>,
        vma: &Vma,
        range: VirtRange,
    ) {
        // SAFETY: the map lock is held, and the area is not detached: its tables stay.
        let Some(view) = (unsafe { mm.engine.space().find_table(self, range.start(), Level::Pte) }) else {
            return;
        };
        let mut taken = [None; FOLIOS_OF_A_TABLE];
        let mut leaves = 0;
        let locked = view.lock(self);
        gather.note_deferred_flushes();
        let starts = (range.start()..range.end()).step_by(FOLIO as usize * 4096);
        let whole = starts.filter_map(folio_at).filter(|folio| range.covers(*folio));
        for (place, folio) in taken.iter_mut().zip(whole) {
            let Some(first) = self.first_of_folio(&locked, folio) else { continue };
            for (number, address) in (0..).zip((folio.start()..folio.end()).step_by(4096)) {
                self.between_look_and_change();
                // SAFETY: the gather is told before the lock drops, and the pages are freed through
                // it.
                let value = unsafe { locked.entry(address).get_and_clear() };
                let leaf = UnmappedLeaf { address, level: Level::Pte, value, frame: first + number };
                let disposition = self.unmap_page(vma.staying().area, &leaf);
                debug_assert_eq!(disposition, Disposition::Free, "an anonymous page is counted");
            }
            gather.changed(folio, Level::Pte);
            *place = Some((first, folio));
            leaves += FOLIO;
        }
        drop(locked);
        self.observe_gather(GatherEvent::LockDropped { leaves });
        for (first, folio) in taken.into_iter().flatten() {
            // SAFETY: the entries were cleared just now, and what they held is dropped nowhere
            // else.
            unsafe { gather.remove_pages(first, FOLIO, folio) };
        }
    }

    /// The first frame, if all entries of `range` map pages of programs, in a row.
    fn first_of_folio<G>(&self, locked: &LockedTable<'_, G>, range: VirtRange) -> Option<PhysFrame> {
        let frame_at = |address| match EntryValue::decode(locked.entry(address).load(), Level::Pte) {
            Decoded::Leaf(page) => Some(PhysFrame::containing_address(page)),
            _ => None,
        };
        let first: PhysFrame = frame_at(range.start())?;
        let are_in_a_row = (0..).zip((range.start()..range.end()).step_by(4096)).all(|(number, address)| {
            frame_at(address) == Some(first + number)
                && self.frames.meta(first + number).kind() == FrameKind::Page
        });
        are_in_a_row.then_some(first)
    }
}

/// The 16 pages around `page`.
fn folio_at(page: u64) -> Option<VirtRange> {
    let start = page & !(BYTES - 1);
    VirtRange::new(start, start + BYTES).ok()
}
