//! What the command reads.
//!
//! ```text
//!  FILE.layout ─▶ layout ◀── live_process ◀─ /proc/PID/smaps, and pagemap ◀─ /proc/PID/pagemap
//!  /proc/PID/maps, smaps ─▶ maps ─▶ layout
//!  FILE.strace ─▶ lines (bounded) ─▶ strace
//!  tests/layouts, tests/traces ─▶ bundled    (text that is compiled in)
//! ```
//!
//! What comes in is text and live processes; what goes out is a checked `Layout` or `Trace`, or an
//! error that names the source, the line and what was expected. Nothing here knows a kernel or a
//! machine. Every other room may use this one, and fuzz targets do.

pub mod bundled;
pub mod layout;
mod lines;
pub mod live_process;
pub mod maps;
mod pagemap;
pub mod strace;
