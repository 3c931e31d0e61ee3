//! What the small kernel is put to.
//!
//! ```text
//!   command line ──► select ──► phases ──► threads, churn, lazy, rivals, ...: one file a part
//!                                               │
//!                                               ├──► program: processes that check their memory
//!                                               └──► meeting: where CPUs wait for each other
//! ```
//!
//! What comes in is the command line and the machine; what goes out is a verdict, and lines that
//! `teardown boot` reads. Uses every other room; only `start` uses this one.

pub(crate) mod churn;
pub(crate) mod lazy;
pub(crate) mod measure;
pub(crate) mod meeting;
pub(crate) mod phases;
pub(crate) mod program;
pub(crate) mod rivals;
pub(crate) mod select;
pub(crate) mod stage;
pub(crate) mod swap;
pub(crate) mod threads;
