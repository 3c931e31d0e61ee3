//! What happens in one teardown, counted: the same in every run.

use core::cell::Cell;
use core::ptr;

use mmu_gather::tlb::TlbEvent;
use mmu_gather::{FreedPages, GatherEvent};
use mmu_measured::shape::Shape;
use serde::Serialize;
use x86_64::structures::paging::PhysFrame;

use crate::sweep::captured_process::page_bytes;
use crate::sweep::machine::Watcher;

/// What happened in one teardown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Counts {
    /// Pages cleared and freed.
    pub pages: u64,
    /// Tables freed.
    pub tables: u64,
    /// Flushes asked for, forced ones and the one at the end.
    pub flushes: u64,
    /// Those that named more pages than the ceiling, so that each CPU told drops the whole context.
    pub full_flushes: u64,
    /// Flushes because the gather was full.
    pub forced_flushes: u64,
    /// Single pages invalidated, over all CPUs.
    pub invlpgs: u64,
    /// CR3 loads that drop a context, over all CPUs.
    pub contexts_dropped: u64,
    /// Interrupts sent.
    pub ipis_sent: u64,
    /// Interrupts not sent because the CPU was lazy.
    pub ipis_avoided_lazy: u64,
    /// Most batch pages lent at one time, that for tables included.
    pub batch_pages_peak: u64,
    /// Most bytes of pages and tables cleared or unhooked, and not freed yet.
    pub bytes_unfreed_peak: u64,
    /// Most pages and tables cleared, unhooked or freed between two preemption points.
    pub longest_stretch: u64,
}

impl Counts {
    /// Pages for each flush.
    #[must_use]
    pub(crate) fn pages_per_flush(&self) -> f64 {
        self.pages as f64 / self.flushes.max(1) as f64
    }

    /// Interrupts for each 1000 pages.
    #[must_use]
    pub(crate) fn ipis_per_1000_pages(&self) -> f64 {
        self.ipis_sent as f64 * 1000.0 / self.pages.max(1) as f64
    }
}

/// Counts what one teardown does.
#[derive(Debug, Default)]
pub(crate) struct Tally<'s> {
    shape: Option<&'s Shape>,
    counts: Cell<Counts>,
    /// Cleared or unhooked, and not freed.
    waiting_bytes: Cell<u64>,
    batch_pages: Cell<u64>,
    /// Done since the last preemption point.
    stretch: Cell<u64>,
    /// Where the stack was when the teardown began.
    stack_start: Cell<usize>,
    deepest: Cell<usize>,
}

impl<'s> Tally<'s> {
    /// A tally of teardowns of `shape`.
    pub(crate) fn of_shape(shape: Option<&'s Shape>) -> Self {
        Self { shape, ..Self::default() }
    }

    /// What was counted since [`begin`](Self::begin).
    pub(crate) const fn counts(&self) -> Counts {
        self.counts.get()
    }

    /// Most bytes of stack from `begin` to anything that was counted.
    pub(crate) const fn stack_bytes(&self) -> usize {
        self.deepest.get()
    }

    /// A teardown begins.
    pub(crate) fn begin(&self) {
        self.counts.set(Counts::default());
        self.stretch.set(0);
        self.stack_start.set(here());
    }

    fn update(&self, change: impl FnOnce(&mut Counts)) {
        let mut counts = self.counts.get();
        change(&mut counts);
        self.counts.set(counts);
    }

    /// So many pages or tables were dealt with in one go.
    fn worked(&self, items: u64) {
        let stretch = self.stretch.get() + items;
        self.stretch.set(stretch);
        self.update(|counts| counts.longest_stretch = counts.longest_stretch.max(stretch));
    }

    fn waits(&self, bytes: u64) {
        let waiting = self.waiting_bytes.get() + bytes;
        self.waiting_bytes.set(waiting);
        self.update(|counts| counts.bytes_unfreed_peak = counts.bytes_unfreed_peak.max(waiting));
    }

    fn freed(&self, bytes: u64) {
        self.waiting_bytes.set(self.waiting_bytes.get() - bytes);
    }

    fn page_bytes(&self, frame: PhysFrame) -> u64 {
        self.shape.map_or(0, |shape| page_bytes(shape, frame.start_address().as_u64()))
    }

    fn note_depth(&self) {
        self.deepest.set(self.deepest.get().max(self.stack_start.get().saturating_sub(here())));
    }
}

/// About where the stack is.
#[inline(always)]
fn here() -> usize {
    let local = 0usize;
    core::hint::black_box(ptr::from_ref(&local)).addr()
}

impl Watcher for Tally<'_> {
    fn gather(&self, event: GatherEvent) {
        self.note_depth();
        match event {
            GatherEvent::ForcedFlush => self.update(|counts| counts.forced_flushes += 1),
            GatherEvent::LockDropped { leaves } => {
                self.worked(u64::from(leaves));
            }
            GatherEvent::TableUnhooked(_) => {
                self.update(|counts| counts.tables += 1);
                self.waits(4096);
                self.worked(1);
            }
            _ => {}
        }
    }

    fn page_cleared(&self, frame: PhysFrame) {
        self.note_depth();
        self.update(|counts| counts.pages += 1);
        self.waits(self.page_bytes(frame));
    }

    fn tlb(&self, event: TlbEvent) {
        self.note_depth();
        match event {
            TlbEvent::Requested { pages, .. } => self.update(|counts| {
                counts.flushes += 1;
                counts.full_flushes += u64::from(pages.is_none());
            }),
            TlbEvent::IpisSent(sent) => self.update(|counts| counts.ipis_sent += u64::from(sent)),
            TlbEvent::IpisSaved { lazy, .. } => {
                self.update(|counts| counts.ipis_avoided_lazy += u64::from(lazy));
            }
            _ => {}
        }
    }

    fn invlpg(&self) {
        self.note_depth();
        self.update(|counts| counts.invlpgs += 1);
    }

    fn context_dropped(&self) {
        self.note_depth();
        self.update(|counts| counts.contexts_dropped += 1);
    }

    fn batch_taken(&self) {
        self.note_depth();
        let lent = self.batch_pages.get() + 1;
        self.batch_pages.set(lent);
        self.update(|counts| counts.batch_pages_peak = counts.batch_pages_peak.max(lent));
    }

    fn batch_returned(&self) {
        self.batch_pages.set(self.batch_pages.get() - 1);
    }

    fn pages_freed(&self, pages: FreedPages<'_>) {
        self.note_depth();
        for run in pages.iter() {
            self.freed(u64::from(run.nr_pages) * self.page_bytes(run.frame));
        }
        self.worked(pages.iter().map(|run| u64::from(run.nr_pages)).sum());
    }

    fn tables_freed(&self, tables: &[PhysFrame]) {
        self.note_depth();
        self.freed(tables.len() as u64 * 4096);
        self.worked(tables.len() as u64);
    }

    fn preemption_point(&self) {
        self.note_depth();
        self.stretch.set(0);
    }
}
