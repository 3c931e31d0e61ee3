//! A machine whose CPUs are threads that really run beside each other.
//!
//! On the hosted machine (`mmu-hosted`) CPUs take turns at seams, and memory is never weak: a
//! missing fence, or two reads where there should be one, change nothing there. Here they do: the
//! small kernel runs unchanged on real cores, and programs use memory while others take it down.
//!
//! ```text
//!  program/  what CPUs do all the time: map, use, unmap, fork, exec, exit, reclaim, come and go
//!     │ loads and stores                          │ calls            (mmu-kernel-shim, unchanged)
//!  machine ── cpu ── tlb (a PCID: an array)       │
//!     │        └──── ring (the last events)       │
//!     ├── walk (A and D by compare-and-swap) ─────┤ page tables
//!     └── memory (frames; poison in free ones) ───┘
//!  run: phases, the watchdog, the end       report: what was done, what was found, in words
//! ```
//!
//! What comes in is [`Options`], what goes out a [`Report`].
//!
//! Nothing here decides who may still have what cached. A violation is what a program or a walk
//! sees:
//! - poison: the page, or the table, is free;
//! - the stamp of another owner or another page;
//! - a stamp that its owner had published as dead before the load began;
//! - a page that changes while nobody may write to it;
//! - an address that can be used after its unmapping has returned.
//!
//! What it rests on:
//! - **F1** Every access to a frame is atomic, or one aligned instruction of 8 bytes.
//! - **F2** A TLB entry goes by INVLPG, by a flush, or when speculation fills it anew; never else.
//! - **F3** No interrupt comes between a look-up and its access, nor into a walk.
//! - **F4** An owner publishes a generation as dead after the call that ended it has returned, and
//!   a reader reads what is dead before it loads.
//!
//! A run is free, and no seed gives the same run twice: a failure is explained by what it saves.
#![deny(unsafe_code)]

mod access;
mod cpu;
mod doing;
mod here;
mod machine;
mod memory;
mod options;
mod program;
mod report;
mod ring;
mod run;
mod signals;
mod stamp;
mod tlb;
mod violation;
mod walk;

pub use options::{Interrupts, MAX_CPUS, Options, PlantedFault};
pub use report::{Rates, Report, Totals, Verdict};
pub use run::run;
pub use violation::{Violation, ViolationKind};
