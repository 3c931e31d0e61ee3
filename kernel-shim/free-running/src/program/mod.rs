//! What CPUs do in a run.
//!
//! ```text
//!  board    what all CPUs know: the address spaces, who has mapped what there, the phases
//!  worker   one CPU: accesses with faults answered, calls of the kernel, the judgement of words
//!  tour     phase: everything, in every address space
//!  family   fork, exec and exit, as parts of the tour
//!  duel     phases: one page and one table against CPUs that come and go
//! ```
//!
//! `run` starts a worker on each CPU and leads them from phase to phase.

pub(crate) mod board;
mod duel;
mod family;
mod places;
mod rng;
mod tour;
pub(crate) mod worker;
