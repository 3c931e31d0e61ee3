//! Random sequences against the checker, several at a time, until one fails.
//!
//! ```text
//!  FuzzOptions ─▶ campaign (jobs, each a thread; the failure, made short) ─▶ report (text, JSON)
//!                   └── job_watch (a job that does not come back is a finding)
//! ```
//!
//! What comes in is a seed and limits, what goes out is what was covered, and the first failure.
//! `commands::fuzz` uses it, and `commands::replay` its handling of panics.

pub(crate) mod campaign;
mod job_watch;
pub(crate) mod panics;
pub(crate) mod report;
