//! Runs a sequence and says what came of it, whatever that was.

use core::panic::AssertUnwindSafe;
use std::io;
use std::panic::catch_unwind;
use std::sync::Arc;

use crate::boundary::Boundaries;
use crate::checker::events::Event;
use crate::checker::violation::Found;
use crate::kernel::Kernel;
use crate::machine::HostedMachine;
use crate::options::Telling;
use crate::sequence::features::Features;
use crate::sequence::text::Sequence;
use crate::sequence::trial::{Outcome, Trial};
use crate::sequence::world::{World, machine_of};

/// What running a sequence came to.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// It ended, well or not.
    Ended(Outcome),
    /// The engine, the kernel or the machine gave up; with its words.
    Panicked(String),
}

/// One run, with what is remembered of it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Run {
    /// What it came to.
    pub verdict: Verdict,
    /// The corners it has been to.
    pub reached: Boundaries,
    /// What it has done, in small pieces.
    pub features: Features,
    /// How often what was wrong on purpose has happened.
    pub faults: u64,
    /// The violations found, also by a run that then gave up.
    pub found: Found,
    /// All that happened, oldest first; empty unless the trial was to remember all.
    pub events: Vec<Event>,
}

impl Verdict {
    /// Whether nothing was wrong.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        match self {
            Self::Ended(outcome) => outcome.is_clean(),
            Self::Panicked(_) => false,
        }
    }

    /// One word for the sort of failure, so that shrinking does not wander to another.
    #[must_use]
    pub fn sort(&self) -> String {
        match self {
            Self::Panicked(_) => "panic".to_owned(),
            Self::Ended(outcome) => match outcome.found.told.first() {
                Some(violation) => format!("{:?}", violation.kind),
                None if outcome.double_frees > 0 => "double free".to_owned(),
                None if outcome.leaked_frames > 0 => "leaked frame".to_owned(),
                None if outcome.leaked_tables > 0 => "leaked table".to_owned(),
                None => "clean".to_owned(),
            },
        }
    }
}

/// Runs a sequence on the kernel that `make` boots, and catches whatever it does.
///
/// # Errors
/// If the host refuses memory for the machine, or the kernel does not boot.
pub fn judge<K: Kernel>(
    sequence: &Sequence,
    trial: Trial,
    make: impl FnOnce(&Arc<HostedMachine>) -> io::Result<K>,
) -> io::Result<Run> {
    let machine = machine_of::<K>(sequence, trial)?;
    let mut world = None;
    let ended = catch_unwind(AssertUnwindSafe(|| {
        let world = world.insert(World::new(sequence, trial, Arc::clone(&machine), make)?);
        world.run();
        io::Result::Ok(world.end())
    }));
    let verdict = match ended {
        Ok(outcome) => Verdict::Ended(outcome?),
        Err(panic) => {
            let words = panic.downcast_ref::<String>().map(String::as_str);
            let words = words.or_else(|| panic.downcast_ref::<&str>().copied());
            let mut words = words.unwrap_or("no words").to_owned();
            let ends = !words.contains("does not end");
            let locks = if ends { Vec::new() } else { machine.locks_taken_twice() };
            for line in machine.missing_answers().into_iter().chain(locks) {
                words.push('\n');
                words.push_str(&line);
            }
            Verdict::Panicked(words)
        }
    };
    let events = if trial.telling == Telling::All { machine.events() } else { Vec::new() };
    // What was given up may hold a lock that the kernel asks for here.
    let counted = catch_unwind(AssertUnwindSafe(|| {
        world.as_ref().map(|world| (world.reached(), world.faults(), world.features()))
    }));
    let (reached, faults, features) = counted
        .ok()
        .flatten()
        .unwrap_or_else(|| (machine.reached(), machine.nr_faults(), Features::default()));
    let _gives_its_memory_back = catch_unwind(AssertUnwindSafe(|| drop(world)));
    Ok(Run { verdict, reached, features, faults, found: machine.violations(), events })
}
