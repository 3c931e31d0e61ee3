//! The entries of one locked table: the only part of the engine that runs once a page.
//!
//! ```text
//!  clearing.rs   how an entry is cleared ────────┐
//!  leaf_size.rs  which leaves: 4 KiB, or large ──┼─► zap_loop.rs ─┬─► progress.rs what was cleared
//!  part.rs       which entries of which table ───┘                └─► queue        the pages
//! ```
//!
//! In: part of a table whose lock is held. Out: what was cleared, so that the caller notes it for
//! the flush before the lock drops. The walk over tables (zap.rs) uses it, and the path of one
//! table (one_table.rs).

pub(crate) mod clearing;
pub(crate) mod leaf_size;
pub(crate) mod part;
pub(crate) mod progress;
pub(crate) mod zap_loop;
