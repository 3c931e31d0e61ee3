//! x86_64 paging structures, as memory that hardware reads behind our back.
//!
//! ```text
//! CR3 ──► P4D table ──► PUD table ──► PMD table ──► PTE table ──► 4 KiB frame      (four levels)
//!            │              └► 1 GiB leaf └► 2 MiB leaf
//!            └ one entry = 512 GiB
//! ```
//!
//! This crate changes entries, takes locks and decides which tables may go. It knows nothing of
//! TLBs: clearing an entry here does **not** make a translation unusable, and unhooking a table
//! does **not** make its page free. Those two steps belong to `mmu-tlb`, and `mmu-gather` puts the
//! three in order.
//!
//! | you look for | it is |
//! |---|---|
//! | what an entry means: empty, present, or kept | [`EntryValue::decode`], entry.rs |
//! | where an entry is cleared | [`Entry::get_and_clear_seen`], entry.rs |
//! | when a plain store is enough to clear it | [`EntryValue::is_settled`], entry.rs |
//! | a root with tables below it already | [`AddressSpace::adopt`], adopt.rs |
//! | what the `x86_64` crate calls a frame allocator | [`adapters`], adapters.rs |
//! | where a table is linked | [`AddressSpace::ensure_table`], map.rs |
//! | which tables may go (floor and ceiling) | [`Bounds`], unhook.rs |
//! | where a table is unhooked (free_pgd_range) | [`AddressSpace::unhook_tables`], unhook.rs |
//! | where an empty table is unhooked | [`AddressSpace::unhook_empty_tables`], empty.rs |
//! | the lock of a table (ptlock) | [`TableView::lock`], locked.rs |
//! | locks for a kernel that keeps nothing for each frame | [`HashedLocks`], [`NoLock`], lock.rs |
//! | what a kernel implements | [`TableMemory`], memory.rs |
//!
//! Rules (each has a test that bears its sentence as its name, in
//! `tests/tests/rules_pagetable.rs`):
//!
//! - **P1** An entry is only read or written atomically; hardware may set A/D bits at any time.
//! - **P2** A table page reachable from a root is never freed or reused; it is first unhooked under
//!   the lock of its parent entry.
//! - **P3** Table lifetime is decided by VMAs (floor/ceiling), or by "all 512 entries empty under
//!   both locks", never by guess.
//! - **P4** Where a kernel notes the used lines of its tables ([`UsedLines`]), the line of every
//!   entry that is not empty is noted. (The kernel half of a root is not looked at, noted or not.)
//!
//! P1 costs a locked exchange wherever hardware may still set a bit between a load and a store.
//! Where hardware has nothing left to set (A is set, and D is set or nothing can write) a load and
//! a store do: [`EntryValue::is_settled`] has the argument.
#![no_std]
#![deny(unsafe_code)]

pub mod adapters;
mod adopt;
mod empty;
mod entry;
mod level;
mod lock;
mod locked;
mod map;
mod memory;
mod range;
mod space;
mod table;
mod unhook;
mod used_lines;
mod walk;

pub use entry::{Decoded, Entry, EntryValue, Marker, MigrationAccess, NonPresent, StaleWrites};
pub use level::{Level, PagingMode};
pub use lock::{HashedLocks, Lock, NoLock, TableLock};
pub use locked::{GuardOf, LockedEntry, LockedPair, LockedTable};
pub use map::MapError;
pub use memory::TableMemory;
pub use range::{RangeError, VirtRange};
pub use space::AddressSpace;
/// The crate whose mutex a [`TableLock`] is. A kernel names it through here, in the right version.
pub use spin;
pub use table::{Table, TableView};
pub use unhook::{Bounds, UnhookedTable};
pub use used_lines::{Line, Lines, LinesIter, UsedLines, UsedParts};
pub use walk::Mapping;
/// The crate that this one speaks of frames and flags in. On a stable compiler a kernel names it
/// through here, and need not depend on it: its default features ask for a nightly one.
pub use x86_64;
