//! FAST-PATHS.md and MUNMAP.md name files, functions and tests: each of them is there.

use std::fs;
use std::path::{Path, PathBuf};

const FAST_PATHS: &str = include_str!("../FAST-PATHS.md");
const MUNMAP: &str = include_str!("../MUNMAP.md");

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// The words of `text` that are paths in the workspace.
fn paths(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| c.is_whitespace() || "`,;()".contains(c))
        .filter(|word| word.contains('/') && (word.ends_with(".rs") || word.ends_with(".md")))
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Whether one of the files that `text` names defines the function `name`.
fn defines(text: &str, name: &str) -> bool {
    let head = format!("fn {name}");
    paths(text).any(|path| {
        let source = fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
        source.split(&head).skip(1).any(|rest| rest.starts_with(['(', '<']))
    })
}

#[test]
fn every_file_that_is_named_is_there() {
    for (document, text) in [("FAST-PATHS.md", FAST_PATHS), ("MUNMAP.md", MUNMAP)] {
        assert!(paths(text).count() > 40, "{document} names files");
        for path in paths(text) {
            assert!(root().join(path).exists(), "{document} names {path}, which is not there");
        }
    }
}

#[test]
fn every_test_that_holds_a_fast_path_is_in_the_file_named_beside_it() {
    let rows = FAST_PATHS.lines().filter(|line| line.starts_with("| ") && line.contains(".rs`"));
    let mut found = 0;
    for row in rows {
        let held_by = row.trim_end_matches(" |").rsplit(" | ").next().expect("a cell");
        for name in quoted(held_by).filter(|name| name.contains('_') && !name.contains(['/', '.', ' '])) {
            assert!(defines(held_by, name), "no test {name} in the files of: {held_by}");
            found += 1;
        }
    }
    assert!(found > 25, "{found} tests are named");
}

#[test]
fn every_function_on_the_way_of_a_munmap_is_in_the_file_of_its_line() {
    let lines = MUNMAP.lines().filter(|line| line.starts_with(|c: char| c == ' ' || c.is_ascii_digit()));
    let mut found = 0;
    for line in lines {
        let Some(path) = paths(line).next() else { continue };
        let before = &line[..line.find(path).expect("it is there")];
        let names = before.trim_start_matches(|c: char| c == ' ' || c.is_ascii_digit());
        for name in names.split(',').map(|name| name.rsplit("::").next().unwrap_or(name).trim()) {
            assert!(defines(path, name), "{path} has no function {name}: {line}");
            found += 1;
        }
    }
    assert!(found > 50, "{found} functions are named");
}
