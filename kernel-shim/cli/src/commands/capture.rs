//! `teardown capture`: the layout of a live process, as a file.

use std::path::PathBuf;

use clap::Args;

use crate::commands::outcome::{CommandError, CommandVerdict, output_file, write_layout};
use crate::input::live_process;

#[derive(Clone, Debug, Args)]
pub(crate) struct CaptureArgs {
    /// Process ID of the process.
    #[arg(long, value_name = "N")]
    pid: i32,
    /// File to write the layout to. Default: standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(crate) fn execute(args: &CaptureArgs) -> Result<CommandVerdict, CommandError> {
    let file = args.output.as_deref().map(|path| output_file(path).map(|file| (path, file))).transpose()?;
    let layout = live_process::capture(args.pid).map_err(|error| error.to_string())?;
    write_layout(&layout, file)?;
    Ok(CommandVerdict::Good)
}
