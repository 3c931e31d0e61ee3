//! The checker: what must never happen, looked for wherever it could.
//!
//! ```text
//!  in    what the kernel says as it goes (`Note`)                        notes
//!        what the MMUs say of frames they cache and forget              ledger
//!        the way into user mode, and each access of a program           access
//!
//!  looks at every free      who may still reach the frame                notes, device
//!                           which locks are held                         table_locks, map_locks
//!                           how much was done since a preemption point   preemption
//!        at every return    what the call has promised                   promises
//!        at every access    that a program reads what was written        contents
//!        at every call      whether its size explains what it costs      cost
//!        when a page changes hands            pages
//!        at sync points     caches against page tables                   caches_against_tables
//!                           page tables against frames                   at_rest
//!
//!  out   violations, each with the last events that explain it           violation, kind, events
//! ```
//!
//! | what is kept | of what |
//! |---|---|
//! | `ledger::Ledger` | frames: free since when, in how many caches, written to; violations |
//! | `ledger::CpuWatch` | one CPU's caches: what there names a free frame (*stale*) |
//! | `per_cpu` | one CPU: locks it holds, work since its last preemption point |
//! | `events::EventLog` | the machine: the last events, or all |
//! | `contents::Kept` | what each page holds, and what each program is to read |
//! | `cost::state::Cost` | a machine whose kernel promises bounds: its calls, spaces, PCIDs |
//! | `checked::Checked` | one machine: its ledger, its log, its contents |
//!
//! To *check* is to look for one kind of violation and report it; the functions that do are methods
//! of the machine, which calls them as it goes. To *compare* is to hold all of one thing against
//! all of another while nothing runs; `sequence` calls those at sync points. To *judge*, in
//! `sequence::verdict`, is to run a sequence and say what came of it.

pub(crate) mod access;
mod at_rest;
mod caches_against_tables;
pub(crate) mod checked;
mod contents;
mod corners;
pub(crate) mod cost;
mod device;
pub(crate) mod events;
pub(crate) mod kind;
pub(crate) mod ledger;
mod map_locks;
mod notes;
mod pages;
pub(crate) mod per_cpu;
mod preemption;
mod promises;
mod table_locks;
pub(crate) mod violation;
