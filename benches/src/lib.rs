//! What the benches share: a kernel small enough to cost nothing, the workloads, and the peers on the same tables.
//!
//! ```text
//!  memory.rs    fake physical memory, 32 bytes of metadata a frame, intrusive free lists
//!  machine.rs   the engine's three traits over it, as an embedder who cares for speed would write them
//!  shape.rs     the workloads W1 to W7        space.rs   a shape as page tables, checked after it was torn down
//!  engine.rs    floors.rs    peers.rs         who tears it down
//!  entry.rs     the rows of the table       flushes.rs  the rows of the table in which flushes cost something
//!  rounds.rs    samples, in rounds of random order           linux.rs   the same shapes in Linux
//!  steps.rs     counts the instructions of a piece of code   threads.rs threads that play CPUs
//!  preempted.rs whether a sample was disturbed
//! ```
//!
//! All entries of one table run on tables laid out by one builder, with one allocator and one metadata layout; only the
//! teardown is timed, and after each the frames and tables it claims to have freed are counted.
#![deny(unsafe_code)]

pub mod document;
pub mod engine;
#[cfg(feature = "peers")]
pub mod entry;
pub mod floors;
#[cfg(feature = "peers")]
pub mod flushes;
pub mod linux;
pub mod machine;
pub mod memory;
#[cfg(feature = "peers")]
pub mod peers;
pub mod preempted;
#[cfg(feature = "peers")]
pub mod rounds;
pub mod shape;
pub mod space;
#[cfg(feature = "peers")]
pub mod steps;
pub mod threads;
