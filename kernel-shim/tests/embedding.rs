//! The figures in WALKTHROUGH.md are those of the files that it names.
//!
//! `BLESS=1 cargo test -p mmu-kernel-shim --test embedding` writes them anew.

mod lines;

use std::fs;
use std::path::{Path, PathBuf};

use lines::code_lines;

const PAGE: &str = "WALKTHROUGH.md";
const EMBED: &str = "src/embed.rs";

/// A figure is exact below this, and rounded to hundreds from here on.
const EXACT_BELOW: usize = 1000;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// How many lines count in a file, or in all Rust files of a folder and of those in it. What is
/// called `tests` is not looked at.
fn count(path: &Path) -> usize {
    let is_test = path.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("tests"));
    if is_test {
        return 0;
    }
    if path.is_dir() {
        let entries = fs::read_dir(path).expect("a folder that can be read");
        return entries.map(|entry| count(&entry.expect("an entry").path())).sum();
    }
    let is_code = path.extension().is_some_and(|extension| extension == "rs");
    if is_code { code_lines(&fs::read_to_string(path).expect("a text file")).count() } else { 0 }
}

/// How many lines count in the implementations of these traits in `embed.rs`.
fn count_implementations(embed: &str, of: &[&str]) -> usize {
    let begins = |line: &str| of.iter().any(|name| line.contains(&format!("impl<M: Machine> {name} for ")));
    let mut inside = false;
    let mut lines = 0;
    for line in code_lines(embed) {
        inside |= begins(line);
        lines += usize::from(inside);
        inside &= line != "}";
    }
    lines
}

fn shown(lines: usize) -> String {
    let rounded = if lines < EXACT_BELOW { lines } else { (lines + 50) / 100 * 100 };
    rounded.to_string()
}

/// What stands between back-quotes in `text`.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The line with its figure as it should be, if it is one that has a figure.
fn corrected(line: &str, embed: &str) -> Option<String> {
    let cells: Vec<&str> = line.split('|').collect();
    if let [_, _, paths, figure, ..] = cells[..]
        && figure.trim().trim_matches('*').parse::<usize>().is_ok()
        && quoted(paths).next().is_some()
    {
        let whole = |path: &str| {
            // A crate is named by its folder.
            let place = root().join(path);
            count(&if place.join("src").is_dir() { place.join("src") } else { place })
        };
        let lines = quoted(paths).map(whole).sum();
        let old = figure.trim().trim_matches('*');
        let cells: Vec<String> = (0..)
            .zip(&cells)
            .map(|(at, cell)| if at == 3 { cell.replace(old, &shown(lines)) } else { (*cell).to_owned() })
            .collect();
        return Some(cells.join("|"));
    }
    let traits: &[&str] = match line.split("**, ").next() {
        Some("**Memory") => &["PageTableFrameMapping", "TableMemory"],
        Some("**CPUs") => &["Cpus"],
        Some("**Pages") => &["Pages"],
        _ => return None,
    };
    let (before, after) = line.split_once("**, ")?;
    let (_, after) = after.split_once(" lines")?;
    Some(format!("{before}**, {} lines{after}", count_implementations(embed, traits)))
}

#[test]
fn the_figures_are_those_of_the_files() {
    let page = root().join("kernel-shim").join(PAGE);
    let text = fs::read_to_string(&page).expect("the page");
    let embed = fs::read_to_string(root().join("kernel-shim").join(EMBED)).expect("the part to copy from");
    let mut nr_figures = 0;
    let right: String = text
        .lines()
        .map(|line| {
            let new = corrected(line, &embed);
            nr_figures += usize::from(new.is_some());
            new.unwrap_or_else(|| line.to_owned()) + "\n"
        })
        .collect();
    assert_eq!(nr_figures, 8, "five rows of a table, and three headings");
    if std::env::var_os("BLESS").is_some() {
        fs::write(&page, right).expect("the page can be written");
        return;
    }
    for (stands, should) in text.lines().zip(right.lines()) {
        assert_eq!(stands, should, "BLESS=1 cargo test -p mmu-kernel-shim --test embedding writes it anew");
    }
}

#[test]
fn blank_lines_comments_and_tests_do_not_count() {
    let text = "//! A file.\n\nuse a;\n/// Does it.\nfn f() {\n    // Why.\n    g(); // Here.\n}\n\n#[cfg(test)]\nmod tests {\n}\n";
    assert_eq!(code_lines(text).count(), 4);
    let text = "#[cfg(test)]\nmod tests;\nmod a;\n#[cfg(test)]\nmod more {\n    a\n}\nmod b;\n";
    assert_eq!(code_lines(text).collect::<Vec<_>>(), ["mod a;"]);
    let embed = "impl<M: Machine> Cpus for E<M> {\n    // Why.\n    a\n}\nimpl<M: Machine> Pages for E<M> {\n    b\n    c\n}\n";
    assert_eq!(count_implementations(embed, &["Cpus"]), 3);
    assert_eq!(count_implementations(embed, &["Cpus", "Pages"]), 7);
}
