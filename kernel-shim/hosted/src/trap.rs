//! A privileged instruction in a process of ring 3 is a SIGSEGV. Here it gets words.
//!
//! The engine's traits have defaults that are instructions of ring 0: INVLPG, MOV to CR3, CLI. A
//! kernel that does not override them with the machine's methods dies of the first one.

#[cfg(target_os = "linux")]
pub(crate) use linux::Trap;

/// Elsewhere such a process dies without words.
#[cfg(not(target_os = "linux"))]
#[derive(Debug)]
pub(crate) struct Trap;

#[cfg(not(target_os = "linux"))]
impl Trap {
    /// Does nothing.
    pub(crate) const fn set() -> Self {
        Self
    }

    /// Does nothing.
    pub(crate) const fn runs(_seed: u64) {}
}

#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "signal handlers are set by pointer")]
mod linux {
    use core::cell::{Cell, UnsafeCell};
    use core::ffi::{c_int, c_void};
    use core::mem::{MaybeUninit, zeroed};
    use core::ptr;
    use std::sync::{Mutex, PoisonError};

    use libc::{SA_ONSTACK, SA_SIGINFO, SIGSEGV, STDERR_FILENO, sigaction, siginfo_t};

    const WORDS: [&[u8]; 2] = [
        b"\nmmu-hosted: a privileged instruction in ring 3: is Cpus::invlpg, load_cr3 or without_interrupts \
          overridden with the machine's? The sequence that runs has seed ",
        b".\n",
    ];

    /// `si_code` of a general protection fault; a wild pointer has another.
    const SI_KERNEL: c_int = 0x80;

    thread_local! {
        /// The seed of the sequence that this thread runs.
        static RUNS: Cell<Option<u64>> = const { Cell::new(None) };
    }

    /// The handler that was there before.
    struct Before(UnsafeCell<MaybeUninit<sigaction>>);

    // SAFETY: written under the lock of `USERS`, before the handler that reads it is set.
    unsafe impl Sync for Before {}

    static BEFORE: Before = Before(UnsafeCell::new(MaybeUninit::uninit()));

    /// How many `Trap`s there are: tests of a process run at once.
    static USERS: Mutex<u32> = Mutex::new(0);

    /// As long as one is there, a privileged instruction of a run is told before the process ends.
    #[derive(Debug)]
    pub(crate) struct Trap;

    impl Trap {
        /// Sets the handler, if no other has.
        pub(crate) fn set() -> Self {
            let mut users = USERS.lock().unwrap_or_else(PoisonError::into_inner);
            if *users == 0 {
                // SAFETY: zeroes are a `sigaction`: the default action, an empty mask, no flags.
                let mut action: sigaction = unsafe { zeroed() };
                action.sa_sigaction = on_fault as *const () as usize;
                action.sa_flags = SA_SIGINFO | SA_ONSTACK;
                // SAFETY: both point to a `sigaction`; `on_fault` has the signature that SA_SIGINFO
                // asks for, and calls what signal handlers may.
                let _refused = unsafe { sigaction(SIGSEGV, &raw const action, BEFORE.0.get().cast()) };
            }
            *users += 1;
            Self
        }

        /// This thread runs a sequence with this seed.
        pub(crate) fn runs(seed: u64) {
            RUNS.set(Some(seed));
        }
    }

    impl Drop for Trap {
        fn drop(&mut self) {
            RUNS.set(None);
            let mut users = USERS.lock().unwrap_or_else(PoisonError::into_inner);
            *users -= 1;
            if *users == 0 {
                restore();
            }
        }
    }

    /// Puts back what was there, unless somebody has set another since.
    fn restore() {
        // SAFETY: zeroes are a `sigaction`.
        let mut now: sigaction = unsafe { zeroed() };
        // SAFETY: `now` is a `sigaction`; no new one is given.
        let asked = unsafe { sigaction(SIGSEGV, ptr::null(), &raw mut now) };
        if asked == 0 && now.sa_sigaction == on_fault as *const () as usize {
            // SAFETY: our handler is set, so `set` has filled `BEFORE` by the same call.
            let _refused = unsafe { sigaction(SIGSEGV, BEFORE.0.get().cast(), ptr::null_mut()) };
        }
    }

    /// Tells, and gives the fault to the handler that was there before: the instruction is tried
    /// again.
    ///
    /// It calls `write` and `sigaction`, which signal handlers may, and reads a thread-local number
    /// that needs no start.
    extern "C" fn on_fault(_signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
        // SAFETY: a handler with SA_SIGINFO gets one.
        let code = unsafe { (*info).si_code };
        if code == SI_KERNEL
            && let Some(seed) = RUNS.get()
        {
            let mut digits = [0; 20];
            tell(WORDS[0]);
            tell(decimal(seed, &mut digits));
            tell(WORDS[1]);
        }
        restore();
    }

    fn tell(words: &[u8]) {
        // SAFETY: the bytes are there.
        let _nobody_reads = unsafe { libc::write(STDERR_FILENO, words.as_ptr().cast(), words.len()) };
    }

    fn decimal(mut number: u64, digits: &mut [u8; 20]) -> &[u8] {
        let mut first = digits.len();
        loop {
            first -= 1;
            digits[first] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                return &digits[first..];
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn numbers_are_written_without_a_heap() {
            for number in [0, 9, 10, 1_234_567_890, u64::MAX] {
                assert_eq!(decimal(number, &mut [0; 20]), number.to_string().as_bytes());
            }
        }
    }
}
