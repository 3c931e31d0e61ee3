//! The local APIC: interrupts between CPUs, end of interrupt.
//!
//! Intel SDM vol. 3A, chapter 10 (APIC). Reached through MSRs where the CPU has x2APIC, else
//! through one uncached page.

use x86_64::PhysAddr;
use x86_64::instructions::interrupts::without_interrupts;
use x86_64::instructions::port::Port;
use x86_64::registers::model_specific::Msr;

use crate::arch::mmu::features;
use crate::arch::phys_map::{ADDRESS_BITS, phys_to_ptr};
use crate::arch::vectors::SPURIOUS_VECTOR;

/// IA32_APIC_BASE: bits 12 up address of the registers, 11 enable, 10 x2APIC.
const APIC_BASE: u32 = 0x1b;
const ENABLE: u64 = 1 << 11;
const X2APIC: u64 = 1 << 10;
/// First of the MSRs that hold the registers; register number = byte offset / 16.
const X2APIC_MSRS: u32 = 0x800;

/// Register numbers (byte offset in the page, divided by 16).
#[derive(Debug, Clone, Copy)]
#[repr(u32)]
enum Register {
    Id = 0x02,
    EndOfInterrupt = 0x0b,
    Spurious = 0x0f,
    Command = 0x30,
    CommandHigh = 0x31,
    Lint0 = 0x35,
    Lint1 = 0x36,
}

/// Delivery mode in the command register and in the local vector table.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Delivery {
    /// An interrupt with this vector.
    Fixed(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// Reset to the wait-for-SIPI state.
    Init,
    /// Start in real mode at this page of the first megabyte.
    StartUp(u8),
}

impl Delivery {
    /// The low 32 bits of the command: vector, mode, and "assert", which every command in use sets.
    const fn command(self) -> u32 {
        let (mode, vector) = match self {
            Self::Fixed(vector) => (0, vector),
            Self::Nmi => (4, 0),
            Self::Init => (5, 0),
            Self::StartUp(page) => (6, page),
        };
        1 << 14 | mode << 8 | vector as u32
    }
}

/// Destination shorthand: every CPU but the sender.
const ALL_BUT_SELF: u32 = 3 << 18;
/// Command register: the last command is not yet out.
const PENDING: u32 = 1 << 12;
/// Local vector table: masked.
const MASKED: u32 = 1 << 16;
/// Local vector table: deliver as NMI.
const AS_NMI: u32 = 4 << 8;

/// Returns where the registers are, to be mapped before [`init`].
pub(crate) fn registers() -> PhysAddr {
    // SAFETY: every x86_64 CPU has this MSR.
    PhysAddr::new(unsafe { Msr::new(APIC_BASE).read() } & ADDRESS_BITS)
}

/// Enables the running CPU's local APIC, and makes its line for external NMIs one.
pub(crate) fn init() {
    let mut base = Msr::new(APIC_BASE);
    // SAFETY: every x86_64 CPU has this MSR.
    let value = unsafe { base.read() };
    let mode = if features().x2apic { ENABLE | X2APIC } else { ENABLE };
    // SAFETY: enables the APIC where it is, in a mode that CPUID says exists.
    unsafe { base.write(value | mode) };
    write_register(Register::Lint0, MASKED);
    write_register(Register::Lint1, AS_NMI);
    // Bit 8 is the software enable.
    write_register(Register::Spurious, 1 << 8 | u32::from(SPURIOUS_VECTOR));
}

/// Lets the running CPU take the interval timer's line as an NMI; see [`crate::cpu::watchdog`].
pub(crate) fn legacy_line_as_nmi() {
    write_register(Register::Lint0, AS_NMI);
}

/// Masks every line of the two legacy interrupt controllers, except those in `open` (Intel 8259A
/// data sheet).
pub(crate) fn mask_legacy_controllers(open: u8) {
    // Initialise, vectors 0x20 and 0x28, cascade on line 2, 8086 mode; then the masks.
    let sequence = [
        (0x20, 0x11),
        (0xa0, 0x11),
        (0x21, 0x20),
        (0xa1, 0x28),
        (0x21, 0x04),
        (0xa1, 0x02),
        (0x21, 0x01),
        (0xa1, 0x01),
        (0x21, !open),
        (0xa1, 0xff),
    ];
    for (port, value) in sequence {
        // SAFETY: ports of the interrupt controllers; they touch no memory.
        unsafe { Port::<u8>::new(port).write(value) };
    }
}

/// Returns the id of the running CPU's local APIC.
pub(crate) fn id() -> u32 {
    let value = read_register(Register::Id);
    if features().x2apic { value } else { value >> 24 }
}

/// Says that the interrupt being handled is done.
pub(crate) fn end_of_interrupt() {
    write_register(Register::EndOfInterrupt, 0);
}

/// Sends an IPI to the CPU with this APIC, which may not be up yet.
pub(crate) fn send(apic_id: u32, delivery: Delivery) {
    if features().x2apic {
        let command = u64::from(apic_id) << 32 | u64::from(delivery.command());
        // Earlier stores must be visible to the receiver. Unlike a store to the page, this WRMSR
        // does not wait for them: MFENCE makes them visible, and LFENCE keeps the WRMSR behind
        // MFENCE (Intel SDM vol. 3A, 10.12.3).
        // SAFETY: every x86_64 CPU has SSE2.
        unsafe { core::arch::x86_64::_mm_mfence() };
        // SAFETY: as above.
        unsafe { core::arch::x86_64::_mm_lfence() };
        // SAFETY: x2APIC is on; an IPI runs a handler that is installed, or starts a CPU whose
        // start block is filled.
        unsafe { Msr::new(X2APIC_MSRS + Register::Command as u32).write(command) };
        return;
    }
    // The command is two stores; an interrupt handler that sends one of its own must not come
    // between them.
    without_interrupts(|| {
        wait_idle();
        write_register(Register::CommandHigh, apic_id << 24);
        write_register(Register::Command, delivery.command());
    });
}

/// Sends an NMI to every other CPU. Usable in an NMI: it does not touch the destination half of the
/// command.
pub(crate) fn send_nmi_to_others() {
    let command = ALL_BUT_SELF | Delivery::Nmi.command();
    if features().x2apic {
        // SAFETY: x2APIC is on, and every CPU has a handler for NMIs.
        unsafe { Msr::new(X2APIC_MSRS + Register::Command as u32).write(u64::from(command)) };
        return;
    }
    wait_idle();
    write_register(Register::Command, command);
}

fn wait_idle() {
    while read_register(Register::Command) & PENDING != 0 {
        core::hint::spin_loop();
    }
}

fn read_register(register: Register) -> u32 {
    if features().x2apic {
        // SAFETY: x2APIC is on, and the register exists and is readable. Its upper half is 0 for
        // those read here.
        let value = unsafe { Msr::new(X2APIC_MSRS + register as u32).read() };
        return u32::try_from(value & u64::from(u32::MAX)).unwrap_or(0);
    }
    // SAFETY: the page of registers is mapped, uncached, by `paging::init`.
    unsafe { page_register(register).read_volatile() }
}

fn write_register(register: Register, value: u32) {
    if features().x2apic {
        // SAFETY: x2APIC is on; the callers write registers that exist, with values the manual
        // defines.
        return unsafe { Msr::new(X2APIC_MSRS + register as u32).write(u64::from(value)) };
    }
    // SAFETY: the page of registers is mapped, uncached, by `paging::init`.
    unsafe { page_register(register).write_volatile(value) }
}

fn page_register(register: Register) -> *mut u32 {
    phys_to_ptr(registers() + u64::from(register as u32) * 16)
}
