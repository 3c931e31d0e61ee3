//! The memory calls of a real program, read from a log that `strace -f` wrote.
//!
//! ```text
//!  log ─▶ lex (a line taken apart) ─▶ reader (calls in two parts) ─▶ history (whose they are)
//!          └── head (what is first)     ├── names (which calls change an address space)   │
//!                                       └── arguments, flags (those of one call)          ▼
//!                                                                               events: Trace
//! ```
//!
//! What comes in is a file of `tests/traces/README.md`, what goes out a [`Trace`]. `crate::trace`
//! makes its calls again.

mod arguments;
#[cfg(test)]
mod as_recorded;
mod events;
mod flags;
mod head;
mod history;
mod lex;
mod names;
mod number;
mod reader;
#[cfg(test)]
mod tests;

pub use events::{
    Advice, Assumed, Backing, ChildMemory, MemoryCall, OldRange, Placement, Remarked, Trace, TraceError,
    TraceEvent, TraceProblem,
};
