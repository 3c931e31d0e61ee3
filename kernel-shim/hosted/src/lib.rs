//! The conformance kit for kernels that embed `mmu-gather`: N virtual CPUs in an ordinary process,
//! each with an MMU that keeps every stale translation the architecture allows, and a checker that
//! holds a kernel against it.
//!
//! `README.md` is the guide: four steps to a test of a kernel's own. `examples/stranger` has them
//! done.
//!
//! ```text
//!  fuzz/        what a kernel's own tests call
//!      │
//!      v
//!  fuzz/corpus  sequences that went somewhere new, and new ones made from them
//!      │
//!      v
//!  sequence/    steps for every CPU: made up, written down, run on any kernel, made short
//!      │
//!      v
//!  kernel       what this machine needs of a kernel: one trait
//!  threads      what runs on a CPU, and may go on on another
//!  adversary    at every seam other CPUs run, and any CPU speculates
//!  checker/     what must never happen, looked for wherever it could
//!      │
//!      v
//!  hardware     what a kernel calls: interrupts, INVLPG, CR3, and what it tells
//!  machine      CPUs and memory: what the kernel runs on
//!      │        schedule: one coroutine a CPU, the next one chosen by the seed at every seam
//!      │        device: walks page tables, too; hears of nothing but the secondary-TLB hook
//!      │        boundary: corners that a run has been to          options, random, memory, mutex
//!      v
//!  mmu/         the software MMU of one CPU           vocabulary: what both sides speak of
//! ```
//!
//! A file uses what is below it. The checker and the adversary are methods of the machine, which
//! calls them; what they keep lies below the machine (`checker/checked`, `checker/per_cpu`).
//!
//! Everything is determined by the [`Options`] and the work: the same seed does the same.
#![deny(unsafe_code)]

mod adversary;
mod awaited;
mod boundary;
mod checker;
mod device;
mod fuzz;
mod hardware;
mod kernel;
mod machine;
mod memory;
pub mod mmu;
mod mutex;
mod options;
mod patience;
mod program;
mod quiet;
mod random;
mod schedule;
mod sequence;
mod threads;
mod trap;
mod vocabulary;

pub use boundary::{Boundaries, Boundary};
pub use checker::cost::state::CostPromise;
pub use checker::events::{Call, Detail, Event, Fill, Kept, What};
pub use checker::kind::ViolationKind;
pub use checker::violation::{Found, Violation};
pub use fuzz::corpus::Corpus;
pub use fuzz::{Failure, FuzzOptions, Report, fuzz, replay};
pub use hardware::Bits;
pub use kernel::{Execution, FiveLevels, Kernel, NotDone, Preemption, Promises, ReclaimAndExit, boot};
pub use machine::{FlushHandler, HostedMachine};
pub use memory::Memory;
pub use mmu::{arch, broadcast, features, invalidate, physical, structure_cache, tlb_cache, walk, watch};
pub use options::{
    Adversary, Checking, Cores, Device, Eagerness, MachineFault, MostWork, Options, Stores, Telling,
};
pub use program::Signal;
pub use random::Choices;
pub use schedule::{GiveWay, Schedule, give_way, is_scheduled};
pub use sequence::quirks::{Quirk, Quirks};
pub use sequence::{
    Calls, Feature, Features, Lost, MmId, NR_MMS, Op, Outcome, Pace, Pairs, Run, Sequence, SequenceError,
    Step, Tally, Trial, Verdict, execute, generate, judge, shrink, with_cpus_going_off,
};
pub use threads::unlocked;
pub use vocabulary::{
    Backing, Content, Contents, FrameRole, Guarding, Moment, Note, Place, Rights, Seam, Shows, Supply,
    UnderMapLock, UserAccess,
};
