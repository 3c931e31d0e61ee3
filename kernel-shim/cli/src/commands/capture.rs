//! `teardown capture`: the layout of a live process, as a file.

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use clap::Args;

use crate::commands::outcome::{CommandError, CommandVerdict, cannot_write, output_file};
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
    Ok(CommandVerdict::Good)
}
