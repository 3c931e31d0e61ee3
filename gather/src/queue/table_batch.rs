//! Tables that wait for a flush: the first one alone, more in one page of 511, taken on demand.
#![expect(unsafe_code, reason = "the batch page is used by pointer")]

use core::ptr::NonNull;
use core::{fmt, mem};

use arrayvec::ArrayVec;
use static_assertions::const_assert_eq;
use x86_64::structures::paging::PhysFrame;

use crate::limits::Limits;
use crate::platform::BatchPage;
use crate::queue::release::Release;

/// The batch page. Linux: struct mmu_table_batch.
pub(crate) type TableBatch = ArrayVec<PhysFrame, { Limits::TABLE_SLOTS }>;

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

/// The queue of tables. One that waits alone needs no batch page: most often one goes, or many.
pub(crate) enum TableQueue {
    Empty,
    One(PhysFrame),
    /// INVARIANT: the page is known to this queue alone. It is kept across flushes.
    Batch(NonNull<TableBatch>),
}

impl TableQueue {
    #[inline(always)]
    pub(crate) const fn new() -> Self {
        Self::Empty
    }

    /// The queue that was [released](Self::release).
    #[inline(always)]
    pub(crate) const fn of_flushed(table: Option<PhysFrame>, batch: Option<NonNull<TableBatch>>) -> Self {
        match (batch, table) {
            (Some(batch), _) => Self::Batch(batch),
            (None, Some(table)) => Self::One(table),
            (None, None) => Self::Empty,
        }
    }

    pub(crate) fn push<K: Release>(&mut self, kernel: &K, limits: &Limits, table: PhysFrame) -> TableQueued {
        let mut batch = match *self {
            Self::Batch(batch) => batch,
            Self::Empty => {
                *self = Self::One(table);
                return if limits.table_slots > 1 { TableQueued::RoomLeft } else { TableQueued::Full };
            }
            Self::One(first) => {
                let Some(page) = kernel.allocate_batch() else { return TableQueued::NoBatch(table) };
                let batch = page.into_inner().cast::<TableBatch>();
                // SAFETY: the page is 4096 writable bytes, aligned to 8 (contract of
                // `BatchPage::new`); a `TableBatch` has that size and alignment (asserted above).
                unsafe { batch.write(TableBatch::new_const()) };
                *self = Self::Batch(batch);
                let mut tables = batch;
                // SAFETY: as below.
                unsafe { tables.as_mut() }.extend([first]);
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
    #[inline]
    pub(crate) unsafe fn free_all<K: Release>(&mut self, kernel: &K) -> u64 {
        match *self {
            Self::Empty => 0,
            Self::One(table) => {
                *self = Self::Empty;
                // SAFETY: passed on to our caller; each was queued once, because an `UnhookedTable`
                // cannot be copied.
                unsafe { release_tables(kernel, &[table]) }
            }
            Self::Batch(mut batch) => {
                // SAFETY: by the invariant the page is ours alone.
                let batch = unsafe { batch.as_mut() };
                // SAFETY: as above.
                let tables = unsafe { release_tables(kernel, batch) };
                batch.clear();
                tables
            }
        }
    }

    /// Moves the queue out of here, into what is freed later; what stays behind is empty.
    #[inline]
    pub(crate) const fn release(&mut self) -> (Option<PhysFrame>, Option<NonNull<TableBatch>>) {
        match mem::replace(self, Self::Empty) {
            Self::Empty => (None, None),
            Self::One(table) => (Some(table), None),
            Self::Batch(batch) => (None, Some(batch)),
        }
    }

    /// Returns the batch page; called when nothing is queued any more.
    #[inline]
    pub(crate) fn give_back<K: Release>(&mut self, kernel: &K) {
        debug_assert!(self.is_empty(), "G5: tables queued and never freed");
        if let Self::Batch(batch) = *self {
            *self = Self::Empty;
            // SAFETY: this is the page that `allocate_batch` lent, and we have just forgotten it.
            kernel.free_batch(unsafe { BatchPage::new(batch.cast()) });
        }
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::One(_) => false,
            // SAFETY: by the invariant the page is ours alone.
            Self::Batch(batch) => unsafe { batch.as_ref() }.is_empty(),
        }
    }
}

/// Hands `tables` to the kernel, if there are any; returns how many.
///
/// # Safety
/// As for [`TableQueue::free_all`].
#[inline]
pub(crate) unsafe fn release_tables<K: Release>(kernel: &K, tables: &[PhysFrame]) -> u64 {
    if !tables.is_empty() {
        // SAFETY: passed on to our caller.
        unsafe { kernel.release_tables(tables) };
        kernel.cond_resched();
    }
    tables.len() as u64
}

impl fmt::Debug for TableQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("no table"),
            Self::One(table) => table.fmt(f),
            Self::Batch(batch) => write!(f, "tables in {batch:?}"),
        }
    }
}
