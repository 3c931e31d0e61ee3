//! What happened in one run of a sequence, CPU by CPU, and what went wrong in words.
//!
//! ```text
//!  Sequence, Run ─▶ build (each event as a row) ─▶ rows: Timeline ─▶ explanation (sentences)
//!                     ├── names, phrases (of one event)              ├─▶ terminal (columns)
//!                     └── focus (which rows matter)                  └─▶ page (HTML)
//! ```
//!
//! What comes in is a run that remembered all its events, what goes out a drawing for a terminal or
//! a page for a browser. `commands::replay` uses it.

mod build;
mod explanation;
mod focus;
mod names;
pub(crate) mod page;
mod phrases;
pub(crate) mod rows;
pub(crate) mod terminal;
