//! Who may still hold a translation, and how to make sure that nobody does.
//!
//! 1. The page table has been changed.
//! 2. `tlb_gen` of its address space is raised: "whatever is older than this is stale".
//! 3. Only then does the flusher look which CPUs must be told; CPUs that it does not tell find out
//!    by comparing generations before they next use the address space.
//!
//! | you look for | it is |
//! |---|---|
//! | what starts a flush (flush_tlb_mm_range) | [`flush_tlb_mm_range`], shootdown.rs |
//! | where an IPI is decided (should_flush_tlb) | `cpus_to_interrupt`, shootdown.rs |
//! | what it asks of each CPU, if no tables go | [`CpuTlb::concern`], cpu_state.rs |
//! | what the CPU that is told does (flush_tlb_func) | [`flush_tlb_func`], flush.rs |
//! | how it decides: nothing, pages, or everything | [`plan`], flush.rs |
//! | where a slot is chosen (choose_new_asid) | `CpuTlb::choose_new_asid`, cpu_state.rs |
//! | what a switch does with the slot (switch_mm) | [`switch_mm`], switch.rs |
//! | where a lazy CPU catches up | `catch_up`, called by [`switch_mm`], switch.rs |
//! | reclaim's batch (arch_tlbbatch) | [`UnmapBatch`], unmap_batch.rs |
//! | what a kernel implements | [`Cpus`], mmu.rs |
//!
//! Rules (each has a test that bears its sentence as its name, in `tests/tests/rules_tlb.rs`):
//!
//! - **T1** Order is: change the page table, raise `tlb_gen`, then look who must be told. `tlb_gen`
//!   rises even if nobody must.
//! - **T2** A CPU slot `(ctx_id, gen)` means: nothing older than `gen` of that context is cached
//!   there. Flushing without raising the slot is legal; raising it without flushing is not.
//! - **T3** A ranged flush is enough only when it takes the slot from gen-1 to gen. Otherwise flush
//!   all.
//! - **T4** A switch announces itself (SWITCHING), joins the cpumask, fences fully, reads
//!   `tlb_gen`, then loads CR3.
//! - **T5** A lazy CPU may skip page flushes (it checks on wake-up), never the flush of freed
//!   tables. A CPU that is off skips both: it uses no translation of an address space, and comes
//!   back without one.
//! - **T6** A PCID names one context on one CPU until it is flushed; reuse flushes first.
//!
//! # Switch against flush
//!
//! ```text
//!  flusher (CPU a)                              switcher (CPU b, interrupts off)
//!  F1  change the page table                    S1  is_lazy = false
//!  F2  tlb_gen += 1; fence(SeqCst)              S2  loaded_mm = SWITCHING
//!  F3  read cpumask                             S3  cpumask |= b; fence(SeqCst)
//!  F4  read loaded_mm[b]        (acquire)       S4  read tlb_gen, compare with the slot
//!  F5  read is_lazy[b]          (acquire)       S5  slot = (ctx_id, gen)
//!  F6  send, wait for every answer              S6  write CR3 (flushing or keeping)
//!  F7  free the frame or the table              S7  loaded_mm = next
//! ```
//!
//! This is store buffering on {`tlb_gen`, cpumask + `loaded_mm`}: with a full fence on both sides,
//! at least one of "S4 sees the new generation" and "F3 and F4 see b" holds.
//!
//! - S2 comes before S4, not merely before S6. Otherwise F4 sees the old mm and sends nothing,
//!   while S4 has already decided that nothing need be flushed (CVE-2025-37964).
//! - S1 comes before the fence, too: a CPU on its way in must not be taken for a lazy one.
//! - For all this relaxed accesses would do, because the fences stand between them. Acquire (F4,
//!   F5) and release (S2, S7, going lazy) are for the CPU that is *not* told: its last use of the
//!   page must come before whoever found it elsewhere or lazy frees the page.
//!
//! # Lazy exit against flush
//!
//! ```text
//!  flusher (CPU a)                              waking CPU b (the mm is still in CR3)
//!  F1  change the page table                    L1  is_lazy = false
//!  F2  tlb_gen += 1; fence(SeqCst)              L2  fence(SeqCst)
//!  F5  read is_lazy[b]                          L3  read tlb_gen, compare with the slot
//!  F6  send, wait                               L4  equal: keep the TLB; else flush it, raise slot
//! ```
//!
//! This has the same shape, on {`tlb_gen`, `is_lazy`}: either b is told, or b sees the new
//! generation. Entering lazy mode needs no fence: a request that races with it finds either an
//! active CPU, which flushes, or a lazy one, which leaves.
//!
//! In Rust's memory model a SeqCst read-modify-write alone is not a full barrier, so loom is shown
//! a fence after it. On x86 the locked instruction is that fence already, and the compiler may not
//! know it: F2 is one instruction of assembly (`sync::fetch_add_fenced`) instead of two locked
//! ones.
//!
//! # How requests travel
//!
//! F6 goes by mail: each [`CpuTlb`] has room for a request of every other CPU, and the kernel
//! supplies one interrupt. `mailbox.rs` has the picture. A kernel with calls to other CPUs of its
//! own overrides [`Cpus::flush_others`] instead.
//!
//! # How the protocol is checked
//!
//! - **loom** (`tests/loom`) proves of this very source, in twenty-five tests of two or three CPUs,
//!   that no execution that loom tries ends badly, and that memory passes from its last user to the
//!   next owner in order. It does not prove: what no test does; more than 6 slots' worth of address
//!   spaces; CPUs beyond the 64th; interleavings that loom passes over, many of which the corrected
//!   loom tries; load buffering (`tests/loom/README.md`).
//! - **A machine of small steps** (`mmu-tests`, `tlb_gen_model`) proves every run of two CPUs and
//!   two address spaces, up to three generations, exit and reclaim included, with stores that wait;
//!   and that everything begun can end. It does not prove this source, except for `plan`: the steps
//!   are a copy, compared with the engine call by call. Three CPUs it has only where all run one
//!   address space and none switches.
//! - **The rules** (`mmu-tests`, `rules_tlb`) prove each sentence above, on one thread that plays
//!   all CPUs, and not what happens between two instructions.
//! - **The fuzzer** (`teardown fuzz`) proves nothing. It finds what breaks in long random runs of a
//!   whole kernel over a software MMU; no reordering, because its CPUs change over at seams only.
//! - **The boot image** (`teardown boot`) proves nothing. It runs the real instructions on emulated
//!   CPUs; QEMU's TLB keeps less than hardware may.
//!
//! Which cache lines all this touches is recorded access by access in unit tests
//! (`src/tests/lines.rs`): a request that is satisfied already writes nothing and reads only its
//! own CPU's lines; initiators that share no address space share no line that one of them writes;
//! what an initiator reads of a CPU is on a line that this CPU does not write when it flushes.
//!
//! Bugs planted in this crate (`tests/planted`) show that each of these checks can fail.
#![no_std]
#![deny(unsafe_code)]

mod cpu_state;
mod cpuset;
mod delivery;
mod flush;
mod generation;
mod hotplug;
mod mailbox;
mod mistakes;
mod mmu;
mod request;
mod shootdown;
mod switch;
mod sync;
#[cfg(all(test, not(mmu_loom)))]
mod tests;
mod unmap_batch;

pub use cpu_state::{Asid, Concern, CpuTlb, Laziness, LoadedMm, NR_DYN_ASIDS, PcidSupport, Slot};
pub use cpuset::{CpuBits, CpuId, CpuSet};
pub use delivery::flush_interrupt;
pub use flush::{Action, LoadedIs, Situation, WhyNothing, flush_tlb_func, plan};
pub use generation::{CtxId, CtxIds, MmContext, TlbGen};
pub use hotplug::{init_cpu, offline_cpu};
pub use mailbox::Answers;
pub use mmu::{CachedTranslations, Cpus, EarlyAnswer, OnlineCpus, SINGLE_PAGE_FLUSH_CEILING, TlbEvent};
pub use request::{FlushKind, FlushRequest, FreedTables, PageSpan, Wanted};
pub use shootdown::{Flushed, flush_tlb_batched_pending, flush_tlb_mm, flush_tlb_mm_range};
pub use switch::{enter_lazy_tlb, leave_mm, switch_mm};
pub use unmap_batch::UnmapBatch;
/// The crate that this one speaks of frames and PCIDs in. On a stable compiler a kernel names it
/// through here, and need not depend on it: its default features ask for a nightly one.
pub use x86_64;
