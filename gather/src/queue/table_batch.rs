//! Tables that wait for a flush: one page of 511, taken on demand.
#![expect(unsafe_code, reason = "the batch page is used by pointer")]

use core::fmt;
use core::ptr::NonNull;

use arrayvec::ArrayVec;
use static_assertions::const_assert_eq;
use x86_64::structures::paging::PhysFrame;

use crate::limits::Limits;
use crate::platform::BatchPage;
use crate::queue::release::Release;

/// The batch page. Linux: struct mmu_table_batch.
type TableBatch = ArrayVec<PhysFrame, { Limits::TABLE_SLOTS }>;

const_assert_eq!(size_of::<TableBatch>(), 4096);
const_assert_eq!(align_of::<TableBatch>(), 8);

/// What became of a table that was to be queued.
#[derive(Debug)]
#[must_use]
pub(crate) enum TableQueued {
    /// It waits, and there is room for more.
    RoomLeft,
    /// It waits, and the batch is full now.
    Full,
    /// No page for a batch could be had; the table still belongs to the caller.
    NoBatch(PhysFrame),
}

/// The queue of tables. INVARIANT: the page, if there is one, is known to this queue alone.
pub(crate) struct TableQueue {
    batch: Option<NonNull<TableBatch>>,
}

impl TableQueue {
    pub(crate) const fn new() -> Self {
        Self { batch: None }
    }

    pub(crate) fn push<K: Release>(&mut self, kernel: &K, limits: &Limits, table: PhysFrame) -> TableQueued {
        let mut batch = match self.batch {
            Some(batch) => batch,
            None => {
                let Some(page) = kernel.allocate_batch() else { return TableQueued::NoBatch(table) };
                let batch = page.into_inner().cast::<TableBatch>();
                // SAFETY: the page is 4096 writable bytes, aligned to 8 (contract of
                // `BatchPage::new`); a `TableBatch` has that size and alignment (asserted above).
                unsafe { batch.write(TableBatch::new_const()) };
                self.batch = Some(batch);
                batch
            }
        };
        // SAFETY: by the invariant the page is ours alone, and `&mut self` is the only way to it.
        let batch = unsafe { batch.as_mut() };
        match batch.try_push(table) {
            Ok(()) if batch.len() < usize::from(limits.table_slots) => TableQueued::RoomLeft,
            Ok(()) => TableQueued::Full,
            Err(refused) => TableQueued::NoBatch(refused.element()),
        }
    }

    /// Hands every table to the kernel; returns how many.
    ///
    /// # Safety
    /// All of them were [unhooked](mmu_pagetable::UnhookedTable), and have been flushed for since
    /// they were queued.
    pub(crate) unsafe fn free_all<K: Release>(&mut self, kernel: &K) -> u64 {
        let Some(mut batch) = self.batch else { return 0 };
        // SAFETY: by the invariant the page is ours alone.
        let batch = unsafe { batch.as_mut() };
        if batch.is_empty() {
            return 0;
        }
        // SAFETY: passed on to our caller; each was queued once, because an `UnhookedTable` cannot
        // be copied.
        unsafe { kernel.release_tables(batch) };
        let tables = batch.len() as u64;
        batch.clear();
        kernel.cond_resched();
        tables
    }

    /// Moves the queue out of here; what stays behind is empty.
    #[inline]
    pub(crate) const fn take(&mut self) -> Self {
        Self { batch: self.batch.take() }
    }

    /// Whether there is a batch page to be given back.
    #[inline]
    pub(crate) const fn has_batch(&self) -> bool {
        self.batch.is_some()
    }

    /// Returns the batch page; called when nothing is queued any more.
    #[inline]
    pub(crate) fn give_back<K: Release>(&mut self, kernel: &K) {
        debug_assert!(self.is_empty(), "G5: tables queued and never freed");
        if let Some(batch) = self.batch.take() {
            // SAFETY: this is the page that `allocate_batch` lent, and we have just forgotten it.
            kernel.free_batch(unsafe { BatchPage::new(batch.cast()) });
        }
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        match self.batch {
            // SAFETY: by the invariant the page is ours alone.
            Some(batch) => unsafe { batch.as_ref() }.is_empty(),
            None => true,
        }
    }
}

impl fmt::Debug for TableQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TableQueue").field("batch", &self.batch).finish()
    }
}
