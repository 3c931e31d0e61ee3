//! The bootable image in QEMU: built, started, listened to, and compared with the hosted machine.
//!
//! ```text
//!  Layout ─▶ layout_plan (text for the image) ─┐
//!  sources ─▶ image (cargo) ───────────────────┴─▶ emulator (QEMU, what it prints) ─▶ report
//! ```
//!
//! What comes in is what the image is to do, what goes out a report with a verdict.
//! `commands::boot` uses it.

pub(crate) mod emulator;
pub mod error;
pub(crate) mod image;
pub mod layout_plan;
pub(crate) mod options;
pub mod report;
