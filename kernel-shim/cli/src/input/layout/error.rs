//! Why a text is not a layout: the source, the line, and what was expected there.

use crate::input::layout::snapshot::{MOST_PAGES, PAGE_BYTES, USER_END};
use crate::output::escape::excerpt;
use crate::output::words::counted;

/// Why a text is not a layout, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{source_name}:{line}: {problem}")]
pub struct LayoutError {
    /// The file, or whatever the caller called it.
    pub source_name: String,
    /// Line, counted from 1.
    pub line: usize,
    /// What is wrong there.
    pub problem: LayoutProblem,
}

/// What is wrong with one line of a layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutProblem {
    /// Something else stands where a word of the format belongs.
    #[error("expected {expected}, found {}", excerpt(found))]
    Expected {
        /// What belongs there.
        expected: &'static str,
        /// What stands there, from that place to the end of the line.
        found: String,
    },
    /// The text stops before its last line.
    #[error("the file is cut off: expected {expected} before its end")]
    CutOff {
        /// What should have followed.
        expected: &'static str,
    },
    /// The trailer counted something else: lines were lost, added or changed.
    #[error("the end line states {stated} {what}, the file has {counted}")]
    Count {
        /// Which count.
        what: &'static str,
        /// What the end line says.
        stated: u64,
        /// What the lines before it hold.
        counted: u64,
    },
    /// An address between pages.
    #[error("expected a multiple of 4096, found address {address:#x}")]
    Unaligned {
        /// The address.
        address: u64,
    },
    /// An address no x86_64 CPU with four levels accepts.
    #[error("expected a user address, found {address:#x}, which is not canonical")]
    NotCanonical {
        /// The address.
        address: u64,
    },
    /// An address in the last user page or in the kernel's half.
    #[error("expected a user address below {USER_END:#x}, found {address:#x} of the kernel")]
    NotUser {
        /// The address.
        address: u64,
    },
    /// An area without a page.
    #[error("expected an end above the start {start:#x}, found {end:#x}")]
    EmptyVma {
        /// The start.
        start: u64,
        /// The end.
        end: u64,
    },
    /// An area that starts inside or before the one above it.
    #[error("expected an area at or above {previous_end:#x}, where the one before ends, found {start:#x}")]
    VmaOrder {
        /// The start.
        start: u64,
        /// Where the previous area ends.
        previous_end: u64,
    },
    /// A run, or a count of pages, larger than its area.
    #[error("expected at most {} in this area, found {found}", counted(*nr_vma_pages, "page", "pages"))]
    LeavesVma {
        /// What was written.
        found: String,
        /// Pages of the area.
        nr_vma_pages: u64,
    },
    /// A run that starts inside or before the one before it.
    #[error(
        "expected a run at or after page {previous_end}, where the one before ends, found page {first_page}"
    )]
    RunOrder {
        /// The first page.
        first_page: u64,
        /// The page after the previous run.
        previous_end: u64,
    },
    /// More pages than the memory of a simulated machine is meant for.
    #[error("expected at most {MOST_PAGES} pages in all ({} GiB), found more", (MOST_PAGES * PAGE_BYTES) >> 30)]
    TooManyPages,
    /// Pages of a kind that the area cannot have.
    #[error("expected pages that an area of kind `{kind}` can have ({can}), found `{found}`")]
    StateOfKind {
        /// The word of the area.
        kind: &'static str,
        /// The words of the states it can have.
        can: String,
        /// The word of the state.
        found: &'static str,
    },
    /// A run of 2 MiB leaves that does not start and end where such leaves do.
    #[error("expected whole 2 MiB leaves, found {} at {address:#x}", counted(*nr_pages, "page", "pages"))]
    HugeUnaligned {
        /// Address of the first page.
        address: u64,
        /// Base pages in the run.
        nr_pages: u64,
    },
}
