//! Ring 3: entering it, and what brings the CPU back.
//!
//! [`run_user`] works like entering a virtual machine: it returns at the first trap that the kernel
//! has to answer, on the ordinary kernel stack, with interrupts on. The program runs in the address
//! space that CR3 holds.

use core::sync::atomic::Ordering;

use x86_64::VirtAddr;
use x86_64::instructions::interrupts;
use x86_64::registers::control::Cr2;
use x86_64::structures::idt::PageFaultErrorCode;

use crate::arch::context::{TrapFrame, UserContext};
use crate::arch::descriptors::user_segments;
use crate::arch::symbols::enter_user;
use crate::arch::vectors::{NMI, PAGE_FAULT, SYSCALL_VECTOR};
use crate::cpu::percpu::this_cpu;
use crate::cpu::{trap, watchdog};

/// Flags that ring 3 may choose: the arithmetic ones, direction and single step.
const USER_FLAGS: u64 = 0xdd5;
/// Interrupts on, and the bit that is always set.
const FORCED_FLAGS: u64 = 1 << 9 | 1 << 1;
/// End of the lower half with four levels; IRETQ to a non-canonical address would fault in ring 0.
const LOWER_HALF_END: u64 = 1 << 47;
/// #GP, for an instruction pointer outside the lower half.
const GENERAL_PROTECTION: u64 = 13;

/// Why a program came back from ring 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserExit {
    /// INT 0x80; the arguments are in the registers, and the instruction pointer is behind the
    /// instruction.
    Syscall,
    /// The program touched an address that it may not use, or that is not mapped yet; running it
    /// again retries.
    PageFault {
        /// The address touched (CR2).
        address: VirtAddr,
        /// What was tried.
        error: PageFaultErrorCode,
    },
    /// Any other exception.
    Exception {
        /// Its number.
        vector: u64,
        /// Its error code, or 0.
        error_code: u64,
    },
    /// Another CPU asked for this one; see [`crate::cpu::smp::kick`].
    Interrupted,
}

/// Runs `context` in ring 3 on this CPU, in the address space that is loaded, until the kernel is
/// needed.
///
/// Interrupts from other CPUs are served meanwhile, so a TLB flush that arrives while the program
/// runs is carried out before its next instruction.
///
/// # Context
///
/// No lock held; interrupts on afterwards.
pub fn run_user(context: &mut UserContext) -> UserExit {
    let me = this_cpu();
    interrupts::disable();
    let exit = loop {
        // ORDERING: pairs with the store in `smp::kick`.
        if me.kicked.swap(false, Ordering::Acquire) {
            break UserExit::Interrupted;
        }
        if context.frame.rip >= LOWER_HALF_END {
            break UserExit::Exception { vector: GENERAL_PROTECTION, error_code: 0 };
        }
        let segments = user_segments();
        context.frame.code_segment = u64::from(segments.code.0);
        context.frame.stack_segment = u64::from(segments.data.0);
        context.frame.rflags = context.frame.rflags & USER_FLAGS | FORCED_FLAGS;
        // SAFETY: the context is borrowed for us alone; interrupts are off; segments and flags were
        // just made those of ring 3, and the instruction pointer is canonical.
        unsafe { enter_user(context) };
        let TrapFrame { vector, error_code, .. } = context.frame;
        if vector == u64::from(SYSCALL_VECTOR) {
            break UserExit::Syscall;
        }
        match vector {
            NMI => watchdog::handle_nmi(&context.frame),
            PAGE_FAULT => {
                // CR2 still holds the address: interrupts are off, and nothing in the kernel
                // faults.
                let address = VirtAddr::new_truncate(Cr2::read_raw());
                break UserExit::PageFault {
                    address,
                    error: PageFaultErrorCode::from_bits_truncate(error_code),
                };
            }
            0..32 => break UserExit::Exception { vector, error_code },
            _ => trap::handle_interrupt(vector),
        }
    };
    interrupts::enable();
    exit
}
