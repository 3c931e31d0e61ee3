//! What a booted run found: the lines the image prints, put together and printed for a person or a
//! program.

use core::str::FromStr;
use std::io;

use mmu_kernel_shim::Snapshot;
use serde::Serialize;

use crate::boot::emulator::Ending;
use crate::boot::layout_plan::LayoutPlan;
use crate::boot::options::{BootFault, Workload};
use crate::output::escape::{escaped, label, write_json};
use crate::output::report::{LayoutReport, Report};
use crate::output::table::{Column, Group, write_table};
use crate::output::words::counted;

/// Everything a booted run found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct BootReport {
    /// As in the report of `run`: the drill and the layout are its rows.
    #[serde(flatten)]
    pub report: Report,
    /// The emulator, in its own words.
    pub emulator: String,
    /// How it ran the CPUs: `tcg` or `kvm`.
    pub accelerator: String,
    /// CPUs of the machine.
    pub cpus: u32,
    /// Memory of the machine.
    pub memory_mib: u64,
    /// What the image was told to do.
    pub workload: String,
    /// The fault that was planted.
    pub fault: Option<String>,
    /// How the run ended, in one word or two.
    pub ending: &'static str,
    /// The parts of the workload.
    pub phases: Vec<Phase>,
    /// All of them together.
    pub total: Total,
    /// What things cost, in cycles of the emulator, not of hardware.
    pub emulated_cycles: Vec<Cycles>,
    /// What was counted here and on the hosted machine.
    pub comparisons: Vec<Comparison>,
    /// Base pages of the layout that memory held, and of all of it.
    pub layout_pages: Option<(u64, u64)>,
    #[serde(skip)]
    counts: Vec<(String, Snapshot)>,
    #[serde(skip)]
    pcid: bool,
    /// CPUs that have started, once the image has printed it.
    #[serde(skip)]
    started: Option<u64>,
    /// Whether the image has printed that all was well, besides ending with that status.
    #[serde(skip)]
    passed: bool,
    /// Whether the image has printed its totals.
    #[serde(skip)]
    summed_up: bool,
    /// The last line, whatever it was.
    #[serde(skip)]
    last: Option<String>,
    /// What the image printed that is none of the above.
    #[serde(skip)]
    console: Vec<String>,
}

/// One part of the workload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Phase {
    /// Its name.
    pub name: String,
    /// How long it took, by the emulated clock.
    pub ms: u64,
    /// Entries of pages cleared.
    pub pages: u64,
    /// Page tables freed.
    pub tables: u64,
    /// Times a CPU told others to flush, and waited.
    pub shootdowns: u64,
    /// Interrupts sent for that.
    pub ipis: u64,
    /// Page faults of programs, answered.
    pub faults: u64,
}

/// The whole run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Total {
    /// Entries of pages cleared.
    pub pages: u64,
    /// Page tables freed.
    pub tables: u64,
    /// Times a CPU told others to flush, and waited.
    pub shootdowns: u64,
    /// The shortest of them, in emulated cycles.
    pub shootdown_cycles_least: u64,
    /// The mean of them: under load, mostly waits for a core of the host.
    pub shootdown_cycles_mean: u64,
    /// Interrupts sent for that.
    pub ipis: u64,
    /// Flush requests for pages.
    pub flushes_ranged: u64,
    /// Flush requests for whole address spaces.
    pub flushes_full: u64,
    /// Processes that exited.
    pub exits: u64,
    /// Page faults of programs, answered.
    pub faults: u64,
    /// How long all took, by the emulated clock.
    pub ms: u64,
}

/// What one thing cost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cycles {
    /// What.
    pub what: String,
    /// The least, in emulated cycles.
    pub least: u64,
    /// The median.
    pub median: u64,
    /// How often it was measured.
    pub times: u64,
}

/// The same work on two machines.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Which work.
    pub of: String,
    /// How many counters were compared.
    pub counters: usize,
    /// Those that differ.
    pub differences: Vec<Difference>,
}

/// A counter that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// Which.
    pub counter: &'static str,
    /// On the hosted machine.
    pub hosted: u64,
    /// On the booted one.
    pub booted: u64,
}

impl Comparison {
    /// Compares every counter.
    #[must_use]
    pub fn between(name: &str, hosted: &Snapshot, booted: &Snapshot) -> Self {
        let pairs = hosted.fields().into_iter().zip(booted.fields());
        let differences = pairs
            .filter(|((_, hosted), (_, booted))| hosted != booted)
            .map(|((counter, hosted), (_, booted))| Difference { counter, hosted, booted })
            .collect();
        Self { of: name.to_owned(), counters: Snapshot::LEN, differences }
    }
}

impl BootReport {
    pub(crate) fn new(
        emulator: String,
        accelerator: String,
        cpus: u32,
        memory_mib: u64,
        workload: String,
        fault: Option<String>,
    ) -> Self {
        let report = Report { checked: true, ..Report::default() };
        let emulator = escaped(&emulator);
        Self { report, emulator, accelerator, cpus, memory_mib, workload, fault, ..Self::default() }
    }

    /// Takes in one line of the image; returns what to show meanwhile, if it says how far it is.
    pub(crate) fn take_line(&mut self, line: String) -> Option<String> {
        // An emulator may print anything, and its lines go to a terminal.
        let line = escaped(&line);
        self.last = Some(line.clone());
        let (kind, rest) = line.split_once(": ").unwrap_or((&line, ""));
        match kind {
            "progress" => return Some(rest.to_owned()),
            "phase" => self.phases.push(Phase {
                name: text(rest, "name").unwrap_or_default().to_owned(),
                ms: number(rest, "ms"),
                pages: number(rest, "pages"),
                tables: number(rest, "tables"),
                shootdowns: number(rest, "shootdowns"),
                ipis: number(rest, "ipis"),
                faults: number(rest, "faults"),
            }),
            "count" => self.counts.push((text(rest, "of").unwrap_or_default().to_owned(), snapshot(rest))),
            "cycles" => self.emulated_cycles.push(Cycles {
                what: rest.split_once("what=").map_or("", |(_, what)| what).to_owned(),
                least: number(rest, "least"),
                median: number(rest, "median"),
                times: number(rest, "times"),
            }),
            "total" => self.take_total(rest),
            "boot" if rest == "verdict Pass" => self.passed = true,
            "boot" if text(rest, "cpus").is_some() => {
                self.started = Some(number(rest, "cpus"));
                self.pcid = text(rest, "pcid") == Some("true");
            }
            "boot" | "layout" => {}
            "violation" => self.take_violation(rest),
            _ => self.console.push(line),
        }
        None
    }

    fn take_total(&mut self, rest: &str) {
        self.summed_up = true;
        self.total = Total {
            pages: number(rest, "pages"),
            tables: number(rest, "tables"),
            shootdowns: number(rest, "shootdowns"),
            shootdown_cycles_least: number(rest, "shootdown_cycles_least"),
            shootdown_cycles_mean: number(rest, "shootdown_cycles_mean"),
            ipis: number(rest, "ipis"),
            flushes_ranged: number(rest, "flushes_ranged"),
            flushes_full: number(rest, "flushes_full"),
            exits: number(rest, "exits"),
            faults: number(rest, "faults"),
            ms: number(rest, "ms"),
        };
        self.report.leaked_frames = number(rest, "lost_frames");
        self.report.leaked_tables = number(rest, "lost_tables");
        self.report.double_frees = number(rest, "double_frees");
    }

    fn take_violation(&mut self, rest: &str) {
        // The details of a violation follow its first line, indented.
        match (rest.starts_with(' '), self.report.told_violations.last_mut()) {
            (true, Some(story)) => *story += &format!("{rest}\n"),
            _ => {
                self.report.violations += 1;
                self.report.told_violations.push(format!("violation: {rest}\n"));
            }
        }
    }

    /// The run has ended like this.
    pub(crate) fn set_ending(&mut self, ending: Ending) {
        self.ending = match ending {
            Ending::Pass => "pass",
            Ending::Violation => "violation",
            Ending::Usage => "usage",
            Ending::Panic => "panic",
            Ending::Exception => "exception",
            Ending::Hang => "hang",
            Ending::Reset => "reset",
            Ending::TimedOut => "timeout",
        };
        let what = match ending {
            Ending::Pass | Ending::Usage | Ending::TimedOut => return,
            // The image has printed it.
            Ending::Violation if self.report.violations > 0 => return,
            Ending::Violation => "a test of the image failed",
            Ending::Panic => "the kernel panicked",
            Ending::Exception => "the kernel took an exception",
            Ending::Hang => "no CPU made progress; the state of each:",
            Ending::Reset => "the machine was reset by a fault that its kernel could not report",
        };
        self.report.violations += 1;
        let console: String = self.console.iter().map(|line| format!("  {line}\n")).collect();
        self.report.told_violations.push(format!("violation: {what}\n{console}"));
    }

    /// The last line of text that the image printed.
    pub(crate) fn last_words(&self) -> String {
        self.console.last().cloned().unwrap_or_default()
    }

    /// What the image said last, in words.
    pub(crate) fn last_line(&self) -> String {
        self.last.as_ref().map_or_else(
            || "the image printed nothing".to_owned(),
            |line| format!("the last line of the image was: {line}"),
        )
    }

    /// What the image should have done or printed in a run without a violation, and did not. Such a
    /// run would otherwise pass for one of a good engine.
    pub(crate) fn missing(&self, workload: Workload, fault: Option<BootFault>) -> Option<String> {
        if self.last.is_none() {
            return Some("the image printed nothing".to_owned());
        }
        if self.ending != "pass" {
            return None;
        }
        let Some(started) = self.started else {
            return Some("the image did not print how many CPUs it started".to_owned());
        };
        if started != u64::from(self.cpus) {
            let asked = counted(self.cpus.into(), "CPU was", "CPUs were");
            return Some(format!("{asked} asked for and {started} started"));
        }
        let phases = workload.phases(fault);
        let is_done = |name: &str| self.phases.iter().any(|phase| phase.name == name);
        if let Some(missing) = phases.iter().find(|name| !is_done(name)) {
            return Some(format!("the image did not run its part `{missing}`"));
        }
        let is_counted = |name: &str| self.counts.iter().any(|(of, _)| of == name);
        if let Some(missing) = ["drill", "layout"].iter().find(|of| phases.contains(of) && !is_counted(of)) {
            return Some(format!("the image did not print the counters of its part `{missing}`"));
        }
        if !phases.is_empty() && !self.summed_up {
            return Some("the image did not print its totals".to_owned());
        }
        if self.cpus > 1 && workload.shoots_down() && self.total.shootdowns == 0 {
            return Some("no CPU told another to flush".to_owned());
        }
        if !self.passed {
            return Some("the image did not print a verdict".to_owned());
        }
        fault.map(|fault| format!("the planted fault {fault} was not noticed"))
    }

    pub(crate) const fn has_pcid(&self) -> bool {
        self.pcid
    }

    pub(crate) fn counters_of(&self, of: &str) -> Option<Snapshot> {
        self.counts.iter().find(|(name, _)| name == of).map(|(_, counted)| *counted)
    }

    /// The layout that was run, as a row of the report.
    pub(crate) fn add_layout(&mut self, plan: &LayoutPlan) {
        self.layout_pages = Some((plan.nr_planned, plan.nr_pages));
        if let Some(counted) = self.counters_of("layout") {
            self.add_row(&plan.name, plan.nr_areas, plan.nr_planned, &counted);
        }
    }

    /// Takes in a comparison; that of the drill is a row of the report too.
    pub(crate) fn add_comparison(&mut self, comparison: Comparison) {
        if comparison.of == "drill"
            && let Some(counted) = self.counters_of("drill")
        {
            self.add_row("drill", 6, counted.leaves, &counted);
        }
        self.comparisons.push(comparison);
    }

    fn add_row(&mut self, name: &str, vmas: u64, pages: u64, counted: &Snapshot) {
        let row = LayoutReport::between(name, vmas, pages, &Snapshot::default(), counted);
        self.report.layouts.push(row);
    }

    /// Whether nothing was wrong, and both machines counted the same.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let same = self.comparisons.iter().all(|comparison| comparison.differences.is_empty());
        self.report.is_clean() && self.ending == "pass" && same
    }

    /// Writes the JSON form.
    ///
    /// # Errors
    /// What `out` returns.
    pub fn write_json(&self, mut out: impl io::Write) -> io::Result<()> {
        write_json(&mut out, self)
    }

    /// Writes what was done, what it cost, how it compares, and then what `run` writes.
    ///
    /// # Errors
    /// What `out` returns.
    pub fn write_text(&self, mut out: impl io::Write) -> io::Result<()> {
        let Self { emulator, accelerator, cpus, memory_mib, workload, .. } = self;
        let cpus = counted(u64::from(*cpus), "CPU", "CPUs");
        writeln!(out, "{cpus}, {memory_mib} MiB, workload {workload}, {emulator}, {accelerator}")?;
        if let Some(fault) = &self.fault {
            writeln!(out, "the fault {fault} is planted: a violation should follow")?;
        }
        if let Some((planned, all)) = self.layout_pages
            && planned < all
        {
            writeln!(out, "memory holds {planned} of the layout's {all} pages; --memory gives it more")?;
        }
        self.write_phases(&mut out)?;
        self.write_cycles(&mut out)?;
        self.write_comparisons(&mut out)?;
        writeln!(out)?;
        if !self.report.layouts.is_empty() {
            return self.report.write_text(out);
        }
        if self.report.told_violations.is_empty() {
            // The results of a self-test, for example.
            self.console.iter().try_for_each(|line| writeln!(out, "{line}"))?;
        }
        self.report.told_violations.iter().try_for_each(|story| write!(out, "{story}"))?;
        let verdict = if self.is_clean() { "clean" } else { "NOT CLEAN" };
        writeln!(out, "\n{verdict}: violations {}", self.report.violations)?;
        out.flush()
    }

    fn write_phases(&self, out: &mut impl io::Write) -> io::Result<()> {
        if self.phases.is_empty() {
            return Ok(());
        }
        let columns = vec![
            Column::words("phase", |phase: &Phase| phase.name.clone()),
            Column::numbers("ms", |phase| phase.ms.to_string()),
            Column::numbers("pages", |phase| phase.pages.to_string()),
            Column::numbers("tables", |phase| phase.tables.to_string()),
            Column::numbers("shootdowns", |phase| phase.shootdowns.to_string()),
            Column::numbers("IPIs", |phase| phase.ipis.to_string()),
            Column::numbers("page faults", |phase| phase.faults.to_string()),
        ];
        let Total { ms, pages, tables, shootdowns, ipis, faults, exits, .. } = self.total;
        let total = (pages > 0).then(|| {
            let name = "total".to_owned();
            Phase { name, ms, pages, tables, shootdowns, ipis, faults }
        });
        writeln!(out)?;
        write_table(out, &[Group::new("", columns)], "", self.phases.iter().chain(&total))?;
        if total.is_some() {
            writeln!(out, "{} exited", counted(exits, "process", "processes"))?;
        }
        Ok(())
    }

    fn write_cycles(&self, out: &mut impl io::Write) -> io::Result<()> {
        if self.emulated_cycles.is_empty() {
            return Ok(());
        }
        let columns = vec![
            Column::words("emulated cycles (not those of hardware)", |cost: &Cycles| cost.what.clone()),
            Column::numbers("least", |cost| cost.least.to_string()),
            Column::numbers("median", |cost| cost.median.to_string()),
        ];
        writeln!(out)?;
        write_table(out, &[Group::new("", columns)], "", &self.emulated_cycles)?;
        let Total { shootdowns, shootdown_cycles_least, shootdown_cycles_mean, .. } = self.total;
        if shootdowns > 0 {
            writeln!(
                out,
                "a shootdown, over the whole run: least {shootdown_cycles_least}, mean {shootdown_cycles_mean}"
            )?;
        }
        Ok(())
    }

    fn write_comparisons(&self, out: &mut impl io::Write) -> io::Result<()> {
        for Comparison { of, counters, differences } in &self.comparisons {
            let of = label(of);
            if differences.is_empty() {
                writeln!(out, "\n{of}: all {counters} counters are the same as on the hosted machine")?;
                continue;
            }
            writeln!(out, "\n{of}: {} of {counters} counters differ", differences.len())?;
            let columns = vec![
                Column::words("counter", |one: &Difference| one.counter.to_owned()),
                Column::numbers("hosted", |one| one.hosted.to_string()),
                Column::numbers("booted", |one| one.booted.to_string()),
            ];
            write_table(out, &[Group::new("", columns)], "", differences)?;
        }
        Ok(())
    }
}

/// The value of `key` in words of the form `key=value`.
fn text<'a>(words: &'a str, key: &str) -> Option<&'a str> {
    words
        .split_ascii_whitespace()
        .filter_map(|word| word.split_once('='))
        .find(|(k, _)| *k == key)
        .map(|(_, v)| v)
}

/// The number that `key` has, or 0.
fn number(words: &str, key: &str) -> u64 {
    text(words, key).and_then(|value| u64::from_str(value).ok()).unwrap_or(0)
}

fn snapshot(words: &str) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for (name, value) in words.split_ascii_whitespace().filter_map(|word| word.split_once('=')) {
        if let (Some(field), Ok(value)) = (snapshot.field_mut(name), value.parse()) {
            *field = value;
        }
    }
    snapshot
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(lines: &[&str]) -> BootReport {
        let mut report = BootReport::new("Q".into(), "tcg".into(), 4, 512, "full".into(), None);
        for line in lines {
            report.take_line((*line).to_owned());
        }
        report
    }

    #[test]
    fn lines_become_numbers() {
        let mut report = report(&[
            "boot: cpus=4 free_mib=221 pcid=true invpcid=false",
            "phase: name=churn ms=949 pages=163600 tables=4800 shootdowns=7 ipis=9 faults=123600",
            "count: of=drill cpus=4 ipis_sent=92 leaves=2986",
            "cycles: least=340 median=363 times=40 what=flush of one page, this CPU only",
            "total: pages=439237 lost_frames=0 exits=464",
        ]);
        report.set_ending(Ending::Pass);
        assert!(report.has_pcid() && report.is_clean());
        assert_eq!((report.phases[0].pages, report.total.exits), (163_600, 464));
        assert_eq!(report.emulated_cycles[0].what, "flush of one page, this CPU only");
        let counted = report.counters_of("drill").expect("it was counted");
        assert_eq!((counted.ipis_sent, counted.leaves), (92, 2986));
        report.add_comparison(Comparison::between("drill", &Snapshot { ipis_sent: 91, ..counted }, &counted));
        assert!(!report.is_clean(), "a difference is not clean");
        assert_eq!(
            report.comparisons[0].differences,
            [Difference { counter: "ipis_sent", hosted: 91, booted: 92 }]
        );
    }

    #[test]
    fn a_story_is_one_violation_however_many_lines_it_has() {
        let mut report =
            report(&["violation: a program read a frame that was freed", "violation:   cpu 2, address 0x10"]);
        report.set_ending(Ending::Violation);
        assert_eq!(report.report.violations, 1);
        assert!(report.report.told_violations[0].ends_with("freed\n  cpu 2, address 0x10\n"));
    }

    #[test]
    fn whatever_is_not_an_orderly_end_cannot_pass() {
        for ending in [Ending::Violation, Ending::Panic, Ending::Exception, Ending::Hang, Ending::Reset] {
            let mut report = report(&["total: pages=1", "cpu 0: in ring 0"]);
            report.set_ending(ending);
            assert!(!report.is_clean(), "{ending:?}");
            assert!(report.report.told_violations[0].contains("cpu 0: in ring 0"), "{ending:?}");
        }
    }
}
