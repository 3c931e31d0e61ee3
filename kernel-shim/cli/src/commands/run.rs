//! `teardown run`: layouts are built as page tables, used, and taken down.

use std::path::PathBuf;

use clap::Args;

use crate::commands::options::MachineArgs;
use crate::commands::outcome::{CommandError, CommandVerdict, read_layout};
use crate::input::bundled::LAYOUTS;
use crate::input::layout::Layout;
use crate::input::live_process;
use crate::run::teardown::run_layout;

#[derive(Clone, Debug, Args)]
pub(crate) struct RunArgs {
    /// Layout file to tear down; may be given several times. Default: all bundled layouts.
    #[arg(long, value_name = "FILE")]
    layout: Vec<PathBuf>,
    /// Process ID of a live process, which is captured first.
    #[arg(long, value_name = "N")]
    pid: Option<i32>,
    #[command(flatten)]
    machine: MachineArgs,
}

pub(crate) fn execute(args: &RunArgs) -> Result<CommandVerdict, CommandError> {
    // All input is read before anything runs.
    let options = args.machine.options()?;
    let layouts = layouts(args)?;
    args.machine.run_each(
        &layouts,
        |layout| &layout.name,
        |layout, report| run_layout(layout, &options, report).map_err(|error| error.to_string()),
    )
}

fn layouts(args: &RunArgs) -> Result<Vec<Layout>, CommandError> {
    let mut layouts = Vec::new();
    for path in &args.layout {
        layouts.push(read_layout(path)?);
    }
    if let Some(pid) = args.pid {
        layouts.push(live_process::capture(pid).map_err(|error| error.to_string())?);
    }
    if layouts.is_empty() {
        for bundled in LAYOUTS {
            layouts.push(Layout::parse(bundled.name, bundled.text).map_err(|error| error.to_string())?);
        }
    }
    Ok(layouts)
}
