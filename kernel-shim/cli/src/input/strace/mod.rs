//! The memory calls of a real program, read from a log that `strace -f` wrote.
//!
//! ```text
//!  log ─▶ lex (a line taken apart) ─▶ reader (threads, calls in two parts) ─▶ events: Trace
//!                                       ├── names (which calls change an address space)
//!                                       └── arguments (those of one call)
//! ```
//!
//! What comes in is a file of `tests/traces/README.md`, what goes out a [`Trace`]. `crate::trace`
//! makes its calls again.

mod arguments;
mod events;
mod lex;
mod names;
mod reader;
#[cfg(test)]
mod tests;

pub use events::{
    Advice, Backing, ChildMemory, MemoryCall, OldRange, Placement, Trace, TraceError, TraceEvent,
    TraceProblem,
};
