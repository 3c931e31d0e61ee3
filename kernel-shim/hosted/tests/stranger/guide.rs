//! The code and the words of the guide.

use std::sync::Arc;

use mmu_hosted::{FuzzOptions, HostedMachine, Trial, fuzz, replay};

use crate::kernel::Stranger as MyKernel;
use crate::mistake::Mistake;

impl MyKernel {
    fn new(machine: &Arc<HostedMachine>) -> Self {
        Self::with(machine, Mistake::Absent)
    }
}

#[test]
fn my_kernel_keeps_the_rules() {
    let saved = Some(concat!(env!("CARGO_TARGET_TMPDIR"), "/failure.sequence").into());
    let options = FuzzOptions { seed: 1, reproducer: saved, ..FuzzOptions::default() };
    let report = fuzz(&options, |machine| Ok(MyKernel::new(machine))).expect("memory for a machine");
    assert!(report.is_clean(), "{report}");
}

#[test]
fn the_saved_sequence_is_clean_now() {
    let text = std::fs::read_to_string("tests/changed-forgotten.sequence").expect("the saved sequence");
    let report = replay(&text, Trial::default(), |machine| Ok(MyKernel::new(machine)));
    let report = report.unwrap_or_else(|error| panic!("{error}"));
    assert!(report.is_clean(), "{report}");
}

const GUIDE: &str = include_str!("../../README.md");

/// The lines of the blocks of the guide that begin with this.
fn blocks(fence: &str) -> impl Iterator<Item = &'static str> {
    let mut is_inside = false;
    GUIDE.lines().filter_map(move |line| {
        let was_inside = is_inside;
        is_inside = if is_inside { line != "```" } else { line == fence };
        (was_inside && is_inside).then(|| line.trim()).filter(|line| !line.is_empty())
    })
}

#[test]
fn the_code_of_the_guide_is_what_runs_here() {
    let here: Vec<&str> = include_str!("guide.rs").lines().map(str::trim).collect();
    let mut nr_lines = 0;
    for line in blocks("```rust,ignore").filter(|line| !line.starts_with("use ")) {
        nr_lines += 1;
        assert!(here.contains(&line), "{line}");
    }
    assert!(nr_lines > 8, "only {nr_lines} lines were found");
}

#[test]
fn the_words_of_the_guide_are_those_of_the_kit() {
    let text = include_str!("../changed-forgotten.sequence");
    let made = |machine: &Arc<HostedMachine>| Ok(MyKernel::with(machine, Mistake::ChangedForgotten));
    let told = replay(text, Trial::default(), made).expect("a sequence").to_string();
    let told: Vec<&str> = told.lines().map(str::trim).collect();
    let mut nr_lines = 0;
    for line in blocks("```text") {
        nr_lines += 1;
        assert!(told.contains(&line), "{line}\n{}", told.join("\n"));
    }
    assert!(nr_lines > 8, "only {nr_lines} lines were found");
}
