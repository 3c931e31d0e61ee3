//! Interrupts as signals.
#![expect(unsafe_code, reason = "installs a signal handler, and changes where a program goes on")]

use core::ffi::c_int;
use core::mem::MaybeUninit;
use std::io;
use std::sync::OnceLock;

use crate::access::restarted;
use crate::here::with_here;

/// The signal that is an interrupt. The process must use it for nothing else.
const SIGNAL: c_int = libc::SIGUSR1;

/// Installs the handler, once for the process.
///
/// # Errors
/// If the host refuses.
pub(crate) fn install() -> io::Result<()> {
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        let fields = action.as_mut_ptr();
        // SAFETY: a place of this function's own, which is a sigaction of zeroes.
        let fields = unsafe { &mut *fields };
        fields.sa_sigaction = (on_interrupt as *const ()).addr();
        fields.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        // SAFETY: `fields` is a whole sigaction. The handler touches thread-local plain words,
        // atomics, and the engine's `flush_interrupt`, which takes no lock and allocates nothing.
        let refused = unsafe { libc::sigaction(SIGNAL, fields, core::ptr::null_mut()) } != 0;
        if refused { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) } else { Ok(()) }
    });
    done.map_err(io::Error::from_raw_os_error)
}

/// The calling thread, for [`send`].
pub(crate) fn this_thread() -> i32 {
    // SAFETY: has no preconditions.
    unsafe { libc::gettid() }
}

/// Interrupts a thread of this process.
pub(crate) fn send(thread: i32) {
    // SAFETY: has no preconditions.
    let process = unsafe { libc::getpid() };
    // The thread may have ended: then nobody waits for its answer either.
    // SAFETY: takes three numbers and follows no pointer.
    let _refused = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, SIGNAL) };
}

extern "C" fn on_interrupt(_signal: c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let taken = with_here(|interrupted, cpu| interrupted.on_signal(cpu));
    if taken != Some(true) {
        return;
    }
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes a handler with SA_SIGINFO the context of its thread, which nobody
    // else uses meanwhile.
    let context = unsafe { &mut *context };
    let at = &mut context.uc_mcontext.gregs[libc::REG_RIP as usize];
    let Ok(instruction) = usize::try_from(*at) else { return };
    *at = i64::try_from(restarted(instruction)).unwrap_or(*at);
}
