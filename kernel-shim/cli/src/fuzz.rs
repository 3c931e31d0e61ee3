//! Random sequences against the checker, several at a time, and the shortest form of one that fails.
//!
//! The n-th sequence depends on the seed and on n alone, and of several that fail the first in that order counts. So, but for
//! time limits, what is found does not depend on the number of jobs.

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use mmu_hosted::{
    Boundaries, Boundary, Op, Run, Sequence, Telling, Trial, Verdict, generate, judge_in, shrink,
};

/// How to fuzz.
#[derive(Clone, Copy, Debug)]
pub struct FuzzOptions {
    /// The first sequence's seed; the n-th is made from this plus n.
    pub seed: u64,
    /// CPUs of each machine.
    pub nr_cpus: u32,
    /// Stops after so many operations, over all jobs; whole sequences are run.
    pub most_ops: Option<u64>,
    /// Stops after so long.
    pub most_time: Option<Duration>,
    /// Operations in one sequence.
    pub length: usize,
    /// Sequences run at the same time, each on a thread of its own.
    pub jobs: usize,
    /// What is wrong on purpose.
    pub trial: Trial,
}

/// What was done, and what was found.
#[derive(Debug, Default)]
pub struct Fuzzed {
    /// Sequences run.
    pub sequences: u64,
    /// Operations run.
    pub ops: u64,
    /// What was covered.
    pub coverage: Coverage,
    /// The first failure, if there was one.
    pub failure: Option<Failure>,
}

/// A sequence that fails.
#[derive(Debug)]
pub struct Failure {
    /// Its number, from 0.
    pub number: u64,
    /// As found.
    pub found: Sequence,
    /// As short as it could be made.
    pub shrunk: Sequence,
    /// What the short one shows.
    pub verdict: Verdict,
}

/// Which pairs of neighbouring operations were run, and how many sequences have been to each corner.
#[derive(Clone, Debug)]
pub struct Coverage {
    pairs: [[bool; Op::WORDS.len()]; Op::WORDS.len()],
    boundaries: [u64; Boundary::ALL.len()],
}

impl Default for Coverage {
    fn default() -> Self {
        Self { pairs: [[false; Op::WORDS.len()]; Op::WORDS.len()], boundaries: [0; Boundary::ALL.len()] }
    }
}

impl Coverage {
    fn add(&mut self, sequence: &Sequence, reached: Boundaries) {
        for pair in sequence.steps.windows(2) {
            if let [first, second] = pair {
                self.pairs[first.op.number()][second.op.number()] = true;
            }
        }
        for boundary in reached.iter() {
            self.boundaries[boundary as usize] += 1;
        }
    }

    /// How many pairs of operations, of how many there are.
    #[must_use]
    pub fn pairs(&self) -> (usize, usize) {
        (self.pairs.iter().flatten().filter(|seen| **seen).count(), Op::WORDS.len() * Op::WORDS.len())
    }

    /// Every corner, with the number of sequences that have been there.
    pub fn boundaries(&self) -> impl Iterator<Item = (Boundary, u64)> + '_ {
        Boundary::ALL.into_iter().zip(self.boundaries)
    }

    /// How many corners, of how many there are.
    #[must_use]
    pub fn reached(&self) -> (usize, usize) {
        (self.boundaries.iter().filter(|times| **times > 0).count(), Boundary::ALL.len())
    }
}

/// What the jobs share.
struct Shared<'a, P> {
    options: &'a FuzzOptions,
    start: Instant,
    /// Number of the next sequence.
    next: AtomicU64,
    /// Number of the first sequence that failed so far: later ones need not be run.
    failed: AtomicU64,
    /// How many sequences there are to run, if that is limited.
    sequences: Option<u64>,
    state: Mutex<State<P>>,
}

struct State<P> {
    fuzzed: Fuzzed,
    failure: Option<(u64, Sequence, Verdict)>,
    progress: P,
}

/// Runs random sequences until a limit is reached or one fails. `progress` is told how it stands, after every sequence.
///
/// # Errors
/// If the host refuses memory for a machine, or a thread.
pub fn fuzz(options: &FuzzOptions, progress: impl FnMut(&Fuzzed, Duration) + Send) -> io::Result<Fuzzed> {
    let length = options.length.max(1) as u64;
    let shared = Shared {
        options,
        start: Instant::now(),
        next: AtomicU64::new(0),
        failed: AtomicU64::new(u64::MAX),
        sequences: options.most_ops.map(|most| most.div_ceil(length)),
        state: Mutex::new(State { fuzzed: Fuzzed::default(), failure: None, progress }),
    };
    thread::scope(|scope| {
        let jobs: Vec<_> = (0..options.jobs.max(1))
            .map(|_| thread::Builder::new().spawn_scoped(scope, || work(&shared)))
            .collect::<io::Result<_>>()?;
        for job in jobs {
            // `work` catches what sequences do; a panic of its own goes on here.
            job.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        io::Result::Ok(())
    })?;
    let State { mut fuzzed, failure, .. } = shared.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some((number, found, verdict)) = failure {
        let (shrunk, verdict) = shrink(&found, options.trial, verdict)?;
        fuzzed.failure = Some(Failure { number, found, shrunk, verdict });
    }
    Ok(fuzzed)
}

/// One job.
fn work<P: FnMut(&Fuzzed, Duration)>(shared: &Shared<'_, P>) -> io::Result<()> {
    let options = shared.options;
    loop {
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        let enough = shared.sequences.is_some_and(|most| number >= most)
            || options.most_time.is_some_and(|most| shared.start.elapsed() >= most)
            || number > shared.failed.load(Ordering::Relaxed);
        if enough {
            return Ok(());
        }
        let sequence = numbered(options, number);
        let Run { verdict, reached, .. } = judge_in(&sequence, options.trial)?;
        let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { fuzzed, failure, progress } = &mut *state;
        fuzzed.sequences += 1;
        fuzzed.ops += sequence.steps.len() as u64;
        fuzzed.coverage.add(&sequence, reached);
        progress(fuzzed, shared.start.elapsed());
        if !verdict.is_clean() {
            shared.failed.fetch_min(number, Ordering::Relaxed);
            if failure.as_ref().is_none_or(|(first, ..)| number < *first) {
                *failure = Some((number, sequence, verdict));
            }
        }
    }
}

/// The sequence with this number.
fn numbered(options: &FuzzOptions, number: u64) -> Sequence {
    let seed = options.seed.wrapping_add(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    generate(seed, options.nr_cpus, options.length)
}

/// Runs a sequence once more and remembers all that happens.
///
/// # Errors
/// If the host refuses memory for the machine.
pub fn tell(sequence: &Sequence, trial: Trial) -> io::Result<Run> {
    judge_in(sequence, Trial { telling: Telling::All, ..trial })
}
