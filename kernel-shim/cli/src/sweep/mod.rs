//! Batch sizes side by side: what a page costs, how often CPUs are interrupted, how much memory waits.
//!
//! ```text
//!  axes (what is varied) ─▶ measure (count each, then time in rounds) ─▶ report (text, CSV, JSON) ─▶ page (HTML, with chart)
//!  captured_process     └── machine (that of the benches)             └── answer (which setting to take)
//! ```
//!
//! What comes in is settings and conditions, what goes out a table with an answer. `commands::sweep` uses it.

mod answer;
pub(crate) mod axes;
pub(crate) mod captured_process;
mod chart;
mod columns;
mod machine;
pub(crate) mod measure;
mod page;
pub(crate) mod report;
#[cfg(test)]
mod tests;
