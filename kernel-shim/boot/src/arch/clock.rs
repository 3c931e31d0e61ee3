//! Time: the timestamp counter, and how fast it runs.
//!
//! Under emulation a cycle is what the emulator makes of it: such numbers can be compared only with
//! each other.

use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicU64, Ordering};

use x86_64::instructions::port::Port;

/// Rate of the PC's interval timer, in Hz.
pub(crate) const PIT_HZ: u64 = 1_193_182;
/// How long the counter is watched to learn its rate, in ticks of the interval timer: about 10 ms.
const CALIBRATION_TICKS: u16 = 11_932;
/// How often the rate is measured.
const CALIBRATIONS: u32 = 5;
/// If the timer does not answer in this many polls, the rate is guessed.
const MAX_POLLS: u32 = 50_000_000;
const GUESSED_HZ: u64 = 1_000_000_000;

static HZ: AtomicU64 = AtomicU64::new(GUESSED_HZ);

/// Returns the timestamp counter.
#[inline]
#[must_use]
pub fn cycles() -> u64 {
    // SAFETY: every x86_64 CPU has RDTSC, and CR4.TSD is off.
    unsafe { _rdtsc() }
}

/// Returns how many cycles a second has.
#[must_use]
pub fn cycles_per_second() -> u64 {
    HZ.load(Ordering::Relaxed)
}

/// Returns how many cycles a number of microseconds has.
#[must_use]
pub fn cycles_in_us(microseconds: u64) -> u64 {
    cycles_per_second().saturating_mul(microseconds) / 1_000_000
}

/// Spins for at least this long.
pub fn wait_us(microseconds: u64) {
    let _ = wait_until(microseconds, || false);
}

/// Spins until `condition` holds, and returns `true`; or returns `false` after `timeout_us`.
#[must_use]
pub fn wait_until(timeout_us: u64, condition: impl Fn() -> bool) -> bool {
    let start = cycles();
    let limit = cycles_in_us(timeout_us);
    while !condition() {
        if cycles().wrapping_sub(start) >= limit {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

/// Measures the rate of the counter. The shortest of several measurements counts: a disturbance,
/// such as a host that takes its core away from the emulator, makes a measurement longer, never
/// shorter.
pub(crate) fn init() {
    let shortest = (0..CALIBRATIONS).filter_map(|_| calibration_cycles()).min();
    if let Some(cycles) = shortest {
        HZ.store(cycles * PIT_HZ / u64::from(CALIBRATION_TICKS), Ordering::Relaxed);
    }
}

/// Returns how many cycles channel 2 of the interval timer takes for its count (Intel 8254 data
/// sheet).
fn calibration_cycles() -> Option<u64> {
    let [low, high] = CALIBRATION_TICKS.to_le_bytes();
    // Gate on, speaker off.
    write_port(0x61, read_port(0x61) & !0x02 | 0x01);
    // Channel 2, both bytes, mode 0: the output rises at the end of the count.
    write_port(0x43, 0xb0);
    write_port(0x42, low);
    write_port(0x42, high);
    let start = cycles();
    for _ in 0..MAX_POLLS {
        if read_port(0x61) & 0x20 != 0 {
            return Some(cycles().wrapping_sub(start));
        }
    }
    None
}

fn read_port(port: u16) -> u8 {
    // SAFETY: called with ports of the interval timer only; they touch no memory.
    unsafe { Port::new(port).read() }
}

fn write_port(port: u16, value: u8) {
    // SAFETY: as above; channel 2 raises no interrupt.
    unsafe { Port::new(port).write(value) }
}
