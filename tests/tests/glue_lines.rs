//! How long the glue to memory layers from elsewhere is, and what the conformance kit needs beside
//! it, as the README says it.
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

/// The row with its figures as they should be, and how many there are: a cell with the name of a
/// file is followed by one with its figure.
fn corrected(line: &str) -> (String, usize) {
    let mut cells: Vec<String> = line.split('|').map(str::to_owned).collect();
    let mut nr_figures = 0;
    for number in 1..cells.len() {
        let file = cells[number - 1].trim().trim_matches('`');
        if file.starts_with("tests/tests/") && (file.ends_with("/glue.rs") || file.ends_with("/kit.rs")) {
            let text = fs::read_to_string(root().join(file)).expect("the file that the row names");
            cells[number] = format!(" {} ", code_lines(&text).count());
            nr_figures += 1;
        }
    }
    (cells.join("|"), nr_figures)
}

#[test]
fn the_figures_are_those_of_the_files() {
    let page = root().join("README.md");
    let text = fs::read_to_string(&page).expect("the page");
    let mut nr_figures = 0;
    let right: String = text
        .lines()
        .map(|line| {
            let (new, figures) = corrected(line);
            nr_figures += figures;
            new + "\n"
        })
        .collect();
    assert_eq!(nr_figures, 4, "glue and kit of each layer");
    if std::env::var_os("BLESS").is_some() {
        fs::write(&page, right).expect("the page can be written");
        return;
    }
    for (stands, should) in text.lines().zip(right.lines()) {
        assert_eq!(stands, should, "BLESS=1 cargo test -p mmu-tests --test glue_lines writes it anew");
    }
}
