//! A timeline as one page for a browser: lanes, marks with details, the explanation, the sequence.
//! Nothing is loaded from anywhere.

use core::fmt::{self, Write};

use mmu_hosted::{Detail, Sequence, Verdict, What};

use crate::output::verdict::verdict_text;
use crate::output::words::counted;
use crate::timeline::explanation::{Sentence, explanation};
use crate::timeline::phrases::call_text;
use crate::timeline::rows::{Mark, Row, Timeline};

/// Rows beside those that matter, the last before the violation: a browser has to lay them out.
const MOST_OTHERS: usize = 3000;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The page.
#[must_use]
pub(crate) fn html_page(timeline: &Timeline, sequence: &Sequence, verdict: &Verdict, name: &str) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_page(&mut out, timeline, sequence, verdict, name);
    out
}

/// Text that is safe between tags and in attributes.
struct Safe<'a>(&'a str);

impl fmt::Display for Safe<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}

fn write_page(
    out: &mut String,
    timeline: &Timeline,
    sequence: &Sequence,
    verdict: &Verdict,
    name: &str,
) -> fmt::Result {
    let title = title(timeline, verdict);
    write!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{}: {}</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body class=\"{}\">\n<header>\n<h1>{}</h1>\n",
        Safe(name),
        Safe(&title),
        if verdict.is_clean() { "clean" } else { "wrong" },
        Safe(&title),
    )?;
    writeln!(out, "<p class=\"where\">{}</p>\n</header>\n<main>", Safe(&place(timeline, sequence, name)))?;
    writeln!(out, "<section>\n<h2>What happened</h2>\n<ol class=\"words\">")?;
    for sentence in explanation(timeline) {
        writeln!(out, "<li>{}</li>", linked(&sentence))?;
    }
    writeln!(out, "</ol>\n</section>")?;
    write_lanes(out, timeline, sequence)?;
    writeln!(out, "<section>\n<h2>The sequence</h2>\n<pre tabindex=\"0\">")?;
    write_sequence(out, sequence)?;
    writeln!(out, "</pre>\n</section>\n<section>\n<h2>What the checker said</h2>\n<pre tabindex=\"0\">")?;
    write!(out, "{}", Safe(&verdict_text(sequence, verdict)))?;
    write!(out, "</pre>\n</section>\n</main>\n<script>\n{SCRIPT}</script>\n</body>\n</html>\n")
}

fn title(timeline: &Timeline, verdict: &Verdict) -> String {
    match (&timeline.focus, verdict) {
        (Some(focus), _) => focus.violation.kind.to_string(),
        (None, Verdict::Panicked(words)) => format!("panic: {words}"),
        (None, Verdict::Ended(outcome)) if outcome.is_clean() => "clean: no violation was found".to_owned(),
        (None, Verdict::Ended(_)) => format!("not clean: {}", verdict.sort()),
    }
}

fn place(timeline: &Timeline, sequence: &Sequence, name: &str) -> String {
    let run = format!(
        "{name}, {}, {}",
        counted(sequence.nr_cpus.into(), "CPU", "CPUs"),
        counted(sequence.steps.len() as u64, "step", "steps")
    );
    match &timeline.focus {
        Some(focus) => format!(
            "CPU {}, address {:#x} of {}, frame {:#x}, event {}. {run}.",
            focus.violation.cpu.number(),
            focus.violation.address,
            focus.mm,
            focus.violation.frame.start_address(),
            timeline.rows.get(focus.row).map_or(0, |row| row.at),
        ),
        None => format!("{run}."),
    }
}

/// The sentence, with a link from each "event N" to the row it names.
fn linked(sentence: &Sentence) -> String {
    const WORD: &str = "event ";
    let mut out = String::new();
    let mut rest = sentence.text.as_str();
    for row in &sentence.rows {
        let Some(at) = rest.find(WORD) else { break };
        let digits = rest[at + WORD.len()..].chars().take_while(char::is_ascii_digit).count();
        let (named, after) = rest.split_at(at + WORD.len() + digits);
        let (before, named) = named.split_at(at);
        let _ = write!(out, "{}<a href=\"#e{row}\">{named}</a>", Safe(before));
        rest = after;
    }
    let _ = write!(out, "{}", Safe(rest));
    out
}

const LEGEND: [(&str, &str); 8] = [
    ("call", "call"),
    ("entry", "entry changed"),
    ("generation", "generation, gather"),
    ("interrupt", "request"),
    ("flush", "flush"),
    ("switch", "CR3"),
    ("fill", "cached, used, given out"),
    ("freed", "freed"),
];

fn write_lanes(out: &mut String, timeline: &Timeline, sequence: &Sequence) -> fmt::Result {
    let end = timeline.focus.as_ref().map_or(timeline.rows.len(), |focus| focus.row + 1);
    let mut others = MOST_OTHERS;
    let mut drawn: Vec<usize> = (0..end)
        .rev()
        .filter(|at| {
            let matters = timeline.rows[*at].matters;
            others = others.saturating_sub(usize::from(!matters));
            matters || others > 0
        })
        .collect();
    drawn.reverse();
    let mut cpus: Vec<usize> = drawn.iter().map(|at| timeline.rows[*at].cpu).collect();
    cpus.sort_unstable();
    cpus.dedup();
    let matter = drawn.iter().filter(|at| timeline.rows[**at].matters).count();
    writeln!(out, "<section>\n<h2>Timeline</h2>\n<div class=\"controls\">")?;
    writeln!(
        out,
        "<label><input type=\"checkbox\" id=\"all\"> all events ({} more, of {} in the run)</label>",
        drawn.len() - matter,
        timeline.rows.len()
    )?;
    for (class, words) in LEGEND {
        writeln!(out, "<span class=\"key {class}\">{words}</span>")?;
    }
    writeln!(out, "</div>\n<div class=\"look\">\n<div class=\"scroll\">")?;
    writeln!(out, "<div class=\"lanes\" style=\"--cpus:{}\">", cpus.len().max(1))?;
    write!(out, "<div class=\"row head\"><span>event</span>")?;
    for cpu in &cpus {
        write!(out, "<span>CPU {cpu}</span>")?;
    }
    writeln!(out, "</div>")?;
    let lanes = Lanes { timeline, sequence, cpus: &cpus };
    let mut calls = vec![None; timeline.nr_cpus];
    let mut next = drawn.into_iter().peekable();
    for (at, row) in timeline.rows.iter().enumerate() {
        calls[row.cpu] = row.call;
        if next.next_if_eq(&at).is_some() {
            lanes.write_row(out, at, &calls)?;
        }
        if let What::Detail(Detail::Ended(_)) = row.what {
            calls[row.cpu] = None;
        }
    }
    writeln!(out, "<svg class=\"arrows\" aria-hidden=\"true\"></svg>\n</div>\n</div>")?;
    writeln!(
        out,
        "<aside class=\"details\" aria-live=\"polite\">\n<h3>The event</h3>\n<dl></dl>\n<p class=\"hint\">Point at a mark, \
         or click it. With the keyboard: Tab to the marks, then the arrow keys.</p>\n</aside>\n</div>\n</section>"
    )
}

struct Lanes<'a> {
    timeline: &'a Timeline,
    sequence: &'a Sequence,
    cpus: &'a [usize],
}

impl Lanes<'_> {
    fn write_row(&self, out: &mut String, at: usize, calls: &[Option<usize>]) -> fmt::Result {
        let row = &self.timeline.rows[at];
        let minor = if row.matters { "" } else { " minor" };
        write!(out, "<div class=\"row{minor}\" id=\"e{at}\"><span class=\"at\">{}</span>", row.at)?;
        for (lane, cpu) in self.cpus.iter().enumerate() {
            if calls.get(*cpu).is_some_and(Option::is_some) {
                write!(out, "<i class=\"busy\" style=\"grid-column:{}\"></i>", lane + 2)?;
            }
        }
        let lane = self.cpus.iter().position(|cpu| *cpu == row.cpu).unwrap_or(0);
        write!(
            out,
            "<button type=\"button\" class=\"mark {}\" style=\"grid-column:{}\" data-lane=\"{lane}\" data-at=\"{}\" \
             data-cpu=\"{}\" data-long=\"{}\"",
            class(row.mark),
            lane + 2,
            row.at,
            row.cpu,
            Safe(&row.long)
        )?;
        if let Some(step) = row.call {
            write!(out, " data-step=\"{step}\" data-call=\"{}\"", Safe(&call_text(self.sequence, step)))?;
        }
        if let Some(mm) = &row.mm {
            write!(out, " data-mm=\"{}\"", Safe(mm))?;
        }
        if let Some(partner) = row.partner {
            let is = if matches!(row.what, What::Sent(_)) { "Answered at" } else { "Asked at" };
            write!(out, " data-partner=\"e{partner}\" data-partner-is=\"{is}\"")?;
        }
        writeln!(out, ">{}</button></div>", Safe(&text(row)))
    }
}

fn text(row: &Row) -> String {
    match row.what {
        What::Detail(Detail::Began(..)) => format!("\u{25b6} {}", row.short),
        What::Detail(Detail::Ended(_)) => format!("\u{25c0} {}", row.short),
        _ => row.short.clone(),
    }
}

const fn class(mark: Mark) -> &'static str {
    match mark {
        Mark::Call => "call",
        Mark::Entry => "entry",
        Mark::Generation => "generation",
        Mark::Interrupt => "interrupt",
        Mark::Flush => "flush",
        Mark::Switch => "switch",
        Mark::Fill => "fill",
        Mark::Allocated => "allocated",
        Mark::Freed => "freed",
        Mark::Violation => "violation",
    }
}

/// The text form, each step marked so that it can be found.
fn write_sequence(out: &mut String, sequence: &Sequence) -> fmt::Result {
    let text = sequence.to_string();
    let lines: Vec<&str> = text.lines().collect();
    let first = lines.len().saturating_sub(sequence.steps.len() + 1);
    for (number, line) in lines.iter().enumerate() {
        match number.checked_sub(first).filter(|step| *step < sequence.steps.len()) {
            Some(step) => writeln!(out, "<span id=\"l{step}\">{}</span>", Safe(line))?,
            None => writeln!(out, "{}", Safe(line))?,
        }
    }
    Ok(())
}
