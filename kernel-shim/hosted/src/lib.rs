//! The hosted machine: N virtual CPUs in an ordinary process, each with an MMU that keeps every stale translation the
//! architecture allows, and a checker that holds the engine against it.
//!
//! ```text
//!  schedule    one coroutine a CPU, the next one chosen by the seed at every seam
//!  machine     CPUs, interrupts, memory: what the small kernel runs on
//!  mmu ...     the software MMU: arch, features, tlb_cache, structure_cache, walk, invalidate, broadcast
//!  device      one that walks the page tables of programs, too, and hears of nothing but the hook for secondary TLBs
//!  oversight   at every seam other CPUs run and speculate; at every free the checker looks who may still reach the frame
//!  returns     what a call has promised   table_locks, work     rules G3, G7      mappings    tables against frames
//!  map_locks   what a call may do under the map lock
//!  checker     frames, who holds them, violations        story      the last events, to tell one
//! ```
//!
//! Everything is determined by the [`Options`] and the work: the same seed does the same.
#![deny(unsafe_code)]

pub mod arch;
mod boundary;
pub mod broadcast;
mod bytes;
mod checker;
mod compare;
mod device;
mod executor;
pub mod features;
mod generate;
pub mod invalidate;
mod judge;
mod machine;
mod map_locks;
mod mappings;
mod memory;
pub mod mmu;
mod op;
mod options;
mod oversight;
pub mod physical;
mod program;
mod random;
mod returns;
mod schedule;
mod sequence;
mod shrink;
mod spaces;
mod stage;
mod story;
pub mod structure_cache;
mod table_locks;
pub mod tlb_cache;
mod visible;
pub mod walk;
pub mod watch;
mod work;

pub use boundary::{Boundaries, Boundary};
pub use checker::{Found, Violation, ViolationKind};
pub use executor::{Outcome, Trial, execute, execute_with};
pub use generate::generate;
pub use judge::{Run, Verdict, judge, judge_in};
pub use machine::{GiveWay, HostedMachine};
pub use memory::Memory;
pub use op::{Backing, Guarding, MmId, NR_MMS, Op, Rights, Step};
pub use options::{Adversary, Checking, Device, MachineFault, Options, Telling};
pub use program::{HostedKernel, Touched, touch};
pub use random::Choices;
pub use schedule::{Schedule, give_way, is_scheduled};
pub use sequence::{Sequence, SequenceError};
pub use shrink::shrink;
pub use stage::HostedStage;
pub use story::{Detail, Event, Fill, Kept, What};
pub use visible::{View, views};
pub use work::MostWork;
