//! The only inline assembly: three short wrappers, and the functions that compiled code calls by
//! name.
//!
//! Instructions that the `x86_64` crate already wraps (INVLPG, MOV CR3, port and MSR access,
//! descriptor tables, HLT) are used through it and do not appear here.

use core::arch::asm;

/// Returns the pointer stored at the GS base, which is the GS base itself: the state of the running
/// CPU (B2).
#[inline]
pub(crate) fn gs_self() -> *const () {
    let pointer: *const ();
    // SAFETY: invariant B2: in ring 0, GS points to this CPU's state, whose first field is its own
    // address. The read has no other effect.
    unsafe {
        asm!("mov {}, gs:[0]", out(reg) pointer, options(nostack, readonly, preserves_flags, pure));
    }
    pointer
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

/// What compiled code calls by these names (`memcpy` and its kin); the ordinary C library provides
/// them on a host.
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
            // SAFETY: `to` does not lie inside the source, so copying upwards reads each byte
            // before it is overwritten.
            return unsafe { memcpy(to, from, length) };
        }
        // SAFETY: the caller vouches for both ranges. `to` lies inside the source, so it is copied
        // downwards, from the last byte (`length` is not 0 here); the direction flag is cleared
        // again, as the ABI wants it.
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
            // SAFETY: `index` is inside the range the caller vouches for. Volatile, or the compiler
            // would see a `memcmp` here.
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
}
