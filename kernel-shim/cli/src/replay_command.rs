//! `teardown replay`.

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use clap::Args;
use mmu_cli::fuzz_report::{verdict_json, verdict_text};
use mmu_hosted::{Sequence, judge_in};

use crate::fuzz_command::{quiet_panics, trial};
use crate::{Failure, Fault, Format, Verdict};

/// What `replay` is told.
#[derive(Clone, Debug, Args)]
pub(crate) struct ReplayArgs {
    /// A saved sequence.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// What was wrong on purpose when it was found.
    #[arg(long, value_enum)]
    fault: Option<Fault>,
    /// How the verdict is printed.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

pub(crate) fn replay(args: &ReplayArgs) -> Result<Verdict, Failure> {
    let name = args.file.display();
    let text = std::fs::read_to_string(&args.file).map_err(|error| format!("cannot read {name}: {error}"))?;
    let sequence = Sequence::parse(&text).map_err(|error| format!("{name}:{error}"))?;
    quiet_panics();
    let run =
        judge_in(&sequence, trial(args.fault)).map_err(|error| format!("cannot make a machine: {error}"))?;
    let report = match args.format {
        Format::Text => verdict_text(&sequence, &run.verdict),
        Format::Json => format!("{:#}", verdict_json(&sequence, &run.verdict)),
    };
    let mut out = BufWriter::new(io::stdout().lock());
    let written = writeln!(out, "{report}").and_then(|()| out.flush());
    written.map_err(|error| format!("cannot write the report: {error}"))?;
    Ok(if run.verdict.is_clean() { Verdict::Good } else { Verdict::Violation })
}
