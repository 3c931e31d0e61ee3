//! The only place with assembly: the `.s` files, the symbols they and the linker script define, and three short wrappers.
//!
//! Instructions that the `x86_64` crate already wraps (INVLPG, MOV CR3, port and MSR access, descriptor tables, HLT) are used
//! through it and do not appear here.

use core::arch::asm;
use core::ops::Range;

use crate::cpu::percpu::Cpu;
use crate::cpu::ring3::UserContext;

#[cfg(bare)]
core::arch::global_asm!(
    include_str!("../assembly/start.s"),
    trampoline = const crate::cpu::smp::TRAMPOLINE,
    boot_stack_size = const BOOT_STACK_BYTES,
    boot_main = sym crate::start::boot_main,
    secondary_main = sym crate::cpu::smp::secondary_main,
    start_block = sym crate::cpu::smp::START_BLOCK,
    start_root = const core::mem::offset_of!(crate::cpu::smp::StartBlock, root),
    start_stack = const core::mem::offset_of!(crate::cpu::smp::StartBlock, stack_top),
    start_cpu = const core::mem::offset_of!(crate::cpu::smp::StartBlock, cpu),
);

#[cfg(bare)]
core::arch::global_asm!(
    include_str!("../assembly/trap.s"),
    frame_cs = const core::mem::offset_of!(crate::cpu::trap::TrapFrame, code_segment),
    frame_words = const size_of::<crate::cpu::trap::TrapFrame>() / 8,
    cpu_user_context = const Cpu::USER_CONTEXT_OFFSET,
    cpu_kernel_stack = const Cpu::KERNEL_STACK_OFFSET,
    trap_from_kernel = sym crate::cpu::trap::trap_from_kernel,
);

#[cfg(bare)]
core::arch::global_asm!(include_str!("../assembly/agent.s"));

/// Stack of the first CPU until it has one of its own; it is enough for parsing the boot information.
#[cfg(bare)]
const BOOT_STACK_BYTES: usize = 64 * 1024;

/// Distance between two entry points in `trap.s`, in bytes.
const TRAP_STUB_BYTES: u64 = 16;

unsafe extern "C" {
    // Only their addresses mean anything. The first is an absolute, physical address.
    static image_physical_start: u8;
    static text_start: u8;
    static text_end: u8;
    static rodata_end: u8;
    static image_end: u8;
    static trap_stubs: u8;
    static trampoline_start: u8;
    static trampoline_end: u8;
    static agent_start: u8;
    static agent_read: u8;
    static agent_write: u8;
    static agent_check: u8;
    static agent_watch: u8;
    static agent_count: u8;
    static agent_end: u8;

    /// Enters ring 3 with the registers of `context`; returns at the next trap from ring 3, which is stored there.
    ///
    /// # Safety
    ///
    /// - `context` is valid for reads and writes, and nothing else touches it until the return.
    /// - Interrupts are off, and GS holds this CPU's [`Cpu`].
    /// - The segments and flags in `context` are those of ring 3.
    pub(crate) fn enter_user(context: *mut UserContext);
}

/// Virtual addresses of the parts of the image, each page-aligned and ending where the next one begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ImageLayout {
    /// First physical address of the image, with its low boot code.
    pub(crate) physical_start: u64,
    /// Code: readable and executable.
    pub(crate) text_start: u64,
    /// End of the code, start of constants: readable.
    pub(crate) text_end: u64,
    /// End of the constants, start of data: readable and writable.
    pub(crate) rodata_end: u64,
    /// End of the image.
    pub(crate) image_end: u64,
}

/// Returns where the linker script put the image.
pub(crate) fn image_layout() -> ImageLayout {
    ImageLayout {
        physical_start: (&raw const image_physical_start).addr() as u64,
        text_start: (&raw const text_start).addr() as u64,
        text_end: (&raw const text_end).addr() as u64,
        rodata_end: (&raw const rodata_end).addr() as u64,
        image_end: (&raw const image_end).addr() as u64,
    }
}

/// Returns the address of the entry point of `vector`.
pub(crate) fn trap_stub(vector: u8) -> u64 {
    (&raw const trap_stubs).addr() as u64 + u64::from(vector) * TRAP_STUB_BYTES
}

/// Returns the physical address range of the code that other CPUs run first, before it is copied.
///
/// The code is linked low, so its addresses are physical ones.
pub(crate) fn trampoline() -> Range<u64> {
    (&raw const trampoline_start).addr() as u64..(&raw const trampoline_end).addr() as u64
}

/// Byte offsets of the entry points of the ring-3 agent in [`agent_text`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct AgentEntries {
    pub(crate) read: u64,
    pub(crate) write: u64,
    pub(crate) check: u64,
    pub(crate) watch: u64,
    pub(crate) count: u64,
}

/// Returns the position-independent code of the ring-3 agent.
pub(crate) fn agent_text() -> &'static [u8] {
    let start = &raw const agent_start;
    let length = (&raw const agent_end).addr() - start.addr();
    // SAFETY: both labels delimit one constant section of the image, which is mapped for the whole run and never written.
    unsafe { core::slice::from_raw_parts(start, length) }
}

/// Returns where the programs of the ring-3 agent begin.
pub(crate) fn agent_entries() -> AgentEntries {
    let start = (&raw const agent_start).addr() as u64;
    AgentEntries {
        read: (&raw const agent_read).addr() as u64 - start,
        write: (&raw const agent_write).addr() as u64 - start,
        check: (&raw const agent_check).addr() as u64 - start,
        watch: (&raw const agent_watch).addr() as u64 - start,
        count: (&raw const agent_count).addr() as u64 - start,
    }
}

/// Returns the pointer stored at the start of the running CPU's [`Cpu`], which points to that same structure.
#[inline]
pub(crate) fn gs_self() -> *const Cpu {
    let cpu: *const Cpu;
    // SAFETY: invariant B2: in ring 0, GS points to this CPU's `Cpu`, whose first field is its own address. The read has no
    // other effect.
    unsafe {
        asm!("mov {}, gs:[0]", out(reg) cpu, options(nostack, readonly, preserves_flags, pure));
    }
    cpu
}

/// Leaves the current stack for ever and calls `function` on the stack that ends at `top`.
///
/// # Safety
///
/// - `top` is 16-byte aligned, and the end of a mapped stack that nobody uses.
/// - `function` does not need anything on the old stack.
pub(crate) unsafe fn call_on_stack(top: u64, function: extern "C" fn() -> !) -> ! {
    // SAFETY: the caller vouches for the stack; the call leaves it aligned as the ABI wants it.
    unsafe {
        asm!("mov rsp, {top}", "xor ebp, ebp", "call {function}", "ud2", top = in(reg) top, function = in(reg) function,
            options(noreturn));
    }
}

/// Returns the stack pointer of the caller, to print what lies above it.
#[cfg(bare)]
#[inline(always)]
pub(crate) fn stack_pointer() -> u64 {
    let pointer: u64;
    // SAFETY: copies a register.
    unsafe {
        asm!("mov {}, rsp", out(reg) pointer, options(nomem, nostack, preserves_flags));
    }
    pointer
}

/// What compiled code calls by these names (`memcpy` and its kin); the ordinary C library provides them on a host.
#[cfg(bare)]
mod memory_functions {
    use core::arch::asm;

    /// # Safety
    ///
    /// As for C `memcpy`: both ranges are valid and do not overlap.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
        // SAFETY: the caller vouches for both ranges; the direction flag is clear by the ABI.
        unsafe {
            asm!("rep movsb", inout("rcx") length => _, inout("rdi") to => _, inout("rsi") from => _,
                options(nostack, preserves_flags));
        }
        to
    }

    /// # Safety
    ///
    /// As for C `memmove`: both ranges are valid.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
        if to.addr().wrapping_sub(from.addr()) >= length {
            // SAFETY: `to` does not lie inside the source, so copying upwards reads each byte before it is overwritten.
            return unsafe { memcpy(to, from, length) };
        }
        // SAFETY: the caller vouches for both ranges. `to` lies inside the source, so it is copied downwards, from the last
        // byte (`length` is not 0 here); the direction flag is cleared again, as the ABI wants it.
        unsafe {
            asm!("std", "rep movsb", "cld", inout("rcx") length => _,
                inout("rdi") to.wrapping_add(length - 1) => _, inout("rsi") from.wrapping_add(length - 1) => _,
                options(nostack));
        }
        to
    }

    /// # Safety
    ///
    /// As for C `memset`: the range is valid.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memset(to: *mut u8, value: i32, length: usize) -> *mut u8 {
        // SAFETY: the caller vouches for the range; the direction flag is clear by the ABI.
        unsafe {
            asm!("rep stosb", inout("rcx") length => _, inout("rdi") to => _, in("al") value.to_le_bytes()[0],
                options(nostack, preserves_flags));
        }
        to
    }

    /// # Safety
    ///
    /// As for C `memcmp`: both ranges are valid.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, length: usize) -> i32 {
        for index in 0..length {
            // SAFETY: `index` is inside the range the caller vouches for. Volatile, or the compiler would see a `memcmp` here.
            let a = unsafe { left.wrapping_add(index).read_volatile() };
            // SAFETY: as above.
            let b = unsafe { right.wrapping_add(index).read_volatile() };
            if a != b {
                return i32::from(a) - i32::from(b);
            }
        }
        0
    }

    /// # Safety
    ///
    /// As for [`memcmp`].
    #[unsafe(no_mangle)]
    unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, length: usize) -> i32 {
        // SAFETY: the same contract.
        unsafe { memcmp(left, right, length) }
    }

    /// Named by the unwinding tables of the prebuilt `core`, which this image discards; never called.
    // SAFETY: nothing else in the image defines this name.
    #[unsafe(no_mangle)]
    extern "C" fn rust_eh_personality() {}

    /// Named by the landing pads of the prebuilt `alloc`; never called, because a panic ends the run where it happens.
    // SAFETY: nothing else in the image defines this name.
    #[unsafe(no_mangle)]
    extern "C" fn _Unwind_Resume() -> ! {
        crate::arch::exit::exit(crate::arch::exit::Verdict::Panic)
    }
}
