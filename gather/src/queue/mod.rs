//! What waits for a flush: pages and tables, until they are handed to the kernel.
//!
//! ```text
//!  zap loop ──► spare.rs ──► batch.rs ────────┐
//!              (room in     (pages, chained)  ├──► waiting.rs ──► the kernel's allocator
//!               a batch)    table_batch.rs ───┘    (with the receipt of a flush)
//!                           (tables, one page)
//! ```
//!
//! In: cleared entries, as words of a batch (word.rs), and unhooked tables. Out: slices for
//! [`free_pages`](crate::Pages::free_pages) and [`free_tables`](mmu_pagetable::TableMemory::free_tables), on the receipt of a
//! flush alone. The gather, the zap loop and the path of one page use it.

pub(crate) mod batch;
pub(crate) mod freed_pages;
pub(crate) mod spare;
pub(crate) mod table_batch;
pub(crate) mod waiting;
pub(crate) mod word;
