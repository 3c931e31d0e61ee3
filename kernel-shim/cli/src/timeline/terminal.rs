//! A timeline drawn on a terminal: a column a CPU, time going down.

use core::fmt::{self, Write};

use mmu_hosted::{Detail, What};

use crate::output::words::counted;
use crate::timeline::explanation::explanation;
use crate::timeline::rows::{Mark, Row, Timeline};

/// Characters in a line.
const WIDTH: usize = 100;
/// Characters of the step in front of a line.
const STEP: usize = 7;
/// Columns narrower than this are no use: then every row names its CPU.
const NARROWEST: usize = 16;

/// Which rows are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WhichRows {
    /// Those that explain the violation; without one, the outline.
    WhatMatters,
    /// All.
    All,
}

/// Whether sorts of events differ in colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Colour {
    /// They do.
    On,
    /// Text only.
    Off,
}

/// Draws the timeline, and says below it what happened.
#[must_use]
pub(crate) fn draw_on_terminal(timeline: &Timeline, shown: WhichRows, colour: Colour) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = draw(&mut out, timeline, shown, colour);
    out
}

/// What is drawn of one row, or of several alike that follow one another.
struct Line<'a> {
    row: &'a Row,
    text: String,
}

fn draw(out: &mut String, timeline: &Timeline, shown: WhichRows, colour: Colour) -> fmt::Result {
    let is_shown = |row: &Row| shown == WhichRows::All || row.matters;
    let mut cpus: Vec<usize> = timeline.rows.iter().filter(|row| is_shown(row)).map(|row| row.cpu).collect();
    cpus.sort_unstable();
    cpus.dedup();
    let column = (WIDTH - STEP).checked_div(cpus.len()).map_or(WIDTH - STEP, |width| width.saturating_sub(2));
    let drawer = Drawer { cpus: &cpus, column, colour, as_list: column < NARROWEST };
    drawer.heads(out)?;
    let mut calls = vec![None; timeline.nr_cpus];
    let lines = lines(timeline, is_shown, shown);
    let mut next = lines.iter().peekable();
    for row in &timeline.rows {
        calls[row.cpu] = row.call;
        if let Some(line) = next.next_if(|line| core::ptr::eq(line.row, row)) {
            drawer.line(out, line, &calls)?;
        }
        if let What::Detail(Detail::Ended(_)) = row.what {
            calls[row.cpu] = None;
        }
    }
    let nr_shown = timeline.rows.iter().filter(|row| is_shown(row)).count();
    writeln!(out)?;
    for (number, sentence) in explanation(timeline).iter().enumerate() {
        paragraph(out, &format!("{}. ", number + 1), &sentence.text)?;
    }
    match shown {
        WhichRows::All => writeln!(out, "{}", counted(nr_shown as u64, "event", "events")),
        WhichRows::WhatMatters => {
            writeln!(
                out,
                "{nr_shown} of {}; --all draws the others too",
                counted(timeline.rows.len() as u64, "event", "events")
            )
        }
    }
}

/// The rows that are drawn; in an outline, entries cleared one after the other by one CPU become
/// one line.
fn lines<'a>(timeline: &'a Timeline, is_shown: impl Fn(&Row) -> bool, shown: WhichRows) -> Vec<Line<'a>> {
    let mut lines: Vec<Line<'a>> = Vec::new();
    let mut alike = 1;
    for row in timeline.rows.iter().filter(|row| is_shown(row)) {
        let joins = shown == WhichRows::WhatMatters
            && timeline.focus.is_none()
            && matches!(row.what, What::Detail(Detail::Cleared(..)))
            && lines.last().is_some_and(|line| {
                line.row.cpu == row.cpu && matches!(line.row.what, What::Detail(Detail::Cleared(..)))
            });
        if joins && let Some(last) = lines.last_mut() {
            alike += 1;
            last.text = format!("{} and {} more", last.row.short, alike - 1);
            continue;
        }
        alike = 1;
        lines.push(Line { row, text: row.short.clone() });
    }
    lines
}

struct Drawer<'a> {
    cpus: &'a [usize],
    column: usize,
    colour: Colour,
    /// Too many CPUs for columns.
    as_list: bool,
}

impl Drawer<'_> {
    fn heads(&self, out: &mut String) -> fmt::Result {
        write!(out, "{:>6} ", "event")?;
        if self.as_list {
            return writeln!(out, "  CPU");
        }
        for cpu in self.cpus {
            write!(out, "  {:<width$}", format!("CPU {cpu}"), width = self.column)?;
        }
        // Trailing blanks help nobody.
        out.truncate(out.trim_end().len());
        writeln!(out)
    }

    fn line(&self, out: &mut String, line: &Line<'_>, calls: &[Option<usize>]) -> fmt::Result {
        // A blank before the next column.
        let width = if self.as_list { WIDTH - STEP - 7 } else { self.column - 1 };
        let text = match line.row.what {
            What::Detail(Detail::Began(..)) => format!("> {}", line.text),
            What::Detail(Detail::Ended(_)) => format!("< {}", line.text),
            _ => line.text.clone(),
        };
        for (number, part) in wrap(&text, width).iter().enumerate() {
            if number == 0 {
                write!(out, "{:>6} ", line.row.at)?;
            } else {
                write!(out, "{:>6} ", "")?;
            }
            if self.as_list {
                write!(out, "  {:>3}  ", line.row.cpu)?;
                self.painted(out, line.row.mark, part)?;
            } else {
                self.cells(out, line.row, part, calls)?;
            }
            out.truncate(out.trim_end_matches(' ').len());
            writeln!(out)?;
        }
        Ok(())
    }

    /// One line across the columns: the part in that of its CPU, bars where others are busy.
    fn cells(&self, out: &mut String, row: &Row, part: &str, calls: &[Option<usize>]) -> fmt::Result {
        for cpu in self.cpus {
            let busy = calls.get(*cpu).is_some_and(Option::is_some);
            let is_edge =
                *cpu == row.cpu && matches!(row.what, What::Detail(Detail::Began(..) | Detail::Ended(_)));
            out.push_str(if busy && !is_edge { "| " } else { "  " });
            if *cpu == row.cpu {
                self.painted(out, row.mark, part)?;
                write!(out, "{:1$}", "", self.column.saturating_sub(part.chars().count()))?;
            } else {
                write!(out, "{:1$}", "", self.column)?;
            }
        }
        Ok(())
    }

    fn painted(&self, out: &mut String, mark: Mark, text: &str) -> fmt::Result {
        let code = match mark {
            _ if self.colour == Colour::Off => return out.write_str(text),
            Mark::Call => "1",
            Mark::Entry => "33",
            Mark::Generation => "35",
            Mark::Interrupt => "36",
            Mark::Flush => "32",
            Mark::Switch => "34",
            Mark::Fill | Mark::Allocated => return out.write_str(text),
            Mark::Freed => "31",
            Mark::Violation => "1;37;41",
        };
        write!(out, "\x1b[{code}m{text}\x1b[0m")
    }
}

/// Breaks a text into lines of at most `width` characters, between words where that is possible;
/// all but the first are set in.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut line = String::new();
    for word in text.split(' ') {
        let mut rest = word;
        loop {
            let indent = if lines.is_empty() { 0 } else { 2 };
            let gap = usize::from(!line.is_empty());
            let room =
                width.saturating_sub(indent + line.chars().count() + gap).max(usize::from(line.is_empty()));
            if rest.chars().count() <= room {
                line.push_str(&" "[..gap]);
                line.push_str(rest);
                break;
            }
            if line.is_empty() {
                // Longer than a line.
                let cut = rest.char_indices().nth(room).map_or(rest.len(), |(at, _)| at);
                line.push_str(&rest[..cut]);
                rest = &rest[cut..];
            }
            lines.push(format!("{:indent$}{}", "", core::mem::take(&mut line)));
        }
    }
    let indent = if lines.is_empty() { 0 } else { 2 };
    lines.push(format!("{:indent$}{line}", ""));
    lines
}

fn paragraph(out: &mut String, head: &str, text: &str) -> fmt::Result {
    for (number, line) in wrap(text, WIDTH - head.len()).iter().enumerate() {
        let head = if number == 0 { head } else { "   " };
        writeln!(out, "{head}{}", line.trim_start())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_line_is_too_long_and_nothing_is_lost() {
        let text = "caches 7fffffc00000 -> 123000 averyveryverylongwordthatmustbecut in two or three";
        for width in 4..60 {
            let lines = wrap(text, width);
            assert!(lines.iter().all(|line| line.chars().count() <= width), "{width}: {lines:?}");
            let letters = |text: &str| text.chars().filter(|c| *c != ' ').collect::<String>();
            assert_eq!(letters(&lines.concat()), letters(text), "{width}");
        }
    }
}
