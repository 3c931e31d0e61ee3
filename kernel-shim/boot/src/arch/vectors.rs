//! The numbers of interrupts and exceptions.

/// System call: INT 0x80 from ring 3.
pub const SYSCALL_VECTOR: u8 = 0x80;
/// There is mail of other CPUs.
pub(crate) const FLUSH_VECTOR: u8 = 0xf0;
/// Wakes a CPU from HLT, or fetches it from ring 3.
pub(crate) const WAKE_VECTOR: u8 = 0xf1;
/// What the local APIC raises when an interrupt is withdrawn before it is taken; it gets no
/// end-of-interrupt.
pub(crate) const SPURIOUS_VECTOR: u8 = 0xff;

pub(crate) const NMI: u64 = 2;
pub(crate) const PAGE_FAULT: u64 = 14;
/// The first vector of interrupts; those below are exceptions.
pub(crate) const FIRST_INTERRUPT: u64 = 32;

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
