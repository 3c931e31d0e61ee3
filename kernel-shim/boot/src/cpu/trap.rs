//! What happens on an interrupt or exception.
//!
//! From ring 3, a trap ends [`crate::cpu::ring3::run_user`]. From ring 0 a trap arrives here:
//! interrupts and NMIs are handled, any exception ends the run. The kernel has no page faults of
//! its own, because it reaches user memory through the offset map.

use crate::arch::apic;
use crate::arch::context::TrapFrame;
use crate::arch::exit::{self, Verdict};
use crate::arch::vectors::{FIRST_INTERRUPT, FLUSH_VECTOR, NMI, SPURIOUS_VECTOR, exception_name};
use crate::cpu::dump::print_state;
use crate::cpu::{ipi, watchdog};

/// Called by `trap.s` for every trap from ring 0.
#[cfg_attr(not(bare), expect(dead_code, reason = "called from assembly, which only the image has"))]
pub(crate) extern "C" fn trap_from_kernel(frame: &TrapFrame) {
    match frame.vector {
        NMI => watchdog::handle_nmi(frame),
        FIRST_INTERRUPT.. => handle_interrupt(frame.vector),
        _ => end_with_exception(frame),
    }
}

/// Handles an interrupt, wherever it came from. Interrupts are off.
///
/// # Context
///
/// Takes no lock and allocates nothing (B4).
pub(crate) fn handle_interrupt(vector: u64) {
    if vector != u64::from(SPURIOUS_VECTOR) {
        // Acknowledged before the work is done: mail that arrives during the work must interrupt
        // again.
        apic::end_of_interrupt();
    }
    if vector == u64::from(FLUSH_VECTOR) {
        ipi::take_mail();
    }
}

fn end_with_exception(frame: &TrapFrame) -> ! {
    let name = exception_name(frame.vector);
    print_state(
        format_args!("EXCEPTION {} ({name}) in ring 0, error code {:#x}", frame.vector, frame.error_code),
        frame,
    );
    exit::exit(Verdict::Exception)
}
