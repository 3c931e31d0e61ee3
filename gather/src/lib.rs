//! Page-table teardown for x86_64 kernels.
//!
//! > 1. Unhook the entry.  2. Invalidate it on every CPU that may hold it.  3. Only then free the page or table.
//!
//! An [`MmuGather`] lives on the stack of whoever unmaps. It clears entries ([`unmap_vmas`](MmuGather::unmap_vmas)),
//! unhooks tables ([`free_pgtables`](MmuGather::free_pgtables)), and keeps both in batches until a flush has completed.
//! When no page for a batch can be had it goes on with the eight slots it has, flushing more often.
//!
//! ```text
//!  zap.rs            free_pgtables.rs        gather.rs                  mmu-tlb               you
//!  clear entry ──►   unhook table ──►        batch, range      ──►      raise tlb_gen,  ──►   free_pages,
//!  (table lock)      (parent's lock)         (nothing freed)            tell, wait            free_tables
//! ```
//!
//! The drivers (teardown.rs) do it all in the order that is right; one page goes a shorter way there (one_page.rs).
//!
//! A kernel supplies three traits: [`TableMemory`](pagetable::TableMemory) (where tables live),
//! [`Cpus`](tlb::Cpus) (who may hold a translation) and [`Pages`] (what happens to the pages). Nothing else is reached:
//! no heap, no global, no `dyn`.
//!
//! Rules (each has a test that bears its sentence as its name; P and T rules are in the two crates below):
//!
//! - **G1** A frame or table reaches the allocator only after every CPU that may hold a translation through it has
//!   flushed.
//! - **G2** The flush covers every address cleared since the last flush, and its stride is the smallest level cleared.
//! - **G3** Nothing is freed and no IPI is waited for under a page-table lock; flushes that must come before the lock drops
//!   (of dirty pages, and of pages that were moved) are the one stated exception, and they free nothing.
//! - **G4** Allocation failure changes speed, never the visible result: bundle, forced flush, single-table fallback.
//! - **G5** Everything queued is released exactly once; an unfinished gather finishes itself when dropped. (If a call of the
//!   kernel's own unwinds in the middle of a flush or of freeing, what waits leaks, and whoever looks next makes up for the
//!   flush.)
//! - **G6** If another gather ran on the same mm meanwhile, finish flushes the whole mm, tables included.
//! - **G7** The work between two preemption points is bounded, whatever the range.
#![no_std]
#![deny(unsafe_code)]

#[cfg(feature = "bumpalo")]
mod arena;
mod batch;
mod entries;
mod free_pgtables;
mod gather;
mod limits;
mod mm;
mod move_tables;
mod one_page;
mod platform;
mod range;
mod slot;
mod spare;
mod split;
mod table_batch;
mod teardown;
mod waiting;
mod zap;

pub use mmu_pagetable as pagetable;
pub use mmu_tlb as tlb;

#[cfg(feature = "bumpalo")]
pub use arena::BatchArena;
pub use gather::{FlushedGather, GatherMode, MmuGather};
pub use limits::Limits;
pub use mm::Mm;
pub use platform::{BatchPage, Disposition, Fate, GatherEvent, Pages, Platform, UnmappedLeaf, Vma, VmaKind};
pub use slot::{FreedFrames, FreedPages, PageRun};
pub use split::SplitError;
pub use teardown::{exit_mmap, shift_arg_pages, unmap_region, zap_page_range};
pub use zap::CutLeaf;
