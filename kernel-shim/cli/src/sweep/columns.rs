//! The columns of a sweep's tables: in the text report, in CSV, and on the page.

use crate::output::bytes::bytes;
use crate::output::table::{Align, Column, Group};
use crate::sweep::answer::modelled_ns;
use crate::sweep::measure::Measured;

/// A column whose numbers are the same in every run.
pub(crate) struct SweepColumn {
    /// What CSV and the page call it.
    pub(crate) name: &'static str,
    /// What stands in it.
    pub(crate) value: fn(&Measured) -> String,
    /// How the text report shows it; there the conditions stand above the table.
    text: Option<TextColumn>,
}

struct TextColumn {
    head: [&'static str; 2],
    /// Where a person reads something else than a program.
    value: Option<fn(&Measured) -> String>,
}

const fn condition(name: &'static str, value: fn(&Measured) -> String) -> SweepColumn {
    SweepColumn { name, value, text: None }
}

const fn count(name: &'static str, head: [&'static str; 2], value: fn(&Measured) -> String) -> SweepColumn {
    SweepColumn { name, value, text: Some(TextColumn { head, value: None }) }
}

/// All of them, in order.
pub(crate) const COLUMNS: [SweepColumn; 19] = [
    condition("batch", |cell| cell.batch.to_string()),
    condition("shape", |cell| cell.conditions.shape.to_string()),
    condition("size_pages", |cell| cell.conditions.size.0.to_string()),
    condition("cpus", |cell| cell.conditions.cpus.to_string()),
    condition("ceiling_pages", |cell| cell.conditions.ceiling.to_string()),
    condition("refuse", |cell| cell.conditions.refuse.to_string()),
    count("pages", ["", "pages"], |cell| cell.counts.pages.to_string()),
    count("tables", ["", "tables"], |cell| cell.counts.tables.to_string()),
    count("flushes", ["", "flushes"], |cell| cell.counts.flushes.to_string()),
    count("pages_per_flush", ["pages per", "flush"], |cell| format!("{:.2}", cell.counts.pages_per_flush())),
    count("full_flushes", ["full", "flushes"], |cell| cell.counts.full_flushes.to_string()),
    count("forced_flushes", ["forced", "flushes"], |cell| cell.counts.forced_flushes.to_string()),
    count("invlpgs", ["", "INVLPGs"], |cell| cell.counts.invlpgs.to_string()),
    count("contexts_dropped", ["contexts", "dropped"], |cell| cell.counts.contexts_dropped.to_string()),
    count("ipis_sent", ["IPIs", "sent"], |cell| cell.counts.ipis_sent.to_string()),
    count("ipis_avoided_lazy", ["lazy CPUs", "spared"], |cell| cell.counts.ipis_avoided_lazy.to_string()),
    count("batch_pages_peak", ["batch", "pages"], |cell| cell.counts.batch_pages_peak.to_string()),
    SweepColumn {
        name: "bytes_unfreed_peak",
        value: |cell| cell.counts.bytes_unfreed_peak.to_string(),
        text: Some(TextColumn {
            head: ["unfreed", "at peak"],
            value: Some(|cell| bytes(cell.counts.bytes_unfreed_peak)),
        }),
    },
    count("longest_stretch_pages", ["longest", "stretch"], |cell| cell.counts.longest_stretch.to_string()),
];

/// The columns of the text report: the setting, what is counted, what was measured, and what
/// follows from a model.
pub(crate) fn text_columns(ipi_ns: u32) -> Vec<Group<Measured>> {
    let number = |head, cell: Box<dyn Fn(&Measured) -> String>| Column { head, align: Align::Right, cell };
    let counts = COLUMNS.iter().filter_map(|column| {
        let text = column.text.as_ref()?;
        Some(number(text.head, Box::new(text.value.unwrap_or(column.value))))
    });
    let measured = |cell: &Measured| ns(cell.measured.map(|timing| timing.ns_per_page_median));
    let modelled = move |cell: &Measured| ns(modelled_ns(cell, ipi_ns));
    vec![
        Group::new("", vec![Column::numbers("batch", |cell: &Measured| cell.batch.to_string())]),
        Group::new("counted: the same in every run", counts.collect()),
        Group::new("measured", vec![number(["ns/page", "(median)"], Box::new(measured))]),
        Group::new(
            format!("with {ipi_ns} ns an IPI"),
            vec![number(["modelled", "ns/page"], Box::new(modelled))],
        ),
    ]
}

fn ns(ns: Option<f64>) -> String {
    ns.map_or_else(|| String::from("-"), |ns| format!("{ns:.2}"))
}
