//! Sequences: what CPUs do, made up, written down, run, and made short.
//!
//! ```text
//!  in    a seed            generate ─┐
//!        bytes             bytes ────┼─> text: a Sequence, steps of op
//!        text              text ─────┘        │
//!                                             v
//!        what is wrong on purpose ────>  world: machine and kernel; every CPU does its steps
//!                                             │
//!  out   what programs could see              ├─> view
//!        how it ended, whatever it was        └─> verdict ──> shrink: a shorter one
//! ```
//!
//! The fuzzer, replay, property tests and the saved reproducers use it; the machine and the checker
//! do not know it.

mod bytes;
mod generate;
mod op;
mod pace;
mod places;
mod shrink;
mod text;
mod verdict;
mod view;
mod world;

pub use generate::generate;
pub use op::{Backing, Guarding, MmId, NR_MMS, Op, Rights, Step};
pub use pace::View;
pub use shrink::shrink;
pub use text::{Sequence, SequenceError};
pub use verdict::{Run, Verdict, judge, judge_in};
pub use view::views;
pub use world::{Outcome, Trial, execute, execute_with};
