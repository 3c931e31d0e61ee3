//! A snapshot of one process's address space, and its text form.
//!
//! ```text
//!  text ─▶ text.rs (read, checked, written) ─▶ snapshot.rs: Layout ─▶ LayoutVma ─▶ PageRun
//! ```
//!
//! What comes in is a file of `tests/layouts/README.md`, what goes out a [`Layout`] that keeps the
//! promises of [`snapshot`].

pub mod snapshot;
#[cfg(test)]
mod tests;
pub(crate) mod text;

pub use snapshot::{
    HUGE_PAGES, Layout, LayoutVma, PAGE_BYTES, PageRun, PageState, Prot, Sharing, Totals, USER_END, VmaKind,
};
pub use text::{LayoutError, LayoutProblem};
