//! `teardown boot`: the same kernel on emulated x86_64 hardware.

use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;
use std::io::{self, BufWriter};
use std::path::PathBuf;

use clap::Args;
use mmu_gather::tlb::PcidSupport;

use crate::boot::emulator::{Emulator, Ending, emulator_version};
use crate::boot::error::BootError;
use crate::boot::image::build_image;
use crate::boot::layout_plan::{LayoutPlan, count_drill_hosted};
use crate::boot::options::{Accelerator, BootFault, Mebibytes, Workload, name, parse_memory};
use crate::boot::report::{BootReport, Comparison};
use crate::commands::options::Format;
use crate::commands::outcome::{CommandError, CommandVerdict, read_layout};
use crate::input::layout::Layout;
use crate::output::cleanup::UnfinishedFile;
use crate::output::progress::spinner;
use crate::run::hosted_process::frames_needed;

/// Memory without `--memory`, where no layout asks for more.
const DEFAULT_MIB: u64 = 512;
/// The least that the image boots with.
const LEAST_MIB: u64 = 64;
/// QEMU's PC has a hole below 4 GiB; up to this much memory lies below the hole in one piece.
const WHOLE_MIB: u64 = 3072;

/// How long `qemu --version` may take.
const VERSION_LIMIT: Duration = Duration::from_secs(20);

/// The flags of `teardown boot`.
#[derive(Clone, Debug, Args)]
pub struct BootArgs {
    /// CPUs of the emulated machine, 1 to 64.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub cpus: u32,
    /// Memory of the emulated machine, such as 256M or 2G. Default: 512M, or what the layout needs,
    /// up to 3G.
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    pub memory: Option<Mebibytes>,
    /// What the image runs. Default: full; with --layout: layout.
    #[arg(long, value_enum)]
    pub workload: Option<Workload>,
    /// Plants a fault, which the image must notice. Faults show in --workload full, short and
    /// threads, the skipped flushes in rivals and swap too, skip-remote-flush in lazy too; all but
    /// skip-local-flush need two CPUs.
    #[arg(long, value_enum)]
    pub fault: Option<BootFault>,
    /// Layout file to build and tear down on the emulated machine, as many of its pages as memory
    /// holds.
    #[arg(long, value_name = "FILE")]
    pub layout: Option<PathBuf>,
    /// Path of the QEMU binary.
    #[arg(long, value_name = "PATH", default_value = "qemu-system-x86_64")]
    pub qemu: PathBuf,
    /// How QEMU runs the CPUs.
    #[arg(long, value_enum, default_value_t = Accelerator::Tcg)]
    pub accel: Accelerator,
    /// Image to boot instead of the one that is built from the sources.
    #[arg(long, value_name = "PATH")]
    pub image: Option<PathBuf>,
    /// Seconds without progress after which the image prints what each CPU does, and ends; 0 turns
    /// this off.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub watchdog: u64,
    /// Seconds after which QEMU is killed, whatever it does; 1 to 86400.
    #[arg(long, value_name = "SECONDS", default_value_t = 300,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
    /// Form of the report.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

/// Builds the image if need be, boots it, and prints a report to standard output.
pub(crate) fn execute(args: &BootArgs) -> Result<CommandVerdict, CommandError> {
    boot_and_report(args).map_err(|error| error.to_string())
}

fn boot_and_report(args: &BootArgs) -> Result<CommandVerdict, BootError> {
    let report = boot(args)?;
    let out = BufWriter::new(io::stdout().lock());
    let written = match args.format {
        Format::Text => report.write_text(out),
        Format::Json => report.write_json(out),
    };
    written.map_err(BootError::Output)?;
    Ok(if report.is_clean() { CommandVerdict::Good } else { CommandVerdict::Violation })
}

/// Builds the image if need be, boots it, and says what it came to.
///
/// # Errors
/// [`BootError`].
pub fn boot(args: &BootArgs) -> Result<BootReport, BootError> {
    args.check()?;
    let layout = args.layout.as_deref().map(read_layout).transpose().map_err(BootError::Input)?;
    let memory_mib = args.memory.map_or_else(|| default_mib(layout.as_ref()), |memory| memory.0);
    let plan = layout.map(|layout| LayoutPlan::new(&layout, usable_frames(memory_mib)));
    let module = plan.as_ref().map(|plan| write_module(&plan.text)).transpose()?;
    // The emulator first: without it there is no need to build.
    let limit = Duration::from_secs(args.timeout);
    let version = emulator_version(&args.qemu, limit.min(VERSION_LIMIT))?;
    let image = args.image.clone().map_or_else(build_image, Ok)?;
    if !image.is_file() {
        return Err(BootError::NoImage(image));
    }
    let command_line = args.command_line();
    let emulator = Emulator {
        qemu: &args.qemu,
        accelerator: args.accel,
        nr_cpus: args.cpus,
        memory_mib,
        image: &image,
        module: module.as_ref().map(UnfinishedFile::path),
        command_line: &command_line,
    };
    let mut report = BootReport::new(
        version,
        name(&args.accel),
        args.cpus,
        memory_mib,
        args.workload().to_string(),
        args.fault.map(|fault| fault.to_string()),
    );
    let progress = spinner();
    let ending = emulator.run(limit, |line| {
        if let Some(message) = report.take_line(line) {
            progress.set_message(message);
        }
    });
    progress.finish_and_clear();
    let ending = ending?;
    report.set_ending(ending);
    match ending {
        Ending::Usage => return Err(BootError::Image(report.last_words())),
        Ending::TimedOut => {
            return Err(BootError::TimedOut { seconds: args.timeout, last: report.last_line() });
        }
        _ => {}
    }
    if let Some(missing) = report.missing(args.workload(), args.fault) {
        return Err(BootError::Incomplete(missing));
    }
    if let Some(plan) = &plan {
        report.add_layout(plan);
    }
    compare(&mut report, args.cpus, plan.as_ref())?;
    Ok(report)
}

/// Does the same work on the hosted machine, and compares the counters.
fn compare(report: &mut BootReport, nr_cpus: u32, plan: Option<&LayoutPlan>) -> Result<(), BootError> {
    let pcid = if report.has_pcid() { PcidSupport::On } else { PcidSupport::Off };
    if let Some(booted) = report.counters_of("drill") {
        let hosted = count_drill_hosted(nr_cpus, pcid).map_err(BootError::Hosted)?;
        report.add_comparison(Comparison::between("drill", &hosted, &booted));
    }
    if let (Some(booted), Some(plan)) = (report.counters_of("layout"), plan) {
        let hosted = plan.count_hosted(nr_cpus, pcid).map_err(BootError::Hosted)?;
        report.add_comparison(Comparison::between(&plan.name, &hosted, &booted));
    }
    Ok(())
}

impl BootArgs {
    fn workload(&self) -> Workload {
        let default = if self.layout.is_some() { Workload::Layout } else { Workload::Full };
        self.workload.unwrap_or(default)
    }

    fn check(&self) -> Result<(), BootError> {
        let needs_two = matches!(self.fault, Some(BootFault::SkipRemoteFlush | BootFault::FreeBeforeFlush));
        if needs_two && self.cpus < 2 {
            return Err(BootError::Usage(
                "this fault needs two CPUs, one of which uses the memory that the other takes away; use --cpus 2 or more",
            ));
        }
        if self.memory.is_some_and(|memory| memory.0 < LEAST_MIB) {
            return Err(BootError::Usage("--memory: the image needs at least 64M"));
        }
        if self.fault.is_some_and(|fault| !fault.shows_in(self.workload())) {
            return Err(BootError::Usage(
                "no program in this workload would notice the fault: faults show in --workload full, short and threads, \
                 the skipped flushes in rivals and swap too, skip-remote-flush in lazy too",
            ));
        }
        match (self.workload(), &self.layout) {
            (Workload::Layout, None) => {
                Err(BootError::Usage("--workload layout needs a layout: name it with --layout FILE"))
            }
            (Workload::Layout, Some(_)) | (_, None) => Ok(()),
            (_, Some(_)) => Err(BootError::Usage("--layout goes with --workload layout only")),
        }
    }

    fn command_line(&self) -> String {
        let fault = self.fault.map_or_else(|| "none".to_owned(), |fault| fault.to_string());
        format!("workload={} fault={fault} watchdog={}", self.workload(), self.watchdog)
    }
}

/// Writes a plan into a file of its own, for QEMU to load; removed afterwards.
fn write_module(text: &str) -> Result<UnfinishedFile, BootError> {
    static WRITTEN: AtomicU32 = AtomicU32::new(0);
    let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("teardown-{}-{number}.plan", std::process::id()));
    let module = UnfinishedFile::new(&path);
    std::fs::write(&path, text).map_err(|error| BootError::File { path, error })?;
    Ok(module)
}

/// What a layout needs, up to what lies below the hole.
fn default_mib(layout: Option<&Layout>) -> u64 {
    let needed = layout.map_or(0, |layout| frames_needed(layout) * 8 / 7 / 256 + 64);
    needed.clamp(DEFAULT_MIB, WHOLE_MIB)
}

/// Frames that the image has left for the kernel: its heap takes an eighth, up to 256 MiB.
const fn usable_frames(memory_mib: u64) -> u64 {
    // Of memory on both sides of the hole, the larger part counts.
    let largest_mib = if memory_mib <= WHOLE_MIB {
        memory_mib
    } else if memory_mib > 2 * WHOLE_MIB {
        memory_mib - WHOLE_MIB
    } else {
        WHOLE_MIB
    };
    let heap_mib = if memory_mib / 8 < 256 { memory_mib / 8 } else { 256 };
    (largest_mib - heap_mib).saturating_sub(16) * 256
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frames_left_are_fewer_than_the_memory_and_never_all_of_it() {
        for mib in [64, 256, 512, 3072, 4096, 8192] {
            let frames = usable_frames(mib);
            assert!(frames > 0 && frames < mib * 256 * 19 / 20, "{mib} MiB: {frames}");
        }
    }
}
