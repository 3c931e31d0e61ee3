//! The atomics of this crate: those of `core`, loom's when the protocol is model-checked, or
//! recorded ones in unit tests.
#![cfg_attr(
    not(any(test, mmu_loom)),
    expect(
        unsafe_code,
        reason = "a locked instruction that is also a full fence; core has no function for that"
    )
)]

#[cfg(all(test, not(mmu_loom)))]
pub(crate) use crate::tests::recorded::{AtomicBool, AtomicPtr, AtomicU16, AtomicU64};
#[cfg(not(any(test, mmu_loom)))]
pub(crate) use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU16, AtomicU64};
#[cfg(not(mmu_loom))]
pub(crate) use core::sync::atomic::{Ordering, fence};
#[cfg(mmu_loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicU16, AtomicU64, Ordering, fence};

/// A function without arguments that is `const`, except under loom, whose atomics are made at run
/// time.
macro_rules! const_fn {
    ($(#[$attribute:meta])* $visible:vis fn $name:ident() -> $result:ty $body:block) => {
        $(#[$attribute])*
        #[cfg(not(mmu_loom))]
        $visible const fn $name() -> $result $body

        $(#[$attribute])*
        #[cfg(mmu_loom)]
        $visible fn $name() -> $result $body
    };
}
pub(crate) use const_fn;

/// An array of so many values, each made by the expression, in such a function.
#[cfg(not(mmu_loom))]
macro_rules! array_of {
    ($value:expr; $length:expr) => {
        [const { $value }; $length]
    };
}
#[cfg(mmu_loom)]
macro_rules! array_of {
    ($value:expr; $length:expr) => {
        core::array::from_fn(|_| $value)
    };
}
pub(crate) use array_of;

/// Adds `value` (SeqCst), then fences fully (SeqCst), in one instruction; returns the old value.
///
/// The compiler makes a locked instruction of the addition, and another one, or an MFENCE, of the
/// fence. In Rust's model the two differ, so the compiler may not drop the second. On x86 no access
/// passes a locked instruction, in either direction.
///
/// # Source
/// Intel SDM vol. 3A 10.2.2: reads and writes are not reordered with locked instructions. Linux:
/// smp_mb__after_atomic, arch/x86/include/asm/barrier.h.
#[cfg(not(any(test, mmu_loom)))]
#[inline]
pub(crate) fn fetch_add_fenced(counter: &AtomicU64, value: u64) -> u64 {
    let old;
    // SAFETY: eight aligned bytes, which live as long as `counter` and which anybody may change
    // atomically, as this does. The block may touch all memory (there is no `nomem`), so the
    // compiler moves no access across it either.
    unsafe {
        core::arch::asm!(
            "lock xadd qword ptr [{counter}], {value}",
            counter = in(reg) counter.as_ptr(),
            value = inout(reg) value => old,
            options(nostack),
        );
    }
    old
}

/// The same in Rust's model, which loom explores and unit tests record.
#[cfg(any(test, mmu_loom))]
pub(crate) fn fetch_add_fenced(counter: &AtomicU64, value: u64) -> u64 {
    let old = counter.fetch_add(value, Ordering::SeqCst);
    fence(Ordering::SeqCst);
    old
}
