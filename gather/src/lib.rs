//! Page-table teardown for x86_64 kernels.
//!
//! > 1. Unhook the entry.
//! > 2. Invalidate it on every CPU that may hold it.
//! > 3. Only then free the page or table.
//!
//! An [`MmuGather`] lives on the stack of whoever unmaps. It clears entries
//! ([`unmap_vmas`](MmuGather::unmap_vmas)), unhooks tables
//! ([`free_pgtables`](MmuGather::free_pgtables)), and keeps the pages and tables in batches until a
//! flush has completed. When no page for a batch can be had, it goes on with the eight slots it
//! has, and flushes more often.
//!
//! ```text
//!  zap.rs           free_pgtables.rs     gather.rs            mmu-tlb             you
//!  clear entry ──►  unhook table ──►     batch, range   ──►   raise tlb_gen, ──►  free_pages,
//!  (table lock)     (parent's lock)      (nothing freed)      tell, wait          free_tables
//! ```
//!
//! The drivers ([`unmap_region`], [`zap_page_range`], [`exit_mmap`], [`shift_arg_pages`], and
//! [`unmap_range`] for a kernel that knows no neighbours) take these steps in the order that is
//! right. [`one_munmap`] follows one munmap through them, file
//! by file; [`fast_paths`] is the table of the shorter paths: what each saves, where that
//! was measured, and which test holds it equal to the general path.
//!
//! A kernel supplies three traits: [`TableMemory`](pagetable::TableMemory) (where tables live),
//! [`Cpus`](tlb::Cpus) (who may hold a translation) and [`Pages`] (what happens to the pages).
//! Nothing else is reached: no heap, no global, no `dyn`.
//!
//! # Example
//!
//! Two CPUs run a program; then part of it is unmapped, and then the rest.
//! `gather/examples/small_kernel/machine.rs` has the three traits, in 100 lines.
//!
//! ```
#![doc = include_str!("../examples/small_kernel/main.rs")]
//! ```
//!
//! # What safe code can and cannot do
//!
//! No safe call, in any order, with any argument, makes the engine free something reachable, or
//! lose a flush that it owes. What could do so is `unsafe` and lists what it asks, or takes a
//! proof, or is not public. Safe code can make the engine flush more than it must, wait for a lock
//! that it holds itself, panic where a function says so, and leak what it forgets.
//!
//! | proof | shows | comes from |
//! |---|---|---|
//! | [`MmuGather`] | the map lock is held until it has flushed | [`new`], from the kernel |
//! | [`FlushedGather`] | every CPU has forgotten what waits in it | [`flush`]; consumed by `free` |
//! | [`UnhookedTable`] | no new walk of that root reaches the table | unhooking; not copied |
//! | [`TableView`] | it was a table of this level, and stays one | `unsafe`, or another view |
//! | [`LockedTable`] | no other software changes the entries | [`lock`] |
//! | [`Flushed`] | who had to be told has answered, up to a generation | a flush; not copied |
//! | [`FlushRequest`] | it asks for no less than was changed | a flush, or `unsafe` |
//! | a pinned [`MmContext`] | a CPU may know it by its address | `Pin<&Mm>` |
//!
//! A [`LockedTable`] shows nothing about a new value of an entry, and a [`Flushed`] is of one
//! context.
//!
//! [`new`]: MmuGather::new
//! [`flush`]: MmuGather::flush
//! [`lock`]: pagetable::TableView::lock
//! [`UnhookedTable`]: pagetable::UnhookedTable
//! [`TableView`]: pagetable::TableView
//! [`LockedTable`]: pagetable::LockedTable
//! [`Flushed`]: tlb::Flushed
//! [`FlushRequest`]: tlb::FlushRequest
//! [`MmContext`]: tlb::MmContext
//!
//! What the engine believes without proof is what a kernel promises when it implements the
//! unsafe traits: among it, that there is one machine, with one memory. Safe code that holds two
//! kernels of one type could flush the CPUs of the wrong one. What a kernel does with its own pages
//! when its own methods are called (`unmap_page`, say) is the kernel's affair.
//!
//! Two tests hold this up: `tests/compile_fail`, where each way around it does not compile, and
//! `safe_attacker`, which makes all the safe calls at random.
//!
//! # Rules
//!
//! Each has a test that bears its sentence as its name, in `tests/tests/rules_gather.rs`; the P and
//! T rules are in the two crates below.
//!
//! - **G1** A frame or table reaches the allocator only after every CPU that may hold a translation
//!   through it has flushed.
//! - **G2** The flush covers every address cleared since the last flush, and its stride is the
//!   smallest level cleared.
//! - **G3** Nothing is freed and no IPI is waited for under a page-table lock; flushes that must
//!   come before the lock drops (of dirty pages, and of pages that were moved) are the one stated
//!   exception, and they free nothing.
//! - **G4** Allocation failure changes speed, never the visible result: bundle, forced flush,
//!   single-table fallback.
//! - **G5** Everything queued is released exactly once; an unfinished gather finishes itself when
//!   dropped. (If a call of the kernel's own unwinds in the middle of a flush or of freeing, what
//!   waits leaks, and whoever looks next makes up for the flush.)
//! - **G6** If another gather ran on the same mm meanwhile, finish flushes the whole mm, tables
//!   included.
//! - **G7** The work between two preemption points is bounded, whatever the range.
#![no_std]
#![deny(unsafe_code)]

#[cfg(feature = "bumpalo")]
mod arena;
mod cut_leaf;
mod entries;
mod flush_policy;
mod flushed_gather;
mod free_empty;
mod free_pgtables;
mod gather;
mod limits;
mod mm;
mod move_tables;
mod one_page;
mod open_gather;
mod platform;
mod queue;
mod range;
mod remove;
mod split;
mod state;
mod teardown;
mod zap;

#[cfg(doc)]
#[doc = include_str!("../FAST-PATHS.md")]
pub mod fast_paths {}
#[cfg(doc)]
#[doc = include_str!("../MUNMAP.md")]
pub mod one_munmap {}

pub use mmu_pagetable as pagetable;
pub use mmu_tlb as tlb;
/// What an embedder names of other crates: frames and flags, and locks that spin. A kernel that
/// depends on this crate alone compiles on stable; the default features of `x86_64` do not.
pub use pagetable::{spin, x86_64};

#[cfg(feature = "bumpalo")]
pub use arena::BatchArena;
pub use cut_leaf::CutLeaf;
pub use flushed_gather::FlushedGather;
pub use free_empty::unmap_range;
pub use gather::MmuGather;
pub use limits::{GatherMode, Limits};
pub use mm::Mm;
pub use platform::{BatchPage, Disposition, Fate, GatherEvent, Pages, Platform, UnmappedLeaf, Vma, VmaKind};
pub use queue::freed_pages::{FreedFrames, FreedPages, PageRun};
pub use split::SplitError;
pub use teardown::{exit_mmap, exit_mmap_within, shift_arg_pages, unmap_region, zap_page_range};
