//! What a run has done, and what it has found: counts, words, and all that helps to look at a
//! failure.

use core::fmt::Write;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::sync::PoisonError;

use crate::cpu::{Counts, Cpu};
use crate::doing::Doing;
use crate::options::{Interrupts, Options};
use crate::program::board::{Live, SharedSpace, World};
use crate::ring::{Event, Happened};
use crate::violation::Violation;

/// Fewer shootdowns than this show nothing.
const FEWEST_SHOOTDOWNS: u64 = 1000;
/// One shootdown in so many must have met a CPU that ran, or the CPUs took turns.
const MET_ONE_IN: u64 = 10;

macro_rules! totals {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What all CPUs have counted together.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Totals { $($(#[$doc])* pub $name: u64,)* }

        impl Totals {
            pub(crate) fn of(world: &World) -> Self {
                let sum = |of: fn(&Counts) -> &AtomicU64| -> u64 {
                    world.machine.cpus().iter().map(|cpu| of(&cpu.counts).load(Ordering::Relaxed)).sum()
                };
                Self { $($name: sum(|counts| &counts.$name),)* }
            }

            /// Every count with its name.
            #[must_use]
            pub fn fields(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name)),*]
            }
        }
    };
}

totals! {
    /// Loads and stores of programs.
    accesses,
    /// Entries that the TLBs took in for them.
    fills,
    /// Entries that they took in by speculation.
    speculative_fills,
    /// Calls that took pages away: munmap, MADV_DONTNEED, mremap, exec's stack move, exit, reclaim.
    unmappings,
    /// Calls of the kernel, faults and switches among them.
    calls,
    /// Shootdowns, each with its wait.
    shootdowns,
    /// Shootdowns that were answered before the CPU that waited had given its core away.
    met,
    /// Interrupts taken.
    interrupts,
    /// Signals taken.
    signals,
    /// INVLPGs.
    invlpgs,
    /// Loads of CR3 that dropped what was cached.
    flushes,
    /// Loads of CR3 that kept it.
    kept_loads,
    /// Pages freed.
    freed_pages,
    /// Page tables freed.
    freed_tables,
    /// How often the planted fault has happened.
    faults,
}

/// How fast it went: counts a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Calls that took pages away.
    pub unmappings: f64,
    /// Loads and stores of programs.
    pub accesses: f64,
    /// Shootdowns.
    pub shootdowns: f64,
}

impl Rates {
    /// Those of these counts in that time.
    #[must_use]
    pub fn of(totals: &Totals, time: Duration) -> Self {
        let rate = |count: u64| count as f64 / time.as_secs_f64().max(1e-9);
        let Totals { unmappings, accesses, shootdowns, .. } = *totals;
        Self { unmappings: rate(unmappings), accesses: rate(accesses), shootdowns: rate(shootdowns) }
    }
}

/// How a run has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing was found, and CPUs did run beside each other.
    Clean,
    /// Something was found.
    Violation,
    /// Nothing was found, and nothing could be: CPUs took turns, or too little was done.
    NotTested,
}

/// A run that has ended.
#[derive(Clone, Debug)]
pub struct Report {
    /// How it was to be.
    pub options: Options,
    /// How long it took.
    pub time: Duration,
    /// What was done.
    pub totals: Totals,
    /// What was found, the first first; a few of each CPU.
    pub violations: Vec<Violation>,
    /// What panicked programs have said.
    pub panics: Vec<String>,
    /// Who waits for whom, where the run is stuck.
    pub stuck: Vec<String>,
    /// For the file: what each owner had mapped, the last events.
    details: String,
}

impl Report {
    pub(crate) fn new(
        world: &World,
        options: &Options,
        time: Duration,
        cycles_a_us: f64,
        violations: Vec<Violation>,
        stuck: Vec<String>,
    ) -> Self {
        let panics = world.board.panics.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let details = if violations.is_empty() { String::new() } else { details(world, cycles_a_us) };
        let totals = Totals::of(world);
        Self { options: options.clone(), time, totals, violations, panics, stuck, details }
    }

    /// How it has ended.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        if !self.violations.is_empty() {
            Verdict::Violation
        } else if self.why_not_tested().is_some() {
            Verdict::NotTested
        } else {
            Verdict::Clean
        }
    }

    /// Why a run without violations shows nothing, if it does not.
    #[must_use]
    pub fn why_not_tested(&self) -> Option<String> {
        let Totals { shootdowns, met, .. } = self.totals;
        if shootdowns < FEWEST_SHOOTDOWNS {
            return Some(format!(
                "{shootdowns} shootdowns are too few to show anything; it takes {FEWEST_SHOOTDOWNS}"
            ));
        }
        (met < shootdowns / MET_ONE_IN).then(|| {
            format!(
                "only {met} of {shootdowns} shootdowns met a CPU that ran at that moment, and it takes one in {MET_ONE_IN}: \
                 there are fewer free cores than CPUs, and they took turns"
            )
        })
    }

    /// Counts a second.
    #[must_use]
    pub fn rates(&self) -> Rates {
        Rates::of(&self.totals, self.time)
    }

    /// All that helps to look at a failure: what was found, who had mapped what, what each CPU was
    /// at, and the last events, by time.
    #[must_use]
    pub fn failure_file(&self) -> String {
        let Options { nr_cpus, seed, interrupts, .. } = &self.options;
        let interrupts = match interrupts {
            Interrupts::Polled => "polled",
            Interrupts::Signals => "signals",
            Interrupts::Alternating => "polled and signals in turns",
        };
        let mut text = format!("# free-running, {nr_cpus} CPUs, seed {seed}, interrupts {interrupts}\n");
        for violation in &self.violations {
            let _ = writeln!(text, "violation: {violation}");
        }
        for words in self.panics.iter().chain(&self.stuck) {
            let _ = writeln!(text, "{words}");
        }
        text.push_str(&self.details);
        text
    }
}

/// What each CPU is at, in words: who waits for whom.
pub(crate) fn stuck_cpus(world: &World) -> Vec<String> {
    world.machine.cpus().iter().enumerate().map(|(number, cpu)| what_it_is_at(number, cpu)).collect()
}

fn what_it_is_at(number: usize, cpu: &Cpu) -> String {
    let load = |word: &AtomicU64| word.load(Ordering::Relaxed);
    let status = &cpu.status;
    let mut words = format!("CPU {number}: {}", Doing::from_number(load(&status.doing)));
    let waits_for: Vec<String> = (0..64)
        .filter(|bit| load(&status.waits_for) >> bit & 1 != 0)
        .map(|bit: u32| format!("CPU {bit}"))
        .collect();
    if !waits_for.is_empty() {
        let _ = write!(words, ", waits for an answer of {}", waits_for.join(" and "));
    } else if status.spins.load(Ordering::Relaxed) {
        let _ = write!(words, ", spins for a lock (the last table was {:#x})", load(&status.table));
    }
    if load(&status.map_lock) != 0 {
        let _ = write!(
            words,
            ", holds the map lock of the address space with root {:#x}",
            load(&status.map_lock)
        );
    }
    if cpu.has_interrupt() {
        words.push_str(", has an interrupt that it has not taken");
    }
    let on = if cpu.interrupts_are_on() { "on" } else { "off" };
    let _ = write!(words, "; interrupts {on}, {} calls so far", load(&status.progress));
    words
}

fn details(world: &World, cycles_a_us: f64) -> String {
    let mut text = String::from("\n# what each owner has mapped, and up to which generation all is dead\n");
    for space in world.board.shared.iter().chain([&world.board.duel]) {
        describe_space(&mut text, space);
    }
    text.push_str("\n# what each CPU was at\n");
    for words in stuck_cpus(world) {
        let _ = writeln!(text, "{words}");
    }
    text.push_str("\n# the last events of all CPUs, microseconds before the last one\n");
    let mut events: Vec<(usize, Event)> = Vec::new();
    for (number, cpu) in world.machine.cpus().iter().enumerate() {
        events.extend(cpu.ring.events().into_iter().map(|event| (number, event)));
    }
    events.sort_by_key(|(_, event)| event.time);
    let last = events.last().map_or(0, |(_, event)| event.time);
    for (number, event) in events {
        let before = (last - event.time) as f64 / cycles_a_us.max(1.0);
        let _ = writeln!(text, "-{before:.2}  CPU {number}  {}", event_words(event));
    }
    text
}

fn describe_space(text: &mut String, space: &SharedSpace) {
    let root = space.mm.root().start_address().as_u64();
    for (owner, published) in space.areas.iter().enumerate() {
        let dead = published.dead();
        if let Some(Live { generation, place, nr_pages }) = published.live() {
            let _ = writeln!(
                text,
                "space {} (root {root:#x}), CPU {owner}: generation {generation}, {nr_pages} pages at its place {place}; \
                 dead up to {dead}",
                space.number
            );
        }
    }
}

fn event_words(event: Event) -> String {
    let Event { what, numbers: [first, second], .. } = event;
    match what {
        Happened::Begins | Happened::Done => {
            format!("{what} {} at {second:#x}", Doing::from_number(first))
        }
        Happened::LoadedAndFlushed | Happened::LoadedAndKept => {
            format!("{what}: root {first:#x}, PCID {second}")
        }
        Happened::Invlpg => format!("{what} {first:#x}"),
        Happened::Asked => format!("{what} {first:#b}"),
        Happened::Answered => format!("{what}: {first}"),
        Happened::Interrupted => what.to_string(),
        Happened::Freed | Happened::Allocated => {
            let sort = if second == 0 { "page" } else { "table" };
            format!("{what} {sort} {first:#x}")
        }
    }
}
