//! The command `teardown`: snapshots of real address spaces, recorded system calls, and what is done with them.
//!
//! ```text
//!                          commands        one file a command: its flags, and what it does with them
//!     ┌────────┬────────┬─────┴────┬──────────┬─────────┐
//!    run     trace    sweep      boot       fuzz    timeline     one room a job
//!     └────────┴────────┴─────┬────┴──────────┴─────────┘
//!                        input   output    what is read: layouts, logs │ what is written: reports, files
//! ```
//!
//! Arrows point down. `trace` runs on the machine that `run` boots, and `boot` compares with it.

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
