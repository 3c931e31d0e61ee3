//! `teardown trace`: the memory calls of a recorded log are made again.

use std::path::PathBuf;

use clap::Args;

use crate::commands::options::MachineArgs;
use crate::commands::outcome::{CommandError, CommandVerdict, open_input};
use crate::input::bundled::TRACES;
use crate::trace::log::{TraceLog, run_log};

#[derive(Clone, Debug, Args)]
pub(crate) struct TraceArgs {
    /// Log to run; tests/traces/README.md says how to record one. Default: all bundled logs.
    #[arg(value_name = "FILE")]
    log: Vec<PathBuf>,
    #[command(flatten)]
    machine: MachineArgs,
}

pub(crate) fn execute(args: &TraceArgs) -> Result<CommandVerdict, CommandError> {
    // All input is read before anything runs.
    let options = args.machine.options()?;
    let logs = logs(args)?;
    args.machine.run_each(
        &logs,
        |log| &log.name,
        |log, report| run_log(log, &options, report).map_err(|error| error.to_string()),
    )
}

fn logs(args: &TraceArgs) -> Result<Vec<TraceLog>, CommandError> {
    let mut logs = Vec::new();
    for path in &args.log {
        let name = path.display().to_string();
        logs.push(TraceLog::read(&name, open_input(path)?).map_err(|error| error.to_string())?);
    }
    if logs.is_empty() {
        for bundled in TRACES {
            let name = format!("{}.strace", bundled.name);
            logs.push(TraceLog::read(&name, bundled.text.as_bytes()).map_err(|error| error.to_string())?);
        }
    }
    Ok(logs)
}
