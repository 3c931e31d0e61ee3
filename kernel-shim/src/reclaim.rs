//! Taking pages away from programs that do not expect it: reclaim.
#![expect(unsafe_code, reason = "walks tables under the map lock")]

use alloc::vec::Vec;

use mmu_gather::pagetable::{Decoded, EntryValue, Level, NonPresent, TableMemory, VirtRange};
use mmu_gather::tlb::{Cpus, PageSpan, TlbEvent, UnmapBatch};
use x86_64::structures::paging::PhysFrame;

use crate::frame::FrameKind;
use crate::kernel::Kernel;
use crate::machine::{Machine, Note, Place, UnderMapLock};
use crate::mm::Mm;
use crate::supply::{Asked, Scarce, Supply};
use crate::vma::{AreaKind, Vma};

/// A page that no entry maps any more, until it is freed.
struct Taken {
    frame: PhysFrame,
    /// The place in swap that it goes to; none if it is clean.
    slot: Option<u64>,
}

impl<M: Machine> Kernel<M> {
    /// Changes whether gathers get batch pages.
    pub fn set_batch_supply(&self, supply: Supply) {
        self.batch_supply.set(supply);
    }

    /// Changes whether page tables can be had.
    pub fn set_table_supply(&self, supply: Supply) {
        self.table_supply.set(supply);
    }

    /// Changes whether frames for programs' pages can be had.
    pub fn set_frame_supply(&self, supply: Supply) {
        self.frame_supply.set(supply);
    }

    /// What was asked for since the supply of it was set to [`Supply::Nth`].
    pub fn asked(&self, what: Scarce) -> Asked {
        match what {
            Scarce::Batches => self.batch_supply.asked(),
            Scarce::Tables => self.table_supply.asked(),
            Scarce::Frames => self.frame_supply.asked(),
        }
    }

    /// Moves the programs' own pages in these ranges to swap, one flush for all of them; how many
    /// pages of 4 KiB.
    ///
    /// A clean 2 MiB page goes whole and leaves no place in swap: it holds zeroes, which the next
    /// fault brings back. A dirty one stays.
    ///
    /// The map locks are dropped before the flush, so other calls may come in between: they find
    /// entries cleared and not yet flushed, which is what
    /// [`has_deferred_flushes`](mmu_gather::tlb::MmContext::has_deferred_flushes) is for. The pages
    /// are freed after it.
    ///
    /// # Source
    /// Linux: try_to_unmap_one with TTU_BATCH_FLUSH, try_to_unmap_flush, mm/rmap.c.
    #[doc(alias = "try_to_unmap")]
    pub fn reclaim<'m>(&self, victims: impl IntoIterator<Item = (&'m Mm<M>, VirtRange)>) -> u64
    where
        M: 'm,
    {
        let mut batch = UnmapBatch::new();
        let mut taken = Vec::new();
        for (mm, range) in victims {
            self.unmap_to_swap(mm, range, &mut batch, &mut taken);
            self.machine.cond_resched();
        }
        let flushed = batch.flush(self);
        debug_assert!(flushed.is_some() || taken.is_empty(), "G1: pages taken and nothing flushed");
        let nr_pages = |taken: &Taken| match self.frames.meta(taken.frame).kind() {
            FrameKind::Block => Level::Pmd.entry_span() / 4096,
            _ => 1,
        };
        let count = taken.iter().map(nr_pages).sum();
        // Nobody can write to the pages any more.
        for Taken { frame, slot } in &taken {
            if let Some(slot) = *slot {
                self.machine.write_to_disk(*frame, Place::Swap { slot });
                self.swap.written(slot);
            }
        }
        self.drop_references_in_chunks(taken.into_iter().map(|taken| taken.frame));
        count
    }

    fn unmap_to_swap(
        &self,
        mm: &Mm<M>,
        range: VirtRange,
        batch: &mut UnmapBatch<Self>,
        taken: &mut Vec<Taken>,
    ) {
        let vmas = mm.read(&self.machine, UnderMapLock::WaitsForNobody);
        let mut next = range.start();
        while next < range.end() {
            let address = next;
            next += 4096;
            if address.is_multiple_of(Level::Pmd.entry_span()) {
                // Rule G7: no more than one table at a time.
                self.machine.cond_resched();
            }
            // A detached area is being unmapped by another call, which frees its tables.
            let Some(vma) = vmas.find(address) else { continue };
            if vma.area.kind == AreaKind::Pfn {
                // Not memory.
                next = vma.range.end();
                continue;
            }
            // SAFETY: the map lock is held for reading, and the area is not detached: its tables
            // stay.
            let Some(view) = (unsafe { mm.engine.space().find_table(self, address, Level::Pte) }) else {
                let block = VirtRange::of_entry(Level::Pmd, address);
                let frame = self.discard_block(mm, vma, block, batch);
                taken.extend(frame.map(|frame| Taken { frame, slot: None }));
                next = block.end();
                continue;
            };
            let locked = view.lock(self);
            let entry = locked.entry(address);
            let Decoded::Leaf(page) = entry.load().decode(Level::Pte) else { continue };
            let frame = PhysFrame::containing_address(page);
            let meta = self.frames.meta(frame);
            // A page that only this entry uses; others would need their entries found (rmap).
            if meta.kind() != FrameKind::Page || meta.owner() != 0 || !meta.is_exclusive() {
                continue;
            }
            let slot = self.swap.take();
            // In one step, so that a write in between is not lost.
            // SAFETY: the batch is told before the lock drops, and the page is freed after its
            // flush.
            let _old = unsafe { entry.exchange(NonPresent::Swap { device: 0, slot }.encode()) };
            self.machine.note(Note::Cleared { address, level: Level::Pte, frame });
            self.remove_mapping(frame);
            self.note_pending(mm, batch, VirtRange::of_entry(Level::Pte, address), Level::Pte);
            taken.push(Taken { frame, slot: Some(slot) });
        }
    }

    /// Drops the 2 MiB page that `block` is, if it is clean: its first
    /// frame, to be freed after the flush.
    ///
    /// # Source
    /// Linux: unmap_huge_pmd_locked, `__discard_anon_folio_pmd_locked`, mm/huge_memory.c; there
    /// each flushes at once.
    fn discard_block(
        &self,
        mm: &Mm<M>,
        vma: &Vma,
        block: VirtRange,
        batch: &mut UnmapBatch<Self>,
    ) -> Option<PhysFrame> {
        const LEVEL: Level = Level::Pmd;
        if !vma.range.covers(block) {
            return None;
        }
        // SAFETY: as in `unmap_to_swap`.
        let view = unsafe { mm.engine.space().find_table(self, block.start(), LEVEL) }?;
        if view.load(block.start()).is_empty() {
            return None;
        }
        let locked = view.lock(self);
        let entry = locked.entry(block.start());
        let seen = entry.load();
        let Decoded::Leaf(page) = seen.decode(LEVEL) else { return None };
        let frame = PhysFrame::containing_address(page);
        let meta = self.frames.meta(frame);
        if seen.is_dirty() || meta.kind() != FrameKind::Block || meta.owner() != 0 || !meta.is_exclusive() {
            return None;
        }
        self.between_look_and_change();
        // SAFETY: the batch is told before the lock drops, and the page is freed after its flush;
        // or it is put back below.
        let old = unsafe { entry.exchange(EntryValue::EMPTY) };
        self.between_look_and_change();
        if old.is_dirty() {
            // A program wrote to the page since the entry was read, so it goes back. A call that
            // saw the entry empty in between passed it by, as if it had come before the write.
            // SAFETY: the value that was there a moment ago, and no other CPU was told of a change.
            unsafe { entry.store(old) };
            self.note_mapped(mm, block.start(), frame);
            return None;
        }
        self.machine.note(Note::Cleared { address: block.start(), level: LEVEL, frame });
        self.remove_mapping(frame);
        self.note_pending(mm, batch, block, LEVEL);
        Some(frame)
    }

    /// An entry of a table at `level`, which is locked, was cleared, and will be flushed with the
    /// batch.
    fn note_pending(&self, mm: &Mm<M>, batch: &mut UnmapBatch<Self>, cleared: VirtRange, level: Level) {
        let context = mm.engine.context();
        batch.add_mm(self, context);
        // The batch raises the generation; whom to tell comes later, for all of it.
        let span = PageSpan { start: cleared.start(), end: cleared.end(), stride_shift: level.entry_shift() };
        let (ctx_id, tlb_gen) = (context.ctx_id(), context.tlb_gen());
        self.observe(TlbEvent::Raised { ctx_id, tlb_gen, span: Some(span) });
    }
}
