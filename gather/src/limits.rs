//! How much a gather may hold before it must flush.

/// What a gather may assume about other users of the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GatherMode {
    /// Other CPUs may run programs in it: entries are cleared with a locked exchange, unless
    /// hardware has nothing left to set in them
    /// ([`EntryValue::is_settled`](mmu_pagetable::EntryValue::is_settled)).
    ///
    /// There is no mode for a machine with a single CPU. If it cleared entries with plain stores, a
    /// program that preempts between load and store could set a dirty bit that is then lost. If it
    /// freed pages at once, that program could use a stale entry; Linux removed such a mode for
    /// that reason. That flushes stay local on one CPU is decided below, by
    /// [`OnlineCpus::One`](mmu_tlb::OnlineCpus::One).
    Shared,
    /// The whole address space is dying and no program runs in it any more, though lazy CPUs may
    /// have it loaded: plain stores, full flushes.
    ///
    /// The first flush makes the lazy CPUs leave, so later ones find nobody to interrupt, and
    /// nothing is gained by holding much. A gather in this mode takes one batch page at the most
    /// ([`Limits::EXIT_BATCH_PAGES`]), whatever its limits.
    FullMm,
}

/// Upper bounds of what one gather keeps unfreed.
///
/// The default is Linux's. Tests shrink the limits so that every boundary is reached, and a kernel
/// short of memory may shrink them, too.
///
/// Starts from [`DEFAULT`](Self::DEFAULT) or [`for_pages`](Self::for_pages) and says what differs;
/// a later version may add a bound, and no caller changes for it.
///
/// # Examples
/// ```
/// # use mmu_gather::Limits;
/// const SMALL: Limits = Limits::DEFAULT.with_batch_pages(2).with_batch_slots(64);
/// assert_eq!((SMALL.batch_pages, SMALL.batch_slots), (2, 64));
/// assert_eq!(SMALL.free_chunk, Limits::DEFAULT.free_chunk);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Slots used of the eight on the stack: 2 to 8. Linux: MMU_GATHER_BUNDLE.
    pub bundle_slots: u16,
    /// Slots used of the 510 in a batch page: 2 to 510. Linux: MAX_GATHER_BATCH.
    pub batch_slots: u16,
    /// Batch pages that a gather takes at the most, one after the other. By default 19, which are
    /// 9690 slots: "below 10 000 pages a flush is safe without a preemption point". Linux:
    /// MAX_GATHER_BATCH_COUNT.
    pub batch_pages: u16,
    /// Tables that wait at the most, in a batch page of 511 slots, which is taken for the second: 1
    /// to 511. Linux: MAX_TABLE_BATCH.
    pub table_slots: u16,
    /// Pages handed to [`free_pages`](crate::Pages::free_pages) at a time, between two preemption
    /// points, unless a single run is longer; at least 1. Linux: MAX_NR_FOLIOS_PER_FREE.
    pub free_chunk: u16,
}

impl Limits {
    /// Slots on the stack.
    pub const BUNDLE_SLOTS: usize = 8;
    /// Slots in a batch page: (4096 - 8 for the link - 8 for the length) / 8.
    pub const BATCH_SLOTS: usize = 510;
    /// Slots in a batch page of tables: (4096 - 8 for the length) / 8.
    pub const TABLE_SLOTS: usize = 511;

    /// Batch pages that the gather of a dying address space takes at the most.
    ///
    /// Its first flush makes lazy CPUs leave, and later ones interrupt nobody: each costs a
    /// generation. Metadata and slots of 516 pages stay in the first-level cache until the pages
    /// are freed, those of 9678 do not: dense memory takes 1.06 times the plain floor instead of
    /// 1.19 (benches/README.md, W1). With smaller batches, fetching metadata ahead would start anew
    /// too often.
    pub const EXIT_BATCH_PAGES: u16 = 1;
    /// Large leaves that the gather of a dying address space frees at a time. Their metadata lies
    /// far apart, often in a few sets of the caches; so few at a time, the processor waits for it
    /// while it clears the next leaves.
    pub(crate) const EXIT_LARGE_LEAVES: usize = 64;

    /// Linux's capacities.
    pub const DEFAULT: Self = Self {
        bundle_slots: 8,
        batch_slots: 510,
        batch_pages: 10_000 / 510,
        table_slots: 511,
        free_chunk: 512,
    };

    /// Limits for a teardown of about `nr_pages` pages: as few flushes as with
    /// [`DEFAULT`](Self::DEFAULT), and no more held unfreed than those need.
    ///
    /// Up to 9677 pages take one flush. Beyond, flushes are forced, and under the default the last
    /// one is of whatever is left: 10 000 pages make one of 9678 and one of 322. With these limits
    /// both are of 5000, so half as much memory waits at the peak. A wrong guess costs speed or
    /// memory, never the result (rule G4). A run counts as two pages.
    ///
    /// # Examples
    /// ```
    /// # use mmu_gather::Limits;
    /// assert_eq!(Limits::for_pages(6).batch_pages, 0, "they fit on the stack");
    /// // Two flushes of 5000 pages each.
    /// let half = Limits::for_pages(10_000);
    /// assert_eq!((half.batch_pages, Limits::DEFAULT.batch_pages), (10, 19));
    /// ```
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "at most 19 pages of 510 slots, as the default's")]
    pub const fn for_pages(nr_pages: u64) -> Self {
        let default = Self::DEFAULT;
        // A bundle and a batch count as full one slot early.
        let in_bundle = default.bundle_slots as u64 - 1;
        let in_batch = default.batch_slots as u64 - 1;
        let flushes = nr_pages / (in_bundle + default.batch_pages as u64 * in_batch) + 1;
        // One more than each flush gets. Otherwise the last of these flushes would be forced, too,
        // and the flush at the end would be one more.
        let beyond_bundle = (nr_pages / flushes + 1).saturating_sub(in_bundle);
        let batch_pages = beyond_bundle.div_ceil(in_batch);
        if batch_pages == 0 {
            return Self { batch_pages: 0, ..default };
        }
        let batch_slots = beyond_bundle.div_ceil(batch_pages) + 1;
        Self { batch_pages: batch_pages as u16, batch_slots: batch_slots as u16, ..default }
    }

    /// These limits, with [`bundle_slots`](Self::bundle_slots) of the slots on the stack.
    #[must_use]
    #[inline]
    pub const fn with_bundle_slots(self, bundle_slots: u16) -> Self {
        Self { bundle_slots, ..self }
    }

    /// These limits, with [`batch_slots`](Self::batch_slots) of the slots in each batch page.
    #[must_use]
    #[inline]
    pub const fn with_batch_slots(self, batch_slots: u16) -> Self {
        Self { batch_slots, ..self }
    }

    /// These limits, with [`batch_pages`](Self::batch_pages) batch pages at the most; 0 leaves the
    /// slots on the stack alone.
    #[must_use]
    #[inline]
    pub const fn with_batch_pages(self, batch_pages: u16) -> Self {
        Self { batch_pages, ..self }
    }

    /// These limits, with [`table_slots`](Self::table_slots) of the slots in a batch page of
    /// tables.
    #[must_use]
    #[inline]
    pub const fn with_table_slots(self, table_slots: u16) -> Self {
        Self { table_slots, ..self }
    }

    /// These limits, with [`free_chunk`](Self::free_chunk) pages freed at a time.
    #[must_use]
    #[inline]
    pub const fn with_free_chunk(self, free_chunk: u16) -> Self {
        Self { free_chunk, ..self }
    }

    /// Whether so many pages can wait in the slots on the stack.
    #[inline(always)]
    pub(crate) const fn are_few(&self, nr_pages: u64) -> bool {
        nr_pages <= 1 || nr_pages < Self::BUNDLE_SLOTS as u64 && nr_pages < self.bundle_slots as u64
    }

    /// Whether so many pages are not [few](Self::are_few), and can wait in one batch page.
    #[inline(always)]
    pub(crate) const fn fit_into_batch(&self, nr_pages: u64) -> bool {
        let fit = nr_pages < Self::BATCH_SLOTS as u64 && nr_pages < self.batch_slots as u64;
        fit && self.batch_pages > 0 && !self.are_few(nr_pages)
    }

    /// These limits, without what a gather in `mode` has no use for.
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
