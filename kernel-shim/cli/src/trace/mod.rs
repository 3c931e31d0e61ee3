//! What a real program asked of its address spaces, asked again of the hosted kernel.
//!
//! ```text
//!  Trace ─▶ log (timed, then checked) ─▶ threads (who runs on which CPU, and when)
//!                                          └─▶ space (one address space, call by call)
//!                                                └─▶ kernel (the hosted kernel)
//! ```
//!
//! What comes in is a log that `input::strace` has read, what goes out a row of the report.
//! `commands::trace` uses it.

mod kernel;
pub(crate) mod log;
mod space;
mod threads;
