//! The hosted machine: N virtual CPUs in an ordinary process, each with an MMU that keeps every
//! stale translation the architecture allows, and a checker that holds the engine against it.
//!
//! ```text
//!  sequence/    steps for every CPU: made up, written down, run, made short
//!      │        program, stage: programs, and fixed work
//!      │
//!      v
//!  adversary    at every seam other CPUs run, and any CPU speculates
//!  checker/     what must never happen, looked for wherever it could
//!      │
//!      v
//!  machine      CPUs, interrupts, memory: what the kernel runs on
//!      │        schedule: one coroutine a CPU, the next one chosen by the seed at every seam
//!      │        device: walks page tables, too; hears of nothing but the secondary-TLB hook
//!      │        boundary: corners that a run has been to          options, random, memory, mutex
//!      v
//!  mmu/         the software MMU of one CPU
//! ```
//!
//! A file uses what is below it. The checker and the adversary are methods of the machine, which
//! calls them; what they keep lies below the machine (`checker/checked`, `checker/per_cpu`).
//!
//! Everything is determined by the [`Options`] and the work: the same seed does the same.
#![deny(unsafe_code)]

mod adversary;
mod boundary;
mod checker;
mod device;
mod machine;
mod memory;
pub mod mmu;
mod mutex;
mod options;
mod program;
mod random;
mod schedule;
mod sequence;
mod stage;

pub use boundary::{Boundaries, Boundary};
pub use checker::events::{Detail, Event, Fill, Kept, What};
pub use checker::kind::ViolationKind;
pub use checker::violation::{Found, Violation};
pub use machine::{FlushHandler, HostedMachine};
pub use memory::Memory;
pub use mmu::{arch, broadcast, features, invalidate, physical, structure_cache, tlb_cache, walk, watch};
pub use options::{Adversary, Checking, Device, MachineFault, MostWork, Options, Telling};
pub use program::{HostedKernel, Touched, boot, touch};
pub use random::Choices;
pub use schedule::{GiveWay, Schedule, give_way, is_scheduled};
pub use sequence::{
    Backing, Guarding, MmId, NR_MMS, Op, Outcome, Rights, Run, Sequence, SequenceError, Step, Trial, Verdict,
    View, execute, execute_with, generate, judge, judge_in, shrink, views,
};
pub use stage::HostedStage;
