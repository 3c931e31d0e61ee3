//! The main job: a layout as page tables on the hosted machine, used by its CPUs, and taken down.
//!
//! ```text
//!  Layout ─▶ hosted_process (areas and pages in a kernel) ─▶ teardown ─▶ output::report
//!             └── kernel_terms (protection, contents, files)   └── pass (timed, then checked)
//! ```
//!
//! What comes in is a `Layout` and [`RunOptions`](pass::RunOptions), what goes out a row of the
//! report with what the checker found. `commands::run` uses this room; `trace` runs its passes the
//! same way, and `boot` writes its plans in the same terms.

pub mod hosted_process;
pub(crate) mod kernel_terms;
pub mod pass;
pub mod teardown;
