//! One file a command: its flags, and what it does with them, from reading the input to the exit
//! code.
//!
//! ```text
//!  command line ─▶ mod.rs ─▶ run, capture, convert, trace, .. ─▶ report, exit code
//!                              ├── options  (flags of several commands)
//!                              └── outcome  (how a command ends)
//! ```
//!
//! What goes in is the command line, what goes out a report and an exit code; progress and errors
//! go to stderr. Only `main.rs` calls this room, and tests of `boot`.

pub mod boot;
mod capture;
mod convert;
mod free_running;
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
use convert::ConvertArgs;
use fuzz::FuzzArgs;
use outcome::CommandVerdict;
use replay::ReplayArgs;
use run::RunArgs;
use sweep::SweepArgs;
use trace::TraceArgs;

/// Checks and measures the teardown of page tables: on the memory and the system calls of real
/// programs, on random sequences, and on emulated hardware.
#[derive(Debug, Parser)]
#[command(
    name = "teardown",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Without a command, `teardown` does what `teardown run` does, with the same options.\n\n\
                  Exit code: 0 everything held, 1 a violation was found, 2 bad usage or input."
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// To check the engine on the memory of real processes: builds layouts as page tables, uses
    /// them from several CPUs and tears them down (the default).
    #[command(after_help = "Example: teardown run --layout tests/layouts/redis-server.layout --cpus 8")]
    Run(RunArgs),
    /// To get a layout of your own: writes down the memory of a live Linux process.
    #[command(
        after_help = "Example: teardown capture --pid 4321 -o mine.layout && teardown run --layout mine.layout"
    )]
    Capture(CaptureArgs),
    /// To keep or edit what `/proc/PID/maps` or `smaps` said, of a bug report, say: writes it as a
    /// layout.
    #[command(after_help = "Example: teardown convert pasted.smaps -o mine.layout")]
    Convert(ConvertArgs),
    /// To check the engine on what a real program did over time: makes the memory calls that a log
    /// of `strace -f` holds.
    #[command(after_help = "Example: teardown trace tests/traces/redis-bgsave.strace --cpus 8")]
    Trace(TraceArgs),
    /// To check the engine on emulated hardware: boots the same kernel in QEMU, with programs that
    /// run while their memory is torn down.
    #[command(after_help = "Example: teardown boot --cpus 4 --workload short")]
    Boot(BootArgs),
    /// To look for unknown bugs: runs random sequences of operations until one fails, and makes
    /// that one short.
    #[command(after_help = "Examples: teardown fuzz --time 60 --jobs 2 -o failure.sequence\n          \
                            teardown fuzz --free-running --time 60")]
    Fuzz(FuzzArgs),
    /// To understand a failure that `fuzz` saved: runs its sequence again, with the same verdict
    /// every time, and explains it.
    #[command(after_help = "Example: teardown replay failure.sequence --explain --html failure.html")]
    Replay(ReplayArgs),
    /// To choose a batch size: measures what each setting costs in time, flushes, interrupts and
    /// memory that waits.
    ///
    /// Without --batch, --size, --shape, --layout, --cpus, --ceiling and --refuse, nine settings
    /// are compared, and each axis is varied alone from one base: 32Ki dense pages, 2 CPUs, ceiling
    /// 33, no batch page refused. With some of them, every combination of the values given is
    /// measured, and the other axes stay at the base.
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
        Some(Command::Convert(args)) => convert::execute(args),
        Some(Command::Trace(args)) => trace::execute(args),
        Some(Command::Boot(args)) => boot::execute(args),
        Some(Command::Fuzz(args)) => fuzz::execute(args),
        Some(Command::Replay(args)) => replay::execute(args),
        Some(Command::Sweep(args)) => sweep::execute(args),
    };
    // Errors hold names and words of files. Only those of the compiler have several lines.
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
