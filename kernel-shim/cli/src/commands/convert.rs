//! `teardown convert`: what `/proc/PID/maps` or `smaps` said, as a layout.

use std::path::PathBuf;

use clap::Args;

use crate::commands::outcome::{CommandError, CommandVerdict, output_file, read_layout, write_layout};

#[derive(Clone, Debug, Args)]
pub(crate) struct ConvertArgs {
    /// The text of `/proc/PID/maps` or `/proc/PID/smaps`, as printed or pasted, or a layout; `-`
    /// is standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// File to write the layout to. Default: standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(crate) fn execute(args: &ConvertArgs) -> Result<CommandVerdict, CommandError> {
    let layout = read_layout(&args.file)?;
    let file = args.output.as_deref().map(|path| output_file(path).map(|file| (path, file))).transpose()?;
    write_layout(&layout, file)?;
    Ok(CommandVerdict::Good)
}
