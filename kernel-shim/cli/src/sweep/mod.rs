//! Batch sizes side by side: what a page costs, how often CPUs are interrupted, how much memory
//! waits.
//!
//! ```text
//!  axes (what is varied) ─▶ measure (counts, then times in rounds) ─▶ report (text, CSV, JSON)
//!  captured_process           └── machine (CPUs, frames), tally         ├── answer, columns
//!                                                                       └── page (HTML), chart
//! ```
//!
//! What comes in is settings and conditions, what goes out a table with an answer.
//! `commands::sweep` uses it.

mod answer;
pub(crate) mod axes;
pub(crate) mod captured_process;
mod chart;
mod columns;
mod machine;
pub(crate) mod measure;
mod page;
pub(crate) mod report;
mod tally;
#[cfg(test)]
mod tests;
