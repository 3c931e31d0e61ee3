//! How much a gather may hold before it must flush.

/// What a gather may assume about other users of the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GatherMode {
    /// Other CPUs may run programs in it: entries are cleared with a locked exchange, unless hardware has nothing left to set
    /// in them ([`EntryValue::is_settled`](mmu_pagetable::EntryValue::is_settled)).
    ///
    /// There is no mode of its own for a single CPU. Were entries cleared there with plain stores, a program that preempts in
    /// between could set a dirty bit that is then lost; were pages freed at once, it could use a stale entry (such a mode was
    /// removed from Linux for that reason). That flushes are local, [`OnlineCpus::One`](mmu_tlb::OnlineCpus::One) says.
    Shared,
    /// The whole address space is dying and no program runs in it any more, though lazy CPUs may have it loaded: plain
    /// stores, full flushes. The first makes the lazy CPUs leave, so the later ones find nobody to interrupt, and nothing is
    /// gained by holding much: a gather in this mode takes one batch page at the most
    /// ([`Limits::EXIT_BATCH_PAGES`]), whatever its limits.
    FullMm,
}

/// Capacities, all of them upper bounds of what one gather keeps unfreed.
///
/// The default is Linux's. Tests shrink them so that every boundary runs; a kernel short of memory may too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// WordSink used of the eight on the stack; 2 to 8. Linux: MMU_GATHER_BUNDLE.
    pub bundle_slots: u16,
    /// WordSink used of the 510 in a batch page; 2 to 510. Linux: MAX_GATHER_BATCH.
    pub batch_slots: u16,
    /// Batch pages a gather takes at the most, one after the other: 19 pages are 9690 slots, "below 10 000 pages a
    /// flush is safe without a preemption point". Linux: MAX_GATHER_BATCH_COUNT.
    pub batch_pages: u16,
    /// Tables used of the 511 in a table batch page; 1 to 511. Linux: MAX_TABLE_BATCH.
    pub table_slots: u16,
    /// Pages handed to [`free_pages`](crate::Pages::free_pages) at a time, between preemption points, unless a single run is
    /// longer; at least 1. Linux: MAX_NR_FOLIOS_PER_FREE.
    pub free_chunk: u16,
}

impl Limits {
    /// WordSink on the stack.
    pub const BUNDLE_SLOTS: usize = 8;
    /// WordSink in a batch page: (4096 - 8 for the link - 8 for the length) / 8.
    pub const BATCH_SLOTS: usize = 510;
    /// Tables in a table batch page: (4096 - 8 for the length) / 8.
    pub const TABLE_SLOTS: usize = 511;

    /// Batch pages that the gather of a dying address space takes at the most.
    ///
    /// Its first flush makes lazy CPUs leave, and later ones interrupt nobody: they cost a generation each. Metadata and slots of 516
    /// pages stay in the first-level cache until the pages are freed, those of 9678 do not: 1.06 times the plain floor in dense
    /// memory instead of 1.19 (benches/README.md, W1). Freed smaller still, fetching metadata ahead begins anew too often.
    pub const EXIT_BATCH_PAGES: u16 = 1;
    /// Large leaves that it frees at a time. Their metadata lies far apart, often in a few sets of the caches; the processor waits
    /// for it while it clears the next ones.
    pub(crate) const EXIT_LARGE_LEAVES: usize = 64;

    /// Linux's capacities.
    pub const DEFAULT: Self = Self {
        bundle_slots: 8,
        batch_slots: 510,
        batch_pages: 10_000 / 510,
        table_slots: 511,
        free_chunk: 512,
    };

    /// Limits for a teardown of about `nr_pages` pages: as few flushes as [`DEFAULT`](Self::DEFAULT) comes to, and no more held
    /// unfreed than those need.
    ///
    /// Up to 9677 pages that is one flush. Beyond, flushes are forced, and under the default the last one is of whatever is
    /// left: 10 000 pages make one of 9678 and one of 322. Here both are of 5000, so half as much memory waits at the peak.
    /// A wrong guess costs speed or memory, never the result (rule G4). A run counts as two pages.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "at most 19 pages of 510 slots, as the default's")]
    pub const fn for_pages(nr_pages: u64) -> Self {
        let default = Self::DEFAULT;
        // A bundle and a batch count as full one slot early.
        let in_bundle = default.bundle_slots as u64 - 1;
        let in_batch = default.batch_slots as u64 - 1;
        let flushes = nr_pages / (in_bundle + default.batch_pages as u64 * in_batch) + 1;
        // One more than each flush gets, or the last would be forced, and the one at the end come on top.
        let beyond_bundle = (nr_pages / flushes + 1).saturating_sub(in_bundle);
        let batch_pages = beyond_bundle.div_ceil(in_batch);
        if batch_pages == 0 {
            return Self { batch_pages: 0, ..default };
        }
        let batch_slots = beyond_bundle.div_ceil(batch_pages) + 1;
        Self { batch_pages: batch_pages as u16, batch_slots: batch_slots as u16, ..default }
    }

    /// These limits, as far as a gather in `mode` can use them.
    #[inline]
    pub(crate) const fn usable_in(self, mode: GatherMode) -> Self {
        match mode {
            GatherMode::FullMm if self.batch_pages > Self::EXIT_BATCH_PAGES => {
                Self { batch_pages: Self::EXIT_BATCH_PAGES, ..self }
            }
            _ => self,
        }
    }

    /// The same limits with every value brought into its legal range.
    #[must_use]
    #[inline]
    pub fn clamped(self) -> Self {
        Self {
            bundle_slots: self.bundle_slots.clamp(2, 8),
            batch_slots: self.batch_slots.clamp(2, 510),
            batch_pages: self.batch_pages,
            table_slots: self.table_slots.clamp(1, 511),
            free_chunk: self.free_chunk.max(1),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}
