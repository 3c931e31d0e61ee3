//! `teardown fuzz` and `teardown replay`.

use core::time::Duration;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::PathBuf;

use clap::Args;
use mmu_cli::fuzz::{self, FuzzOptions, Fuzzed};
use mmu_hosted::Sequence;

use crate::{Failure, Verdict};

/// What `fuzz` is told.
#[derive(Clone, Debug, Args)]
pub(crate) struct FuzzArgs {
    /// Where to begin: the n-th sequence is made from this and n.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Stops after so many operations.
    #[arg(long, value_name = "N")]
    ops: Option<u64>,
    /// Stops after so many seconds. Default, without --ops: 60.
    #[arg(long, value_name = "SECONDS")]
    time: Option<u64>,
    /// CPUs of each machine, 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Operations in one sequence.
    #[arg(long, value_name = "N", default_value_t = 160, value_parser = clap::value_parser!(u16).range(1..))]
    length: u16,
    /// Where the shortened failure is saved.
    #[arg(short, long, value_name = "FILE", default_value = "failure.sequence")]
    output: PathBuf,
}

/// What `replay` is told.
#[derive(Clone, Debug, Args)]
pub(crate) struct ReplayArgs {
    /// A saved sequence.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub(crate) fn fuzz(args: &FuzzArgs) -> Result<Verdict, Failure> {
    let most_time = args.time.or(if args.ops.is_some() { None } else { Some(60) }).map(Duration::from_secs);
    let options = FuzzOptions {
        seed: args.seed,
        nr_cpus: args.cpus,
        most_ops: args.ops,
        most_time,
        length: usize::from(args.length),
    };
    quiet_panics();
    let shows_progress = io::stderr().is_terminal();
    let mut next = Duration::ZERO;
    let progress = |fuzzed: &Fuzzed, time: Duration| {
        if shows_progress && time >= next {
            next = time + Duration::from_millis(200);
            let _ = write!(io::stderr(), "\r{}", summary(fuzzed, time));
        }
    };
    let start = std::time::Instant::now();
    let fuzzed = fuzz::fuzz(&options, progress).map_err(|error| format!("cannot make a machine: {error}"))?;
    let time = start.elapsed();
    if shows_progress {
        let _ = write!(io::stderr(), "\r");
    }
    let mut out = io::stdout().lock();
    let mut print =
        |line: &str| writeln!(out, "{line}").map_err(|error| format!("cannot write the report: {error}"));
    print(&summary(&fuzzed, time))?;
    let Some(failure) = &fuzzed.failure else {
        print("clean")?;
        return Ok(Verdict::Good);
    };
    std::fs::write(&args.output, failure.shrunk.to_string())
        .map_err(|error| format!("cannot write {}: {error}", args.output.display()))?;
    print(&format!(
        "found after {} sequences; {} operations shrunk to {}, saved as {}",
        fuzzed.sequences,
        failure.found.steps.len(),
        failure.shrunk.steps.len(),
        args.output.display()
    ))?;
    print(&tell(&failure.shrunk, &failure.verdict))?;
    Ok(Verdict::Violation)
}

pub(crate) fn replay(args: &ReplayArgs) -> Result<Verdict, Failure> {
    let name = args.file.display();
    let text = std::fs::read_to_string(&args.file).map_err(|error| format!("cannot read {name}: {error}"))?;
    let sequence = Sequence::parse(&text).map_err(|error| format!("{name}:{error}"))?;
    quiet_panics();
    let verdict = fuzz::judge(&sequence).map_err(|error| format!("cannot make a machine: {error}"))?;
    let mut out = BufWriter::new(io::stdout().lock());
    let written = writeln!(out, "{}", tell(&sequence, &verdict)).and_then(|()| out.flush());
    written.map_err(|error| format!("cannot write the report: {error}"))?;
    Ok(if verdict.is_clean() { Verdict::Good } else { Verdict::Violation })
}

fn summary(fuzzed: &Fuzzed, time: Duration) -> String {
    let seconds = time.as_secs_f64().max(1e-9);
    let (pairs, all) = fuzzed.pairs.count();
    format!(
        "{} sequences, {} operations, {:.0} operations/s, {pairs} of {all} pairs of operations",
        fuzzed.sequences,
        fuzzed.ops,
        fuzzed.ops as f64 / seconds,
    )
}

fn tell(sequence: &Sequence, verdict: &fuzz::Verdict) -> String {
    let mut told = String::new();
    match verdict {
        fuzz::Verdict::Panicked(words) => told.push_str(&format!("panic: {words}\n")),
        fuzz::Verdict::Ended(outcome) => {
            for violation in &outcome.found.told {
                told.push_str(&violation.to_string());
            }
            told.push_str(&format!(
                "violations {}, leaked frames {}, leaked tables {}, double frees {}\n",
                outcome.found.count, outcome.leaked_frames, outcome.leaked_tables, outcome.double_frees
            ));
        }
    }
    if !verdict.is_clean() && sequence.steps.len() <= 40 {
        told.push_str(&sequence.to_string());
    }
    told.push_str(if verdict.is_clean() { "clean" } else { "NOT CLEAN" });
    told
}

/// A panic is a finding here, told once with its sequence, not on the way.
fn quiet_panics() {
    std::panic::set_hook(Box::new(|_| {}));
}
