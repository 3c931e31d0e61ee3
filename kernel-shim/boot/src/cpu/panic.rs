//! The end of the run after a Rust panic.

use core::panic::PanicInfo;

use x86_64::instructions::interrupts;

use crate::arch::exit::{self, Verdict};
use crate::arch::{asm, serial};
use crate::cpu::dump::print_stack;
use crate::cpu::percpu::this_index;

/// Ends the run after a Rust panic.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    interrupts::disable();
    // Before the first CPU has its GS base, `this_index` faults and the machine resets: status 0,
    // without a line.
    serial::print_line_urgent(format_args!("cpu {}: PANIC: {info}", this_index()));
    print_stack(asm::stack_pointer());
    exit::exit(Verdict::Panic)
}

/// Named by the unwinding tables of the prebuilt `core`, which this image discards; never called.
// SAFETY: nothing else in the image defines this name.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Named by the landing pads of the prebuilt `alloc`; never called, because a panic ends the run
/// where it happens.
// SAFETY: nothing else in the image defines this name.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    exit::exit(Verdict::Panic)
}
