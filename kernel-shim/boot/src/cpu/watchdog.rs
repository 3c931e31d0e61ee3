//! Ends a run that hangs, and says what each CPU was doing.
//!
//! The legacy interval timer interrupts the first CPU as an NMI, about 18 times a second, so a CPU
//! that spins with interrupts off is noticed, too. When no CPU has called [`progress`] for too
//! long, every CPU gets an NMI and prints its state.

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use spin::Mutex;
use x86_64::instructions::port::Port;

use crate::arch::context::TrapFrame;
use crate::arch::exit::{self, Verdict};
use crate::arch::{apic, clock, serial};
use crate::counted::Counted;
use crate::cpu::dump::print_state;
use crate::cpu::index::{CpuIndex, CpuMask, MAX_CPUS};
use crate::cpu::ipi;
use crate::cpu::percpu::{online, this_index};

/// How long the reporting CPU waits for the others' reports.
const REPORT_TIMEOUT_US: u64 = 5_000_000;

/// Longest time without progress, in cycles; 0 while the watchdog sleeps.
static LIMIT: AtomicU64 = AtomicU64::new(0);
static LAST_COUNT: AtomicU64 = AtomicU64::new(0);
static LAST_CHANGE: AtomicU64 = AtomicU64::new(0);
static REPORTING: AtomicBool = AtomicBool::new(false);
static NR_REPORTED: AtomicU32 = AtomicU32::new(0);
/// One report at a time; taken in NMIs only.
static TURN: Mutex<()> = Mutex::new(());

static LIVES: [Life; MAX_CPUS] = [const { Life::new() }; MAX_CPUS];

/// What one CPU has told the watchdog; on a cache line of its own.
#[repr(align(128))]
struct Life {
    /// Counts steps of work.
    steps: AtomicU64,
    /// What the CPU says it is doing.
    activity: AtomicPtr<&'static str>,
}

impl Life {
    const fn new() -> Self {
        Self { steps: AtomicU64::new(0), activity: AtomicPtr::new(core::ptr::null_mut()) }
    }

    fn activity(&self) -> &'static str {
        // SAFETY: null, or from the reference to a static in `note`.
        unsafe { self.activity.load(Ordering::Relaxed).as_ref() }.copied().unwrap_or("nothing noted")
    }
}

fn life_of(cpu: CpuIndex) -> &'static Life {
    &LIVES[cpu.get()]
}

/// Starts watching: the run ends when nobody has called [`progress`] for `limit_s` seconds.
///
/// # Panics
///
/// On another CPU than the first.
pub fn start(limit_s: u64) {
    assert!(this_index() == CpuIndex::FIRST, "the timer's line reaches the first CPU");
    LAST_CHANGE.store(clock::cycles(), Ordering::Relaxed);
    LIMIT.store(clock::cycles_in_us(limit_s.saturating_mul(1_000_000)).max(1), Ordering::Relaxed);
    // Channel 0, both bytes, mode 2 (rate), count 65536 (Intel 8254 data sheet).
    for (port, value) in [(0x43_u16, 0x34_u8), (0x40, 0), (0x40, 0)] {
        // SAFETY: ports of the interval timer; they touch no memory.
        unsafe { Port::new(port).write(value) };
    }
    apic::legacy_line_as_nmi();
    apic::mask_legacy_controllers(1);
}

/// Says that this CPU has done a step of its work.
#[inline]
pub fn progress() {
    life_of(this_index()).steps.fetch_add(1, Ordering::Relaxed);
}

/// Says what this CPU is doing now, for the report: `note(&"tearing down")`.
#[inline]
pub fn note(activity: &'static &'static str) {
    life_of(this_index()).activity.store(core::ptr::from_ref(activity).cast_mut(), Ordering::Relaxed);
}

/// Handles an NMI: a tick, a request to report, or one from outside (QEMU's monitor command `nmi`).
///
/// # Context
///
/// Anything may have been interrupted; only `TURN` is locked.
pub(crate) fn handle_nmi(frame: &TrapFrame) {
    if REPORTING.load(Ordering::Relaxed) {
        report_and_halt(frame);
    }
    let limit = LIMIT.load(Ordering::Relaxed);
    if limit == 0 || this_index() != CpuIndex::FIRST {
        report(format_args!("an NMI from outside asked for the state of all CPUs"), frame);
    }
    acknowledge_tick();
    let count = online().iter().map(|cpu| life_of(cpu).steps.load(Ordering::Relaxed)).sum();
    let now = clock::cycles();
    if LAST_COUNT.swap(count, Ordering::Relaxed) != count {
        LAST_CHANGE.store(now, Ordering::Relaxed);
    } else if now.wrapping_sub(LAST_CHANGE.load(Ordering::Relaxed)) > limit {
        let seconds = limit / clock::cycles_per_second().max(1);
        report(format_args!("no CPU made progress for {seconds} s"), frame);
    }
}

/// Makes every CPU print its state, and ends the run.
fn report(why: fmt::Arguments<'_>, frame: &TrapFrame) -> ! {
    if REPORTING.swap(true, Ordering::Relaxed) {
        report_and_halt(frame);
    }
    serial::print_line_urgent(format_args!("HANG: {why}"));
    apic::send_nmi_to_others();
    print_this_cpu(frame);
    let nr_others = online().without(this_index()).count();
    if !clock::wait_until(REPORT_TIMEOUT_US, || NR_REPORTED.load(Ordering::Relaxed) == nr_others) {
        serial::print_line_urgent(format_args!("HANG: not every CPU answered"));
    }
    exit::exit(Verdict::Hang)
}

fn report_and_halt(frame: &TrapFrame) -> ! {
    print_this_cpu(frame);
    NR_REPORTED.fetch_add(1, Ordering::Relaxed);
    exit::halt()
}

fn print_this_cpu(frame: &TrapFrame) {
    let _turn = TURN.lock();
    let me = this_index();
    let life = life_of(me);
    let waiters = online().iter().filter(|other| ipi::waited_for(*other).contains(me)).collect();
    let ring = frame.code_segment & 3;
    print_state(
        format_args!(
            "in ring {ring}, {}, {}; waits for answers of {}; is waited for by {}",
            life.activity(),
            Counted(life.steps.load(Ordering::Relaxed), "step"),
            List(ipi::waited_for(me)),
            List(waiters),
        ),
        frame,
    );
}

/// Lets the interrupt controller raise the next tick. An NMI sends no acknowledgement; a poll
/// counts as one.
fn acknowledge_tick() {
    let mut port = Port::<u8>::new(0x20);
    // SAFETY: OCW3 with the poll bit (Intel 8259A data sheet); touches no memory.
    unsafe { port.write(0x0c) };
    // SAFETY: reads the poll word.
    let _ = unsafe { port.read() };
    // SAFETY: end of interrupt.
    unsafe { port.write(0x20) };
}

/// CPU numbers with commas, or "none".
struct List(CpuMask);

impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (position, cpu) in self.0.iter().enumerate() {
            if position > 0 {
                f.write_str(",")?;
            }
            write!(f, "{cpu}")?;
        }
        Ok(())
    }
}
