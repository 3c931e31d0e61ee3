//! What a sweep found, as a table, as CSV and as JSON.

use std::io;

use serde::Serialize;

use crate::output::table::write_table;
use crate::sweep::answer::{Answer, groups, modelled_ns};
use crate::sweep::axes::Conditions;
use crate::sweep::columns::{COLUMNS, text_columns};
use crate::sweep::machine::{CPU_BYTES, FRAME_BYTES, GATHER_BYTES, MM_BYTES, TABLE_BYTES};
use crate::sweep::measure::{Measured, Measurements};

/// Everything a sweep has to say.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SweepReport {
    /// The settings under their conditions.
    pub(crate) cells: Vec<Measured>,
    /// Conditions for which the machine does not have enough frames.
    pub(crate) left_out: Vec<Conditions>,
    /// Which setting to take; none if nothing was timed, or there is no choice.
    pub(crate) answer: Option<Answer>,
    /// What was assumed.
    pub(crate) model: Model,
    /// What was taken off every sample, in nanoseconds.
    pub(crate) clock_ns: f64,
    /// What the engine needs, whatever the setting.
    pub(crate) memory: EngineMemory,
}

/// Costs that no hosted machine can measure.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Model {
    /// One interrupt, sent and waited for.
    pub(crate) ipi_ns: u32,
}

/// Bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct EngineMemory {
    /// One gather, on the stack of whoever unmaps.
    pub(crate) gather: usize,
    /// From the call of munmap down to the deepest call of the kernel's; as compiled.
    pub(crate) stack: usize,
    /// Of each CPU.
    pub(crate) cpu: usize,
    /// Of each address space.
    pub(crate) mm: usize,
    /// Of each frame that is a table: its lock, and the note of its used lines.
    pub(crate) table: usize,
    /// Of each frame, with this machine's counts and free list.
    pub(crate) frame: usize,
}

impl SweepReport {
    pub(crate) fn new(found: Measurements, ipi_ns: u32) -> Self {
        Self {
            answer: Answer::new(&found.cells, ipi_ns),
            cells: found.cells,
            left_out: found.left_out,
            model: Model { ipi_ns },
            clock_ns: found.clock_ns,
            memory: EngineMemory {
                gather: GATHER_BYTES,
                stack: found.stack_bytes,
                cpu: CPU_BYTES,
                mm: MM_BYTES,
                table: TABLE_BYTES,
                frame: FRAME_BYTES,
            },
        }
    }

    /// The same on one line each, in words.
    pub(crate) fn memory_words(&self) -> [String; 4] {
        let EngineMemory { gather, stack, cpu, mm, table, frame } = self.memory;
        [
            format!(
                "a gather: {gather} bytes on the stack; about {stack} with all calls down to the kernel's own"
            ),
            format!("each CPU: {cpu} bytes"),
            format!("each address space: {mm} bytes"),
            format!("each table: {table} bytes; each frame, with this machine's counts: {frame} bytes"),
        ]
    }

    /// How much the samples of one setting differ, in words.
    pub(crate) fn noise_words(&self) -> Option<String> {
        let timings = self.cells.iter().filter_map(|cell| cell.measured);
        let mut excess: Vec<f64> = timings
            .filter(|timing| timing.ns_per_page_min > 0.0)
            .map(|timing| timing.ns_per_page_median / timing.ns_per_page_min - 1.0)
            .collect();
        excess.sort_by(f64::total_cmp);
        let middle = excess.get(excess.len() / 2)? * 100.0;
        Some(format!(
            "Noise: the median sample of a setting took {middle:.0} % longer than its quickest (the median over all settings)."
        ))
    }

    pub(crate) fn write_json(&self, mut out: impl io::Write) -> io::Result<()> {
        serde_json::to_writer(&mut out, self)?;
        writeln!(out)?;
        out.flush()
    }

    pub(crate) fn write_csv(&self, mut out: impl io::Write) -> io::Result<()> {
        let header: Vec<&str> = COLUMNS.iter().map(|column| column.name).collect();
        writeln!(
            out,
            "{},measured_ns_per_page_median,measured_ns_per_page_min,measured_samples,modelled_ipi_ns,modelled_ns_per_page",
            header.join(",")
        )?;
        for cell in &self.cells {
            let mut row: Vec<String> = COLUMNS.iter().map(|column| (column.value)(cell)).collect();
            if let Some(timing) = cell.measured {
                row.push(format!("{:.3}", timing.ns_per_page_median));
                row.push(format!("{:.3}", timing.ns_per_page_min));
                row.push(timing.samples.to_string());
            } else {
                row.extend([String::new(), String::new(), String::from("0")]);
            }
            row.push(self.model.ipi_ns.to_string());
            row.push(modelled_ns(cell, self.model.ipi_ns).map_or_else(String::new, |ns| format!("{ns:.3}")));
            writeln!(out, "{}", row.join(","))?;
        }
        out.flush()
    }

    pub(crate) fn write_text(&self, mut out: impl io::Write) -> io::Result<()> {
        for group in groups(&self.cells) {
            self.write_group(&mut out, group)?;
        }
        for conditions in &self.left_out {
            writeln!(out, "left out, because the machine does not have enough frames: {conditions}")?;
        }
        writeln!(out, "memory, whatever the setting")?;
        for words in self.memory_words() {
            writeln!(out, "  {words}")?;
        }
        match &self.answer {
            Some(answer) => {
                writeln!(out)?;
                for words in answer.words() {
                    writeln!(out, "{words}")?;
                }
                if let Some(words) = self.noise_words() {
                    writeln!(out, "{words}")?;
                }
            }
            None => writeln!(out, "\nno choice: {}", self.why_no_answer())?,
        }
        out.flush()
    }

    /// Why there is no answer.
    pub(crate) fn why_no_answer(&self) -> &'static str {
        if self.cells.iter().any(|cell| cell.measured.is_none()) {
            "nothing was timed"
        } else {
            "under these conditions every setting flushes equally often"
        }
    }

    fn write_group(&self, out: &mut impl io::Write, group: &[Measured]) -> io::Result<()> {
        let Some(first) = group.first() else { return Ok(()) };
        writeln!(out, "{}", first.conditions)?;
        write_table(out, &text_columns(self.model.ipi_ns), " | ", group)?;
        writeln!(out)
    }
}
