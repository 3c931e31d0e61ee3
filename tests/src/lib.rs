//! A kernel on paper: the smallest platform that embeds the engine, and what holds the engine to
//! its rules.
//!
//! [`PaperKernel`] implements the three traits over an ordinary heap arena, on one thread. Its
//! pretend CPUs keep every translation they ever filled until something invalidates it, everything
//! that happens is logged in order, and a checker reports each page or table that is freed while
//! some CPU could still reach it.
//!
//! ```text
//!  platform.rs   what an embedder writes: three impls, about 130 lines
//!  kernel.rs     the kernel's data; table_page.rs a table with its lock
//!  program.rs    what programs and schedulers do: map, touch, switch, go lazy
//!  cpu.rs        one CPU's TLB and structure cache
//!  gather.rs     the unsafe calls of a gather, made safe
//!  ledger.rs     the counts of every page: who may be freed, once
//!  violation.rs  what counts as one; check.rs looks for them
//!  log.rs        events in order; hooks.rs runs something at them
//!  options.rs    the machine, and how much memory there is
//! ```
//!
//! A hook runs at an event, in the middle of the engine's work. So one thread can play two CPUs:
//! the second one acts exactly where a race would let it.
//!
//! Beside it is [`HostedPlatform`]: what a kernel has below its memory layer, on the machine of the
//! conformance kit. Layers from elsewhere are put on it.
//!
//! ```text
//!  hosted.rs     frames that are counted, CPUs, the three impls
//!  map_lock.rs   a map lock of which the checker is told
//! ```
#![deny(unsafe_code)]

mod check;
mod cpu;
mod gather;
mod hooks;
mod hosted;
mod kernel;
mod ledger;
mod log;
mod map_lock;
mod options;
mod platform;
mod program;
mod table_page;
mod violation;

pub use cpu::{Access, Fault, Translation};
pub use gather::GatherOnPaper;
pub use hosted::{HostedMm, HostedPlatform, counted};
pub use kernel::{PaperKernel, PaperMm};
pub use ledger::PageAccount;
pub use log::{Event, Noted};
pub use map_lock::{MapGuard, MapLock};
pub use options::{Answers, Bits, LineNotes, Locks, Options, Supply};
pub use platform::Backing;
pub use program::{CPU, GIB, KIB, MIB, TIB, area, range};
pub use violation::Violation;
