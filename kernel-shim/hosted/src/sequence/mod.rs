//! Sequences: what CPUs do, made up, written down, run, and made short.
//!
//! ```text
//!  in    a seed            generate ─┐
//!                          hotplug ──┤
//!        others            mutate ───┤
//!        bytes             bytes ────┼─> text: a Sequence, steps of op
//!        text              text ─────┘        │
//!                                             v
//!        a kernel, a trial ────────────>  world: machine and kernel; every CPU does its steps
//!                                             │  steps: what each of them is
//!                                             │
//!  out   how many calls were made             ├─> calls
//!        how it ended, whatever it was        └─> verdict ──> shrink: a shorter one
//! ```
//!
//! The fuzzer, replay, property tests and the saved reproducers use it; the machine and the checker
//! do not know it.

mod bytes;
mod calls;
mod features;
mod generate;
mod hotplug;
mod mutate;
mod op;
mod places;
pub(crate) mod quirks;
mod shrink;
mod steps;
mod text;
mod trial;
mod verdict;
mod world;

pub use calls::{Calls, Tally};
pub use features::{Feature, Features, Pairs};
pub use generate::generate;
pub use hotplug::with_cpus_going_off;
pub(crate) use mutate::{Rare, mutate};
pub use op::{MmId, NR_MMS, Op, Step};
pub use shrink::shrink;
pub(crate) use shrink::without_lacking;
pub(crate) use text::KERNEL;
pub use text::{Sequence, SequenceError};
pub use trial::{Lost, Outcome, Pace, Trial};
pub use verdict::{Run, Verdict, judge};
pub use world::execute;
