//! Whether the host took the CPU away during a sample.

/// How often this thread lost its CPU so far; `None` if the host does not say.
#[must_use]
pub fn times_preempted() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/thread-self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("nonvoluntary_ctxt_switches:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
