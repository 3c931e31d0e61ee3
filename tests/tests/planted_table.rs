//! The table of planted bugs in `planted/README.md`: written by `planted/run --write`, with a row
//! for each patch.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/planted"))
}

fn readme() -> String {
    fs::read_to_string(folder().join("README.md")).expect("the README of the planted bugs")
}

/// The name and the verdict of each row, except that of the unchanged tree.
fn rows(readme: &str) -> Vec<(&str, &str)> {
    readme
        .lines()
        .skip_while(|line| !line.starts_with("| bug | verdict |"))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .filter_map(|line| {
            let mut cells = line.split('|').map(str::trim).skip(1);
            cells.next().zip(cells.next())
        })
        .filter(|(name, _)| *name != "(none)")
        .collect()
}

#[test]
fn the_table_has_a_row_for_each_planted_bug_and_no_other() {
    let entries = fs::read_dir(folder()).expect("the planted bugs");
    let patches: BTreeSet<String> = entries
        .filter_map(|entry| {
            let name =
                entry.expect("an entry of a folder").file_name().into_string().expect("a name in ASCII");
            name.strip_suffix(".patch").map(str::to_owned)
        })
        .collect();
    let readme = readme();
    let rows: Vec<String> = rows(&readme).into_iter().map(|(name, _)| name.to_owned()).collect();
    assert_eq!(rows, patches.into_iter().collect::<Vec<_>>(), "run planted/run --write");
}

#[test]
fn the_sum_below_the_table_is_that_of_its_rows() {
    let readme = readme();
    let rows = rows(&readme);
    let caught = rows.iter().filter(|(_, verdict)| *verdict == "caught").count();
    let sum = format!("{caught} of {} caught: ", rows.len());
    assert!(readme.lines().any(|line| line.starts_with(&sum)), "{sum}");
}
