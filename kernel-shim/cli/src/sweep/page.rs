//! The page a sweep writes: the answer in words, then charts. One file, no script, nothing fetched.

use std::io;

use crate::output::bytes::bytes;
use crate::output::words::counted;
use crate::sweep::answer::modelled_ns;
use crate::sweep::axes::{Arrangement, Batch, Conditions};
use crate::sweep::chart::{Chart, Place, STYLES, Series, Unit, key};
use crate::sweep::columns::COLUMNS;
use crate::sweep::measure::Measured;
use crate::sweep::report::SweepReport;

const STYLE: &str = include_str!("page.css");
const X_NAME: &str = "batch setting (slots)";

/// What one chart shows.
struct Metric {
    title: &'static str,
    y_name: &'static str,
    unit: Unit,
    /// Where the number comes from.
    source: Source,
    value: fn(&Measured, u32) -> Option<f64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Counted,
    Measured,
    Modelled,
}

const METRICS: [Metric; 9] = [
    Metric {
        title: "Time for a page",
        y_name: "ns per page",
        unit: Unit::Number,
        source: Source::Measured,
        value: |cell, _| cell.measured.map(|timing| timing.ns_per_page_median),
    },
    Metric {
        title: "Time for a page, interrupts included",
        y_name: "ns per page",
        unit: Unit::Number,
        source: Source::Modelled,
        value: modelled_ns,
    },
    Metric {
        title: "Pages for each flush",
        y_name: "pages per flush",
        unit: Unit::Number,
        source: Source::Counted,
        value: |cell, _| Some(cell.counts.pages_per_flush()),
    },
    Metric {
        title: "Interrupts sent",
        y_name: "IPIs per 1000 pages",
        unit: Unit::Number,
        source: Source::Counted,
        value: |cell, _| Some(cell.counts.ipis_per_1000_pages()),
    },
    Metric {
        title: "Memory held back: cleared, and not free yet",
        y_name: "bytes unfreed at peak",
        unit: Unit::Bytes,
        source: Source::Counted,
        value: |cell, _| Some(cell.counts.bytes_unfreed_peak as f64),
    },
    Metric {
        title: "Longest stretch without a preemption point",
        y_name: "pages in a stretch",
        unit: Unit::Number,
        source: Source::Counted,
        value: |cell, _| Some(cell.counts.longest_stretch as f64),
    },
    Metric {
        title: "Pages invalidated one by one, on all CPUs",
        y_name: "INVLPGs per page",
        unit: Unit::Number,
        source: Source::Counted,
        value: |cell, _| Some(cell.counts.invlpgs as f64 / cell.counts.pages as f64),
    },
    Metric {
        title: "Contexts dropped whole, on all CPUs",
        y_name: "CR3 loads per 1000 pages",
        unit: Unit::Number,
        source: Source::Counted,
        value: |cell, _| Some(cell.counts.contexts_dropped as f64 * 1000.0 / cell.counts.pages as f64),
    },
    Metric {
        title: "Interrupts that lazy CPUs were spared",
        y_name: "IPIs spared per 1000 pages",
        unit: Unit::Number,
        source: Source::Counted,
        value: |cell, _| Some(cell.counts.ipis_avoided_lazy as f64 * 1000.0 / cell.counts.pages as f64),
    },
];

/// One way to choose lines: everything is at the base but one axis.
struct View {
    id: &'static str,
    name: &'static str,
    /// The value of the axis.
    value: fn(&Conditions) -> String,
    /// `base` with the axis as in `other`.
    with: fn(Conditions, &Conditions) -> Conditions,
}

const VIEWS: [View; 5] = [
    View {
        id: "shape",
        name: "how the pages lie",
        value: |conditions| match conditions.shape {
            Arrangement::Process(name) => format!("{name}, {}", conditions.size.in_words()),
            shape => shape.to_string(),
        },
        with: |base, other| match other.shape {
            // Of its own size.
            Arrangement::Process(_) => Conditions { shape: other.shape, size: other.size, ..base },
            shape => Conditions { shape, ..base },
        },
    },
    View {
        id: "size",
        name: "how many pages",
        value: |conditions| conditions.size.in_words(),
        with: |base, other| Conditions { size: other.size, ..base },
    },
    View {
        id: "cpus",
        name: "which CPUs",
        value: |conditions| match conditions.cpus.lazy {
            0 if conditions.cpus.total == 1 => String::from("1 CPU"),
            0 => format!("{} CPUs", conditions.cpus.total),
            lazy => format!("{} CPUs, {lazy} lazy", conditions.cpus.total),
        },
        with: |base, other| Conditions { cpus: other.cpus, ..base },
    },
    View {
        id: "ceiling",
        name: "ceiling of a flush by pages",
        value: |conditions| format!("ceiling {}", conditions.ceiling),
        with: |base, other| Conditions { ceiling: other.ceiling, ..base },
    },
    View {
        id: "refuse",
        name: "refused batch pages",
        value: |conditions| match conditions.refuse.to_string().as_str() {
            "never" => String::from("none refused"),
            "always" => String::from("all refused"),
            number => format!("every {number}th refused"),
        },
        with: |base, other| Conditions { refuse: other.refuse, ..base },
    },
];

impl SweepReport {
    /// Writes the page.
    pub(crate) fn write_html(&self, mut out: impl io::Write) -> io::Result<()> {
        let out = &mut out;
        writeln!(
            out,
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n<title>teardown sweep: which batch size?</title>\n\
             <style>\n{STYLE}{}</style>\n</head>\n<body>\n<main>",
            legend_rules()
        )?;
        self.write_answer(out)?;
        self.write_charts(out)?;
        self.write_memory(out)?;
        self.write_table(out)?;
        writeln!(out, "</main>\n</body>\n</html>")?;
        out.flush()
    }

    fn write_answer(&self, out: &mut impl io::Write) -> io::Result<()> {
        writeln!(out, "<h1>Which batch size should I take, and why?</h1>")?;
        let Some(answer) = &self.answer else {
            return writeln!(out, "<p class=\"lead\">No choice: {}.</p>", self.why_no_answer());
        };
        for (number, words) in answer.words().iter().enumerate() {
            writeln!(out, "<p{}>{words}</p>", if number == 0 { " class=\"lead\"" } else { "" })?;
        }
        writeln!(
            out,
            "<div class=\"wide\"><table><thead><tr><th>setting</th><th>cost, times the cheapest<br>(mean)</th>\
             <th>cost, times the cheapest<br>(worst)</th><th>unfreed at the peak<br>(bytes)</th><th>flushes</th></tr></thead><tbody>"
        )?;
        for setting in &answer.settings {
            writeln!(
                out,
                "<tr{}><th>{}</th><td>{:.2} x</td><td>{:.2} x</td><td>{}</td><td>{}</td></tr>",
                if setting.batch == answer.choice { " class=\"strong\"" } else { "" },
                setting.batch,
                setting.mean_ratio,
                setting.worst_ratio,
                bytes(setting.bytes_unfreed_peak),
                setting.flushes,
            )?;
        }
        writeln!(out, "</tbody></table></div>")?;
        writeln!(
            out,
            "<p class=\"note\">Settings: 8 is the slots on the stack alone, N one more page of N slots, KxN so many pages of N \
             slots (19x510 is the engine's default), unlimited as many pages as it takes, adaptive the fewest that come to as \
             few flushes as 19x510. Unfreed memory (pages and tables) and flushes: {}.</p>",
            answer.memory_at
        )
    }

    fn write_charts(&self, out: &mut impl io::Write) -> io::Result<()> {
        let Some(first) = self.cells.first() else { return Ok(()) };
        // What the other axes are at: the base of the default sweep where that was measured.
        let base = if self.cells.iter().any(|cell| cell.conditions == Conditions::BASE) {
            Conditions::BASE
        } else {
            first.conditions
        };
        let mut views: Vec<(&View, Vec<Conditions>)> =
            VIEWS.iter().map(|view| (view, self.lines(view, base))).collect();
        // A single line looks the same in every view.
        let several: Vec<bool> = views.iter().map(|(_, lines)| lines.len() > 1).collect();
        if several.contains(&true) {
            views.retain(|(_, lines)| lines.len() > 1);
        } else {
            views.truncate(1);
        }
        writeln!(out, "<h2>Charts</h2>")?;
        writeln!(
            out,
            "<p class=\"note\"><b class=\"tag counted\">counted</b> is the same in every run. <b class=\"tag measured\">measured</b> \
             is what the machine that ran the sweep needed, the median of its samples, with no cost for interrupts. \
             <b class=\"tag modelled\">modelled</b> adds {} ns for each interrupt sent. The shaded setting is the one chosen \
             above. Lines that would lie on each other are drawn a little apart. A page is 4 KiB, of <i>huge</i> 2 MiB, \
             of a process what it was; a process is of its own size.{}</p>",
            self.model.ipi_ns,
            self.noise_words().map_or_else(String::new, |words| format!(" {words}"))
        )?;
        for (number, (view, _)) in views.iter().enumerate() {
            let checked = if number == 0 { " checked" } else { "" };
            writeln!(
                out,
                "<input type=\"radio\" name=\"view\" class=\"view\" id=\"by-{}\"{checked}>",
                view.id
            )?;
        }
        write!(out, "<nav>One line for each: ")?;
        for (view, _) in &views {
            write!(out, "<label for=\"by-{}\">{}</label> ", view.id, view.name)?;
        }
        writeln!(out, "</nav>")?;
        for (view, lines) in &views {
            self.write_view(out, view, lines, base)?;
        }
        Ok(())
    }

    /// The conditions that differ from `base` in the axis of `view` only.
    fn lines(&self, view: &View, base: Conditions) -> Vec<Conditions> {
        let mut lines: Vec<Conditions> = Vec::new();
        for cell in &self.cells {
            let conditions = cell.conditions;
            if (view.with)(base, &conditions) == conditions && !lines.contains(&conditions) {
                lines.push(conditions);
            }
        }
        if view.id != "shape" {
            lines.sort_by_key(|conditions| {
                (conditions.size, conditions.cpus.total, conditions.ceiling.pages())
            });
        }
        lines
    }

    fn write_view(
        &self,
        out: &mut impl io::Write,
        view: &View,
        lines: &[Conditions],
        base: Conditions,
    ) -> io::Result<()> {
        let others: Vec<String> =
            VIEWS.iter().filter(|other| other.id != view.id).map(|other| (other.value)(&base)).collect();
        writeln!(out, "<section class=\"by-{}\">\n<div class=\"legend\">", view.id)?;
        for (index, conditions) in lines.iter().enumerate() {
            writeln!(
                out,
                "<label><input type=\"checkbox\" class=\"t{index}\" checked>{}{}</label>",
                key(index),
                (view.value)(conditions)
            )?;
        }
        writeln!(
            out,
            "<span class=\"fixed\">The rest is fixed: {}.</span>\n</div>\n<div class=\"charts\">",
            others.join(", ")
        )?;
        let (batches, places) = self.places();
        for metric in &METRICS {
            let series: Vec<Series> = lines
                .iter()
                .map(|conditions| Series {
                    name: (view.value)(conditions),
                    values: batches
                        .iter()
                        .map(|batch| {
                            let cell = self
                                .cells
                                .iter()
                                .find(|cell| cell.batch == *batch && cell.conditions == *conditions);
                            cell.and_then(|cell| (metric.value)(cell, self.model.ipi_ns))
                        })
                        .collect(),
                })
                .collect();
            if !series.iter().flat_map(|series| series.values.iter().flatten()).any(|value| *value > 0.0) {
                continue;
            }
            let (x_name, y_name, unit) = (X_NAME, metric.y_name, metric.unit);
            let chart = Chart { x_name, y_name, unit, places: &places, series: &series };
            let (class, source) = match metric.source {
                Source::Counted => ("counted", String::from("counted")),
                Source::Measured => ("measured", String::from("measured, median")),
                Source::Modelled => ("modelled", format!("modelled, {} ns an IPI", self.model.ipi_ns)),
            };
            write!(
                out,
                "<figure><figcaption>{} <b class=\"tag {class}\">{source}</b></figcaption>\n{}</figure>\n",
                metric.title,
                chart.svg()
            )?;
        }
        writeln!(out, "</div>\n</section>")
    }

    /// The settings in the order of what they hold.
    fn places(&self) -> (Vec<Batch>, Vec<Place>) {
        let mut batches: Vec<Batch> = Vec::new();
        for cell in &self.cells {
            if !batches.contains(&cell.batch) {
                batches.push(cell.batch);
            }
        }
        batches.sort_by_key(|batch| match *batch {
            Batch::Bundle => 0,
            Batch::Pages { pages, slots } => u64::from(pages) * u64::from(slots - 1),
            Batch::Unlimited => u64::MAX - 1,
            Batch::Adaptive => u64::MAX,
        });
        let chosen = self.answer.as_ref().map(|answer| answer.choice);
        let places = batches
            .iter()
            .map(|batch| Place {
                label: batch.to_string(),
                joined: *batch != Batch::Adaptive,
                chosen: chosen == Some(*batch),
            })
            .collect();
        (batches, places)
    }

    fn write_memory(&self, out: &mut impl io::Write) -> io::Result<()> {
        writeln!(out, "<h2>Memory, whatever the setting</h2>\n<ul>")?;
        for words in self.memory_words() {
            writeln!(out, "<li>{words}</li>")?;
        }
        writeln!(out, "</ul>")
    }

    fn write_table(&self, out: &mut impl io::Write) -> io::Result<()> {
        writeln!(
            out,
            "<h2>All numbers</h2>\n<details><summary>{}</summary>\n<div class=\"wide rows\"><table><thead><tr>",
            counted(self.cells.len() as u64, "row", "rows")
        )?;
        for column in &COLUMNS {
            write!(out, "<th>{}</th>", column.name.replace('_', " "))?;
        }
        writeln!(
            out,
            "<th class=\"measured\">measured ns per page (median)</th><th class=\"modelled\">modelled ns per page</th></tr></thead><tbody>"
        )?;
        for cell in &self.cells {
            write!(out, "<tr>")?;
            for column in &COLUMNS {
                write!(out, "<td>{}</td>", (column.value)(cell))?;
            }
            let ns = |ns: Option<f64>| ns.map_or_else(String::new, |ns| format!("{ns:.2}"));
            let measured = ns(cell.measured.map(|timing| timing.ns_per_page_median));
            writeln!(out, "<td>{measured}</td><td>{}</td></tr>", ns(modelled_ns(cell, self.model.ipi_ns)))?;
        }
        writeln!(out, "</tbody></table></div></details>")?;
        for conditions in &self.left_out {
            writeln!(
                out,
                "<p class=\"note\">Left out, because the machine does not have enough frames: {conditions}.</p>"
            )?;
        }
        Ok(())
    }
}

/// A line goes when its box in the legend is cleared; the first sixteen, which is more than anyone
/// can tell apart.
fn legend_rules() -> String {
    (0..2 * STYLES)
        .map(|index| format!("section:has(.t{index}:not(:checked)) .s{index} {{ display: none }}\n"))
        .collect()
}
