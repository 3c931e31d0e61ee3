//! What the command writes.
//!
//! ```text
//!  findings  ─▶ report, verdict ─▶ table, words, bytes ─▶ escape (for terminals) ─▶ stdout
//!  files     ─▶ file (there as a whole or not at all) ─▶ cleanup (what must not stay behind)
//!  long work ─▶ progress ─▶ stderr
//! ```
//!
//! What comes in is what a run found, what goes out bytes for a person or a program. Every room may
//! use this one; it uses none.

pub(crate) mod bytes;
pub(crate) mod cleanup;
pub(crate) mod escape;
pub(crate) mod file;
pub(crate) mod progress;
pub mod report;
pub(crate) mod table;
pub(crate) mod verdict;
pub(crate) mod words;
