//! Calls on other CPUs: run a function there, in an interrupt, and wait until all have.
//!
//! Each CPU has one slot for the call it makes, and an inbox with one bit for each CPU that has a
//! call for it:
//!
//! ```text
//! caller                                  called
//! slot.function = f; slot.waiting = set
//! inbox[called] |= me      (Release)      bits = inbox.swap(0)         (Acquire)
//! send the interrupt                      for each bit: run slot[bit].function
//! until slot.waiting is empty (Acquire):  slot[bit].waiting -= called  (Release)
//!     serve own inbox
//! ```
//!
//! Because the waiting CPU serves its own inbox, two CPUs that call each other cannot block each
//! other, even with interrupts off. With interrupts on, the caller spins for a while and then halts
//! until the last of the called CPUs wakes it: an emulator has more CPUs than its host has cores,
//! and a CPU that spins occupies the core that a called CPU needs.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use spin::RelaxStrategy;
use x86_64::instructions::interrupts::{self, without_interrupts};

use crate::arch::apic::{self, Delivery};
use crate::arch::clock;
use crate::arch::vectors::{CALL_VECTOR, WAKE_VECTOR};
use crate::cpu::index::{CpuIndex, CpuMask, MAX_CPUS};
use crate::cpu::percpu::{cpu, online, this_index};

/// How long a caller spins before it halts, in cycles. A round trip takes 10,000 to 20,000 emulated
/// cycles where both CPUs run, and millions where one has to wait for a core of the host.
const SPIN_CYCLES: u64 = 40_000;

static CALLS: [CpuCalls; MAX_CPUS] = [const { CpuCalls::new() }; MAX_CPUS];

/// The calls of one CPU; on cache lines of its own.
#[repr(align(128))]
struct CpuCalls {
    /// One bit for each CPU that has a call for this one.
    inbox: AtomicU64,
    /// The call this CPU has for others.
    slot: CallSlot,
    /// Calls that this CPU has sent to others.
    nr_sent: AtomicU64,
}

impl CpuCalls {
    const fn new() -> Self {
        Self { inbox: AtomicU64::new(0), slot: CallSlot::new(), nr_sent: AtomicU64::new(0) }
    }
}

fn calls_of(cpu: CpuIndex) -> &'static CpuCalls {
    &CALLS[cpu.get()]
}

/// A function to be run on other CPUs, and the CPUs that have not run it yet.
struct CallSlot {
    function: UnsafeCell<Option<&'static Function<'static>>>,
    waiting: AtomicU64,
    /// The caller has halted, or is about to.
    halted: AtomicBool,
}

type Function<'a> = dyn Fn(CpuIndex) + Sync + 'a;

// SAFETY: the cell is written by its own CPU only, while `waiting` is empty, and read by others
// only while they are in `waiting`; see the orderings in `call_on` and `serve`.
unsafe impl Sync for CallSlot {}

impl CallSlot {
    const fn new() -> Self {
        Self { function: UnsafeCell::new(None), waiting: AtomicU64::new(0), halted: AtomicBool::new(false) }
    }

    /// Returns who has still to run the call.
    fn waiting(&self) -> CpuMask {
        CpuMask::from_bits(self.waiting.load(Ordering::Relaxed))
    }
}

/// Runs `function` on every CPU in `targets`, the calling one too if it is a member, and returns
/// when all have run it.
///
/// On another CPU it runs in an interrupt, in ring 0, with interrupts off, whatever that CPU was
/// doing: it must not wait for anything that the interrupted code may hold, and must not make a
/// call itself. What the caller wrote before is visible to `function`, and what `function` wrote is
/// visible to the caller afterwards.
///
/// # Context
///
/// Interrupts on or off; no lock is held that `function` takes. While this CPU waits, it runs the
/// calls of others.
///
/// # Panics
///
/// If a target is not online, or if called from a `function`.
pub fn call_on(targets: CpuMask, function: &(dyn Fn(CpuIndex) + Sync)) {
    call_on_meanwhile(targets, function, || ());
}

/// As [`call_on`], and runs `meanwhile` on this CPU between sending the interrupts and waiting: a
/// CPU that flushes itself while the others flush hides one cost behind the other.
///
/// # Panics
///
/// As [`call_on`]. `meanwhile` must not make a call.
pub fn call_on_meanwhile(targets: CpuMask, function: &(dyn Fn(CpuIndex) + Sync), meanwhile: impl FnOnce()) {
    assert!(targets.bits() & !online().bits() == 0, "a call for a CPU that is not online");
    let me = this_index();
    let calls = calls_of(me);
    let others = targets.without(me);
    if !others.is_empty() {
        assert!(calls.slot.waiting().is_empty(), "a call made from within a call");
        // SAFETY: only the lifetime changes. `wait_for_targets` below returns after the last target
        // has run the function, and there is no other way out of here: panics end the run. So no
        // target uses the reference after this function has returned.
        let function = unsafe { core::mem::transmute::<&Function<'_>, &'static Function<'static>>(function) };
        // SAFETY: `waiting` is empty, so nobody reads the cell, and it is this CPU's own.
        unsafe { *calls.slot.function.get() = Some(function) };
        calls.slot.waiting.store(others.bits(), Ordering::Relaxed);
        for target in others.iter() {
            // ORDERING: pairs with the swap in `serve`: who takes the bit sees the slot, and all
            // that was written before.
            calls_of(target).inbox.fetch_or(CpuMask::only(me).bits(), Ordering::Release);
            send(target, CALL_VECTOR);
        }
        calls.nr_sent.fetch_add(u64::from(others.count()), Ordering::Relaxed);
    }
    meanwhile();
    if targets.contains(me) {
        without_interrupts(|| function(me));
    }
    wait_for_targets(&calls.slot);
}

/// How a CPU of this image waits for a lock. With interrupts off it runs the calls of others
/// meanwhile: the holder of the lock may be waiting for this CPU to flush, and would wait for ever.
#[derive(Debug)]
pub struct ServeCalls;

impl RelaxStrategy for ServeCalls {
    #[inline]
    fn relax() {
        if !interrupts::are_enabled() {
            serve();
        }
        core::hint::spin_loop();
    }
}

/// Returns how many calls a CPU has sent to others so far: one for each target.
#[must_use]
pub fn calls_sent(by: CpuIndex) -> u64 {
    calls_of(by).nr_sent.load(Ordering::Relaxed)
}

/// Returns the CPUs that have still to run the call of `caller`; to be printed.
pub(crate) fn waited_for(caller: CpuIndex) -> CpuMask {
    calls_of(caller).slot.waiting()
}

/// Returns the CPUs whose calls `called` has still to run; to be printed.
pub(crate) fn callers_of(called: CpuIndex) -> CpuMask {
    CpuMask::from_bits(calls_of(called).inbox.load(Ordering::Relaxed))
}

/// Wakes a CPU that has halted until the next interrupt.
pub fn wake(target: CpuIndex) {
    send(target, WAKE_VECTOR);
}

fn send(target: CpuIndex, vector: u8) {
    apic::send(cpu(target).apic_id(), Delivery::Fixed(vector));
}

/// Waits until nobody has the call still to run.
fn wait_for_targets(slot: &CallSlot) {
    let may_halt = interrupts::are_enabled();
    let start = clock::cycles();
    // ORDERING: pairs with the `fetch_and` in `serve`: what the function did there is visible here.
    while slot.waiting.load(Ordering::Acquire) != 0 {
        if may_halt && clock::cycles().wrapping_sub(start) > SPIN_CYCLES {
            halt_until_served(slot);
        } else {
            without_interrupts(serve);
            core::hint::spin_loop();
        }
    }
}

/// Halts until an interrupt arrives, unless the call is over.
fn halt_until_served(slot: &CallSlot) {
    interrupts::disable();
    slot.halted.store(true, Ordering::Relaxed);
    // ORDERING: pairs with the fence in `serve`; either the last of the called CPUs sees `halted`,
    // or this one sees that nobody is left in `waiting`.
    fence(Ordering::SeqCst);
    if slot.waiting.load(Ordering::Relaxed) == 0 {
        interrupts::enable();
    } else {
        // Interrupts come on together with the halt: one that is sent from now on ends it.
        interrupts::enable_and_hlt();
    }
    slot.halted.store(false, Ordering::Relaxed);
}

/// Runs the calls that other CPUs have for this one. Interrupts are off.
pub(crate) fn serve() {
    let me = this_index();
    let inbox = &calls_of(me).inbox;
    if inbox.load(Ordering::Relaxed) == 0 {
        return;
    }
    // ORDERING: pairs with the `fetch_or` in `call_on`.
    let callers = CpuMask::from_bits(inbox.swap(0, Ordering::Acquire));
    for caller in callers.iter() {
        let slot = &calls_of(caller).slot;
        // SAFETY: the caller wrote the cell before it set the bit just taken, and writes it again
        // only after this CPU has left `waiting`, below.
        let function = unsafe { *slot.function.get() };
        if let Some(function) = function {
            function(me);
        }
        let mine = CpuMask::only(me).bits();
        // ORDERING: pairs with the load in `wait_for_targets`.
        let before = slot.waiting.fetch_and(!mine, Ordering::Release);
        // ORDERING: pairs with the fence in `halt_until_served`.
        fence(Ordering::SeqCst);
        if before == mine && slot.halted.load(Ordering::Relaxed) {
            wake(caller);
        }
    }
}
