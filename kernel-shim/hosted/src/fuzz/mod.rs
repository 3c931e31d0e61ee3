//! What a kernel's own tests call: many sequences, and one that was saved.

pub(crate) mod corpus;

use core::any::type_name;
use core::fmt;
use core::time::Duration;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::boundary::{Boundaries, Boundary};
use crate::checker::events::Event;
use crate::checker::violation::Found;
use crate::fuzz::corpus::Corpus;
use crate::kernel::Kernel;
use crate::machine::HostedMachine;
use crate::options::Telling;
use crate::patience::{Watched, watched};
use crate::quiet::quietly;
use crate::random::Choices;
use crate::sequence::KERNEL;
use crate::sequence::{
    Calls, Op, Run, Sequence, Trial, Verdict, generate, judge, shrink, with_cpus_going_off, without_lacking,
};

/// How a kernel is fuzzed.
#[derive(Clone, Debug)]
pub struct FuzzOptions {
    /// Which sequences: the n-th is made from this and n, mixed.
    pub seed: u64,
    /// How many.
    pub sequences: u64,
    /// Steps in one.
    pub length: usize,
    /// CPUs of each machine, 1 to 64.
    pub nr_cpus: u32,
    /// How each is run.
    pub trial: Trial,
    /// Where the shortest form of the first that fails is written.
    pub reproducer: Option<PathBuf>,
    /// A sequence that takes longer ends the process, and is printed: nothing else can stop a CPU
    /// that never gives way. Two minutes, unless it is set.
    pub patience: Duration,
}

impl Default for FuzzOptions {
    /// 500 sequences of 160 steps on four CPUs, which take a few seconds.
    fn default() -> Self {
        Self {
            seed: 1,
            sequences: 500,
            length: 160,
            nr_cpus: 4,
            trial: Trial::default(),
            reproducer: None,
            patience: PATIENCE,
        }
    }
}

/// How long one sequence may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// What came of it.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Report {
    /// Sequences run.
    pub sequences: u64,
    /// Steps in them.
    pub steps: u64,
    /// What came of the steps, by operation; of sequences that ended.
    pub calls: Calls,
    /// The corners that were reached.
    pub reached: Boundaries,
    /// The first sequence that failed: none after it was run.
    pub failure: Option<Failure>,
}

/// A sequence that fails, as short as it could be made.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Failure {
    /// Its number, from 0, if it was made up.
    pub number: Option<u64>,
    /// The sequence.
    pub sequence: Sequence,
    /// What it shows.
    pub verdict: Verdict,
    /// The violations found in it, also if it then gave up.
    pub found: Found,
    /// The last that happened in it.
    pub last_events: Vec<Event>,
    /// The kernel, by the path of its type.
    pub kernel: &'static str,
    /// Where it was written.
    pub saved: Option<PathBuf>,
}

/// How many of the last events are told of a run that did not come to its end.
const LAST_EVENTS: usize = 40;

/// Runs made-up sequences on the kernel that `make` boots, each on a machine of its own, until one
/// fails. That one is made short, and saved.
///
/// The same options do the same every time, as long as the kernel does.
///
/// # Errors
/// If the host refuses memory for a machine, if the kernel does not boot, or if the reproducer
/// cannot be written.
pub fn fuzz<K: Kernel>(
    options: &FuzzOptions,
    make: impl Fn(&Arc<HostedMachine>) -> io::Result<K>,
) -> io::Result<Report> {
    watched(options.patience, options.reproducer.as_deref(), |watched| fuzz_watched(options, &make, watched))
}

fn fuzz_watched<K: Kernel>(
    options: &FuzzOptions,
    make: &impl Fn(&Arc<HostedMachine>) -> io::Result<K>,
    watched: &Watched,
) -> io::Result<Report> {
    let mut report = Report::default();
    let mut corpus = Corpus::new();
    for number in 0..options.sequences {
        let seed = Choices::new(Choices::new(options.seed).bits().wrapping_add(number)).bits();
        let goes_off = number % 4 == 3 && !report.calls.are_missing(Op::Offline);
        let changed = corpus.next(&Choices::new(!seed), options.nr_cpus, options.length);
        let sequence = changed.unwrap_or_else(|| {
            let sequence = generate(seed, options.nr_cpus, options.length);
            // In one of four CPUs go off, too, if the kernel can do that.
            if goes_off { with_cpus_going_off(sequence) } else { sequence }
        });
        watched.begin(&sequence);
        let made = |machine: &Arc<HostedMachine>| {
            watched.begins_on(machine);
            make(machine)
        };
        let run = judge(&sequence, options.trial, made)?;
        report.add(&sequence, &run);
        let _new = corpus.add(&sequence, &run.features.all);
        if !run.verdict.is_clean() {
            // The panic, if it was one, has been printed, and is once more below.
            let short = quietly(|| {
                let (sequence, verdict) =
                    without_lacking(sequence, options.trial, run.verdict, &report.calls, &made)?;
                shrink(&sequence, options.trial, verdict, made)
            });
            let (sequence, verdict) = short?;
            let mut failure = Failure::of(Some(number), sequence, verdict, options.trial, &made)?;
            if let Some(path) = &options.reproducer {
                failure.save(path.clone())?;
            }
            report.failure = Some(failure);
            break;
        }
    }
    Ok(report)
}

/// Runs a saved sequence, the text of the file that [`fuzz`] has written, on the kernel that `make`
/// boots.
///
/// # Errors
/// If the text is no sequence ([`SequenceError`](crate::SequenceError), with its line); if the host
/// refuses memory; if the kernel does not boot.
pub fn replay<K: Kernel>(
    text: &str,
    trial: Trial,
    make: impl Fn(&Arc<HostedMachine>) -> io::Result<K>,
) -> io::Result<Report> {
    let sequence =
        Sequence::parse(text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    watched(PATIENCE, None, |watched| {
        watched.begin(&sequence);
        let made = |machine: &Arc<HostedMachine>| {
            watched.begins_on(machine);
            make(machine)
        };
        let run = judge(&sequence, trial, made)?;
        let mut report = Report::default();
        report.add(&sequence, &run);
        if !run.verdict.is_clean() {
            report.failure = Some(Failure::of(None, sequence, run.verdict, trial, &made)?);
        }
        Ok(report)
    })
}

impl Report {
    /// Whether nothing was wrong.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.failure.is_none()
    }

    fn add(&mut self, sequence: &Sequence, run: &Run) {
        self.sequences += 1;
        self.steps += sequence.steps.len() as u64;
        self.reached = self.reached.or(run.reached);
        if let Verdict::Ended(outcome) = &run.verdict {
            self.calls.add(&outcome.calls);
        }
    }
}

impl Failure {
    /// Runs the sequence once more, to remember what happens.
    fn of<K: Kernel>(
        number: Option<u64>,
        sequence: Sequence,
        verdict: Verdict,
        trial: Trial,
        make: &impl Fn(&Arc<HostedMachine>) -> io::Result<K>,
    ) -> io::Result<Self> {
        let run = judge(&sequence, Trial { telling: Telling::All, ..trial }, make)?;
        let last = run.events.len().saturating_sub(LAST_EVENTS);
        let last_events = run.events[last..].to_vec();
        Ok(Self {
            number,
            sequence,
            verdict,
            found: run.found,
            last_events,
            kernel: type_name::<K>(),
            saved: None,
        })
    }

    fn save(&mut self, path: PathBuf) -> io::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&path, format!("# {}\n{KERNEL}{}\n{}", self.verdict.sort(), self.kernel, self.sequence))?;
        self.saved = Some(path);
        Ok(())
    }
}

impl Report {
    fn tell_boundaries(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let missed = Boundary::ALL.into_iter().filter(|boundary| !self.reached.has(*boundary));
        let missed: Vec<&str> = missed.map(Boundary::name).collect();
        let all = Boundary::ALL.len();
        writeln!(f, "boundaries reached: {} of {all}", all - missed.len())?;
        if !missed.is_empty() {
            writeln!(f, "not reached, or not told by `Kernel::reached`: {}", missed.join(", "))?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = if self.sequences == 1 { "" } else { "s" };
        writeln!(f, "{} sequence{s}, {} steps", self.sequences, self.steps)?;
        write!(f, "{}", self.calls)?;
        if self.calls.iter().any(|(_, tally)| tally.refused > 0) {
            writeln!(
                f,
                "refused: the kernel said no; sequences are made up, and name addresses where nothing is"
            )?;
        }
        // One sequence alone reaches few.
        if self.sequences > 1 {
            self.tell_boundaries(f)?;
        }
        match &self.failure {
            None => f.write_str("clean"),
            Some(failure) => failure.fmt(f),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number {
            Some(number) => writeln!(f, "sequence {number} fails; as short as it could be made:")?,
            None => writeln!(f, "the sequence fails:")?,
        }
        writeln!(f, "{}", self.sequence)?;
        for violation in &self.found.told {
            writeln!(f, "{violation}  {}", violation.kind.rule())?;
        }
        match &self.verdict {
            Verdict::Panicked(words) => {
                writeln!(f, "it ends with: {words}\nthe last that happened:")?;
                self.last_events.iter().try_for_each(|event| writeln!(f, "    {event}"))?;
            }
            Verdict::Ended(outcome) => {
                outcome.lost.iter().try_for_each(|lost| write!(f, "{lost}"))?;
                writeln!(
                    f,
                    "violations {}, leaked frames {}, leaked tables {}, double frees {}",
                    outcome.found.count, outcome.leaked_frames, outcome.leaked_tables, outcome.double_frees
                )?;
            }
        }
        match &self.saved {
            Some(path) => write!(f, "saved as {}", path.display()),
            None if self.number.is_some() => f.write_str("not saved: the options name no file"),
            None => f.write_str("NOT CLEAN"),
        }
    }
}
