//! The 2 MiB page of zeroes, which all programs share: a read brings it where nothing is, and a
//! write puts a page of the program's own in its place.
#![expect(unsafe_code, reason = "walks tables under the map lock")]

use mmu_gather::pagetable::{Decoded, Level, TableMemory, VirtRange};
use mmu_gather::{MmuGather, Pages, UnmappedLeaf};
use x86_64::structures::paging::PhysFrame;

use crate::frame::{BLOCK, FrameKind};
use crate::kernel::Kernel;
use crate::machine::{FrameRole, Machine, Note, UnderMapLock};
use crate::mm::Mm;
use crate::supply::Site;
use crate::vma::{Granule, Protection, Vma};

/// Whether a fault found what it was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replaced {
    Yes,
    /// It was not there, or there is no memory: what is there must be split.
    No,
}

impl<M: Machine> Kernel<M> {
    /// Whether a read at `page` in `vma` is to be answered with the 2 MiB page of zeroes. The map
    /// lock is held, for reading at least.
    pub(crate) fn wants_zero_block(&self, mm: &Mm<M>, vma: &Vma, page: u64) -> bool {
        if vma.area.granule != Granule::Block
            || vma.area.protection == Protection::Nothing
            || !vma.range.covers(VirtRange::of_entry(Level::Pmd, page))
        {
            return false;
        }
        // SAFETY: the map lock is held, and the area is not detached: its tables stay.
        let found = unsafe { mm.engine.space().lookup(self, page) };
        found.level > Level::Pte && found.value.is_empty()
    }

    /// Maps the 2 MiB page of zeroes around `page`, if nothing is there.
    ///
    /// Linux: do_huge_pmd_anonymous_page, mm/huge_memory.c; there under the page table's lock
    /// alone. Here large pages come and go under the map lock held for writing.
    #[doc(alias = "set_huge_zero_folio")]
    pub(crate) fn map_zero_block(&self, mm: &Mm<M>, page: u64) {
        let vmas = mm.write(&self.machine, UnderMapLock::WaitsForNobody);
        let Some(vma) = vmas.find(page).filter(|vma| self.wants_zero_block(mm, vma, page)) else { return };
        let block = VirtRange::of_entry(Level::Pmd, page);
        // SAFETY: the map lock is held, and the area is not detached.
        let Ok(view) = (unsafe { mm.engine.space().ensure_table(self, page, Level::Pmd) }) else { return };
        let locked = view.lock(self);
        let entry = locked.entry(page);
        // Reclaim may have cleared the entry and not flushed: what a CPU has cached of it, then, is
        // as much zeroes as this page.
        if entry.load().is_empty()
            && let Some(zeroes) = self.zero_block()
        {
            // SAFETY: the entry is empty, and the page of zeroes is not counted.
            unsafe { entry.store(self.leaf_at(Level::Pmd, zeroes, vma.area.without_write())) };
            self.note_mapped(mm, block.start(), zeroes);
            self.count().zero_block();
        }
    }

    /// Puts a 2 MiB page of the program's own in the place of the one of zeroes, around `page`.
    ///
    /// The entry is cleared and flushed first: no CPU reads zeroes when another has written.
    ///
    /// Linux: do_huge_zero_wp_pmd, mm/huge_memory.c.
    #[doc(alias = "do_huge_zero_wp_pmd")]
    pub(crate) fn replace_zero_block(&self, mm: &Mm<M>, page: u64) -> Replaced {
        const LEVEL: Level = Level::Pmd;
        let vmas = mm.write(&self.machine, UnderMapLock::Flushes);
        let range = VirtRange::of_entry(LEVEL, page);
        let wants = |vma: &Vma| {
            vma.area.granule == Granule::Block
                && vma.area.protection == Protection::Write
                && vma.range.covers(range)
        };
        let Some(vma) = vmas.find(page).copied().filter(wants) else { return Replaced::No };
        // SAFETY: the map lock is held, and the area is not detached: its tables stay.
        let Some(view) = (unsafe { mm.engine.space().find_table(self, page, LEVEL) }) else {
            return Replaced::No;
        };
        // SAFETY: the map lock is held for writing until the gather has flushed.
        let mut gather = unsafe { MmuGather::new(self, &mm.engine) };
        let locked = view.lock(self);
        let entry = locked.entry(page);
        let Decoded::Leaf(address) = entry.load().decode(LEVEL) else { return Replaced::No };
        let zeroes = PhysFrame::containing_address(address);
        if *self.zero_block.lock() != Some(zeroes) {
            return Replaced::No;
        }
        let Some(new) = self.new_block() else { return Replaced::No };
        self.between_look_and_change();
        // SAFETY: the gather is told before the lock drops, and the page is not counted.
        let value = unsafe { entry.get_and_clear() };
        let leaf = UnmappedLeaf { address: range.start(), level: LEVEL, value, frame: zeroes };
        let _kept = self.unmap_page(vma.staying().area, &leaf);
        gather.changed(range, LEVEL);
        drop(locked);
        let flushed = gather.flush();
        let locked = view.lock(self);
        // SAFETY: the entry has been empty since, for faults wait for the map lock; the page is
        // new.
        unsafe { locked.entry(page).store(self.leaf_at(LEVEL, new, vma.area)) };
        self.note_mapped(mm, range.start(), new);
        drop(locked);
        self.count().zero_block_replaced();
        drop(vmas);
        flushed.free();
        Replaced::Yes
    }

    /// A 2 MiB page of a program, mapped once.
    pub(crate) fn new_block(&self) -> Option<PhysFrame> {
        if !self.may_have_frame(Site::Block) {
            return None;
        }
        let block = self.frames.allocate_block();
        if block.is_none() {
            self.count().frame_refused();
        }
        let block = block?;
        self.frames.meta(block).add_mapping();
        self.machine.note(Note::Allocated(block, FrameRole::Block));
        self.machine.zero_frames(block, u64::from(BLOCK));
        Some(block)
    }

    /// The 2 MiB page of zeroes. Not counted.
    pub(crate) fn zero_block(&self) -> Option<PhysFrame> {
        let mut block = self.zero_block.lock();
        if block.is_none() {
            if !self.may_have_frame(Site::Block) {
                return None;
            }
            let new = self.frames.allocate_block()?;
            self.frames.set_kind(new, FrameKind::Reserved);
            self.machine.note(Note::Allocated(new, FrameRole::Block));
            self.machine.zero_frames(new, u64::from(BLOCK));
            *block = Some(new);
        }
        *block
    }
}
