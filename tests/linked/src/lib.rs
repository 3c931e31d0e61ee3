//! The engine as a kernel links it: every driver, in `no_std`, with `panic = "abort"`, and no
//! allocator.
//!
//! What a kernel supplies is declared and never defined, so that the optimiser can assume nothing
//! about it. `tests/tests/linked` builds this as a static library (`linked.toml` says how) and
//! reads what is in it: which symbols are missing, which panics are left, how large the text is.
#![no_std]
#![expect(unsafe_code, reason = "exports functions by name, and calls some that it does not define")]

/// Functions that are only linked, each with its body and with what its caller promises: all that
/// the engine asks.
macro_rules! linked {
    ($(fn $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)? = $body:expr;)*) => {
        $(
            /// # Safety
            /// Of every engine call in it.
            #[unsafe(no_mangle)]
            #[allow(unused_unsafe, reason = "some of the calls are safe")]
            unsafe fn $name($($argument: $type),*) $(-> $result)? {
                // SAFETY: passed on to our caller.
                unsafe { $body }
            }
        )*
    };
}

mod calls;
mod machine;
mod own_flush;

pub use machine::Machine;
pub use own_flush::OwnFlush;

/// What a kernel does when it panics. Only the static library has it: a library that is checked or
/// documented leaves that to the standard one.
#[cfg(panic = "abort")]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    unsafe extern "C" {
        fn platform_panicked(info: *const ()) -> !;
    }
    // SAFETY: it is not defined anywhere; nothing of this ever runs.
    unsafe { platform_panicked(core::ptr::from_ref(info).cast()) }
}
