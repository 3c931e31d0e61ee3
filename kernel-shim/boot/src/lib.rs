//! The bootable image: what a kernel needs of an x86_64 PC, and the small kernel on top of it.
//!
//! ```text
//!   assembly   the `.s` files: PVH entry, traps, the program for ring 3
//!      │
//!   start      the order in which the machine is brought up
//!      │
//!   workloads  what the kernel is put to: threads, churn, lazy, ...
//!      │
//!   machine    all of what is below, as the small kernel wants it
//!      │
//!   checks     frames poisoned between two uses; stamps; violations; the self-test
//!      │
//!   cpu        several CPUs: state, calls, work, programs in ring 3, the watchdog
//!      │
//!   arch       one CPU and the devices of a PC
//!
//!   what a machine supplies to the kernel    where
//!   -------------------------------------    -----
//!   this CPU, its state                      cpu::percpu::this_cpu
//!   INVLPG, CR3 with or without flush        arch::mmu::invalidate_page, arch::mmu::load_root
//!   interrupt other CPUs, wait for them       cpu::ipi
//!   physical memory as pointers, frames      arch::phys_map::phys_to_ptr, arch::frames
//!   ring 3 until a system call or fault      cpu::ring3::run_user
//!   all CPUs at work                         cpu::smp::on_every_cpu
//! ```
//!
//! Each room uses those below it and none above; no file uses one that uses it.
//!
//! # Invariants
//!
//! - **B1** Every gate switches interrupts off and changes to the interrupt stack of its kind,
//!   because compiled code keeps data below its stack pointer (the red zone of the psABI).
//!   (`arch::descriptors`)
//! - **B2** In ring 0, GS points to the running CPU's `Cpu`; `trap.s` swaps it at each crossing.
//!   (`cpu::percpu`)
//! - **B3** All RAM is mapped at `PHYS_OFFSET`, and every root holds the same kernel half, which
//!   does not change after the second CPU has started, except that stacks are added below tables
//!   that exist. (`arch::paging`)
//! - **B4** Interrupt handlers take no lock, allocate nothing and do not fault.
//!
//! Assembly is in `arch::asm` and the `.s` files only. Built for the host, the crate is a library:
//! everything but the assembly is type-checked, and the pure parts are tested. `image.toml` sets
//! `cfg(bare)`, which makes an image of it.

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;

pub mod arch;
#[cfg(bare)]
#[expect(unsafe_code, reason = "includes the assembly")]
mod assembly;
mod checks;
mod counted;
pub mod cpu;
#[expect(unsafe_code, reason = "answers for the machine to the kernel")]
mod machine;
pub mod options;
#[expect(unsafe_code, reason = "changes stacks; reads the boot information")]
mod start;
mod workloads;
