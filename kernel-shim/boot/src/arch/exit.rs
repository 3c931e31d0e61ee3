//! Ends the run: the verdict leaves the machine as QEMU's exit status.
//!
//! QEMU's `isa-debug-exit` device ends the process with status `value << 1 | 1` when `value` is
//! written to its port (QEMU, hw/misc/debugexit.c). None of the statuses below is 0 or 1, which
//! QEMU itself uses.

use core::sync::atomic::{AtomicU32, Ordering};

use x86_64::instructions::port::Port;
use x86_64::instructions::{hlt, interrupts};

/// Where the command line of QEMU puts the device (`iobase` of `isa-debug-exit`).
const PORT: u16 = 0xf4;

/// The first verdict, as its code; 0 while there is none.
static DECIDED: AtomicU32 = AtomicU32::new(0);
/// How long a CPU with a later verdict waits, so that the CPU with the first one can print what it
/// found.
const STORY_US: u64 = 3_000_000;

/// Why the run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Everything that was asked for held. QEMU exits with status 33.
    Pass,
    /// A check found a violation. Status 35.
    Violation,
    /// The command line asked for something unknown. Status 37.
    Usage,
    /// The kernel panicked. Status 39.
    Panic,
    /// An exception in ring 0 that nobody expects. Status 41.
    Exception,
    /// No CPU made progress for too long. Status 43.
    Hang,
}

impl Verdict {
    /// The value written to the exit port.
    const fn code(self) -> u32 {
        match self {
            Self::Pass => 0x10,
            Self::Violation => 0x11,
            Self::Usage => 0x12,
            Self::Panic => 0x13,
            Self::Exception => 0x14,
            Self::Hang => 0x15,
        }
    }

    /// The status with which QEMU exits.
    #[must_use]
    pub const fn qemu_status(self) -> u32 {
        self.code() << 1 | 1
    }
}

/// Makes `verdict` the one that the run ends with, and returns `true`; or returns `false` if there
/// is one already. The first counts, because what one CPU has found may be what makes another one
/// fail.
pub(crate) fn decide(verdict: Verdict) -> bool {
    DECIDED.compare_exchange(0, verdict.code(), Ordering::Relaxed, Ordering::Relaxed).is_ok()
}

/// Ends the machine with `verdict`, or with the one that was decided before. Without the exit
/// device this CPU stops for good, and QEMU has to be ended from outside.
pub fn exit(verdict: Verdict) -> ! {
    let mut code = verdict.code();
    if !decide(verdict) {
        let first = DECIDED.load(Ordering::Relaxed);
        if first != code {
            // The CPU that decided is about to end the run; this CPU ends it if that one cannot.
            crate::arch::clock::wait_us(STORY_US);
            code = first;
        }
    }
    // SAFETY: the port of the exit device, or of nothing; either way no memory is touched.
    unsafe { Port::new(PORT).write(code) };
    halt()
}

/// Stops this CPU for good.
pub(crate) fn halt() -> ! {
    loop {
        interrupts::disable();
        hlt();
    }
}

#[cfg(test)]
mod tests {
    use super::Verdict;

    #[test]
    fn every_verdict_has_its_own_status_unlike_those_of_qemu_itself() {
        let verdicts = [
            Verdict::Pass,
            Verdict::Violation,
            Verdict::Usage,
            Verdict::Panic,
            Verdict::Exception,
            Verdict::Hang,
        ];
        let statuses = verdicts.map(Verdict::qemu_status);
        assert_eq!(statuses, [33, 35, 37, 39, 41, 43]);
    }
}
