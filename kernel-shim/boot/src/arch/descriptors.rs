//! Segments, the task state with its interrupt stacks, the interrupt gates: one set a CPU.
//!
//! Every gate uses the stack of its kind (invariant B1): compiled code keeps data below its stack
//! pointer, where an interrupt on the same stack would overwrite it.

extern crate alloc;

use alloc::boxed::Box;

use spin::Once;
use x86_64::instructions::segmentation::{CS, DS, ES, SS, Segment};
use x86_64::instructions::tables::load_tss;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable, SegmentSelector};
use x86_64::structures::idt::{Entry, InterruptDescriptorTable};
use x86_64::structures::tss::TaskStateSegment;
use x86_64::{PrivilegeLevel, VirtAddr};

use crate::arch::paging::new_stack;
use crate::arch::symbols::trap_stub;
use crate::arch::vectors::SYSCALL_VECTOR;

/// Pages of each interrupt stack: a handler may run a whole TLB flush of the kernel.
const STACK_PAGES: u64 = 8;

/// Which interrupt stack a gate uses, counted from 0. Two kinds may nest; a kind never nests in
/// itself, because gates switch interrupts off, an NMI blocks further NMIs, and an exception within
/// an exception of the same kind ends the run.
#[derive(Debug, Clone, Copy)]
enum InterruptStack {
    Interrupt = 0,
    Exception = 1,
    PageFault = 2,
    DoubleFault = 3,
    Nmi = 4,
    MachineCheck = 5,
}

const NR_STACKS: usize = 6;

static IDT: Once<InterruptDescriptorTable> = Once::new();

/// The segments of ring 3, for [`crate::cpu::ring3`]; alike on every CPU.
static USER_SEGMENTS: Once<UserSegments> = Once::new();

/// Selectors that code in ring 3 runs with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UserSegments {
    pub(crate) code: SegmentSelector,
    pub(crate) data: SegmentSelector,
}

/// Returns the segments of ring 3.
pub(crate) fn user_segments() -> UserSegments {
    *USER_SEGMENTS.get().expect("every CPU loads its descriptors before it runs anything in ring 3")
}

/// Gives the running CPU its own descriptor tables and interrupt stacks.
///
/// The GS base is not touched, but the segment register is expected to be null already.
pub(crate) fn load() {
    let mut tss = TaskStateSegment::new();
    // Filled outside the structure, which is packed: its fields cannot be borrowed.
    let mut stacks = [VirtAddr::zero(); 7];
    stacks[..NR_STACKS].fill_with(|| new_stack(STACK_PAGES));
    tss.interrupt_stack_table = stacks;
    // Both live as long as the CPU.
    let tss: &'static TaskStateSegment = Box::leak(Box::new(tss));
    let gdt: &'static mut GlobalDescriptorTable = Box::leak(Box::new(GlobalDescriptorTable::new()));
    let kernel_code = gdt.append(Descriptor::kernel_code_segment());
    let kernel_data = gdt.append(Descriptor::kernel_data_segment());
    let data = gdt.append(Descriptor::user_data_segment());
    let code = gdt.append(Descriptor::user_code_segment());
    let task = gdt.append(Descriptor::tss_segment(tss));
    gdt.load();
    // SAFETY: the selector is that of the ring-0 code segment just loaded.
    unsafe { CS::set_reg(kernel_code) };
    // SAFETY: a ring-0 data segment, as the stack segment has to be until the first return from an
    // interrupt.
    unsafe { SS::set_reg(kernel_data) };
    // SAFETY: long mode ignores base and limit of these two; null is allowed.
    unsafe { DS::set_reg(SegmentSelector::NULL) };
    // SAFETY: as above.
    unsafe { ES::set_reg(SegmentSelector::NULL) };
    // SAFETY: the selector is that of a task state that lives for ever, loaded once, by this CPU.
    unsafe { load_tss(task) };
    USER_SEGMENTS.call_once(|| UserSegments { code, data });
    IDT.call_once(gates).load();
}

/// Builds the gates; they are alike on every CPU, because the stacks are named by number.
fn gates() -> InterruptDescriptorTable {
    let mut idt = InterruptDescriptorTable::new();
    set_gate(&mut idt.divide_error, 0, InterruptStack::Exception);
    set_gate(&mut idt.debug, 1, InterruptStack::Exception);
    set_gate(&mut idt.non_maskable_interrupt, 2, InterruptStack::Nmi);
    set_gate(&mut idt.breakpoint, 3, InterruptStack::Exception);
    set_gate(&mut idt.overflow, 4, InterruptStack::Exception);
    set_gate(&mut idt.bound_range_exceeded, 5, InterruptStack::Exception);
    set_gate(&mut idt.invalid_opcode, 6, InterruptStack::Exception);
    set_gate(&mut idt.device_not_available, 7, InterruptStack::Exception);
    set_gate(&mut idt.double_fault, 8, InterruptStack::DoubleFault);
    set_gate(&mut idt.invalid_tss, 10, InterruptStack::Exception);
    set_gate(&mut idt.segment_not_present, 11, InterruptStack::Exception);
    set_gate(&mut idt.stack_segment_fault, 12, InterruptStack::Exception);
    set_gate(&mut idt.general_protection_fault, 13, InterruptStack::Exception);
    set_gate(&mut idt.page_fault, 14, InterruptStack::PageFault);
    set_gate(&mut idt.x87_floating_point, 16, InterruptStack::Exception);
    set_gate(&mut idt.alignment_check, 17, InterruptStack::Exception);
    set_gate(&mut idt.machine_check, 18, InterruptStack::MachineCheck);
    set_gate(&mut idt.simd_floating_point, 19, InterruptStack::Exception);
    set_gate(&mut idt.virtualization, 20, InterruptStack::Exception);
    set_gate(&mut idt.cp_protection_exception, 21, InterruptStack::Exception);
    for vector in 32..=255 {
        set_gate(&mut idt[vector], vector, InterruptStack::Interrupt);
    }
    // SAFETY: the stub for this vector; the stack is the one all interrupts use.
    let options = unsafe { idt[SYSCALL_VECTOR].set_handler_addr(VirtAddr::new(trap_stub(SYSCALL_VECTOR))) };
    options.set_privilege_level(PrivilegeLevel::Ring3);
    // SAFETY: a stack of that number exists on every CPU (`load`).
    unsafe { options.set_stack_index(InterruptStack::Interrupt as u16) };
    idt
}

fn set_gate<F>(entry: &mut Entry<F>, vector: u8, stack: InterruptStack) {
    // SAFETY: the stub of `vector` is the entry point of a handler that pops what that vector
    // pushes.
    let options = unsafe { entry.set_handler_addr(VirtAddr::new(trap_stub(vector))) };
    // SAFETY: a stack of that number exists on every CPU (`load`), and is used by this kind of trap
    // only.
    unsafe { options.set_stack_index(stack as u16) };
}
