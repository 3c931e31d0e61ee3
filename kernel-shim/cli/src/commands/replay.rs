//! `teardown replay`: a saved sequence again, explained.

use core::any::type_name;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::PathBuf;

use crate::output::verdict::{verdict_json, verdict_text};
use crate::timeline::page::html_page;
use crate::timeline::rows::Timeline;
use crate::timeline::terminal::{Colour, WhichRows, draw_on_terminal};
use clap::Args;
use mmu_adapter::{ShimKernel, Trial, judge_in};
use mmu_hosted::{Sequence, Telling};

use crate::commands::options::{Fault, Format};
use crate::commands::outcome::{CommandError, CommandVerdict, cannot_write, output_file, read_text};
use crate::fuzz::panics::with_quiet_panics;

/// The flags of `teardown replay`.
#[derive(Clone, Debug, Args)]
pub(crate) struct ReplayArgs {
    /// Sequence that `teardown fuzz` saved. It runs on the small kernel of this repository, so a
    /// sequence that another kernel's tests have saved is refused: they replay it themselves
    /// (`mmu_hosted::replay`).
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Plants the fault that was planted when the sequence was found.
    #[arg(long, value_enum)]
    fault: Option<Fault>,
    /// Draws what happened, a column for each CPU, and says what went wrong. Shows the events that
    /// explain the violation; of a clean sequence, an outline.
    #[arg(long, conflicts_with = "format")]
    explain: bool,
    /// With --explain: shows every event.
    #[arg(long, requires = "explain")]
    all: bool,
    /// Writes the same as one HTML page, which loads nothing from elsewhere.
    #[arg(long, value_name = "OUT")]
    html: Option<PathBuf>,
    /// Form of the verdict.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

pub(crate) fn execute(args: &ReplayArgs) -> Result<CommandVerdict, CommandError> {
    let name = args.file.display();
    let text = read_text(&args.file)?;
    if let Some(kernel) = Sequence::kernel_in(&text)
        && kernel != type_name::<ShimKernel>()
    {
        return Err(format!(
            "{name}: this sequence was found on another kernel, {kernel}; `teardown replay` runs the small kernel of \
             this repository. Run it with `mmu_hosted::replay` in a test of that kernel"
        ));
    }
    let sequence = Sequence::parse(&text)
        .map_err(|error| format!("{name}:{}: expected {}", error.line, error.expected))?;
    let html = args.html.as_deref().map(|path| output_file(path).map(|file| (path, file))).transpose()?;
    let telling = if args.explain || args.html.is_some() { Telling::All } else { Telling::Last };
    let run = with_quiet_panics(|| judge_in(&sequence, Trial { telling, ..Fault::trial(args.fault) }))
        .map_err(|error| format!("cannot make a simulated machine: {error}"))?;
    Fault::check_happened(args.fault, run.faults, run.verdict.is_clean())?;
    let mut report = String::new();
    if args.explain {
        let shown = if args.all { WhichRows::All } else { WhichRows::WhatMatters };
        report = draw_on_terminal(&Timeline::from_run(&sequence, &run), shown, colour());
    }
    if let Some((path, out)) = html {
        let file = args.file.file_name().unwrap_or_default().to_string_lossy();
        let page = html_page(&Timeline::from_run(&sequence, &run), &sequence, &run.verdict, &file);
        out.write(|out| out.write_all(page.as_bytes())).map_err(|error| cannot_write(path, &error))?;
    }
    match args.format {
        Format::Text => report.push_str(&verdict_text(&sequence, &run.verdict)),
        Format::Json => report.push_str(&format!("{:#}", verdict_json(&sequence, &run.verdict))),
    }
    let mut out = BufWriter::new(io::stdout().lock());
    let written = writeln!(out, "{report}").and_then(|()| out.flush());
    written.map_err(|error| format!("cannot write the report: {error}"))?;
    Ok(if run.verdict.is_clean() { CommandVerdict::Good } else { CommandVerdict::Violation })
}

/// Colour, unless the output is no terminal or the person has refused it (no-color.org).
fn colour() -> Colour {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if io::stdout().is_terminal() && !refused { Colour::On } else { Colour::Off }
}
