//! Which CPU the calling thread is.
#![expect(unsafe_code, reason = "a thread-local pointer, to be read in a signal handler")]

use core::cell::Cell;
use core::ptr::NonNull;

use crate::machine::FreeMachine;

/// The kernel's handler of the flush interrupt.
pub(crate) trait Handler: Sync {
    /// Carries out what other CPUs have asked of this one.
    fn flush_interrupt(&self);
}

#[derive(Clone, Copy)]
struct Here {
    machine: NonNull<FreeMachine>,
    handler: NonNull<dyn Handler>,
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

/// Calls `f` with the machine, this CPU's number and the handler, if this thread is a CPU.
#[inline]
pub(crate) fn with_here<R>(f: impl FnOnce(&FreeMachine, usize, &dyn Handler) -> R) -> Option<R> {
    let here = HERE.get()?;
    // SAFETY: `run_as` borrows the machine for as long as it is here.
    let machine = unsafe { here.machine.as_ref() };
    // SAFETY: as for the machine.
    let handler = unsafe { here.handler.as_ref() };
    Some(f(machine, here.cpu, handler))
}

/// The calling thread is CPU `cpu` of `machine` while `f` runs.
pub(crate) fn run_as<R>(
    machine: &FreeMachine,
    cpu: usize,
    handler: &(dyn Handler + '_),
    f: impl FnOnce() -> R,
) -> R {
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            HERE.set(None);
        }
    }
    // SAFETY: changes only how long the pointer may be used by its type; it is taken away before
    // this function returns or unwinds, while `handler` is still borrowed.
    let handler = unsafe {
        core::mem::transmute::<NonNull<dyn Handler + '_>, NonNull<dyn Handler + 'static>>(NonNull::from(
            handler,
        ))
    };
    HERE.set(Some(Here { machine: NonNull::from(machine), handler, cpu }));
    let _leave = Leave;
    f()
}
