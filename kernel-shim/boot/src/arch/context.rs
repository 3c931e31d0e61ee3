//! Registers as `trap.s` stores them: those of whatever a trap interrupted, and those of a program
//! in ring 3.

use core::fmt;

use x86_64::VirtAddr;

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

/// Registers of a program in ring 3. `trap.s` knows the layout.
#[repr(C, align(16))]
#[derive(Clone)]
pub struct UserContext {
    /// General registers, instruction pointer, flags.
    pub frame: TrapFrame,
    /// As FXSAVE64 stores them.
    floating_point: [u8; 512],
}

impl UserContext {
    /// Returns a program that starts at `entry` with all registers 0.
    #[must_use]
    pub fn new(entry: VirtAddr) -> Self {
        let mut floating_point = [0; 512];
        // The x87 control word and MXCSR after reset (Intel SDM vol. 1, 8.1.5 and 10.2.3):
        // everything masked.
        floating_point[0..2].copy_from_slice(&0x037f_u16.to_le_bytes());
        floating_point[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        let frame = TrapFrame { rip: entry.as_u64(), ..TrapFrame::default() };
        Self { frame, floating_point }
    }
}

impl fmt::Debug for UserContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserContext").field("frame", &self.frame).finish_non_exhaustive()
    }
}
