//! One file a command: its flags, and what it does with them, from reading the input to the exit code.
//!
//! ```text
//!  command line ──▶ mod.rs ──▶ run  capture  trace  boot  fuzz  replay  sweep ──▶ report on stdout, exit code
//!                               └───────┴──────┴─────┴─────┴──────┴───────┘
//!                                    options  (flags of several commands)
//!                                    outcome  (how a command ends)
//! ```
//!
//! What goes in is the command line, what goes out a report and an exit code; progress and errors go to stderr. Only `main.rs` calls
//! this room, and tests of `boot`.

pub mod boot;
mod capture;
mod fuzz;
mod options;
mod outcome;
mod replay;
mod run;
pub(crate) mod sweep;
mod trace;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::output::escape::{escaped, escaped_lines};
use boot::BootArgs;
use capture::CaptureArgs;
use fuzz::FuzzArgs;
use outcome::CommandVerdict;
use replay::ReplayArgs;
use run::RunArgs;
use sweep::SweepArgs;
use trace::TraceArgs;

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
    Fuzz(FuzzArgs),
    /// Runs a saved sequence again: the same verdict every time.
    #[command(after_help = "Example: teardown replay failure.sequence --explain --html failure.html")]
    Replay(ReplayArgs),
    /// Compares batch sizes: what a page costs, how often CPUs are interrupted, how much memory waits.
    ///
    /// Without --batch and the rest: nine settings, each axis alone from 32Ki dense pages, 2 CPUs, ceiling 33, none refused. With
    /// some of them: every combination of the values named, the other axes at that base.
    #[command(
        after_help = "Example: teardown sweep --html sweep.html\n         teardown sweep --batch 64,510,19x510 --size 33,32Ki --cpus 2,8lazy6"
    )]
    Sweep(SweepArgs),
}

/// Does what the command line asks for, says on stderr what went wrong, and returns the exit code.
#[must_use]
pub fn run_command_line() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.command {
        None => run::execute(&cli.run),
        Some(Command::Run(args)) => run::execute(args),
        Some(Command::Capture(args)) => capture::execute(args),
        Some(Command::Trace(args)) => trace::execute(args),
        Some(Command::Boot(args)) => boot::execute(args),
        Some(Command::Fuzz(args)) => fuzz::execute(args),
        Some(Command::Replay(args)) => replay::execute(args),
        Some(Command::Sweep(args)) => sweep::execute(args),
    };
    // Names of files, and words of them. Of what the compiler said every line is its own.
    let result = result.map_err(|failure| match cli.command {
        Some(Command::Boot(_)) => escaped_lines(&failure),
        _ => escaped(&failure),
    });
    match result {
        Ok(CommandVerdict::Good) => ExitCode::SUCCESS,
        Ok(CommandVerdict::Violation) => ExitCode::from(1),
        Err(failure) => {
            // If even this cannot be written, the exit code still tells.
            let _ = writeln!(io::stderr(), "teardown: {failure}");
            ExitCode::from(2)
        }
    }
}
