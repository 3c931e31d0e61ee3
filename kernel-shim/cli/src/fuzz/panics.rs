//! A panic of the engine or the kernel under test is a finding, and is told once.

/// Runs `f`, in which a panic is a finding: it is reported with its sequence, and not when it
/// happens.
pub(crate) fn with_quiet_panics<R>(f: impl FnOnce() -> R) -> R {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let result = f();
    std::panic::set_hook(before);
    result
}
