//! Random sequences against the checker, several at a time, and the shortest form of one that
//! fails.
//!
//! The n-th sequence depends on the seed and on n alone. Where several sequences fail, the one with
//! the lowest number is reported. So, time limits aside, the number of jobs does not change what is
//! found. Runs with different seeds have no sequence in common.

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use crate::fuzz::job_watch::JobWatch;
use mmu_adapter::{Trial, judge_in, shrink};
use mmu_hosted::{Boundaries, Boundary, Choices, Op, Run, Sequence, Verdict, generate, with_cpus_going_off};

/// How to fuzz.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FuzzOptions {
    /// Which sequences: the n-th is made from this and n, mixed.
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
pub(crate) struct Fuzzed {
    /// Sequences run.
    pub sequences: u64,
    /// Operations run.
    pub ops: u64,
    /// How often what is wrong on purpose has happened.
    pub faults: u64,
    /// What was covered.
    pub coverage: Coverage,
    /// The first failure, if there was one.
    pub failure: Option<FailedSequence>,
}

/// A sequence that fails.
#[derive(Clone, Debug)]
pub(crate) struct FailedSequence {
    /// Its number, from 0.
    pub number: u64,
    /// As found.
    pub found: Sequence,
    /// As short as it could be made.
    pub shrunk: Sequence,
    /// What the short one shows.
    pub verdict: Verdict,
}

/// Which pairs of neighbouring operations were run, and how many sequences reached each boundary.
#[derive(Clone, Debug)]
pub(crate) struct Coverage {
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

    /// How many pairs of operations were run, and how many there are.
    #[must_use]
    pub(crate) fn pairs(&self) -> (usize, usize) {
        (self.pairs.iter().flatten().filter(|seen| **seen).count(), Op::WORDS.len() * Op::WORDS.len())
    }

    /// Every boundary, with the number of sequences that reached it.
    pub(crate) fn boundaries(&self) -> impl Iterator<Item = (Boundary, u64)> + '_ {
        Boundary::ALL.into_iter().zip(self.boundaries)
    }

    /// How many boundaries were reached, and how many there are.
    #[must_use]
    pub(crate) fn reached(&self) -> (usize, usize) {
        (self.boundaries.iter().filter(|times| **times > 0).count(), Boundary::ALL.len())
    }
}

/// What the jobs share.
struct Campaign<'a, P> {
    options: &'a FuzzOptions,
    watch: JobWatch,
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
    /// As found, until it has been made short.
    failure: Option<FailedSequence>,
    progress: P,
}

/// Seconds that a short sequence may take; most take a few hundredths of a second.
const PATIENCE: u64 = 30;
/// Seconds that shrinking may take.
const PATIENCE_SHRINKING: u64 = 900;

/// Runs random sequences until a limit is reached or one fails. `progress` is called after every
/// sequence.
///
/// A sequence that does not come back cannot be stopped: `stuck` is called with that sequence as
/// the failure, and ends the process.
///
/// # Errors
/// If the host refuses memory for a machine, or a thread.
pub(crate) fn fuzz(
    options: &FuzzOptions,
    progress: impl FnMut(&Fuzzed, Duration) + Send,
    stuck: impl Fn(Fuzzed) + Sync,
) -> io::Result<Fuzzed> {
    let length = options.length.max(1) as u64;
    let jobs = options.jobs.max(1);
    let shared = Campaign {
        options,
        watch: JobWatch::new(jobs),
        start: Instant::now(),
        next: AtomicU64::new(0),
        failed: AtomicU64::new(u64::MAX),
        sequences: options.most_ops.map(|most| most.div_ceil(length)),
        state: Mutex::new(State { fuzzed: Fuzzed::default(), failure: None, progress }),
    };
    let (done, is_done) = mpsc::channel();
    thread::scope(|scope| {
        thread::Builder::new().spawn_scoped(scope, || look_after(&shared, is_done, &stuck))?;
        let result = run_all(&shared, jobs);
        // This ends `look_after`.
        drop(done);
        result
    })?;
    let State { mut fuzzed, failure, .. } = shared.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    fuzzed.failure = failure;
    Ok(fuzzed)
}

/// Runs all jobs to their end, and makes what failed short.
fn run_all<P: FnMut(&Fuzzed, Duration) + Send>(shared: &Campaign<'_, P>, jobs: usize) -> io::Result<()> {
    thread::scope(|scope| {
        let jobs: Vec<_> = (0..jobs)
            .map(|job| thread::Builder::new().spawn_scoped(scope, move || work(shared, job)))
            .collect::<io::Result<_>>()?;
        for job in jobs {
            // `work` catches what sequences do; a panic of its own goes on here.
            job.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        io::Result::Ok(())
    })?;
    let Some(FailedSequence { number, found, verdict, .. }) = lock(&shared.state).failure.clone() else {
        return Ok(());
    };
    shared.watch.begin(0, number, &found);
    let (shrunk, verdict) = shrink(&found, shared.options.trial, verdict)?;
    shared.watch.end(0);
    lock(&shared.state).failure = Some(FailedSequence { number, found, shrunk, verdict });
    Ok(())
}

/// Looks once a second for a sequence that does not come back.
fn look_after<P>(shared: &Campaign<'_, P>, is_done: mpsc::Receiver<()>, stuck: &impl Fn(Fuzzed)) {
    let options = shared.options;
    // Longer sequences on more CPUs take longer.
    let size = u64::try_from(options.length).unwrap_or(u64::MAX).saturating_mul(u64::from(options.nr_cpus));
    let most = PATIENCE + size / 1000;
    let mut looks = shared.watch.looks();
    while is_done.recv_timeout(Duration::from_secs(1)) == Err(RecvTimeoutError::Timeout) {
        let most = if lock(&shared.state).failure.is_some() { PATIENCE_SHRINKING.max(most) } else { most };
        let Some((number, found)) = shared.watch.stuck(&mut looks, most) else { continue };
        let mut state = lock(&shared.state);
        let words = format!(
            "a call does not end: CPUs took no turns, and the sequence did not come back in {most} s"
        );
        let failure = state.failure.take().unwrap_or_else(|| FailedSequence {
            number,
            shrunk: found.clone(),
            found,
            verdict: Verdict::Panicked(words),
        });
        stuck(Fuzzed { failure: Some(failure), ..core::mem::take(&mut state.fuzzed) });
        return;
    }
}

/// One job.
fn work<P: FnMut(&Fuzzed, Duration)>(shared: &Campaign<'_, P>, job: usize) -> io::Result<()> {
    let options = shared.options;
    loop {
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        let enough = shared.sequences.is_some_and(|most| number >= most)
            || options.most_time.is_some_and(|most| shared.start.elapsed() >= most)
            || number > shared.failed.load(Ordering::Relaxed);
        if enough {
            return Ok(());
        }
        let sequence = sequence_of(options, number);
        shared.watch.begin(job, number, &sequence);
        let Run { verdict, reached, faults, .. } = judge_in(&sequence, options.trial)?;
        shared.watch.end(job);
        let mut state = lock(&shared.state);
        let State { fuzzed, failure, progress } = &mut *state;
        fuzzed.sequences += 1;
        fuzzed.faults += faults;
        fuzzed.ops += sequence.steps.len() as u64;
        fuzzed.coverage.add(&sequence, reached);
        progress(fuzzed, shared.start.elapsed());
        if !verdict.is_clean() {
            shared.failed.fetch_min(number, Ordering::Relaxed);
            if failure.as_ref().is_none_or(|first| number < first.number) {
                *failure =
                    Some(FailedSequence { number, shrunk: sequence.clone(), found: sequence, verdict });
            }
        }
    }
}

/// The sequence with this number. In one of four, CPUs go off and come back.
fn sequence_of(options: &FuzzOptions, number: u64) -> Sequence {
    let sequence = generate(seed_of(options.seed, number), options.nr_cpus, options.length);
    if number % 4 != 3 {
        return sequence;
    }
    let mut sequence = with_cpus_going_off(sequence);
    sequence.steps.truncate(options.length);
    sequence
}

/// What the sequence with this number is made from.
///
/// The seed is mixed before the number is added. Otherwise runs with neighbouring seeds would share
/// all sequences but one.
fn seed_of(seed: u64, number: u64) -> u64 {
    Choices::new(Choices::new(seed).bits().wrapping_add(number)).bits()
}

fn lock<P>(state: &Mutex<State<P>>) -> MutexGuard<'_, State<P>> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Once, sequence n of seed s was made from s + n: a run with the next seed repeated all but
    /// one.
    #[test]
    fn runs_with_different_seeds_have_no_sequence_in_common() {
        let seeds = (0..40).chain([1 << 32, u64::MAX, u64::MAX - 1, 1_900_000]);
        let all: Vec<_> = seeds.flat_map(|seed| (0..5000).map(move |number| seed_of(seed, number))).collect();
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
    }
}
