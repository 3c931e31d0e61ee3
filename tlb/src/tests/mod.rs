//! Unit tests that need the inside of the crate, and the atomics they run on.
//!
//! ```text
//!  lines.rs     which cache lines a flush touches: the tests
//!  mail.rs      requests by mail where a call of the kernel goes wrong
//!  recorded.rs  atomics that write down each access; `sync.rs` puts them in the place of `core`'s
//! ```
//!
//! Only the crate's own unit tests use what is here. Under `mmu_loom` the atomics are loom's, and
//! the tests are those of `tlb/tests/loom`.

mod lines;
mod mail;
pub(crate) mod recorded;
