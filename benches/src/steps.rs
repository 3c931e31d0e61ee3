//! Counts the instructions of a piece of code, exactly, by stepping through a forked copy of this
//! process.
//!
//! Needs no performance counters, which virtual machines rarely have, and no other program. The
//! copy stops itself where the counting begins and ends; what stopping costs is counted on an empty
//! piece and taken off.
#![expect(unsafe_code, reason = "forks and traces")]

use core::ptr;
use std::io;

use crate::entry::Meter;

/// Marks the work to be counted, for a parent that is stepping.
#[derive(Debug)]
pub struct Marks;

impl Meter for Marks {
    #[inline(never)]
    fn measure<R>(&mut self, work: impl FnOnce() -> R) -> R {
        stop();
        let result = work();
        stop();
        result
    }
}

fn stop() {
    // SAFETY: a signal to this thread; its tracer takes it.
    unsafe { libc::raise(libc::SIGUSR1) };
}

/// Runs `work` in a forked copy of this process; returns how many user-mode instructions it spent
/// between marks, and how many stretches it marked.
///
/// # Errors
/// The operating system's, if tracing is not allowed here; or if the copy failed.
pub fn count(work: impl FnOnce(&mut Marks)) -> io::Result<Counted> {
    stay_on_one_cpu();
    // SAFETY: the benches that count are single-threaded, so the copy may do whatever this process
    // may.
    let child = unsafe { libc::fork() };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    if child == 0 {
        // SAFETY: asks for no more than to be traced by the parent.
        let traced =
            unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, ptr::null_mut::<u8>(), ptr::null_mut::<u8>()) };
        if traced != 0 {
            exit(EXIT_NOT_TRACED);
        }
        let done = std::panic::catch_unwind(core::panic::AssertUnwindSafe(|| work(&mut Marks)));
        exit(i32::from(done.is_err()));
    }
    follow(child)
}

/// Keeps this process and its copies on the CPU it is on: a step then costs no wake-up of another.
fn stay_on_one_cpu() {
    // SAFETY: a plain structure of bits, for which all zeroes is the empty set.
    let mut cpus: libc::cpu_set_t = unsafe { core::mem::zeroed() };
    // SAFETY: asks for a number.
    let here = unsafe { libc::sched_getcpu() };
    if let Ok(here) = usize::try_from(here) {
        // SAFETY: sets a bit of our own set.
        unsafe { libc::CPU_SET(here, &mut cpus) };
        // SAFETY: reads the set. A refusal costs speed only.
        unsafe { libc::sched_setaffinity(0, size_of_val(&cpus), &raw const cpus) };
    }
}

const EXIT_NOT_TRACED: i32 = 77;

fn exit(code: i32) -> ! {
    // SAFETY: ends the copy without running what belongs to the parent (destructors, buffered
    // output).
    unsafe { libc::_exit(code) }
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Instructions between the marks, the cost of marking included.
    pub instructions: u64,
    /// How many stretches were marked.
    pub stretches: u64,
}

fn follow(child: libc::pid_t) -> io::Result<Counted> {
    let mut counted = Counted::default();
    let mut inside = false;
    let mut signal = 0;
    loop {
        let mut status = 0;
        // SAFETY: waits for our own child.
        if unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        if libc::WIFEXITED(status) {
            return match libc::WEXITSTATUS(status) {
                0 => Ok(counted),
                EXIT_NOT_TRACED => {
                    Err(io::Error::new(io::ErrorKind::PermissionDenied, "tracing is not allowed"))
                }
                code => Err(io::Error::other(format!("the traced copy failed ({code})"))),
            };
        }
        if !libc::WIFSTOPPED(status) {
            return Err(io::Error::other("the traced copy was killed"));
        }
        match libc::WSTOPSIG(status) {
            libc::SIGUSR1 => {
                inside = !inside;
                counted.stretches += u64::from(inside);
            }
            libc::SIGTRAP => counted.instructions += u64::from(inside),
            other => signal = other,
        }
        let request = if inside { libc::PTRACE_SINGLESTEP } else { libc::PTRACE_CONT };
        // SAFETY: our own child, which is stopped.
        let resumed = unsafe {
            libc::ptrace(
                request,
                child,
                ptr::null_mut::<u8>(),
                ptr::without_provenance_mut::<u8>(signal as usize),
            )
        };
        signal = 0;
        if resumed != 0 {
            return Err(io::Error::last_os_error());
        }
    }
}
