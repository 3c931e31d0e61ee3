//! Interrupts between CPUs: one says that there is mail, one ends a halt.
//!
//! What a CPU asks of another lies in the engine's mailbox. This file interrupts the CPUs that have
//! mail, runs there what the kernel has registered, and says how a CPU waits for the answers.
//!
//! With interrupts on, a CPU spins for a while and then halts until the answers are there: an
//! emulator has more CPUs than its host has cores, and a CPU that spins occupies the core that a
//! CPU with mail needs.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use spin::{Once, RelaxStrategy};
use x86_64::instructions::interrupts;

use crate::arch::apic::{self, Delivery};
use crate::arch::clock;
use crate::arch::vectors::{FLUSH_VECTOR, WAKE_VECTOR};
use crate::cpu::index::{CpuIndex, CpuMask, MAX_CPUS};
use crate::cpu::percpu::{cpu, this_index};

/// How long a CPU spins before it halts, in cycles. A round trip takes 10,000 to 20,000 emulated
/// cycles where both CPUs run, and millions where one has to wait for a core of the host.
const SPIN_CYCLES: u64 = 40_000;

type Handler = dyn Fn() + Sync;

/// What a CPU does with its mail.
static HANDLER: Once<&'static Handler> = Once::new();

static WAITS: [Wait; MAX_CPUS] = [const { Wait::new() }; MAX_CPUS];

/// How one CPU waits for answers; on a cache line of its own.
#[repr(align(128))]
struct Wait {
    /// When it asked.
    since: AtomicU64,
    /// The CPUs whose answers were missing when it last looked.
    missing: AtomicU64,
    /// It has halted, or is about to.
    halted: AtomicBool,
}

impl Wait {
    const fn new() -> Self {
        Self { since: AtomicU64::new(0), missing: AtomicU64::new(0), halted: AtomicBool::new(false) }
    }
}

fn wait_of(cpu: CpuIndex) -> &'static Wait {
    &WAITS[cpu.get()]
}

/// Makes `handler` what a CPU does with its mail. It runs with interrupts off.
///
/// # Panics
///
/// If there is a handler already.
pub fn handle_mail_with(handler: &'static Handler) {
    assert!(!HANDLER.is_completed(), "two kernels in one run");
    HANDLER.call_once(|| handler);
}

/// Takes this CPU's mail. Interrupts are off.
pub(crate) fn take_mail() {
    // Nobody has mail before there is a kernel.
    if let Some(handler) = HANDLER.get() {
        handler();
    }
}

/// How a CPU of this image waits for a lock. With interrupts off it takes its mail meanwhile: the
/// holder of the lock may be waiting for this CPU to flush, and would wait for ever.
#[derive(Debug)]
pub struct TakeMail;

impl RelaxStrategy for TakeMail {
    #[inline]
    fn relax() {
        if !interrupts::are_enabled() {
            take_mail();
        }
        core::hint::spin_loop();
    }
}

/// Interrupts `targets`, which have mail now: each runs the handler.
pub fn send_flush_interrupt(targets: CpuMask) {
    // `apic::send` sends only after earlier stores, the mail among them, are visible.
    targets.iter().for_each(|target| send(target, FLUSH_VECTOR));
}

/// Wakes a CPU that has halted until the next interrupt.
pub fn wake(target: CpuIndex) {
    send(target, WAKE_VECTOR);
}

fn send(target: CpuIndex, vector: u8) {
    apic::send(cpu(target).apic_id(), Delivery::Fixed(vector));
}

/// This CPU is about to ask others.
pub fn begin_wait() {
    wait_of(this_index()).since.store(clock::cycles(), Ordering::Relaxed);
}

/// Waits a little for the answers of the CPUs that `missing` returns. Called again and again
/// between [`begin_wait`] and [`end_wait`].
pub fn wait_for_answers(missing: impl Fn() -> CpuMask) {
    let wait = wait_of(this_index());
    wait.missing.store(missing().bits(), Ordering::Relaxed);
    let waited = clock::cycles().wrapping_sub(wait.since.load(Ordering::Relaxed));
    if waited <= SPIN_CYCLES || !interrupts::are_enabled() {
        core::hint::spin_loop();
        return;
    }
    interrupts::disable();
    wait.halted.store(true, Ordering::Relaxed);
    // ORDERING: pairs with the fence in `answered`: either the CPU that answers sees `halted`, or
    // this one sees its answer.
    fence(Ordering::SeqCst);
    if missing().is_empty() {
        interrupts::enable();
    } else {
        // Interrupts come on together with the halt: one that is sent from now on ends it.
        interrupts::enable_and_hlt();
    }
    wait.halted.store(false, Ordering::Relaxed);
}

/// This CPU has answered `initiator`.
pub fn answered(initiator: CpuIndex) {
    // ORDERING: pairs with the fence in `wait_for_answers`.
    fence(Ordering::SeqCst);
    if wait_of(initiator).halted.load(Ordering::Relaxed) {
        wake(initiator);
    }
}

/// All have answered. Returns for how many cycles this CPU has waited.
pub fn end_wait() -> u64 {
    let wait = wait_of(this_index());
    wait.missing.store(0, Ordering::Relaxed);
    clock::cycles().wrapping_sub(wait.since.load(Ordering::Relaxed))
}

/// Returns the CPUs whose answers `initiator` waits for; to be printed.
pub(crate) fn waited_for(initiator: CpuIndex) -> CpuMask {
    CpuMask::from_bits(wait_of(initiator).missing.load(Ordering::Relaxed))
}
