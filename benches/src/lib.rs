//! What the benches share: the rows of their tables, and the peers, on the machine and the
//! workloads of `mmu_measured`.
//!
//! ```text
//!  engine.rs, floors.rs, peers.rs   what tears it down
//!  linux.rs      the same shapes in Linux
//!  entry.rs      the rows of the table
//!  flushes.rs    the rows of the table in which flushes cost something
//!  rounds.rs     samples, in rounds of random order
//!  steps.rs      counts the instructions of a piece of code
//!  threads.rs    threads that play CPUs
//!  document.rs   figures in a README, written by the command that measures them
//! ```
//!
//! All entries of one table run on tables laid out by one builder, with one allocator and one
//! metadata layout; only the teardown is timed, and after each the frames and tables it claims to
//! have freed are counted.
#![deny(unsafe_code)]

pub mod document;
pub mod engine;
pub mod entry;
pub mod floors;
pub mod flushes;
pub mod linux;
pub mod peers;
pub mod rounds;
pub mod steps;
pub mod threads;
