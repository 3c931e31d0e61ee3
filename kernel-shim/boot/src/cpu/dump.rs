//! Prints what a CPU was doing: its registers, and the return addresses on its stack.

use core::fmt;

use x86_64::registers::control::{Cr2, Cr3};

use crate::arch::context::TrapFrame;
use crate::arch::symbols::image_layout;
use crate::arch::{paging, serial};
use crate::cpu::percpu::this_index;

/// Words of the stack that are searched for return addresses, and how many of those are printed.
const STACK_WORDS: u64 = 512;
const STACK_LINES: usize = 16;

/// Prints everything about `frame` and the stack it came from. Works in an NMI, and with any lock
/// held.
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

/// Prints the words above `rsp` that may be return addresses. The code is built without frame
/// pointers, so some of them are left over from calls that have returned.
pub(crate) fn print_stack(rsp: u64) {
    let text = image_layout();
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
