//! Events of a kernel are noted, and hooks run at them.

use crate::kernel::PaperKernel;
use crate::log::{Event, Noted};

impl PaperKernel {
    /// Logs `event`, and runs the first hook that waits for it.
    pub(crate) fn note(&self, event: Event) {
        let noted = Noted { event, on: self.here(), under_lock: self.is_a_lock_held() };
        if let Some(act) = self.log.note(noted) {
            act(self);
        }
    }

    /// Runs `act` once, in the middle of the engine's work, at the next event that `at` picks out.
    pub fn once(&self, at: impl Fn(&Event) -> bool + 'static, act: impl FnOnce(&Self) + 'static) {
        self.log.once(at, act);
    }

    /// After `steps` more steps of gathers, the hook between steps unwinds, once.
    pub fn unwind_after_steps(&self, steps: u32) {
        self.steps_to_unwinding.set(Some(steps));
    }

    /// Nothing unwinds between steps any more. Whether it was still to come.
    pub fn steps_go_on(&self) -> bool {
        self.steps_to_unwinding.take().is_some()
    }

    /// Everything noted since the last call.
    pub fn take_events(&self) -> Vec<Noted> {
        self.log.take()
    }

    /// How many of the events noted so far `pick` picks out.
    pub fn count(&self, pick: impl Fn(&Event) -> bool) -> usize {
        self.log.count(pick)
    }

    /// Hooks that have not run.
    #[must_use]
    pub fn nr_hooks_waiting(&self) -> usize {
        self.log.nr_hooks()
    }
}
