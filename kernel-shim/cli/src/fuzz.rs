//! Random sequences against the checker, and the shortest form of one that fails.

use core::panic::AssertUnwindSafe;
use core::time::Duration;
use std::panic::catch_unwind;
use std::time::Instant;

use mmu_hosted::{Op, Outcome, Sequence, execute, generate};

/// How to fuzz.
#[derive(Clone, Copy, Debug)]
pub struct FuzzOptions {
    /// The first sequence's seed; the n-th is made from this plus n.
    pub seed: u64,
    /// CPUs of each machine.
    pub nr_cpus: u32,
    /// Stops after so many operations.
    pub most_ops: Option<u64>,
    /// Stops after so long.
    pub most_time: Option<Duration>,
    /// Operations in one sequence.
    pub length: usize,
}

/// What was done, and what was found.
#[derive(Debug, Default)]
pub struct Fuzzed {
    /// Sequences run.
    pub sequences: u64,
    /// Operations run.
    pub ops: u64,
    /// Which operation was followed by which on the next line, of all pairs.
    pub pairs: PairCoverage,
    /// The first failure, if there was one.
    pub failure: Option<Failure>,
}

/// A sequence that fails.
#[derive(Debug)]
pub struct Failure {
    /// As found.
    pub found: Sequence,
    /// As short as it could be made.
    pub shrunk: Sequence,
    /// What the short one shows.
    pub verdict: Verdict,
}

/// What running a sequence came to.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// It ended, well or not.
    Ended(Outcome),
    /// The engine, the kernel or the machine gave up; with its words.
    Panicked(String),
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

/// Which pairs of neighbouring operations were run.
#[derive(Clone, Debug)]
pub struct PairCoverage([[bool; Op::WORDS.len()]; Op::WORDS.len()]);

impl Default for PairCoverage {
    fn default() -> Self {
        Self([[false; Op::WORDS.len()]; Op::WORDS.len()])
    }
}

impl PairCoverage {
    fn add(&mut self, sequence: &Sequence) {
        for pair in sequence.steps.windows(2) {
            if let [first, second] = pair {
                self.0[first.op.number()][second.op.number()] = true;
            }
        }
    }

    /// How many, of how many there are.
    #[must_use]
    pub fn count(&self) -> (usize, usize) {
        (self.0.iter().flatten().filter(|seen| **seen).count(), Op::WORDS.len() * Op::WORDS.len())
    }
}

/// Runs a sequence and catches whatever it does.
///
/// # Errors
/// If the host refuses memory for the machine.
pub fn judge(sequence: &Sequence) -> std::io::Result<Verdict> {
    match catch_unwind(AssertUnwindSafe(|| execute(sequence))) {
        Ok(outcome) => Ok(Verdict::Ended(outcome?)),
        Err(panic) => {
            let words = panic.downcast_ref::<String>().map(String::as_str);
            let words = words.or_else(|| panic.downcast_ref::<&str>().copied());
            Ok(Verdict::Panicked(words.unwrap_or("no words").to_owned()))
        }
    }
}

/// Runs random sequences until a limit is reached or one fails. `progress` is told how it stands, after every sequence.
///
/// # Errors
/// If the host refuses memory for a machine.
pub fn fuzz(options: &FuzzOptions, mut progress: impl FnMut(&Fuzzed, Duration)) -> std::io::Result<Fuzzed> {
    let mut fuzzed = Fuzzed::default();
    let start = Instant::now();
    loop {
        let time = start.elapsed();
        let enough_ops = options.most_ops.is_some_and(|most| fuzzed.ops >= most);
        if enough_ops || options.most_time.is_some_and(|most| time >= most) {
            return Ok(fuzzed);
        }
        progress(&fuzzed, time);
        let seed = options.seed.wrapping_add(fuzzed.sequences).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let sequence = generate(seed, options.nr_cpus, options.length);
        let verdict = judge(&sequence)?;
        fuzzed.sequences += 1;
        fuzzed.ops += sequence.steps.len() as u64;
        fuzzed.pairs.add(&sequence);
        if !verdict.is_clean() {
            let (shrunk, verdict) = shrink(&sequence, verdict)?;
            fuzzed.failure = Some(Failure { found: sequence, shrunk, verdict });
            return Ok(fuzzed);
        }
    }
}

/// How many other seeds a shorter sequence is tried with: leaving a step out changes every choice after it.
const SEEDS_TRIED: u64 = 6;

/// Leaves steps out while the same sort of failure stays: halves first, single ones at the end.
///
/// # Errors
/// If the host refuses memory for a machine.
pub fn shrink(sequence: &Sequence, verdict: Verdict) -> std::io::Result<(Sequence, Verdict)> {
    let sort = verdict.sort();
    let mut best = (sequence.clone(), verdict);
    let mut chunk = best.0.steps.len().div_ceil(2);
    loop {
        let mut shorter = false;
        let mut at = 0;
        while at < best.0.steps.len() {
            let mut candidate = best.0.clone();
            candidate.steps.drain(at..(at + chunk).min(best.0.steps.len()));
            match fails_like(&candidate, &sort)? {
                Some(found) => {
                    best = found;
                    shorter = true;
                }
                None => at += chunk,
            }
        }
        if chunk == 1 && !shorter {
            return Ok(best);
        }
        if !shorter || chunk > 1 {
            chunk = chunk.div_ceil(2);
        }
    }
}

fn fails_like(candidate: &Sequence, sort: &str) -> std::io::Result<Option<(Sequence, Verdict)>> {
    for other in 0..SEEDS_TRIED {
        let seeded = Sequence { seed: candidate.seed.wrapping_add(other), ..candidate.clone() };
        let verdict = judge(&seeded)?;
        if verdict.sort() == sort {
            return Ok(Some((seeded, verdict)));
        }
    }
    Ok(None)
}
