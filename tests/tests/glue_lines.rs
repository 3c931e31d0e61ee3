//! How long the glue to memory layers from elsewhere is, as the README says it.
//!
//! `BLESS=1 cargo test -p mmu-tests --test glue_lines` writes the figures anew.

#[path = "../../kernel-shim/tests/lines/mod.rs"]
mod lines;

use std::fs;
use std::path::{Path, PathBuf};

use lines::code_lines;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The row with its figure as it should be, if it is one about glue: its second cell names the
/// file, and its third has the figure.
fn corrected(line: &str) -> Option<String> {
    let cells: Vec<&str> = line.split('|').collect();
    let [_, _, file, figure, ..] = cells[..] else { return None };
    let file = file.trim().trim_matches('`');
    if !file.ends_with("/glue.rs") {
        return None;
    }
    let text = fs::read_to_string(root().join(file)).expect("the file that the row names");
    let right = format!(" {} ", code_lines(&text).count());
    let cells: Vec<&str> =
        cells.iter().map(|cell| if *cell == figure { right.as_str() } else { *cell }).collect();
    Some(cells.join("|"))
}

#[test]
fn the_figures_are_those_of_the_files() {
    let page = root().join("README.md");
    let text = fs::read_to_string(&page).expect("the page");
    let mut nr_figures = 0;
    let right: String = text
        .lines()
        .map(|line| {
            let new = corrected(line);
            nr_figures += usize::from(new.is_some());
            new.unwrap_or_else(|| line.to_owned()) + "\n"
        })
        .collect();
    assert_eq!(nr_figures, 2, "a row for each layer");
    if std::env::var_os("BLESS").is_some() {
        fs::write(&page, right).expect("the page can be written");
        return;
    }
    for (stands, should) in text.lines().zip(right.lines()) {
        assert_eq!(stands, should, "BLESS=1 cargo test -p mmu-tests --test glue_lines writes it anew");
    }
}
