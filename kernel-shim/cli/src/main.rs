//! The command `teardown`.

mod fuzz_command;
mod replay_command;

use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use mmu_cli::boot::{self, BootArgs, BootVerdict};
use mmu_cli::bundled::{LAYOUTS, TRACES};
use mmu_cli::capture;
use mmu_cli::layout::Layout;
use mmu_cli::output::OutputFile;
use mmu_cli::report::Report;
use mmu_cli::run::{RunOptions, run_layout};
use mmu_cli::shown::{escaped, escaped_lines, label};
use mmu_cli::sweep::{self, SweepArgs, SweepError};
use mmu_cli::trace::{TraceLog, run_trace};
use mmu_gather::Limits;
use mmu_hosted::{Checking, MachineFault};
use mmu_kernel_shim::Misbehaviour;

/// Takes page tables of real processes down, on a machine that checks every step.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    after_help = "The options are those of `run`, which is what is done without a command.\n\n\
                  Exit code: 0 good, 1 a violation was found, 2 bad usage or input."
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Builds layouts as page tables, lets CPUs use them, tears them down, and reports (the default).
    #[command(after_help = "Example: teardown run --layout tests/layouts/redis-server.layout --cpus 8")]
    Run(RunArgs),
    /// Writes the layout of a live Linux process.
    #[command(
        after_help = "Example: teardown capture --pid 4321 -o mine.layout && teardown run --layout mine.layout"
    )]
    Capture(CaptureArgs),
    /// Replays the memory calls that a real program made, from a log of `strace -f`.
    #[command(after_help = "Example: teardown trace tests/traces/redis-bgsave.strace --cpus 8")]
    Trace(TraceArgs),
    /// Boots the same kernel on emulated hardware (QEMU) and runs programs in ring 3 while their memory is torn down.
    #[command(after_help = "Example: teardown boot --cpus 4 --workload short")]
    Boot(BootArgs),
    /// Runs random sequences against the checker until one fails, and makes that one short.
    #[command(after_help = "Example: teardown fuzz --time 60 --jobs 2 -o failure.sequence")]
    Fuzz(fuzz_command::FuzzArgs),
    /// Runs a saved sequence again: the same verdict every time.
    #[command(after_help = "Example: teardown replay failure.sequence --explain --html failure.html")]
    Replay(replay_command::ReplayArgs),
    /// Compares batch sizes: what a page costs, how often CPUs are interrupted, how much memory waits.
    ///
    /// Without --batch and the rest: nine settings, each axis alone from 32Ki dense pages, 2 CPUs, ceiling 33, none refused. With
    /// some of them: every combination of the values named, the other axes at that base.
    #[command(
        after_help = "Example: teardown sweep --html sweep.html\n         teardown sweep --batch 64,510,19x510 --size 33,32Ki --cpus 2,8lazy6"
    )]
    Sweep(SweepArgs),
}

#[derive(Clone, Debug, Args)]
struct RunArgs {
    /// A layout file; may be given several times. Default: all that are bundled.
    #[arg(long, value_name = "FILE")]
    layout: Vec<PathBuf>,
    /// A live process, captured first.
    #[arg(long, value_name = "N")]
    pid: Option<i32>,
    #[command(flatten)]
    machine: MachineArgs,
}

#[derive(Clone, Debug, Args)]
struct TraceArgs {
    /// A log; how to record one is in tests/traces/README.md. Default: all that are bundled.
    #[arg(value_name = "FILE")]
    log: Vec<PathBuf>,
    #[command(flatten)]
    machine: MachineArgs,
}

/// What both of them do it on.
#[derive(Clone, Debug, Args)]
struct MachineArgs {
    /// CPUs of the machine, 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Batch pages a gather may take, 0 to 19; 0 leaves it the eight slots on the stack.
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.batch_pages,
          value_parser = clap::value_parser!(u16).range(0..=19))]
    batch_pages: u16,
    /// Whether software MMUs and the checker run.
    #[arg(long, value_enum, default_value_t = Switch::On)]
    checker: Switch,
    /// Something the machine or the kernel does wrong, on purpose: the checker, which must be on, must notice.
    #[arg(long, value_enum)]
    fault: Option<Fault>,
    /// Decides every choice: the same seed does the same.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// How the report is printed.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Clone, Debug, Args)]
struct CaptureArgs {
    /// The process.
    #[arg(long, value_name = "N")]
    pid: i32,
    /// Where to write the layout. Default: standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Fault {
    /// Invalidations do nothing.
    SkipFlush,
    /// Pages are freed when their entries are cleared.
    FreeBeforeFlush,
    /// One flush request in four is lost, and acknowledged; needs two CPUs.
    DropIpi,
}

impl Fault {
    /// Its name on the command line.
    fn word(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Refuses a fault that cannot happen on so many CPUs: a run without a violation would be taken for a blind checker.
    fn check(fault: Option<Self>, nr_cpus: u32) -> Result<(), Failure> {
        if fault == Some(Self::DropIpi) && nr_cpus < 2 {
            return Err("--fault drop-ipi: one CPU sends no flush requests; use --cpus 2 or more".to_owned());
        }
        Ok(())
    }
}

impl Fault {
    /// Refuses to call a run clean whose fault never happened; says so where it did and nothing was found.
    fn check_happened(fault: Option<Self>, times: u64, is_clean: bool) -> Result<(), Failure> {
        let Some(fault) = fault.filter(|_| is_clean) else { return Ok(()) };
        let word = fault.word();
        if times == 0 {
            return Err(format!(
                "--fault {word} never happened: this was too short, so nothing can be said of it"
            ));
        }
        let counted = if times == 1 { "once".to_owned() } else { format!("{times} times") };
        let _ = writeln!(io::stderr(), "teardown: --fault {word} happened {counted}, and harmed nobody");
        Ok(())
    }
}

/// What the process says when it ends.
enum Verdict {
    Good,
    Violation,
}

/// One line for the person, exit code 2.
type Failure = String;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.command {
        None => run(&cli.run),
        Some(Command::Run(args)) => run(args),
        Some(Command::Capture(args)) => capture_layout(args),
        Some(Command::Trace(args)) => trace(args),
        Some(Command::Boot(args)) => boot_image(args),
        Some(Command::Fuzz(args)) => fuzz_command::fuzz(args),
        Some(Command::Replay(args)) => replay_command::replay(args),
        Some(Command::Sweep(args)) => sweep_batches(args),
    };
    // Names of files, and words of them. Of what the compiler said every line is its own.
    let result = result.map_err(|failure| match cli.command {
        Some(Command::Boot(_)) => escaped_lines(&failure),
        _ => escaped(&failure),
    });
    match result {
        Ok(Verdict::Good) => ExitCode::SUCCESS,
        Ok(Verdict::Violation) => ExitCode::from(1),
        Err(failure) => {
            // If even this cannot be written, the exit code still tells.
            let _ = writeln!(io::stderr(), "teardown: {failure}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &RunArgs) -> Result<Verdict, Failure> {
    // All input is read before anything runs.
    let options = args.machine.options()?;
    let layouts = layouts(args)?;
    let mut report = Report::default();
    let progress = progress_bar(layouts.len() as u64);
    for layout in &layouts {
        progress.set_message(label(&layout.name));
        run_layout(layout, &options, &mut report).map_err(|error| error.to_string())?;
        progress.inc(1);
    }
    progress.finish_and_clear();
    print(&report, &args.machine)
}

fn trace(args: &TraceArgs) -> Result<Verdict, Failure> {
    // All input is read before anything runs.
    let options = args.machine.options()?;
    let logs = logs(args)?;
    let mut report = Report::default();
    let progress = progress_bar(logs.len() as u64);
    for log in &logs {
        progress.set_message(label(&log.name));
        run_trace(log, &options, &mut report).map_err(|error| error.to_string())?;
        progress.inc(1);
    }
    progress.finish_and_clear();
    print(&report, &args.machine)
}

impl MachineArgs {
    fn options(&self) -> Result<RunOptions, Failure> {
        if self.fault.is_some() && self.checker == Switch::Off {
            return Err("--fault with --checker off: nobody would look for what goes wrong".to_owned());
        }
        Fault::check(self.fault, self.cpus)?;
        Ok(RunOptions {
            nr_cpus: self.cpus,
            seed: self.seed,
            limits: Limits { batch_pages: self.batch_pages, ..Limits::DEFAULT },
            checking: if self.checker == Switch::On { Checking::On } else { Checking::Off },
            misbehaviour: match self.fault {
                Some(Fault::FreeBeforeFlush) => Misbehaviour::FreeBeforeFlush,
                _ => Misbehaviour::Absent,
            },
            fault: match self.fault {
                Some(Fault::SkipFlush) => MachineFault::SkipFlush,
                Some(Fault::DropIpi) => MachineFault::DropIpi,
                _ => MachineFault::Absent,
            },
            ..RunOptions::default()
        })
    }
}

fn print(report: &Report, machine: &MachineArgs) -> Result<Verdict, Failure> {
    Fault::check_happened(machine.fault, report.faults, report.is_clean())?;
    let out = BufWriter::new(io::stdout().lock());
    let written = match machine.format {
        Format::Text => report.write_text(out),
        Format::Json => report.write_json(out),
    };
    written.map_err(|error| format!("cannot write the report: {error}"))?;
    Ok(if report.is_clean() { Verdict::Good } else { Verdict::Violation })
}

fn layouts(args: &RunArgs) -> Result<Vec<Layout>, Failure> {
    let mut layouts = Vec::new();
    for path in &args.layout {
        layouts.push(read_layout(path)?);
    }
    if let Some(pid) = args.pid {
        layouts.push(capture::capture(pid).map_err(|error| error.to_string())?);
    }
    if layouts.is_empty() {
        for bundled in LAYOUTS {
            layouts.push(Layout::parse(bundled.name, bundled.text).map_err(|error| error.to_string())?);
        }
    }
    Ok(layouts)
}

fn read_layout(path: &Path) -> Result<Layout, Failure> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|error| format!("cannot read {name}: {error}"))?;
    Layout::parse(&name, &text).map_err(|error| error.to_string())
}

fn logs(args: &TraceArgs) -> Result<Vec<TraceLog>, Failure> {
    let mut logs = Vec::new();
    for path in &args.log {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| format!("cannot read {name}: {error}"))?;
        logs.push(TraceLog::parse(&name, &text).map_err(|error| error.to_string())?);
    }
    if logs.is_empty() {
        for bundled in TRACES {
            let name = format!("{}.strace", bundled.name);
            logs.push(TraceLog::parse(&name, bundled.text).map_err(|error| error.to_string())?);
        }
    }
    Ok(logs)
}

fn capture_layout(args: &CaptureArgs) -> Result<Verdict, Failure> {
    let file = args.output.as_deref().map(|path| output_file(path).map(|file| (path, file))).transpose()?;
    let layout = capture::capture(args.pid).map_err(|error| error.to_string())?;
    match file {
        None => {
            let mut out = BufWriter::new(io::stdout().lock());
            let written = layout.write_to(&mut out).and_then(|()| out.flush());
            written.map_err(|error| format!("cannot write the layout: {error}"))?;
        }
        Some((path, file)) => {
            file.write(|out| layout.write_to(out)).map_err(|error| cannot_write(path, &error))?;
        }
    }
    Ok(Verdict::Good)
}

/// A place to write to, or why it is none.
fn output_file(path: &Path) -> Result<OutputFile, Failure> {
    OutputFile::create(path).map_err(|error| cannot_write(path, &error))
}

fn cannot_write(path: &Path, error: &io::Error) -> Failure {
    format!("cannot write {}: {error}", path.display())
}

fn boot_image(args: &BootArgs) -> Result<Verdict, Failure> {
    match boot::run(args) {
        Ok(BootVerdict::Good) => Ok(Verdict::Good),
        Ok(_) => Ok(Verdict::Violation),
        Err(error) => Err(error.to_string()),
    }
}

fn sweep_batches(args: &SweepArgs) -> Result<Verdict, Failure> {
    let plan = args.plan().map_err(|error| error.to_string())?;
    let progress = progress_bar(plan.steps());
    let result = sweep::run(args, &plan, || progress.inc(1), || progress.finish_and_clear());
    match result {
        Ok(()) => Ok(Verdict::Good),
        Err(error @ SweepError::Lost { .. }) => {
            let _ = writeln!(io::stderr(), "teardown: {error}");
            Ok(Verdict::Violation)
        }
        Err(error) => Err(error.to_string()),
    }
}

fn progress_bar(length: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(length);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    bar
}
