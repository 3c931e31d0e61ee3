//! A small kernel that embeds the engine: what `asm/` and `mm_struct` are to Linux's mm/.
//!
//! Written once, generic over its [`Machine`]: the hosted one, which is a model, and the bare one,
//! which is not.
//!
//! | file | what a kernel has to have |
//! |---|---|
//! | machine | CPUs, interrupts, physical memory: supplied by the machine |
//! | frame, frame_use | 32 bytes of metadata a frame: references, mappings, the table lock |
//! | vma, mm | areas, address spaces |
//! | locks/map_lock | the map lock, and what each call may do under it |
//! | embed | the engine's three traits, implemented: **the part to copy from** |
//! | observed | what this project wraps around them: checker, seams, a planted bug |
//! | fault | demand faults |
//! | large/folio | 16 pages that come and go together |
//! | large/zero_block | the 2 MiB page of zeroes: mapped by reads, replaced by writes |
//! | fork | copies of address spaces, pages shared until written |
//! | guard | guard pages: entries that are kept when pages are dropped |
//! | kernel | munmap, madvise, exit, the stack move of exec, context switch, lazy CPUs |
//! | protect, remap | mprotect; mremap and brk |
//! | reclaim, swap | pages taken away, and the places where they are meanwhile |
//! | populate | areas filled without faults |
//! | inspect | what a checker asks when nothing is going on |
//! | supply | memory pressure |
//! | locks/seam_lock | table locks, at whose drop others may run |
//! | counters | what happened, each CPU for itself, for the report |
//! | work/ | the same work on any machine, so that what it counts can be compared |
//!
//! It allocates areas from the heap (`alloc`); the engine below it allocates nothing.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

mod counters;
mod embed;
mod fault;
mod fork;
mod frame;
mod frame_use;
mod guard;
mod inspect;
mod kernel;
mod large;
mod locks;
mod machine;
mod mm;
mod observed;
mod populate;
mod protect;
mod reclaim;
mod remap;
mod supply;
mod swap;
mod vma;
mod work;

pub use counters::{Counters, CpuCounters, Snapshot};
pub use embed::{Embedder, EngineArea};
pub use fault::{FaultError, UserAccess};
pub use frame::{FrameKind, FrameMeta, Frames};
pub use inspect::SharedFrames;
pub use kernel::{Config, Discarding, Error, Kernel, Misbehaviour};
pub use locks::seam_lock::{SeamGuard, SeamLock};
pub use machine::{Content, Contents, FrameRole, Machine, Moment, Note, Place, Seam, Shows, UnderMapLock};
pub use mm::Mm;
pub use populate::PageContent;
pub use supply::{Asked, Scarce, Site, Supply};
pub use vma::{Area, AreaKind, Granule, Growth, Protection, Vma, VmaTree};
pub use work::{Failure, PROGRAM_FILE, PROGRAM_START, Stage, drill, plan, program_area};
