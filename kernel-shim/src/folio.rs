//! Folios: 16 pages in a row that one fault brings, and that go as one record.
//!
//! They are single pages to everything else: each has its own counts, and reclaim, fork and
//! munmap take them one by one.
#![expect(unsafe_code, reason = "walks tables under the map lock")]

use mmu_gather::pagetable::{Decoded, EntryValue, Level, LockedTable, TableMemory, VirtRange};
use mmu_gather::{Disposition, GatherEvent, MmuGather, Pages, UnmappedLeaf};
use x86_64::structures::paging::PhysFrame;

use crate::fault::leaf;
use crate::frame::{FOLIO, FrameKind};
use crate::kernel::Kernel;
use crate::machine::{FrameRole, Machine, Note};
use crate::mm::Mm;
use crate::vma::{AreaKind, Granule, Vma};

/// Bytes of a folio.
const BYTES: u64 = FOLIO as u64 * 4096;

impl<M: Machine> Kernel<M> {
    /// Maps 16 new pages around `page` in the table that is locked, if the area wants it, nothing is
    /// there, and there are 16 frames in a row. Whether it did.
    pub(crate) fn map_folio<G>(&self, mm: &Mm<M>, vma: &Vma, locked: &LockedTable<'_, G>, page: u64) -> bool {
        let Some(around) = folio_at(page).filter(|around| vma.range.covers(*around)) else { return false };
        let addresses = || (around.start()..around.end()).step_by(4096);
        if vma.area.granule != Granule::Folio
            || vma.area.kind != AreaKind::Anon
            || addresses().any(|address| !locked.entry(address).load().is_empty())
        {
            return false;
        }
        let Some(first) = self.frames.allocate_folio() else { return false };
        for (number, address) in (0..).zip(addresses()) {
            let frame = first + number;
            self.frames.meta(frame).add_mapping();
            self.machine.note(Note::Allocated(frame, FrameRole::Page));
            // SAFETY: the entry is empty, and the page is new.
            unsafe { locked.entry(address).store(leaf(frame, vma.area.protection)) };
            self.note_mapped(mm, address, frame);
        }
        true
    }

    /// Takes the folios that lie whole in `part` of an area of folios, each as one record, and frees
    /// them. What is not a folio, or no longer, is left.
    ///
    /// # Safety
    /// As for [`zap_page_range`](mmu_gather::zap_page_range).
    pub(crate) unsafe fn zap_folios(&self, mm: &Mm<M>, vma: &Vma, part: VirtRange) {
        // SAFETY: passed on to our caller.
        let mut gather = unsafe { MmuGather::new(self, &mm.engine) }.with_limits(&self.config.limits);
        let mut address = part.start().next_multiple_of(BYTES);
        while let Some(folio) = folio_at(address).filter(|folio| part.covers(*folio)) {
            // SAFETY: passed on to our caller.
            unsafe { self.zap_folio(mm, &mut gather, vma, folio) };
            address = folio.end();
        }
        gather.flush().free();
    }

    /// Clears the entries of `range` and queues their pages, if these are 16 frames in a row.
    ///
    /// # Safety
    /// As for [`zap_folios`](Self::zap_folios).
    unsafe fn zap_folio(
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
        let locked = view.lock(self);
        gather.note_deferred_flushes();
        let Some(first) = self.first_of_folio(&locked, range) else { return };
        for (number, address) in (0..).zip((range.start()..range.end()).step_by(4096)) {
            self.between_look_and_change();
            // SAFETY: the gather is told before the lock drops, and the pages are freed through it.
            let value = unsafe { locked.entry(address).get_and_clear() };
            let leaf = UnmappedLeaf { address, level: Level::Pte, value, frame: first + number };
            let disposition = self.unmap_page(vma.staying().area, &leaf);
            debug_assert_eq!(disposition, Disposition::Free, "an anonymous page is counted");
        }
        gather.changed(range, Level::Pte);
        drop(locked);
        self.observe_gather(GatherEvent::LockDropped { leaves: FOLIO });
        // SAFETY: the entries were cleared just now, and what they held is dropped nowhere else.
        unsafe { gather.remove_pages(first, FOLIO, range) };
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
