//! `teardown fuzz`: random sequences, until one fails.

use core::time::Duration;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::fuzz::campaign::{self, Fuzzed};
use crate::fuzz::folder::CorpusFolder;
use crate::fuzz::options::{FuzzOptions, Guidance};
use crate::fuzz::panics::with_quiet_panics;
use crate::fuzz::report::{fuzz_json, kept, not_reached, summary};
use crate::output::escape::escaped;
use crate::output::file::OutputFile;
use crate::output::verdict::verdict_text;
use crate::output::words::counted;
use clap::Args;
use mmu_hosted::Sequence;

use crate::commands::free_running::{self, FreeRun, Interrupts};
use crate::commands::options::{Fault, Format};
use crate::commands::outcome::{CommandError, CommandVerdict, cannot_write, output_file};

/// The flags of `teardown fuzz`.
#[derive(Clone, Debug, Args)]
pub(crate) struct FuzzArgs {
    /// Seed of the run: runs with different seeds have no sequence in common.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Stops after this many operations, all jobs together; sequences that have begun are finished.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    ops: Option<u64>,
    /// Stops after this many seconds. Default, without --ops: 60.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    time: Option<u64>,
    /// Sequences to run at the same time. With --ops alone, the number of jobs does not change what
    /// is found: sequences come in rounds of 32, and one is made from what the rounds before the
    /// last have found. So more than 64 jobs wait for one another.
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: u16,
    /// CPUs of each simulated machine, 1 to 64 [default: 4; with --free-running 2 to 8, as many as
    /// there are cores].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: Option<u32>,
    /// Operations in one sequence.
    #[arg(long, value_name = "N", default_value_t = 160, value_parser = clap::value_parser!(u16).range(1..))]
    length: u16,
    /// Plants a fault, to see the checker find it.
    #[arg(long, value_enum)]
    fault: Option<Fault>,
    /// File to save the failing sequence to, made short.
    #[arg(
        short,
        long,
        value_name = "FILE",
        default_value = "failure.sequence",
        default_value_if("free_running", "true", "failure.free-running")
    )]
    output: PathBuf,
    /// Folder that the campaign is kept in, and gone on with: sequences that went somewhere new,
    /// and how much was done. Processes with different seeds may share it.
    #[arg(long, value_name = "DIR", conflicts_with = "fault")]
    corpus: Option<PathBuf>,
    /// Makes every sequence up, and none from those that went somewhere new.
    #[arg(long)]
    unguided: bool,
    /// Form of the report.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// CPUs are threads that really run beside each other: for bugs that only real cores show, such
    /// as missing fences. No run is like another. A failure is saved with the last events of each
    /// CPU.
    #[arg(long, conflicts_with_all = ["ops", "jobs", "length", "corpus", "unguided"])]
    free_running: bool,
    /// How interrupts reach a CPU, with --free-running [default: alternating].
    #[arg(long, value_enum)]
    interrupts: Option<Interrupts>,
}

impl FuzzArgs {
    fn nr_cpus(&self) -> u32 {
        self.cpus.unwrap_or(4)
    }

    fn free_run(&self) -> FreeRun<'_> {
        let Self { cpus, time, seed, fault, ref output, format, .. } = *self;
        let interrupts = self.interrupts.unwrap_or(Interrupts::Alternating);
        FreeRun { cpus, time, seed, fault, interrupts, output, format }
    }
}

pub(crate) fn execute(args: &FuzzArgs) -> Result<CommandVerdict, CommandError> {
    if args.free_running {
        return free_running::execute(&args.free_run());
    }
    if args.interrupts.is_some() {
        return Err("--interrupts needs --free-running".to_owned());
    }
    Fault::check(args.fault, args.nr_cpus())?;
    // A failure may take hours to find. So the file for it is opened first; nothing is left there
    // if nothing fails.
    let file = Mutex::new(Some(output_file(&args.output)?));
    let most_time = args.time.or(if args.ops.is_some() { None } else { Some(60) }).map(Duration::from_secs);
    let options = FuzzOptions {
        seed: args.seed,
        nr_cpus: args.nr_cpus(),
        most_ops: args.ops,
        most_time,
        length: usize::from(args.length),
        guidance: if args.unguided { Guidance::MadeUp } else { Guidance::Guided },
        jobs: usize::from(args.jobs),
        trial: Fault::trial(args.fault),
    };
    let folder = args.corpus.as_deref().map(|path| {
        CorpusFolder::open(path, &options).map_err(|error| {
            format!("cannot use the corpus {}: {error}", escaped(&path.display().to_string()))
        })
    });
    let folder = folder.transpose()?;
    let shows_progress = io::stderr().is_terminal();
    let mut next = Duration::ZERO;
    let progress = |fuzzed: &Fuzzed, time: Duration| {
        if shows_progress && time >= next {
            next = time + Duration::from_millis(200);
            let _ = write!(io::stderr(), "\r\x1b[2K{}", summary(fuzzed, time));
        }
    };
    let start = Instant::now();
    // The thread of a sequence that does not come back cannot be stopped, so the process ends.
    let stuck = |fuzzed: Fuzzed| {
        let code = match finish(args, &file, &options, &fuzzed, start.elapsed(), shows_progress) {
            Ok(_) => 1,
            Err(failure) => {
                let _ = writeln!(io::stderr(), "teardown: {failure}");
                2
            }
        };
        std::process::exit(code);
    };
    let fuzzed = with_quiet_panics(|| campaign::fuzz(&options, folder, progress, stuck))
        .map_err(|error| format!("cannot make a simulated machine: {error}"))?;
    finish(args, &file, &options, &fuzzed, start.elapsed(), shows_progress)
}

/// Saves what failed, and prints the report.
fn finish(
    args: &FuzzArgs,
    file: &Mutex<Option<OutputFile>>,
    options: &FuzzOptions,
    fuzzed: &Fuzzed,
    time: Duration,
    shows_progress: bool,
) -> Result<CommandVerdict, CommandError> {
    if shows_progress {
        let _ = write!(io::stderr(), "\r\x1b[2K");
    }
    Fault::check_happened(args.fault, fuzzed.faults, fuzzed.failure.is_none())?;
    let saved = fuzzed.failure.as_ref().map(|failure| save(args, file, &failure.shrunk));
    let report = match args.format {
        Format::Text => text(args, fuzzed, time, saved),
        Format::Json => format!("{:#}", fuzz_json(options, fuzzed, time)),
    };
    writeln!(io::stdout().lock(), "{report}").map_err(|error| format!("cannot write the report: {error}"))?;
    Ok(if fuzzed.failure.is_none() { CommandVerdict::Good } else { CommandVerdict::Violation })
}

fn text(args: &FuzzArgs, fuzzed: &Fuzzed, time: Duration, saved: Option<Saved>) -> String {
    let mut lines = vec![summary(fuzzed, time)];
    lines.extend(not_reached(fuzzed));
    lines.extend(kept(fuzzed));
    match &fuzzed.failure {
        None => lines.push("clean".to_owned()),
        Some(failure) => {
            let place = match saved {
                Some(Saved::InFile) => format!("saved as {}", escaped(&args.output.display().to_string())),
                Some(Saved::OnStderr) | None => "not saved".to_owned(),
            };
            lines.push(format!(
                "sequence {} of the run failed: {}, made short to {}, {place}",
                failure.number + 1,
                counted(failure.found.steps.len() as u64, "operation", "operations"),
                failure.shrunk.steps.len(),
            ));
            lines.push(verdict_text(&failure.shrunk, &failure.verdict));
        }
    }
    lines.join("\n")
}

/// Where a sequence that fails was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Saved {
    InFile,
    OnStderr,
}

/// Writes a failing sequence, with the command that shows the failure. Where the file cannot be
/// written, the sequence goes to stderr: it may have taken hours to find.
fn save(args: &FuzzArgs, file: &Mutex<Option<OutputFile>>, sequence: &Sequence) -> Saved {
    let fault = match args.fault {
        Some(fault) => format!("# teardown replay --fault {} FILE\n", fault.word()),
        None => String::new(),
    };
    let text = format!("{fault}{sequence}");
    let file = file.lock().unwrap_or_else(PoisonError::into_inner).take();
    // This function is called once, so the file is there.
    let Some(file) = file else { return Saved::InFile };
    let written = file.write(|out| out.write_all(text.as_bytes()));
    let Err(error) = written else { return Saved::InFile };
    let failure = escaped(&cannot_write(&args.output, &error));
    let _ = write!(io::stderr(), "teardown: {failure}; its content:\n{text}");
    Saved::OnStderr
}
