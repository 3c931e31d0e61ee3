//! Which CPU the calling thread is.
#![expect(unsafe_code, reason = "a thread-local pointer, to be read in a signal handler")]

use core::cell::Cell;
use core::ptr::NonNull;

/// What a CPU does where its program does not expect it.
pub(crate) trait Interrupted: Sync {
    /// Takes the interrupts of the CPU, if they are on.
    fn serve(&self, cpu: usize);
    /// The CPU spins for a lock.
    fn spin(&self, cpu: usize);
    /// A signal has come to the CPU. Whether it was taken for an interrupt.
    fn on_signal(&self, cpu: usize) -> bool;
}

#[derive(Clone, Copy)]
struct Here {
    interrupted: NonNull<dyn Interrupted>,
    cpu: usize,
}

thread_local! {
    // Without a destructor and without lazy beginning: a signal handler may read it.
    static HERE: Cell<Option<Here>> = const { Cell::new(None) };
}

/// The CPU that this thread is; `None` for the thread that watches.
#[inline]
pub(crate) fn this_cpu() -> Option<usize> {
    HERE.get().map(|here| here.cpu)
}

/// Calls `f`, if this thread is a CPU, with that and its number.
#[inline]
pub(crate) fn with_here<R>(f: impl FnOnce(&dyn Interrupted, usize) -> R) -> Option<R> {
    let here = HERE.get()?;
    // SAFETY: `run_as` borrows it for as long as it is here.
    let interrupted = unsafe { here.interrupted.as_ref() };
    Some(f(interrupted, here.cpu))
}

/// The calling thread is CPU `cpu` while `f` runs.
pub(crate) fn run_as<R>(interrupted: &(dyn Interrupted + '_), cpu: usize, f: impl FnOnce() -> R) -> R {
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            HERE.set(None);
        }
    }
    // SAFETY: changes only how long the pointer may be used by its type; it is taken away before
    // this function returns or unwinds, while it is still borrowed.
    let interrupted = unsafe {
        core::mem::transmute::<NonNull<dyn Interrupted + '_>, NonNull<dyn Interrupted + 'static>>(
            NonNull::from(interrupted),
        )
    };
    HERE.set(Some(Here { interrupted, cpu }));
    let _leave = Leave;
    f()
}
