//! Ready-made parts of a kernel's own side: where batch pages come from, and where pages go.
//!
//! ```text
//!  arena.rs      lends batch pages out of an arena
//!  free_with.rs  a kernel whose pages are handed back to the caller
//! ```
//!
//! The gather itself uses none of them.

#[cfg(feature = "bumpalo")]
pub(crate) mod arena;
pub(crate) mod free_with;
