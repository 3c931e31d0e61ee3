//! The `.s` files, and what each is told.

use core::arch::global_asm;
use core::mem::offset_of;

use crate::arch::context::TrapFrame;
use crate::cpu::percpu::Cpu;
use crate::cpu::smp::{self, StartBlock};
use crate::cpu::trap;
use crate::start;

global_asm!(
    include_str!("start.s"),
    trampoline = const smp::TRAMPOLINE,
    boot_stack_size = const BOOT_STACK_BYTES,
    boot_main = sym start::boot_main,
    secondary_main = sym smp::secondary_main,
    start_block = sym smp::START_BLOCK,
    start_root = const offset_of!(StartBlock, root),
    start_stack = const offset_of!(StartBlock, stack_top),
    start_cpu = const offset_of!(StartBlock, cpu),
);

global_asm!(
    include_str!("trap.s"),
    frame_cs = const offset_of!(TrapFrame, code_segment),
    frame_words = const size_of::<TrapFrame>() / 8,
    cpu_user_context = const Cpu::USER_CONTEXT_OFFSET,
    cpu_kernel_stack = const Cpu::KERNEL_STACK_OFFSET,
    trap_from_kernel = sym trap::trap_from_kernel,
);

global_asm!(include_str!("agent.s"));

/// Stack of the first CPU until it has one of its own; it is enough for parsing the boot
/// information.
const BOOT_STACK_BYTES: usize = 64 * 1024;
