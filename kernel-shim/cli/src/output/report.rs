//! What a run found, as text and as JSON.

use std::collections::BTreeMap;
use std::io;

use mmu_hosted::Found;
use mmu_kernel_shim::Snapshot;
use serde::Serialize;

use crate::output::escape::{label, write_json};
use crate::output::table::{Column, Group, write_table};
use crate::output::words::counted;

/// Everything a run found.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(into = "Written")]
pub struct Report {
    /// One entry a layout (or log), in the order they ran.
    pub layouts: Vec<LayoutReport>,
    /// Accesses, walks or cached entries that reached a frame after it was freed, and the like; 0,
    /// and null in the JSON, if nothing was checked.
    pub violations: u64,
    /// Frames that nothing uses and nobody freed.
    pub leaked_frames: u64,
    /// Tables among them.
    pub leaked_tables: u64,
    /// Frames freed twice, or freed while still mapped.
    pub double_frees: u64,
    /// The first violations of each layout, told in full; not part of the JSON.
    pub told_violations: Vec<String>,
    /// How often the planted fault has happened.
    pub faults: u64,
    /// Whether the checker ran.
    pub checked: bool,
}

/// A report as JSON has it.
#[derive(Serialize)]
struct Written {
    layouts: Vec<LayoutReport>,
    violations: Option<u64>,
    leaked_frames: u64,
    leaked_tables: u64,
    double_frees: u64,
}

impl From<Report> for Written {
    fn from(report: Report) -> Self {
        Self {
            violations: report.nr_violations(),
            layouts: report.layouts,
            leaked_frames: report.leaked_frames,
            leaked_tables: report.leaked_tables,
            double_frees: report.double_frees,
        }
    }
}

/// What happened to one address space.
#[derive(Clone, Debug, Default, Serialize)]
pub struct LayoutReport {
    /// Its name.
    pub name: String,
    /// Areas; of a log, all that were made from its start to its end.
    pub vmas: u64,
    /// Base pages that were mapped when the teardown began: 512 for each 2 MiB leaf. Of a log, the
    /// pages given up and freed from its start to its end; the page of zeroes, which is never
    /// freed, is not among them.
    pub pages: u64,
    /// Tables freed.
    pub tables: Tables,
    /// Batch pages taken, over all gathers.
    pub batches: u64,
    /// Times a gather was full and flushed before it was done.
    pub forced_flushes: u64,
    /// Flush requests.
    pub flushes: Flushes,
    /// Interrupts for flushes.
    pub ipis: Ipis,
    /// Most pages waiting for one flush.
    pub max_deferred_pages: u64,
    /// Most tables waiting for one flush.
    pub max_deferred_tables: u64,
    /// Most leaves cleared while one table lock was held.
    pub max_pages_per_lock: u64,
    /// Time of the calls that give memory up (of a layout: munmap, exit) on a machine that models
    /// no caches, per base page; not of the checked run.
    pub ns_per_page: f64,
    /// What else there is to say of a log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<LogReport>,
}

/// What became of the calls of a log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LogReport {
    /// Calls that were made.
    pub calls: u64,
    /// Threads that made them.
    pub threads: u64,
    /// Address spaces they ran in.
    pub address_spaces: u64,
    /// Areas that a call showed to have been there before the log.
    pub assumed_areas: u64,
    /// Calls of madvise that have no effect on pages.
    pub ignored_advice: u64,
    /// Calls that had failed.
    pub failed: u64,
    /// Calls of which the log does not hold the return.
    pub unfinished: u64,
    /// Calls that change an address space and were not made, by name.
    pub dropped: BTreeMap<String, u64>,
    /// Calls of threads of which nothing tells the process; they were not made.
    pub dropped_thread_calls: u64,
    /// Those threads.
    pub dropped_threads: u64,
    /// Areas that a mapping was put over, because the log has no munmap of them.
    pub replaced_areas: u64,
    /// Threads that the log does not start, and that were taken for threads of a process.
    pub assumed_threads: u64,
    /// Threads that were taken for children that a call has started under other numbers.
    pub renamed_threads: u64,
    /// Processes that the log does not start.
    pub assumed_processes: u64,
    /// Programs that were executed without a call of the log.
    pub assumed_programs: u64,
    /// Lines that are not strace's, such as output of the program.
    pub output_lines: u64,
    /// The first of them, from 1; 0 where there is none, here and below.
    pub first_output_line: u64,
    /// Returns of calls whose start the log does not hold.
    pub lost_starts: u64,
    /// The line of the first.
    pub first_lost_start: u64,
    /// Calls whose line is broken.
    pub broken_calls: u64,
    /// The line of the first.
    pub first_broken_call: u64,
}

impl LogReport {
    /// The calls for which a verdict does not hold, in words.
    fn not_made(&self) -> Vec<String> {
        let mut what: Vec<_> = self.dropped.iter().map(|(name, count)| format!("{count} {name}")).collect();
        let Self { dropped_thread_calls: calls, dropped_threads: threads, .. } = *self;
        if calls > 0 {
            let (calls, threads) = (counted(calls, "call", "calls"), counted(threads, "thread", "threads"));
            what.push(format!("{calls} of {threads} that the log does not start"));
        }
        for (count, line, one, many) in [
            (self.lost_starts, self.first_lost_start, "call without its start", "calls without their start"),
            (self.broken_calls, self.first_broken_call, "broken call", "broken calls"),
        ] {
            if count > 0 {
                what.push(format!("{}{}", counted(count, one, many), from_line(line)));
            }
        }
        what
    }

    /// Whether fewer calls were made than could not be: nothing holds then.
    #[must_use]
    pub const fn is_mostly_left_out(&self) -> bool {
        self.dropped_thread_calls + self.lost_starts + self.broken_calls > self.calls
    }

    /// Adds the calls of another log that were not made.
    fn add_not_made(&mut self, other: &Self) {
        for (name, count) in &other.dropped {
            *self.dropped.entry(name.clone()).or_default() += count;
        }
        self.dropped_threads += other.dropped_threads;
        self.dropped_thread_calls += other.dropped_thread_calls;
        self.lost_starts += other.lost_starts;
        self.broken_calls += other.broken_calls;
    }

    /// What was assumed about threads that the log does not start, in words.
    fn assumed(&self) -> Vec<String> {
        let said = [
            (
                self.assumed_threads,
                "thread is of the only process that it can be of",
                "threads are of the only process that they can be of",
            ),
            (
                self.renamed_threads,
                "thread is the child that a call started under another number",
                "threads are the children that calls started under other numbers",
            ),
            (self.assumed_processes, "process was there", "processes were there"),
            (self.assumed_programs, "program was executed", "programs were executed"),
        ];
        let said = said.into_iter().filter(|(count, ..)| *count > 0);
        said.map(|(count, one, many)| counted(count, one, many)).collect()
    }

    /// What the table has no column for.
    fn note(&self, name: &str) -> String {
        let Self { calls, threads, address_spaces, .. } = self;
        let mut note = format!(
            "{name}: {}, {}, {}",
            counted(*calls, "call", "calls"),
            counted(*threads, "thread", "threads"),
            counted(*address_spaces, "address space", "address spaces")
        );
        for (count, one, many) in [
            (self.assumed_areas, "area assumed from before the log", "areas assumed from before the log"),
            (
                self.ignored_advice,
                "madvise call without effect on pages",
                "madvise calls without effect on pages",
            ),
            (
                self.replaced_areas,
                "area replaced whose munmap the log does not have",
                "areas replaced whose munmap the log does not have",
            ),
            (self.failed, "failed call left out", "failed calls left out"),
            (self.unfinished, "unfinished call left out", "unfinished calls left out"),
        ] {
            if count > 0 {
                note.push_str(&format!("; {}", counted(count, one, many)));
            }
        }
        if self.output_lines > 0 {
            let lines = counted(self.output_lines, "line of output", "lines of output");
            note.push_str(&format!("; {lines} skipped{}", from_line(self.first_output_line)));
        }
        let assumed = self.assumed();
        if !assumed.is_empty() {
            note.push_str(&format!("; ASSUMED: {}", assumed.join(", ")));
        }
        let not_made = self.not_made();
        if !not_made.is_empty() {
            note.push_str(&format!("; NOT MADE: {}", not_made.join(", ")));
        }
        note
    }
}

/// Where the first of several things stands in a log, if that is known.
fn from_line(line: u64) -> String {
    if line == 0 { String::new() } else { format!(" from line {line} on") }
}

/// Tables freed, by level.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Tables {
    /// Last-level tables.
    pub pte: u64,
    /// Tables of 2 MiB entries.
    pub pmd: u64,
    /// Tables of 1 GiB entries.
    pub pud: u64,
}

/// Flush requests, by what came of them.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Flushes {
    /// Asked for pages.
    pub ranged: u64,
    /// Asked for a whole address space.
    pub full: u64,
    /// Reached a CPU that had nothing to do: another flush had brought it far enough.
    pub skipped: u64,
}

/// Interrupts sent for flushes, and those that need not be.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Ipis {
    /// Sent.
    pub sent: u64,
    /// Saved: the CPU was lazy, or ran something else, and compares generations before it comes
    /// back.
    pub saved: u64,
}

impl LayoutReport {
    /// The report of what happened between two snapshots of a kernel's counters.
    #[must_use]
    pub fn between(name: &str, vmas: u64, pages: u64, before: &Snapshot, after: &Snapshot) -> Self {
        Self {
            name: name.to_owned(),
            vmas,
            pages,
            tables: Tables {
                pte: after.pte_tables - before.pte_tables,
                pmd: after.pmd_tables - before.pmd_tables,
                pud: after.pud_tables - before.pud_tables,
            },
            batches: after.batches - before.batches,
            forced_flushes: after.forced_flushes - before.forced_flushes,
            flushes: Flushes {
                ranged: after.flushes_ranged - before.flushes_ranged,
                full: after.flushes_full - before.flushes_full,
                skipped: after.flushes_skipped - before.flushes_skipped,
            },
            ipis: Ipis {
                sent: after.ipis_sent - before.ipis_sent,
                saved: after.ipis_saved_lazy - before.ipis_saved_lazy + after.ipis_saved_elsewhere
                    - before.ipis_saved_elsewhere,
            },
            max_deferred_pages: after.max_deferred_slots,
            max_deferred_tables: after.max_deferred_tables,
            max_pages_per_lock: after.max_leaves_per_lock,
            ns_per_page: 0.0,
            log: None,
        }
    }
}

impl Report {
    /// Adds one address space, and what its checker said.
    pub fn add(&mut self, layout: LayoutReport, found: &Found, lost: Lost) {
        for violation in &found.told {
            self.told_violations.push(format!("{}: {violation}", label(&layout.name)));
        }
        self.layouts.push(layout);
        self.violations += found.count;
        self.leaked_frames += lost.frames;
        self.leaked_tables += lost.tables;
        self.double_frees += lost.double_frees;
    }

    /// Whether nothing was wrong.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.violations == 0 && self.leaked_frames == 0 && self.leaked_tables == 0 && self.double_frees == 0
    }

    /// Writes the JSON form.
    ///
    /// # Errors
    /// What `out` returns.
    pub fn write_json(&self, mut out: impl io::Write) -> io::Result<()> {
        write_json(&mut out, self)
    }

    /// Writes the table with its totals, the violations, and the verdict.
    ///
    /// # Errors
    /// What `out` returns.
    pub fn write_text(&self, mut out: impl io::Write) -> io::Result<()> {
        let total = (self.layouts.len() > 1).then(|| self.total());
        write_table(&mut out, &columns(), "  ", self.layouts.iter().chain(&total))?;
        for layout in &self.layouts {
            if let Some(log) = &layout.log {
                writeln!(out, "{}", log.note(&label(&layout.name)))?;
            }
        }
        for story in &self.told_violations {
            write!(out, "\n{story}")?;
        }
        writeln!(
            out,
            "\n{}: violations {}, leaked frames {}, leaked tables {}, double frees {}",
            self.verdict(),
            self.nr_violations().map_or_else(|| "unknown".to_owned(), |count| count.to_string()),
            self.leaked_frames,
            self.leaked_tables,
            self.double_frees,
        )?;
        out.flush()
    }

    /// The verdict, and what it does not cover.
    fn verdict(&self) -> String {
        if !self.is_clean() {
            return "NOT CLEAN".to_owned();
        }
        let mut all = LogReport::default();
        let logs: Vec<_> = self.layouts.iter().filter_map(|layout| layout.log.as_ref()).collect();
        match logs[..] {
            // Its lines are named.
            [log] => all = log.clone(),
            ref logs => logs.iter().for_each(|log| all.add_not_made(log)),
        }
        let not_made = all.not_made();
        let mut but_for = Vec::new();
        if !not_made.is_empty() {
            but_for.push(format!("the calls that were not made ({})", not_made.join(", ")));
        }
        if !self.checked {
            but_for.push("what the checker would have found, which was off".to_owned());
        }
        if logs.iter().any(|log| log.is_mostly_left_out()) {
            format!("NOT UNDERSTOOD, most of a log: clean except for {}", but_for.join(" and for "))
        } else if but_for.is_empty() {
            "clean".to_owned()
        } else {
            format!("clean except for {}", but_for.join(" and for "))
        }
    }

    /// Violations, if anybody looked.
    fn nr_violations(&self) -> Option<u64> {
        self.checked.then_some(self.violations)
    }

    fn total(&self) -> LayoutReport {
        let mut total = LayoutReport { name: "total".to_owned(), ..LayoutReport::default() };
        let mut ns = 0.0;
        for one in &self.layouts {
            total.vmas += one.vmas;
            total.pages += one.pages;
            total.tables.pte += one.tables.pte;
            total.tables.pmd += one.tables.pmd;
            total.tables.pud += one.tables.pud;
            total.batches += one.batches;
            total.forced_flushes += one.forced_flushes;
            total.flushes.ranged += one.flushes.ranged;
            total.flushes.full += one.flushes.full;
            total.flushes.skipped += one.flushes.skipped;
            total.ipis.sent += one.ipis.sent;
            total.ipis.saved += one.ipis.saved;
            total.max_deferred_pages = total.max_deferred_pages.max(one.max_deferred_pages);
            total.max_deferred_tables = total.max_deferred_tables.max(one.max_deferred_tables);
            total.max_pages_per_lock = total.max_pages_per_lock.max(one.max_pages_per_lock);
            ns += one.ns_per_page * one.pages as f64;
        }
        total.ns_per_page = if total.pages == 0 { 0.0 } else { ns / total.pages as f64 };
        total
    }
}

/// The columns of the table.
fn columns() -> Vec<Group<LayoutReport>> {
    vec![
        Group::new(
            "",
            vec![
                Column::words("layout", |row: &LayoutReport| label(&row.name)),
                Column::numbers("VMAs", |row| row.vmas.to_string()),
                Column::numbers("pages", |row| row.pages.to_string()),
            ],
        ),
        Group::new(
            "tables freed",
            vec![
                Column::numbers("PTE", |row| row.tables.pte.to_string()),
                Column::numbers("PMD", |row| row.tables.pmd.to_string()),
                Column::numbers("PUD", |row| row.tables.pud.to_string()),
            ],
        ),
        Group::new("batch pages", vec![Column::numbers("taken", |row| row.batches.to_string())]),
        Group::new(
            "flushes",
            vec![
                Column::numbers("ranged", |row| row.flushes.ranged.to_string()),
                Column::numbers("full", |row| row.flushes.full.to_string()),
                Column::numbers("forced", |row| row.forced_flushes.to_string()),
                Column::numbers("skipped", |row| row.flushes.skipped.to_string()),
            ],
        ),
        Group::new(
            "IPIs",
            vec![
                Column::numbers("sent", |row| row.ipis.sent.to_string()),
                Column::numbers("saved", |row| row.ipis.saved.to_string()),
            ],
        ),
        Group::new(
            "most waiting",
            vec![
                Column::numbers("pages", |row| row.max_deferred_pages.to_string()),
                Column::numbers("tables", |row| row.max_deferred_tables.to_string()),
            ],
        ),
        Group::new("most pages", vec![Column::numbers("per lock", |row| row.max_pages_per_lock.to_string())]),
        Group::new("", vec![Column::numbers("ns/page", |row| format!("{:.2}", row.ns_per_page))]),
    ]
}

/// What was lost or given back twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Frames nobody uses and nobody freed.
    pub frames: u64,
    /// Tables among the frames of tables.
    pub tables: u64,
    /// Frames freed twice, or while mapped.
    pub double_frees: u64,
}
