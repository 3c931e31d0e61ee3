//! Random sequences against the checker, several at a time, and the shortest form of one that
//! fails.
//!
//! The n-th sequence depends on the seed, on n, and on what those of earlier rounds have found
//! (`guide`). Where several sequences fail, the one with the lowest number is reported. So, time
//! limits aside, the number of jobs does not change what is found. Runs with different seeds have
//! no
//! sequence in common that was made up.

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use crate::fuzz::coverage::Coverage;
use crate::fuzz::folder::{CorpusFolder, Done, Unread};
use crate::fuzz::guide::Guide;
use crate::fuzz::job_watch::JobWatch;
use crate::fuzz::options::FuzzOptions;
use mmu_adapter::{judge_in, shrink};
use mmu_hosted::{Run, Sequence, Verdict};

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
    /// How many sequences are kept because they went somewhere new, and how many features they
    /// have.
    pub kept: (usize, usize),
    /// The folder of the campaign, if it has one.
    pub folder: Option<FolderReport>,
    /// The first failure, if there was one.
    pub failure: Option<FailedSequence>,
}

/// What is in the folder of a campaign.
#[derive(Clone, Debug, Default)]
pub(crate) struct FolderReport {
    /// What all runs have done there with what is built in.
    pub this_build: Done,
    /// What runs of other builds have done there.
    pub other_builds: Done,
    /// Files that could not be read.
    pub unread: Unread,
    /// Why something could not be written, if anything could not.
    pub not_written: Option<String>,
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

/// What the jobs share.
struct Campaign<'a, P> {
    options: &'a FuzzOptions,
    guide: Guide,
    watch: JobWatch,
    start: Instant,
    /// Number of the next sequence.
    next: AtomicU64,
    /// Number of the first sequence that failed so far: later ones need not be run.
    failed: AtomicU64,
    /// The number before which it ends, if that is limited.
    end: Option<u64>,
    state: Mutex<State<P>>,
}

struct State<P> {
    fuzzed: Fuzzed,
    /// As found, until it has been made short.
    failure: Option<FailedSequence>,
    progress: P,
    /// When the folder was last told how far this has come.
    saved: Duration,
    /// Why it could not be.
    not_saved: Option<io::Error>,
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
    folder: Option<CorpusFolder>,
    progress: impl FnMut(&Fuzzed, Duration) + Send,
    stuck: impl Fn(Fuzzed) + Sync,
) -> io::Result<Fuzzed> {
    let length = options.length.max(1) as u64;
    let jobs = options.jobs.max(1);
    let guide = Guide::new(folder)?;
    let shared = Campaign {
        options,
        watch: JobWatch::new(jobs),
        start: Instant::now(),
        next: AtomicU64::new(guide.first()),
        failed: AtomicU64::new(u64::MAX),
        end: options.most_ops.map(|most| guide.first().saturating_add(most.div_ceil(length))),
        state: Mutex::new(State {
            fuzzed: Fuzzed::default(),
            failure: None,
            progress,
            saved: Duration::ZERO,
            not_saved: None,
        }),
        guide,
    };
    let (done, is_done) = mpsc::channel();
    thread::scope(|scope| {
        thread::Builder::new().spawn_scoped(scope, || look_after(&shared, is_done, &stuck))?;
        let result = run_all(&shared, jobs);
        // This ends `look_after`.
        drop(done);
        result
    })?;
    shared.save(&mut lock(&shared.state), Duration::ZERO);
    let State { mut fuzzed, failure, not_saved, .. } =
        shared.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    fuzzed.failure = failure;
    fuzzed.kept = shared.guide.kept();
    let (folder, not_kept) = shared.guide.into_folder();
    if let Some(mut folder) = folder {
        let (this_build, other_builds) = folder.in_all()?;
        let not_written = not_kept.or(not_saved).map(|error| error.to_string());
        let unread = folder.unread().clone();
        fuzzed.folder = Some(FolderReport { this_build, other_builds, unread, not_written });
    }
    Ok(fuzzed)
}

/// How often the folder is told how far this has come: what stops in between is done again.
const SAVED_EVERY: Duration = Duration::from_secs(2);

impl<P> Campaign<'_, P> {
    /// Tells the folder how far this has come, unless it was told less than `every` ago.
    fn save(&self, state: &mut State<P>, every: Duration) {
        let now = self.start.elapsed();
        let Some(folder) = self.guide.folder().filter(|_| now.saturating_sub(state.saved) >= every) else {
            return;
        };
        let Fuzzed { sequences, ops, .. } = state.fuzzed;
        // Numbers that were given out and are not done are left out by the next run.
        let next = self.next.load(Ordering::Relaxed).min(self.end.unwrap_or(u64::MAX));
        if let Err(error) = folder.save(Done { next, sequences, ops, seconds: now.as_secs_f64() }) {
            state.not_saved.get_or_insert(error);
        }
        state.saved = now;
    }
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
        let enough = shared.end.is_some_and(|end| number >= end)
            || options.most_time.is_some_and(|most| shared.start.elapsed() >= most)
            || number > shared.failed.load(Ordering::Relaxed);
        if enough {
            return Ok(());
        }
        // Until the sequences that this one may be made from are done.
        let is_over = || {
            options.most_time.is_some_and(|most| shared.start.elapsed() >= most)
                || number > shared.failed.load(Ordering::Relaxed)
        };
        let Some(sequence) = shared.guide.sequence(options, number, is_over) else { return Ok(()) };
        shared.watch.begin(job, number, &sequence);
        let Run { verdict, reached, features, faults, .. } = judge_in(&sequence, options.trial)?;
        shared.watch.end(job);
        let mut state = lock(&shared.state);
        let State { fuzzed, failure, progress, .. } = &mut *state;
        fuzzed.sequences += 1;
        fuzzed.faults += faults;
        fuzzed.ops += sequence.steps.len() as u64;
        fuzzed.coverage.add(&sequence, reached, &features);
        progress(fuzzed, shared.start.elapsed());
        if !verdict.is_clean() {
            shared.failed.fetch_min(number, Ordering::Relaxed);
            if failure.as_ref().is_none_or(|first| number < first.number) {
                *failure = Some(FailedSequence {
                    number,
                    shrunk: sequence.clone(),
                    found: sequence.clone(),
                    verdict,
                });
            }
        }
        shared.save(&mut state, SAVED_EVERY);
        drop(state);
        shared.guide.done(number, &sequence, features.all);
    }
}

fn lock<P>(state: &Mutex<State<P>>) -> MutexGuard<'_, State<P>> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
