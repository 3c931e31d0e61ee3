//! A place where CPUs wait for each other. A CPU that waits long halts, because an emulator has
//! more CPUs than its host has cores.

use core::sync::atomic::{AtomicU64, Ordering};

use x86_64::instructions::interrupts;

use crate::arch::clock;
use crate::cpu::percpu::{online, this_index};
use crate::cpu::{ipi, watchdog};

/// How long a CPU spins before it halts, in cycles.
const SPIN_CYCLES: u64 = 20_000;

/// Arrivals, counted over all meetings at this place.
#[derive(Debug)]
pub(crate) struct Meeting {
    arrivals: AtomicU64,
    nr_cpus: u64,
}

impl Meeting {
    /// A place for `nr_cpus` CPUs.
    pub(crate) const fn new(nr_cpus: u64) -> Self {
        Self { arrivals: AtomicU64::new(0), nr_cpus }
    }

    /// Waits until every CPU has arrived as often as this one.
    ///
    /// # Context
    ///
    /// Interrupts on: this CPU takes its mail meanwhile.
    pub(crate) fn meet(&self) {
        // ORDERING: pairs with the loads in `halt_until`: what was done before a meeting is visible
        // after it.
        let mine = self.arrivals.fetch_add(1, Ordering::AcqRel) + 1;
        let target = mine.next_multiple_of(self.nr_cpus);
        if mine == target {
            wake_others();
        } else {
            halt_until(|| self.arrivals.load(Ordering::Acquire) >= target);
        }
        watchdog::progress();
    }
}

/// Waits until `condition` holds, halted after a while. The CPU that makes it hold calls
/// [`wake_others`] afterwards.
pub(crate) fn halt_until(condition: impl Fn() -> bool) {
    let start = clock::cycles();
    while clock::cycles().wrapping_sub(start) < SPIN_CYCLES {
        if condition() {
            return;
        }
        core::hint::spin_loop();
    }
    loop {
        interrupts::disable();
        if condition() {
            interrupts::enable();
            return;
        }
        // Interrupts come on together with the halt: a wake-up that is sent from now on ends it.
        interrupts::enable_and_hlt();
    }
}

/// Wakes every CPU that waits for something.
pub(crate) fn wake_others() {
    online().without(this_index()).iter().for_each(ipi::wake);
}
