//! A snapshot of one process's address space, and its text form.
//!
//! ```text
//!  text ─▶ text (read, checked, written) ─▶ snapshot: Layout ─▶ LayoutVma ─▶ PageRun
//!           └── error (the line, and what was expected there)
//! ```
//!
//! What comes in is a file of `tests/layouts/README.md`, what goes out a [`Layout`] that keeps the
//! promises of [`snapshot`].

mod error;
pub mod snapshot;
#[cfg(test)]
mod tests;
mod text;

pub use error::{LayoutError, LayoutProblem};
pub use snapshot::{
    HUGE_PAGES, Layout, LayoutVma, MOST_PAGES, PAGE_BYTES, PageRun, PageState, Prot, Sharing, Totals,
    USER_END, VmaKind,
};
