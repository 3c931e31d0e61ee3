//! The memory calls of a real program, read from a log that `strace -f` wrote.
//!
//! ```text
//!  log ─▶ lex.rs (a line taken apart) ─▶ reader.rs (threads, calls in two parts) ─▶ Trace: TraceEvent, MemoryCall
//!                                         names.rs (which calls change an address space)
//! ```
//!
//! What comes in is a file of `tests/traces/README.md`, what goes out a [`Trace`]. `crate::trace` carries it out.

mod lex;
mod names;
mod reader;
#[cfg(test)]
mod tests;

pub use reader::{
    Advice, Backing, ChildMemory, MemoryCall, OldRange, Placement, Trace, TraceError, TraceEvent,
    TraceProblem,
};
