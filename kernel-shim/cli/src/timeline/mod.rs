//! What happened in one run of a sequence, CPU by CPU, and what went wrong in words.
//!
//! ```text
//!  Sequence, Run ─▶ rows (each event as a row) ─▶ focus (which rows matter) ─▶ explanation (sentences)
//!                     └── phrases (the words of one event)                         │
//!                                                      terminal (columns) ◀────────┴──▶ page (HTML)
//! ```
//!
//! What comes in is a run that remembered all its events, what goes out a drawing for a terminal or a page for a browser.
//! `commands::replay` uses it.

pub(crate) mod explanation;
mod focus;
pub(crate) mod page;
mod phrases;
pub(crate) mod rows;
pub(crate) mod terminal;
