//! Tables of text: from a list of columns, each as wide as what stands in it.

use std::io::{self, Write};

/// Columns that belong together, under one title.
pub(crate) struct Group<R> {
    /// Stands above their heads; may be empty.
    pub(crate) title: String,
    pub(crate) columns: Vec<Column<R>>,
}

/// One column of a table whose rows are made from `R`.
pub(crate) struct Column<R> {
    /// The two lines of its head.
    pub(crate) head: [&'static str; 2],
    pub(crate) align: Align,
    /// What stands in it.
    pub(crate) cell: Box<dyn Fn(&R) -> String>,
}

/// On which side blanks go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

impl<R> Group<R> {
    pub(crate) fn new(title: impl Into<String>, columns: Vec<Column<R>>) -> Self {
        Self { title: title.into(), columns }
    }
}

impl<R: 'static> Column<R> {
    /// A column of words, with a head of one line.
    pub(crate) fn words(head: &'static str, cell: fn(&R) -> String) -> Self {
        Self { head: ["", head], align: Align::Left, cell: Box::new(cell) }
    }

    /// A column of numbers, with a head of one line.
    pub(crate) fn numbers(head: &'static str, cell: fn(&R) -> String) -> Self {
        Self { head: ["", head], align: Align::Right, cell: Box::new(cell) }
    }
}

/// Writes the titles and heads, as far as there are any, and a line for each row. `gap` stands
/// between groups.
///
/// # Errors
/// What `out` returns.
pub(crate) fn write_table<'r, R: 'r>(
    out: &mut impl Write,
    groups: &[Group<R>],
    gap: &str,
    rows: impl IntoIterator<Item = &'r R>,
) -> io::Result<()> {
    let mut lines: Vec<Vec<Vec<String>>> = (0..2)
        .map(|line| {
            let head = |column: &Column<R>| column.head[line].to_owned();
            groups.iter().map(|group| group.columns.iter().map(head).collect()).collect()
        })
        .collect();
    for row in rows {
        let cell = |column: &Column<R>| (column.cell)(row);
        lines.push(groups.iter().map(|group| group.columns.iter().map(cell).collect()).collect());
    }
    let widths: Vec<Vec<usize>> = groups
        .iter()
        .enumerate()
        .map(|(number, group)| {
            let mut widths: Vec<usize> = (0..group.columns.len())
                .map(|column| lines.iter().map(|line| width(&line[number][column])).max().unwrap_or(0))
                .collect();
            // A title that is wider than its columns makes room at the first.
            let missing = width(&group.title).saturating_sub(total(&widths));
            widths.iter_mut().take(1).for_each(|first| *first += missing);
            widths
        })
        .collect();
    if groups.iter().any(|group| !group.title.is_empty()) {
        let titles = groups.iter().zip(&widths);
        let titles = titles.map(|(group, widths)| pad(&group.title, total(widths), Align::Left));
        write_line(out, gap, titles)?;
    }
    for (number, line) in lines.iter().enumerate() {
        if number < 2 && line.iter().flatten().all(String::is_empty) {
            continue;
        }
        let parts = groups.iter().zip(line).zip(&widths).map(|((group, cells), widths)| {
            let cells = group.columns.iter().zip(cells).zip(widths);
            let cells: Vec<String> =
                cells.map(|((column, cell), width)| pad(cell, *width, column.align)).collect();
            cells.join(" ")
        });
        write_line(out, gap, parts)?;
    }
    Ok(())
}

/// Writes one line, without blanks at its end.
fn write_line(out: &mut impl Write, gap: &str, parts: impl Iterator<Item = String>) -> io::Result<()> {
    let line = parts.collect::<Vec<_>>().join(gap);
    writeln!(out, "{}", line.trim_end())
}

fn pad(text: &str, width: usize, align: Align) -> String {
    match align {
        Align::Left => format!("{text:<width$}"),
        Align::Right => format!("{text:>width$}"),
    }
}

fn width(text: &str) -> usize {
    text.chars().count()
}

/// Columns side by side, a blank between them.
fn total(widths: &[usize]) -> usize {
    widths.iter().sum::<usize>() + widths.len().saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(groups: &[Group<u64>], rows: &[u64]) -> String {
        let mut out = Vec::new();
        write_table(&mut out, groups, " | ", rows).expect("memory takes it");
        String::from_utf8(out).expect("UTF-8")
    }

    #[test]
    fn a_column_is_as_wide_as_what_stands_in_it_and_a_title_stands_over_its_group() {
        let square = Column {
            head: ["times", "itself"],
            align: Align::Right,
            cell: Box::new(|n: &u64| (n * n).to_string()),
        };
        let groups = [
            Group::new("", vec![Column::words("number", |n| format!("n{n}"))]),
            Group {
                title: "powers".into(),
                columns: vec![square, Column::numbers("cube", |n| (n * n * n).to_string())],
            },
        ];
        assert_eq!(
            table(&groups, &[2, 100]),
            "       | powers\n       |  times\nnumber | itself    cube\nn2     |      4       8\nn100   |  10000 1000000\n"
        );
    }

    #[test]
    fn heads_that_are_empty_take_no_line_and_a_wide_title_pushes_nothing_out_of_line() {
        let wide = Group::new("a title", vec![Column::numbers("", u64::to_string)]);
        let next = Group::new("", vec![Column::numbers("", u64::to_string)]);
        assert_eq!(table(&[wide, next], &[1]), "a title |\n      1 | 1\n");
    }
}
