//! Whether the host took the CPU away during a sample, and how long a thread really ran.
#![expect(unsafe_code, reason = "reads a clock of the host")]

use core::time::Duration;

/// How often this thread lost its CPU so far; `None` if the host does not say.
#[must_use]
pub fn times_preempted() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/thread-self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("nonvoluntary_ctxt_switches:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// How long this thread has run so far. Time in which the host ran something else is not in it.
///
/// # Panics
/// Never: Linux has this clock.
#[must_use]
pub fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the result.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(result, 0, "CLOCK_THREAD_CPUTIME_ID cannot be read");
    let seconds = u64::try_from(time.tv_sec).expect("not before the thread began");
    Duration::from_secs(seconds) + Duration::from_nanos(u64::try_from(time.tv_nsec).expect("not negative"))
}
