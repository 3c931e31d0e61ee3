//! A recorded log, run on the hosted kernel: once timed and once checked.
//!
//! The calls are made in the order of the log (`threads`), each on the address space of its process
//! (`space`): `mmap` over what was there, `munmap`, `mremap` in place and elsewhere, `brk`,
//! `madvise`, `mprotect`; threads share an address space, a child of `vfork` borrows its parent's,
//! one of `fork` gets a copy whose pages are shared until written, `execve` moves a stack and
//! leaves the old address space, and the last one out takes it down.
//!
//! What a log does not hold is made up, from the seed:
//!
//! - **pages**: each thread uses a few pages before each call, a few of those that the call is
//!   about, and a few of what it just mapped; threads on the other CPUs use as many between them
//!   while the call runs. So there are far fewer pages than when the program ran, and each is known
//!   to more CPUs;
//! - **areas from before**: the program itself, its interpreter and its vdso appear when a call
//!   first names them; each program has a stack. Where a later call is given their place, they go;
//! - **files**: two mappings show the same file only if one replaces part of the other, or a fork
//!   made the second.
//!
//! `MADV_FREE` and `MADV_REMOVE` drop pages as `MADV_DONTNEED` does; `MADV_DONTFORK` is obeyed;
//! guard pages are put into private areas; other advice is counted only.

use std::io::BufRead;
use std::rc::Rc;
use std::sync::Arc;

use mmu_adapter::boot;
use mmu_hosted::{Checking, HostedMachine, Options};

use crate::input::strace::{MemoryCall, Trace, TraceError, TraceEvent};
use crate::output::report::{LayoutReport, LogReport, Report};
use crate::run::pass::{PassResult, RunOptions, run_passes};
use crate::trace::kernel::TraceKernel;
use crate::trace::threads::{FRAMES_PER_CALL, LogRun, Refused};

/// A log, ready to be run.
#[derive(Clone, Debug)]
pub(crate) struct TraceLog {
    /// What the report calls it.
    pub name: String,
    /// What errors call it: usually the path.
    pub source: String,
    trace: Trace,
}

/// Why a log was not run to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum TraceRunError {
    /// The kernel refused a call of the log.
    #[error("{log}:{line}: expected {call} to succeed as it did in the log, but {source}")]
    Refused {
        /// The log.
        log: String,
        /// The line of the call.
        line: usize,
        /// The call.
        call: &'static str,
        /// What the kernel said.
        source: mmu_kernel_shim::Error,
    },
    /// The kernel could not even start.
    #[error("{log}: cannot start the machine: {source}")]
    Boot {
        /// The log.
        log: String,
        /// What the kernel said.
        source: mmu_kernel_shim::Error,
    },
    /// The host refused memory.
    #[error("cannot reserve memory for the machine: {0}")]
    Memory(#[from] std::io::Error),
}

impl TraceLog {
    /// Reads a log. The report calls it by the file name in `source` without folder and ending.
    ///
    /// # Errors
    /// As for [`Trace::read`].
    pub(crate) fn read(source: &str, input: impl BufRead) -> Result<Self, TraceError> {
        let trace = Trace::read(source, input)?;
        let stem = std::path::Path::new(source).file_stem();
        let name = stem.map_or_else(|| source.to_owned(), |stem| stem.to_string_lossy().into_owned());
        Ok(Self { name, source: source.to_owned(), trace })
    }
}

/// Runs a log, once timed and once checked, and adds what was found to `report`.
///
/// # Errors
/// [`TraceRunError`]; nothing is added then.
pub(crate) fn run_log(
    log: &TraceLog,
    options: &RunOptions,
    report: &mut Report,
) -> Result<(), TraceRunError> {
    run_passes(options, report, |checking| run_pass(log, options, checking))
}

fn run_pass(log: &TraceLog, options: &RunOptions, checking: Checking) -> Result<PassResult, TraceRunError> {
    let machine = HostedMachine::new(options.machine(checking, frames_needed(&log.trace)))?;
    let boot_error = |source| TraceRunError::Boot { log: log.source.clone(), source };
    let kernel = boot(&Arc::new(machine), options.config(checking)).map_err(boot_error)?;
    let before = kernel.counters().snapshot();
    let events: Rc<[TraceEvent]> = log.trace.events.as_slice().into();
    let log_run = Rc::new(LogRun::new(TraceKernel::new(Arc::clone(&kernel)), events).map_err(boot_error)?);
    match checking {
        Checking::On => log_run.run_interleaved(),
        Checking::Off => log_run.run_in_order(),
    }
    if let Some(refused) = log_run.refused() {
        return Err(refused_call(log, refused));
    }
    let after = kernel.counters().snapshot();
    // One slot a page: a log asks for no large ones.
    let pages = after.released_slots - before.released_slots;
    let report = LayoutReport {
        log: Some(log_report(&log.trace, &log_run)),
        ..LayoutReport::between(&log.name, log_run.kernel.areas.get(), pages, &before, &after)
    };
    Ok(PassResult::from_kernel(&kernel, report, log_run.kernel.teardown.get()))
}

/// What became of the calls.
fn log_report(trace: &Trace, log_run: &LogRun) -> LogReport {
    LogReport {
        calls: trace.events.len() as u64 - trace.assumed.events(),
        threads: log_run.nr_threads.get().into(),
        address_spaces: log_run.nr_spaces.get(),
        assumed_areas: log_run.kernel.assumed_areas.get(),
        ignored_advice: log_run.kernel.ignored_advice.get(),
        replaced_areas: log_run.kernel.replaced_areas.get(),
        assumed_threads: trace.assumed.threads,
        renamed_threads: trace.assumed.renamed,
        assumed_processes: trace.assumed.processes,
        assumed_programs: trace.assumed.programs,
        output_lines: trace.output.count,
        first_output_line: trace.output.first_line as u64,
        lost_starts: trace.lost_starts.count,
        first_lost_start: trace.lost_starts.first_line as u64,
        broken_calls: trace.broken.count,
        first_broken_call: trace.broken.first_line as u64,
        failed: trace.nr_failed,
        unfinished: trace.nr_unfinished,
        dropped: trace.dropped.clone(),
        dropped_thread_calls: trace.nr_orphaned,
        dropped_threads: trace.nr_orphaned_threads,
    }
}

/// Frames for the most pages that the programs of a log can have at once.
fn frames_needed(trace: &Trace) -> u64 {
    let copies = trace.events.iter().filter(|event| matches!(event.call, MemoryCall::Clone { .. })).count();
    Options::RESERVED_FRAMES + 16_384 + trace.events.len() as u64 * FRAMES_PER_CALL + copies as u64 * 1024
}

fn refused_call(log: &TraceLog, refused: Refused) -> TraceRunError {
    let last = log.trace.events.len().saturating_sub(1);
    let event = log.trace.events.get(refused.event.min(last));
    let call = match event.map(|event| &event.call) {
        _ if refused.event > last => "the end of all programs",
        Some(MemoryCall::Mmap { .. }) => "mmap",
        Some(MemoryCall::Munmap { .. }) => "munmap",
        Some(MemoryCall::Mremap { .. }) => "mremap",
        Some(MemoryCall::Brk { .. }) => "brk",
        Some(MemoryCall::Madvise { .. }) => "madvise",
        Some(MemoryCall::Mprotect { .. }) => "mprotect",
        Some(MemoryCall::Clone { .. }) => "clone",
        Some(MemoryCall::Exec) => "execve",
        Some(MemoryCall::Appears) => "the start of a process",
        Some(MemoryCall::Exit | MemoryCall::ExitGroup) | None => "exit",
    };
    let line = event.map_or(0, |event| event.line);
    TraceRunError::Refused { log: log.source.clone(), line, call, source: refused.error }
}
