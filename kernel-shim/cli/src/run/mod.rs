//! The main job: a layout as page tables on the hosted machine, used by its CPUs, and taken down.
//!
//! ```text
//!  Layout ─▶ hosted_process (areas and pages in a kernel) ─▶ teardown (timed, then checked) ─▶ output::report
//! ```
//!
//! What comes in is a `Layout` and [`RunOptions`](teardown::RunOptions), what goes out a row of the report, with what the checker found.
//! `commands::run` uses it; `trace` boots its machine the same way, and `boot` counts frames the same way.

pub mod hosted_process;
pub mod teardown;
