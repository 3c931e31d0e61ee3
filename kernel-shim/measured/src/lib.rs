//! What `teardown sweep` and the benches measure: the engine in a kernel that costs as little as
//! can be, on layouts of memory that are the same in every run.
//!
//! ```text
//!  memory     fake physical memory: 32 bytes of metadata a frame, intrusive free lists
//!  machine    the engine's three traits over it, as an embedder who cares for speed writes them
//!  shape      the layouts: workloads W1 to W7, of any size
//!  space      a shape as page tables, checked after it was torn down
//!  shuffle    an order that is random and the same in every run
//!  preempted  whether a sample was disturbed
//! ```
//!
//! What comes in is a workload and its size, what goes out page tables to tear down and a machine
//! to do it on. `mmu-cli` adds a ceiling, lazy CPUs and counts; `mmu-benches` adds peers and
//! clocks.
#![deny(unsafe_code)]

pub mod machine;
pub mod memory;
pub mod preempted;
pub mod shape;
mod shuffle;
pub mod space;

pub use shuffle::shuffle;
