//! EMBEDDING.md, FAST-PATHS.md and MUNMAP.md name files, functions, types and tests: each is there.

use std::fs;
use std::path::{Path, PathBuf};

const EMBEDDING: &str = include_str!("../EMBEDDING.md");
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
    for (document, text, least) in
        [("EMBEDDING.md", EMBEDDING, 3), ("FAST-PATHS.md", FAST_PATHS, 40), ("MUNMAP.md", MUNMAP, 40)]
    {
        assert!(paths(text).count() >= least, "{document} names files");
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

/// All sources of the engine.
fn sources(folder: &Path, into: &mut String) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push_str(&fs::read_to_string(path).expect("a text file"));
        }
    }
}

#[test]
fn all_that_the_guide_tells_an_embedder_to_call_or_implement_is_in_the_engine() {
    let mut engine = String::new();
    for package in ["pagetable", "tlb", "gather"] {
        sources(&root().join(package).join("src"), &mut engine);
    }
    let is_name = |word: &&str| word.chars().all(|c| c.is_alphanumeric() || "_:".contains(c));
    // What is not the engine's: of the `x86_64` and `spin` crates, of Rust, and this project's own.
    let others = [
        "PageTableFrameMapping",
        "FrameAllocator",
        "OffsetPageTable",
        "MappedPageTable",
        "RelaxStrategy",
        "relax",
        "x86_64",
        "spin",
        "Arc",
        "const",
        "None",
        "meanwhile",
    ];
    let mut found = 0;
    for name in quoted(EMBEDDING).filter(is_name) {
        let last = name.rsplit("::").next().expect("a word");
        if others.contains(&last) {
            continue;
        }
        let defined = ["fn ", "struct ", "trait ", "enum ", "const ", "type ", "mod "]
            .iter()
            .any(|kind| engine.contains(&format!("{kind}{last}")))
            || engine.contains(&format!("    {last},"));
        assert!(defined, "EMBEDDING.md names {name}, which the engine does not have");
        found += 1;
    }
    assert!(found > 80, "{found} names");
}
