//! Flags of several commands: the machine of `run` and `trace`, the faults that they, `fuzz` and
//! `replay` plant, how reports are printed.

use std::io::{self, BufWriter, Write};

use clap::{Args, ValueEnum};
use mmu_adapter::Trial;
use mmu_gather::Limits;
use mmu_hosted::{Checking, MachineFault};
use mmu_kernel_shim::Misbehaviour;

use crate::commands::outcome::{CommandError, CommandVerdict};
use crate::output::escape::label;
use crate::output::progress::progress_bar;
use crate::output::report::{LayoutReport, LogReport, Report};
use crate::output::words::counted;
use crate::run::pass::RunOptions;

/// The machine on which `run` and `trace` do their work, and how they report.
#[derive(Clone, Debug, Args)]
pub(crate) struct MachineArgs {
    /// CPUs of the simulated machine, 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Most batch pages that a gather may take, 0 to 19; with 0 it has only the eight slots on the
    /// stack.
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.batch_pages,
          value_parser = clap::value_parser!(u16).range(0..=19))]
    batch_pages: u16,
    /// Whether a checker watches every step; off is quicker, and finds no violations.
    #[arg(long, value_enum, default_value_t = Switch::On)]
    checker: Switch,
    /// Plants a fault, to see the checker find it; the checker must be on.
    #[arg(long, value_enum)]
    fault: Option<Fault>,
    /// Seed of all random choices: the same seed gives the same run.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Form of the report.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

/// How a report is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Tables and sentences, for a person.
    Text,
    /// JSON, for a program.
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Fault {
    /// Flushes invalidate nothing.
    SkipFlush,
    /// Pages are freed as soon as their entries are cleared, before any flush.
    FreeBeforeFlush,
    /// One flush request in four is lost, but acknowledged; needs two CPUs.
    DropIpi,
    /// Each flush is of the CPU that makes the call: what others are asked for is acknowledged, and
    /// not done; needs two CPUs. It is what a kernel does that was written for one CPU.
    LocalFlushOnly,
}

impl MachineArgs {
    pub(crate) fn options(&self) -> Result<RunOptions, CommandError> {
        if self.fault.is_some() && self.checker == Switch::Off {
            return Err(
                "--fault needs --checker on: without the checker nothing would find the fault".to_owned()
            );
        }
        Fault::check(self.fault, self.cpus)?;
        let Trial { fault, misbehaviour, .. } = Fault::trial(self.fault);
        Ok(RunOptions {
            nr_cpus: self.cpus,
            seed: self.seed,
            limits: Limits::DEFAULT.with_batch_pages(self.batch_pages),
            checking: if self.checker == Switch::On { Checking::On } else { Checking::Off },
            misbehaviour,
            fault,
            ..RunOptions::default()
        })
    }

    /// Has `work` done for each of `inputs`, under a progress bar that shows its name, and prints
    /// what was found.
    pub(crate) fn run_each<T>(
        &self,
        inputs: &[T],
        name: impl Fn(&T) -> &str,
        mut work: impl FnMut(&T, &mut Report) -> Result<(), CommandError>,
    ) -> Result<CommandVerdict, CommandError> {
        let mut report = Report::default();
        let progress = progress_bar(inputs.len() as u64);
        for input in inputs {
            progress.set_message(label(name(input)));
            work(input, &mut report)?;
            progress.inc(1);
        }
        progress.finish_and_clear();
        self.print(&report)
    }

    fn print(&self, report: &Report) -> Result<CommandVerdict, CommandError> {
        Fault::check_happened(self.fault, report.faults, report.is_clean())?;
        let out = BufWriter::new(io::stdout().lock());
        let written = match self.format {
            Format::Text => report.write_text(out),
            Format::Json => report.write_json(out),
        };
        written.map_err(|error| format!("cannot write the report: {error}"))?;
        let log_of = |layout: &&LayoutReport| layout.log.as_ref().is_some_and(LogReport::is_mostly_left_out);
        if let Some(layout) = report.layouts.iter().find(log_of).filter(|_| report.is_clean()) {
            let name = label(&layout.name);
            return Err(format!(
                "{name}: most of its calls were not understood, so that there is no verdict"
            ));
        }
        Ok(if report.is_clean() { CommandVerdict::Good } else { CommandVerdict::Violation })
    }
}

impl Fault {
    /// Its name on the command line.
    pub(crate) fn word(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Refuses a fault that cannot happen on so many CPUs: a run without a violation would make the
    /// checker look blind.
    pub(crate) fn check(fault: Option<Self>, nr_cpus: u32) -> Result<(), CommandError> {
        match fault {
            Some(fault @ (Self::DropIpi | Self::LocalFlushOnly)) if nr_cpus < 2 => Err(format!(
                "--fault {}: one CPU alone sends no flush requests; use --cpus 2 or more",
                fault.word()
            )),
            _ => Ok(()),
        }
    }

    /// Refuses to call a run clean in which the planted fault never happened. Says so on stderr
    /// where the fault happened and nothing was found.
    pub(crate) fn check_happened(
        fault: Option<Self>,
        times: u64,
        is_clean: bool,
    ) -> Result<(), CommandError> {
        let Some(fault) = fault.filter(|_| is_clean) else { return Ok(()) };
        let word = fault.word();
        if times == 0 {
            return Err(format!(
                "--fault {word} never happened: the run was too short to show whether it is found"
            ));
        }
        let counted = counted(times, "time", "times");
        let _ = writeln!(io::stderr(), "teardown: --fault {word} happened {counted} and did no harm");
        Ok(())
    }

    /// The machine and the kernel, with the fault planted in them.
    pub(crate) fn trial(fault: Option<Self>) -> Trial {
        match fault {
            None => Trial::default(),
            Some(Self::SkipFlush) => Trial { fault: MachineFault::SkipFlush, ..Trial::default() },
            Some(Self::DropIpi) => Trial { fault: MachineFault::DropIpi, ..Trial::default() },
            Some(Self::LocalFlushOnly) => Trial { fault: MachineFault::LocalFlushOnly, ..Trial::default() },
            Some(Self::FreeBeforeFlush) => {
                Trial { misbehaviour: Misbehaviour::FreeBeforeFlush, ..Trial::default() }
            }
        }
    }
}
