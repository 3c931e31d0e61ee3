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
//! # Levels
//!
//! A kernel takes as much as it wants. Each level has an example that the tests run.
//!
//! | level | the kernel implements | and gets | example |
//! |---|---|---|---|
//! | (a) the gather alone | [`FlushTlb`], [`Release`] | [`PageGather`] | `level_a.rs` |
//! | (b) its own flush | [`TableMemory`], [`FlushTlb`], [`Pages`] | the drivers | `level_b.rs` |
//! | (c) all of it | [`TableMemory`], [`Cpus`], [`Pages`] | the shootdown, too | `small_kernel` |
//!
//! At (a) the kernel walks and clears its tables itself, and queues what it unmaps. At (b) the
//! engine does, over an [`MmOf`]`<`[`OwnContext`]`<..>>`, and calls the kernel to flush; tables
//! that are there already are [adopted](pagetable::AddressSpace::adopt). At (c) it has an [`Mm`],
//! and the engine knows which CPUs must be told, which are lazy, and what their PCIDs still hold.
//!
//! Which level it is, the types say: any [`Cpus`] has [`FlushTlb`] by that, and no type implements
//! both by hand. A kernel of level (c) calls [`switch_mm`](tlb::switch_mm) wherever it loads CR3:
//! who never calls it has no CPU told. A kernel that does not want that takes level (b), and makes
//! an [`MmOf::with_own_flush`].
//!
//! What is provided by default is correct, and slow: without
//! [`allocate_batch`](Pages::allocate_batch) a gather flushes every seven pages, and every
//! second table.
//!
//! [`TableMemory`]: pagetable::TableMemory
//! [`Cpus`]: tlb::Cpus
//!
//! # Pages that are not freed, but handed back
//!
//! Frames of a layer that returns them to its caller go through [`FreeWith`], which is the kernel
//! with another place for its pages. Frames that are counted objects need nothing: an entry holds
//! one reference, [`unmap_page`](Pages::unmap_page) answers [`Free`](Disposition::Free), and
//! [`free_pages`](Pages::free_pages) drops the reference that it finds by the number of the frame
//! (`Arc::from_raw`, if that is its address; else by a table of frames).
//!
//! # Interrupts, and locks that keep them off
//!
//! Levels (a) and (b) ask nothing of interrupts: the kernel's own flush does. In level (c) a flush
//! waits for other CPUs, which answer in the handler of the flush interrupt. A CPU that has
//! interrupts off answers all the same if it calls [`flush_interrupt`](tlb::flush_interrupt) while
//! it spins; the engine does while it waits. So an address-space lock that keeps interrupts off
//! works, whether it is held or waited for, as long as whoever waits for it answers:
//!
//! - a lock of the `spin` crate, the table locks among them, says what a waiting CPU does in
//!   `RelaxStrategy::relax`, which has no `self`: it finds the kernel in a static, and its own
//!   number where `pinned` finds it;
//! - a lock of the kernel's own may keep a reference to the kernel.
//!
//! ```
//! # use core::sync::atomic::AtomicU64;
//! # use mmu_gather::tlb::{CpuId, CpuTlb, Cpus, flush_interrupt};
//! # use x86_64::structures::paging::PhysFrame;
//! # struct Kernel;
//! # // SAFETY: nothing of it is ever run.
//! # unsafe impl Cpus for Kernel {
//! #     type Bits = [AtomicU64; 1];
//! #     fn pinned<R>(&self, _: impl FnOnce(CpuId) -> R) -> R { unimplemented!() }
//! #     fn cpu_state(&self, _: CpuId) -> &CpuTlb<Self::Bits> { unimplemented!() }
//! #     fn init_root(&self) -> PhysFrame { unimplemented!() }
//! # }
//! # static KERNEL: std::sync::OnceLock<Kernel> = std::sync::OnceLock::new();
//! struct Answer;
//!
//! impl spin::RelaxStrategy for Answer {
//!     fn relax() {
//!         if let Some(kernel) = KERNEL.get() {
//!             kernel.pinned(|here| {
//!                 // SAFETY: pinned to `here`, interrupts off.
//!                 kernel.without_interrupts(|| unsafe { flush_interrupt(kernel, here) });
//!             });
//!         }
//!         core::hint::spin_loop();
//!     }
//! }
//! ```
//!
//! A kernel that overrides [`flush_others`](tlb::Cpus::flush_others) knows itself whether its calls
//! to other CPUs need interrupts on. No flush is made with a lock held that the handler of an
//! interrupt takes.
//!
//! # Example
//!
//! Two CPUs run a program; then part of it is unmapped, and then the rest.
//! `gather/examples/small_kernel/machine.rs` has `Kernel` and its three traits, in 100 lines.
//!
//! ```
//! # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/small_kernel/machine.rs"));
#![doc = include_str!("../examples/small_kernel/calls.rs")]
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
//! - **G6** If another gather ran on the same tables meanwhile, finish flushes the whole mm, tables
//!   included. (Which tables: `overlap/mod.rs`.)
//! - **G7** The work between two preemption points is bounded, whatever the range.
#![no_std]
#![deny(unsafe_code)]

mod adapters;
mod change_protection;
mod cut_leaf;
mod entries;
mod flush_policy;
mod flushed_gather;
mod free_empty;
mod free_pgtables;
mod gather;
mod levels;
mod limits;
mod mm;
mod move_tables;
mod one_table;
mod open_gather;
mod overlap;
mod platform;
mod queue;
mod range;
mod remove;
mod split;
mod state;
mod teardown;
mod zap;

#[cfg(doc)]
#[doc = include_str!("../EMBEDDING.md")]
pub mod embedding {}
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
pub use adapters::arena::BatchArena;
pub use adapters::free_with::FreeWith;
pub use cut_leaf::CutLeaf;
pub use flushed_gather::FlushedGather;
pub use free_empty::unmap_range;
pub use gather::MmuGather;
pub use levels::context::{OwnContext, TlbContext};
pub use levels::flush_tlb::FlushTlb;
pub use levels::page_gather::PageGather;
pub use limits::{GatherMode, Limits};
pub use mm::{Mm, MmOf};
pub use platform::{BatchPage, Disposition, Fate, GatherEvent, Pages, Platform, UnmappedLeaf, Vma, VmaKind};
pub use queue::freed_pages::{FreedFrames, FreedPages, PageRun};
pub use queue::release::Release;
pub use queue::spare::Room;
pub use split::SplitError;
pub use teardown::{exit_mmap, exit_mmap_within, shift_arg_pages, unmap_region, zap_page_range};
