//! The bootable image: what a kernel needs of an x86_64 PC, and the small kernel on top of it.
//!
//! ```text
//!   start.s, start   PVH entry -> long mode -> this order: boot information, frames, page tables, heap, gates, CPUs, workload
//!
//!   what a machine supplies to the kernel          where
//!   -------------------------------------          -----
//!   this CPU, its state                            percpu::this_cpu
//!   INVLPG, CR3 with or without flush              mmu::invalidate_page, mmu::load_root
//!   run on other CPUs and wait                     ipi::call_on
//!   physical memory as pointers, frames            paging::phys_to_ptr, frames
//!   ring 3 until a system call or fault            ring3::run
//!   all CPUs at work                               smp::on_every_cpu
//!   all of it, as the kernel wants it              machine
//!
//!   what the kernel is put to                      where
//!   -------------------------                      -----
//!   programs that stamp their memory               program, stamp
//!   frames poisoned between two uses               ledger; what it finds ends the run: violation
//!   the work                                       workload, phases: stage (drill, layouts), threads, churn, lazy, measure
//! ```
//!
//! # Invariants
//!
//! - **B1** Every gate switches interrupts off and has an interrupt stack of its kind: compiled code keeps data below its stack
//!   pointer (the red zone of the psABI). (`descriptors`)
//! - **B2** In ring 0, GS points to the running CPU's `Cpu`; `trap.s` swaps it at each crossing. (`percpu`)
//! - **B3** All RAM is mapped at `PHYS_OFFSET`, and every root holds the same kernel half, which does not change after the
//!   second CPU has started, except that stacks are added below tables that exist. (`paging`)
//! - **B4** Interrupt handlers take no lock, allocate nothing and do not fault; a function passed to `ipi::call_on` decides for
//!   itself which locks the code it interrupts may hold.
//!
//! Assembly is in `asm` and the `.s` files only. Built as a library for the host, everything but the assembly is type-checked
//! and its pure parts are tested; only `cfg(bare)`, which `image.toml` sets, makes an image of it.

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

pub mod arch;
mod checks;
pub mod cpu;
#[expect(unsafe_code, reason = "answers for the machine to the kernel")]
mod machine;
pub mod options;
#[expect(unsafe_code, reason = "changes stacks; reads the boot information")]
mod start;
mod workloads;
