//! The command `teardown`: snapshots of real address spaces, recorded system calls, and what is
//! done with them.
//!
//! ```text
//!                   commands                      one file a command: its flags, what it does
//!     ┌───────┬───────┬──┴────┬───────┬────────┐
//!    run    trace   sweep   boot    fuzz   timeline                          one room a job
//!     └───────┴───────┴──┬────┴───────┴────────┘
//!                  input, output                  layouts and logs are read, reports written
//! ```
//!
//! Arrows point down. `trace` runs its passes as `run` does, `boot` compares with what `run` would
//! build, and `input` escapes the words of its errors as `output` does.

#![deny(unsafe_code)]

pub mod boot;
pub mod commands;
mod fuzz;
pub mod input;
pub mod output;
pub mod run;
mod sweep;
mod timeline;
mod trace;
