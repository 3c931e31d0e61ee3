//! A run: CPUs started, led from phase to phase, watched, and ended.

use core::any::Any;
use core::panic::AssertUnwindSafe;
use core::sync::atomic::Ordering;
use core::time::Duration;
use std::io;
use std::panic::catch_unwind;
use std::sync::{Arc, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use mmu_kernel_shim::{Config, Error, Kernel, Misbehaviour};

use crate::machine::FreeMachine;
use crate::options::{MAX_CPUS, Options, PlantedFault};
use crate::program::board::{Board, Phase, World};
use crate::program::worker::Worker;
use crate::report::{Report, Totals, stuck_cpus};
use crate::ring::now;
use crate::signals;
use crate::violation::{Violation, ViolationKind};

/// Frames of the machine: four times what the programs use at the most, and few enough that one
/// that is freed is soon in other hands.
const FRAMES: usize = 32 * 1024;
/// How often the watching thread looks.
const LOOK: Duration = Duration::from_millis(5);
/// How many looks CPUs may take to leave after a violation.
const FAREWELL_LOOKS: u32 = 400;

/// Runs the small kernel on threads for as long as `options` say, or until a violation.
///
/// `progress` is called now and then with what was done so far. Where a run fails, CPUs may be left
/// behind that wait for what never happens; they use no processor time.
///
/// # Errors
/// If the host refuses threads, or the signal handler.
///
/// # Panics
/// If there are fewer than two CPUs, or more than [`MAX_CPUS`].
pub fn run(options: &Options, mut progress: impl FnMut(&Totals, Duration)) -> io::Result<Report> {
    let nr_cpus = options.nr_cpus;
    assert!((2..=MAX_CPUS).contains(&nr_cpus), "2 to {MAX_CPUS} CPUs, not {nr_cpus}");
    signals::install()?;
    let world = Arc::new(boot(options).map_err(io::Error::other)?);
    let start = (Instant::now(), now());
    let threads =
        (0..nr_cpus).map(|number| start_cpu(&world, number, options.seed)).collect::<io::Result<Vec<_>>>();
    let threads = match threads {
        Ok(threads) => threads,
        Err(error) => {
            world.board.phases.end_all();
            world.machine.abandon();
            return Err(error);
        }
    };
    let mut violations = lead(&world, options, start.0, &mut progress);
    let time = start.0.elapsed();
    let cycles_a_us = (now() - start.1) as f64 / time.as_secs_f64() / 1e6;
    if violations.is_empty() && !join(&world, options, threads) && world.machine.nr_violations() == 0 {
        violations.push(stuck());
    }
    world.machine.abandon();
    for (number, cpu) in world.machine.cpus().iter().enumerate() {
        violations.extend(cpu.found.violations(number));
    }
    let is_stuck = violations.iter().any(|violation| violation.kind == ViolationKind::Stuck);
    let stuck = if is_stuck { stuck_cpus(&world) } else { Vec::new() };
    violations.sort_by_key(|violation| violation.time);
    Ok(Report::new(&world, options, time, cycles_a_us, violations, stuck))
}

fn boot(options: &Options) -> Result<World, Error> {
    let machine = Arc::new(FreeMachine::new(options.nr_cpus, FRAMES, options.fault));
    let misbehaviour = match options.fault {
        PlantedFault::FreeBeforeFlush => Misbehaviour::FreeBeforeFlush,
        PlantedFault::Absent
        | PlantedFault::SkipFlush
        | PlantedFault::DropIpi
        | PlantedFault::LocalFlushOnly
        | PlantedFault::LoseInterrupt => Misbehaviour::Absent,
    };
    let kernel = Kernel::boot(Arc::clone(&machine), Config { misbehaviour, ..Config::default() })?;
    let board = Board::new(&kernel, options.nr_cpus)?;
    Ok(World { kernel, machine, board })
}

fn start_cpu(world: &Arc<World>, number: usize, seed: u64) -> io::Result<JoinHandle<()>> {
    let world = Arc::clone(world);
    Builder::new().name(format!("CPU {number}")).spawn(move || {
        world.machine.run_cpu(number, &*world, |cpu| {
            // What unwinds has dropped its locks; nothing else of the run is used afterwards but
            // what is atomic.
            let ran = catch_unwind(AssertUnwindSafe(|| Worker::new(&world, cpu, number, seed).run()));
            if let Err(panic) = ran {
                world.machine.violation(cpu, ViolationKind::Panicked, [0; 3]);
                let mut panics = world.board.panics.lock().unwrap_or_else(PoisonError::into_inner);
                panics.push(format!("CPU {number}: {}", words_of(&*panic)));
            }
            Worker::leave(&world, cpu);
        });
    })
}

fn words_of(panic: &(dyn Any + Send)) -> String {
    let words = panic.downcast_ref::<&str>().map(|words| (*words).to_owned());
    words.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".to_owned())
}

/// Leads the CPUs from phase to phase until time is up or something is found. What nobody but the
/// watching thread can see comes back: that they are stuck.
fn lead(
    world: &World,
    options: &Options,
    start: Instant,
    progress: &mut impl FnMut(&Totals, Duration),
) -> Vec<Violation> {
    let phases = &world.board.phases;
    // Every phase comes twice at least, once with interrupts of each kind.
    let shortest = options.time / u32::try_from(2 * Phase::NUMBER).unwrap_or(1);
    let length = shortest.min(Duration::from_secs(1));
    let mut watch = Watch::new(world, options.patience);
    for number in 0.. {
        while phases.arrivals() < (number + 1) * options.nr_cpus {
            if world.machine.nr_violations() != 0 {
                phases.end_all();
                return Vec::new();
            }
            if watch.is_stuck(world) {
                return vec![stuck()];
            }
            std::thread::sleep(LOOK.min(length));
        }
        if number >= 2 * Phase::NUMBER && start.elapsed() >= options.time {
            break;
        }
        world.machine.set_delivery(options.interrupts.in_phase(number));
        phases.begin_next();
        let began = Instant::now();
        while began.elapsed() < length && world.machine.nr_violations() == 0 {
            std::thread::sleep(LOOK.min(length));
            progress(&Totals::of(world), start.elapsed());
            if watch.is_stuck(world) {
                return vec![stuck()];
            }
        }
        phases.end();
    }
    phases.end_all();
    Vec::new()
}

const fn stuck() -> Violation {
    Violation { kind: ViolationKind::Stuck, cpu: None, address: 0, value: 0, against: 0, time: u64::MAX }
}

/// Looks whether every CPU gets on. Counted in looks and not in time, because time passes while the
/// whole process is stopped.
struct Watch {
    /// By CPU: its progress at the last look that found some, and the looks since.
    seen: Vec<(u64, u32)>,
    most: u32,
}

impl Watch {
    fn new(world: &World, patience: Duration) -> Self {
        let most = u32::try_from(patience.as_millis() / LOOK.as_millis()).unwrap_or(u32::MAX);
        Self { seen: vec![(0, 0); world.machine.cpus().len()], most }
    }

    fn is_stuck(&mut self, world: &World) -> bool {
        let mut is_stuck = false;
        for ((before, looks), cpu) in self.seen.iter_mut().zip(world.machine.cpus()) {
            let progress = cpu.status.progress.load(Ordering::Relaxed);
            *looks = if progress == *before { *looks + 1 } else { 0 };
            *before = progress;
            is_stuck |= *looks > self.most;
        }
        if is_stuck {
            world.machine.freeze();
        }
        is_stuck
    }
}

/// Waits for the CPUs, not for ever; whether all have left.
fn join(world: &World, options: &Options, threads: Vec<JoinHandle<()>>) -> bool {
    let mut watch = Watch::new(world, options.patience);
    let mut looks_since_a_violation = 0;
    while world.board.phases.nr_left() < threads.len() {
        if world.machine.nr_violations() != 0 {
            looks_since_a_violation += 1;
        }
        if looks_since_a_violation > FAREWELL_LOOKS || watch.is_stuck(world) {
            return false;
        }
        std::thread::sleep(LOOK);
    }
    // One that has left ends soon.
    threads.into_iter().map(JoinHandle::join).all(|joined| joined.is_ok())
}
