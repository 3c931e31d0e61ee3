//! What is put into a gather: pages whose entries are cleared, tables that are unhooked, and notes
//! of entries that changed otherwise.
#![expect(unsafe_code, reason = "the entry is cleared by the caller; a table may be freed alone")]

use mmu_pagetable::{Level, StaleWrites, UnhookedTable, VirtRange};
use x86_64::structures::paging::PhysFrame;

use crate::gather::MmuGather;
use crate::platform::{GatherEvent, Platform};
use crate::queue::spare::Room;
use crate::queue::table_batch::TableQueued;
use crate::queue::word::BatchWord;

impl<K: Platform> MmuGather<'_, '_, K> {
    /// Notes that entries of `level` tables covering `range` lost rights, or changed otherwise in a
    /// way that CPUs must not miss: for mprotect and its like, which queue no page.
    ///
    /// The gather is begun before the first entry changes. Another gather that clears such an entry
    /// relies on that: an entry that is read-only now may still get its dirty bit set until the
    /// flush.
    ///
    /// # Context
    /// The lock of the table is still held.
    ///
    /// # Source
    /// Linux: tlb_flush_pte_range, include/asm-generic/tlb.h.
    #[doc(alias = "tlb_flush_pte_range")]
    pub fn changed(&mut self, range: VirtRange, level: Level) {
        self.state.range.cleared(range, level);
        self.state.rights = StaleWrites::Possible;
    }

    /// Queues the page at `frame`, whose `level` entry covering `cleared` the caller has just
    /// cleared. Flushes and frees if that fills the gather.
    ///
    /// # Context
    /// No table lock is held.
    ///
    /// # Safety
    /// - The entry of a `level` table of this address space that mapped `frame` at `cleared` is
    ///   empty, cleared by the caller in one step
    ///   ([`LockedEntry::get_and_clear`](mmu_pagetable::LockedEntry::get_and_clear));
    /// - nobody else queues or frees what it held: one reference on the page, which now belongs to
    ///   the gather;
    /// - no other mapping relies on that reference.
    ///
    /// # Source
    /// Linux: tlb_remove_page, include/asm-generic/tlb.h.
    #[doc(alias = "tlb_remove_page")]
    pub unsafe fn remove_page(&mut self, frame: PhysFrame, cleared: VirtRange, level: Level) {
        self.make_room();
        self.state.range.cleared(cleared, level);
        if self.waiting.pages.push(self.kernel, &self.limits, BatchWord::page(frame)) == Room::Full {
            self.forced_flush();
        }
    }

    /// Queues `nr_pages` references on the frames from `frame` on, as one run, which takes two
    /// slots; otherwise as [`remove_page`](Self::remove_page).
    ///
    /// # Safety
    /// As for [`remove_page`](Self::remove_page), for each of the `nr_pages` frames and the
    /// last-level entries of `cleared`.
    ///
    /// # Source
    /// Linux: tlb_remove_page with encoded nr_pages, since folios are unmapped in runs.
    #[doc(alias = "__tlb_remove_folio_pages")]
    pub unsafe fn remove_pages(&mut self, frame: PhysFrame, nr_pages: u32, cleared: VirtRange) {
        self.make_room();
        self.state.range.cleared(cleared, Level::Pte);
        let run = BatchWord::run(frame, nr_pages);
        if self.waiting.pages.push_run(self.kernel, &self.limits, run) == Room::Full {
            self.forced_flush();
        }
    }

    /// Queues a table that was unhooked. `address` lies in its span and was given up by the caller.
    ///
    /// If no batch page can be had, the table is flushed for and freed at once, alone (rule G4).
    ///
    /// # Context
    /// No table lock is held.
    ///
    /// # Panics
    /// If the table was part of another address space, or does not cover `address`: the flush would
    /// not cover the table then.
    ///
    /// # Source
    /// Linux: tlb_remove_table, mm/mmu_gather.c.
    #[doc(alias = "tlb_remove_table")]
    pub fn remove_table(&mut self, table: UnhookedTable, address: u64) {
        assert!(table.root() == self.mm.space().root(), "G1: {table:?} belongs to another address space");
        assert!(table.span().contains(address), "G2: {address:#x} was not translated through {table:?}");
        self.queue_table(&table, address);
    }

    /// As [`remove_table`](Self::remove_table), for a table of this address space that covers
    /// `address`.
    #[inline]
    pub(crate) fn queue_table(&mut self, table: &UnhookedTable, address: u64) {
        self.kernel.observe_gather(GatherEvent::TableUnhooked(table.level()));
        self.state.range.unhooked(table.level(), address);
        match self.waiting.tables.push(self.kernel, &self.limits, table.frame()) {
            TableQueued::RoomLeft => {}
            TableQueued::Full => self.forced_flush(),
            TableQueued::NoBatch(alone) => {
                self.kernel.observe_gather(GatherEvent::TableFallback);
                self.flush_tlb_only();
                // INVARIANT: G1, `range` held this table, so the flush just made covers it.
                let receipt = self.take_receipt();
                // SAFETY: it was taken in as an `UnhookedTable`, of which there is one alone, and
                // has been flushed for just now.
                unsafe { self.kernel.free_tables(&[alone]) };
                self.free_all(receipt);
            }
        }
    }

    /// Makes room for a page or run, if the visit of a table used up the room and nothing was
    /// queued since.
    #[inline]
    fn make_room(&mut self) {
        if self.waiting.pages.is_full(&self.limits)
            && self.waiting.pages.next_batch(self.kernel, &self.limits) == Room::Full
        {
            self.forced_flush();
        }
    }
}
