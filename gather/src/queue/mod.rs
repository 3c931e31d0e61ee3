//! What waits for a flush: pages and tables, until they are handed to the kernel.
//!
//! ```text
//!  entries ──► spare.rs ───► batch.rs ────────┐
//!              (unused      (pages, chained)  ├──► waiting.rs ──► freed_pages.rs ──► the kernel's
//!               slots)      table_batch.rs ───┘    (on the        (a slice of        allocator
//!                           (tables, one page)      receipt of     what waited)
//!                                                   a flush)
//! ```
//!
//! In: cleared entries, as words of a batch (word.rs), and unhooked tables. Out: slices for
//! [`free_pages`](crate::Pages::free_pages) and
//! [`free_tables`](mmu_pagetable::TableMemory::free_tables), on the receipt of a flush alone
//! (release.rs). The gathers use it, the loop over entries, and the path of one page.
//!
//! A *slot* is a place in a batch, and a *word* what it holds: a page, or one half of a run.

pub(crate) mod batch;
pub(crate) mod freed_pages;
pub(crate) mod held;
pub(crate) mod release;
pub(crate) mod spare;
pub(crate) mod table_batch;
pub(crate) mod waiting;
pub(crate) mod word;
