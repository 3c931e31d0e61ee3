//! What happens on an interrupt or exception, and how a CPU's state is printed.
//!
//! From ring 3, a trap ends [`crate::cpu::ring3::run`]. From ring 0 it arrives here: interrupts and NMIs are handled, any exception
//! ends the run, because the kernel reaches user memory through the offset map and has no faults of its own.

use core::fmt;

use x86_64::registers::control::{Cr2, Cr3};

use crate::arch::exit::{self, Verdict};
use crate::arch::{apic, paging, serial};
use crate::cpu::percpu::this_index;
use crate::cpu::{ipi, watchdog};

/// System call: INT 0x80 from ring 3.
pub const SYSCALL_VECTOR: u8 = 0x80;
/// A call from another CPU waits in the inbox.
pub(crate) const CALL_VECTOR: u8 = 0xf0;
/// Wakes a CPU from HLT, or fetches it from ring 3.
pub(crate) const WAKE_VECTOR: u8 = 0xf1;
/// What the local APIC raises when an interrupt went away meanwhile; gets no end-of-interrupt.
pub(crate) const SPURIOUS_VECTOR: u8 = 0xff;

pub(crate) const NMI: u64 = 2;
pub(crate) const PAGE_FAULT: u64 = 14;
/// Interrupts start here, exceptions end.
const FIRST_INTERRUPT: u64 = 32;

/// Words of the stack that are searched for return addresses, and how many of those are printed.
const STACK_WORDS: u64 = 512;
const STACK_LINES: usize = 16;

/// General registers and what the CPU pushed, as `trap.s` leaves them.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[expect(missing_docs, reason = "registers are called by their names")]
pub struct TrapFrame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    pub vector: u64,
    pub error_code: u64,
    pub rip: u64,
    pub code_segment: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub stack_segment: u64,
}

// The stack of a gate is aligned before the frame is pushed, and FXSAVE wants 16 bytes below it.
const _: () = assert!(size_of::<TrapFrame>().is_multiple_of(16));

impl fmt::Display for TrapFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rip, rsp, rflags, rax, rbx, rcx, rdx, rsi, rdi, rbp, .. } = self;
        writeln!(f, "  rip {rip:#018x} cs {:#x} rsp {rsp:#018x} rflags {rflags:#x}", self.code_segment)?;
        writeln!(f, "  rax {rax:#018x} rbx {rbx:#018x} rcx {rcx:#018x} rdx {rdx:#018x}")?;
        writeln!(f, "  rsi {rsi:#018x} rdi {rdi:#018x} rbp {rbp:#018x} r8  {:#018x}", self.r8)?;
        let Self { r9, r10, r11, r12, r13, r14, r15, .. } = self;
        writeln!(f, "  r9  {r9:#018x} r10 {r10:#018x} r11 {r11:#018x} r12 {r12:#018x}")?;
        write!(f, "  r13 {r13:#018x} r14 {r14:#018x} r15 {r15:#018x}")
    }
}

/// Called by `trap.s` for every trap from ring 0.
#[cfg_attr(not(bare), expect(dead_code, reason = "called from assembly, which only the image has"))]
pub(crate) extern "C" fn trap_from_kernel(frame: &TrapFrame) {
    match frame.vector {
        NMI => watchdog::nmi(frame),
        FIRST_INTERRUPT.. => interrupt(frame.vector),
        _ => unexpected(frame),
    }
}

/// Handles an interrupt, wherever it came from. Interrupts are off.
///
/// # Context
///
/// Takes no lock and allocates nothing (B4), except what a function passed to [`ipi::call_on`] does.
pub(crate) fn interrupt(vector: u64) {
    if vector != u64::from(SPURIOUS_VECTOR) {
        // Before the work: a call that arrives during it must interrupt again.
        apic::end_of_interrupt();
    }
    if vector == u64::from(CALL_VECTOR) {
        ipi::serve();
    }
}

/// Prints everything about `frame` and the stack it came from. Works in an NMI, and with any lock held.
pub(crate) fn print_state(why: fmt::Arguments<'_>, frame: &TrapFrame) {
    let (root, pcid) = Cr3::read_raw();
    serial::print_line_urgent(format_args!(
        "cpu {}: {why}\n{frame}\n  cr2 {:#018x} cr3 {:#x} pcid {pcid}",
        this_index(),
        Cr2::read_raw(),
        root.start_address(),
    ));
    if frame.code_segment & 3 == 0 {
        print_stack(frame.rsp);
    }
}

/// Prints the words above `rsp` that may be return addresses: the code is built without frame pointers, so some are leftovers.
pub(crate) fn print_stack(rsp: u64) {
    let text = crate::arch::asm::image_layout();
    let mut printed = 0;
    for address in (rsp & !7..).step_by(8).take(usize::try_from(STACK_WORDS).unwrap_or(0)) {
        let Some(word) = paging::read_kernel_word(address) else { break };
        if (text.text_start..text.text_end).contains(&word) {
            serial::print_line_urgent(format_args!("  stack {address:#018x}: {word:#018x}"));
            printed += 1;
        }
        if printed == STACK_LINES {
            break;
        }
    }
}

fn unexpected(frame: &TrapFrame) -> ! {
    let name = exception_name(frame.vector);
    print_state(
        format_args!("EXCEPTION {} ({name}) in ring 0, error code {:#x}", frame.vector, frame.error_code),
        frame,
    );
    exit::exit(Verdict::Exception)
}

/// Returns the mnemonic of an exception.
#[must_use]
pub fn exception_name(vector: u64) -> &'static str {
    match vector {
        0 => "#DE divide error",
        1 => "#DB debug",
        3 => "#BP breakpoint",
        4 => "#OF overflow",
        5 => "#BR bound range",
        6 => "#UD invalid opcode",
        7 => "#NM device not available",
        8 => "#DF double fault",
        10 => "#TS invalid TSS",
        11 => "#NP segment not present",
        12 => "#SS stack fault",
        13 => "#GP general protection",
        14 => "#PF page fault",
        16 => "#MF x87 error",
        17 => "#AC alignment check",
        18 => "#MC machine check",
        19 => "#XM SIMD error",
        20 => "#VE virtualization",
        21 => "#CP control protection",
        _ => "reserved",
    }
}

/// Ends the run after a Rust panic.
#[cfg(bare)]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    x86_64::instructions::interrupts::disable();
    // Before the first CPU has its GS base, this faults and the machine resets; nothing useful could be printed without it.
    serial::print_line_urgent(format_args!("cpu {}: PANIC: {info}", this_index()));
    print_stack(crate::arch::asm::stack_pointer());
    exit::exit(Verdict::Panic)
}
