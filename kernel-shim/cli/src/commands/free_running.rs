//! `teardown fuzz --free-running`: CPUs that are threads, programs that use memory while it is torn
//! down.

use core::time::Duration;
use std::io::{self, IsTerminal, Write};
use std::path::Path;

use clap::ValueEnum;
use mmu_free_running::{MAX_CPUS, Options, PlantedFault, Rates, Report, Totals, Verdict, run};
use serde_json::{Value, json};

use crate::commands::options::{Fault, Format};
use crate::commands::outcome::{CommandError, CommandVerdict, cannot_write, output_file};
use crate::fuzz::panics::with_quiet_panics;
use crate::output::escape::escaped;
use crate::output::file::OutputFile;

/// What was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FreeRun<'a> {
    pub(crate) cpus: Option<u32>,
    /// Seconds.
    pub(crate) time: Option<u64>,
    pub(crate) seed: u64,
    pub(crate) fault: Option<Fault>,
    pub(crate) interrupts: Interrupts,
    pub(crate) output: &'a Path,
    pub(crate) format: Format,
}

/// How interrupts reach a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Interrupts {
    /// It looks for them between two accesses, and wherever it waits.
    Polled,
    /// They are signals (SIGUSR1), between any two instructions.
    Signals,
    /// One phase so, the next the other way.
    Alternating,
}

pub(crate) fn execute(asked: &FreeRun<'_>) -> Result<CommandVerdict, CommandError> {
    let options = options(asked)?;
    let file = output_file(asked.output)?;
    let shows_progress = io::stderr().is_terminal();
    let mut next = Duration::ZERO;
    let progress = |totals: &Totals, time: Duration| {
        if shows_progress && time >= next {
            next = time + Duration::from_millis(500);
            let _ = write!(
                io::stderr(),
                "\r\x1b[2K{}",
                rates_line(options.nr_cpus, time, &Rates::of(totals, time))
            );
        }
    };
    let report = with_quiet_panics(|| run(&options, progress))
        .map_err(|error| format!("cannot start the CPUs: {error}"))?;
    if shows_progress {
        let _ = write!(io::stderr(), "\r\x1b[2K");
    }
    finish(asked, file, &report)
}

fn options(asked: &FreeRun<'_>) -> Result<Options, CommandError> {
    let nr_cpus = match asked.cpus {
        Some(cpus) => usize::try_from(cpus).unwrap_or(usize::MAX),
        None => std::thread::available_parallelism().map_or(2, |cores| cores.get()).clamp(2, MAX_CPUS),
    };
    if !(2..=MAX_CPUS).contains(&nr_cpus) {
        return Err(format!("--cpus {nr_cpus}: with --free-running there are 2 to {MAX_CPUS} CPUs"));
    }
    Ok(Options {
        nr_cpus,
        time: Duration::from_secs(asked.time.unwrap_or(60)),
        seed: asked.seed,
        fault: match asked.fault {
            None => PlantedFault::Absent,
            Some(Fault::SkipFlush) => PlantedFault::SkipFlush,
            Some(Fault::FreeBeforeFlush) => PlantedFault::FreeBeforeFlush,
            Some(Fault::DropIpi) => PlantedFault::DropIpi,
            Some(Fault::LocalFlushOnly) => PlantedFault::LocalFlushOnly,
        },
        interrupts: match asked.interrupts {
            Interrupts::Polled => mmu_free_running::Interrupts::Polled,
            Interrupts::Signals => mmu_free_running::Interrupts::Signals,
            Interrupts::Alternating => mmu_free_running::Interrupts::Alternating,
        },
        ..Options::default()
    })
}

/// Saves what failed, and prints the report.
fn finish(asked: &FreeRun<'_>, file: OutputFile, report: &Report) -> Result<CommandVerdict, CommandError> {
    let saved = (report.verdict() == Verdict::Violation).then(|| save(asked.output, file, report));
    let text = match asked.format {
        Format::Text => text(asked, report, saved),
        Format::Json => format!("{:#}", json_of(report)),
    };
    writeln!(io::stdout().lock(), "{text}").map_err(|error| format!("cannot write the report: {error}"))?;
    match report.verdict() {
        Verdict::Violation => Ok(CommandVerdict::Violation),
        Verdict::Clean => {
            let happened = match asked.fault {
                Some(Fault::FreeBeforeFlush) => report.totals.freed_pages,
                _ => report.totals.faults,
            };
            Fault::check_happened(asked.fault, happened, true)?;
            Ok(CommandVerdict::Good)
        }
        Verdict::NotTested => Err(format!("not tested: {}", report.why_not_tested().unwrap_or_default())),
    }
}

/// One line: how fast it goes.
fn rates_line(nr_cpus: usize, time: Duration, rates: &Rates) -> String {
    let Rates { unmappings, accesses, shootdowns } = *rates;
    format!(
        "{nr_cpus} CPUs, {:.1} s: {unmappings:.0} unmappings/s, {accesses:.0} accesses/s, {shootdowns:.0} shootdowns/s",
        time.as_secs_f64(),
    )
}

fn text(asked: &FreeRun<'_>, report: &Report, saved: Option<Saved>) -> String {
    let totals = &report.totals;
    let mut lines = vec![
        rates_line(report.options.nr_cpus, report.time, &report.rates()),
        format!(
            "{} shootdowns, {} of them answered at once; {} interrupts, {} signals; {} pages and {} tables freed; \
             {} fills, {} by speculation",
            totals.shootdowns,
            totals.met,
            totals.interrupts,
            totals.signals,
            totals.freed_pages,
            totals.freed_tables,
            totals.fills,
            totals.speculative_fills,
        ),
    ];
    match report.verdict() {
        Verdict::Clean => lines.push("clean".to_owned()),
        Verdict::NotTested => lines.push("not tested".to_owned()),
        Verdict::Violation => {
            lines.extend(report.violations.iter().map(|violation| format!("violation: {violation}")));
            lines.extend(report.panics.iter().map(|panic| format!("panic: {panic}")));
            lines.extend(report.stuck.iter().cloned());
            if saved == Some(Saved::InFile) {
                let place = escaped(&asked.output.display().to_string());
                lines.push(format!("what led to it is in {place}"));
            }
        }
    }
    lines.join("\n")
}

fn json_of(report: &Report) -> Value {
    let counts: serde_json::Map<_, _> =
        report.totals.fields().into_iter().map(|(name, count)| (name.to_owned(), json!(count))).collect();
    let Rates { unmappings, accesses, shootdowns } = report.rates();
    let violations: Vec<String> = report.violations.iter().map(ToString::to_string).collect();
    json!({
        "cpus": report.options.nr_cpus,
        "seed": report.options.seed,
        "seconds": report.time.as_secs_f64(),
        "counts": counts,
        "unmappings_per_second": unmappings,
        "accesses_per_second": accesses,
        "shootdowns_per_second": shootdowns,
        "clean": report.verdict() == Verdict::Clean,
        "not_tested": report.violations.is_empty().then(|| report.why_not_tested()).flatten(),
        "violations": violations,
        "panics": report.panics,
        "stuck": report.stuck,
    })
}

/// Where a failure was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Saved {
    InFile,
    OnStderr,
}

/// Writes what led to a failure. Where the file cannot be written, it goes to stderr: no other run
/// is like this one.
fn save(path: &Path, file: OutputFile, report: &Report) -> Saved {
    let text = report.failure_file();
    let Err(error) = file.write(|out| out.write_all(text.as_bytes())) else { return Saved::InFile };
    let failure = escaped(&cannot_write(path, &error));
    let _ = write!(io::stderr(), "teardown: {failure}; its content:\n{text}");
    Saved::OnStderr
}
