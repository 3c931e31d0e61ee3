//! The commands `teardown fuzz` and `teardown replay` as a person meets them.

mod common;

use std::path::Path;

use serde_json::Value;

use common::{json, stdout as text, teardown};

fn path(directory: &tempfile::TempDir, name: &str) -> String {
    directory.path().join(name).to_str().expect("a path of this host").to_owned()
}

#[test]
fn a_clean_run_ends_with_0_and_says_what_it_has_covered() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = path(&directory, "failure");
    let output = teardown(&["fuzz", "--ops", "16000", "--format", "json", "-o", &file]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report = json(&output);
    assert_eq!(report["clean"], true);
    assert_eq!(report["sequences"], 100);
    assert_eq!(report["operations"], 16_000);
    assert_eq!(report["failure"], Value::Null);
    let boundaries = &report["boundaries"];
    let times = boundaries["sequences"].as_object().expect("a number for each");
    let missed = boundaries["not_reached"].as_array().expect("names");
    assert_eq!(boundaries["all"], times.len());
    assert_eq!(times.values().filter(|times| **times == 0).count(), missed.len());
    assert_eq!(boundaries["reached"], times.len() - missed.len());
    for easy in ["forced flush", "ranged flush", "ceiling passed", "lazy skipped", "PCID slot reused"] {
        assert!(times[easy].as_u64().is_some_and(|times| times > 0), "{easy} in {boundaries}");
    }
    assert!(report["pairs"]["covered"].as_u64() > Some(100), "{report}");
    assert!(!Path::new(&file).exists(), "nothing failed");
}

#[test]
fn the_summary_counts_the_boundaries_and_names_those_not_reached() {
    let output = teardown(&["fuzz", "--ops", "160"]);
    let text = text(&output);
    let (summary, missed) = text.split_once('\n').expect("two lines");
    let all = format!(" of {} boundaries", mmu_hosted::Boundary::ALL.len());
    assert!(summary.contains(&all), "{text}");
    assert!(missed.starts_with("boundaries not reached: "), "{text}");
    assert!(missed.contains("generation gap"), "{text}");
}

#[test]
fn what_is_found_does_not_depend_on_the_number_of_jobs() {
    let directory = tempfile::tempdir().expect("a directory");
    let found = |jobs: &str| {
        let file = path(&directory, jobs);
        let output = teardown(&[
            "fuzz", "--ops", "16000", "--seed", "7", "--jobs", jobs, "--fault", "drop-ipi", "--format",
            "json", "-o", &file,
        ]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        (json(&output)["failure"].clone(), std::fs::read_to_string(file).expect("saved"))
    };
    let one = found("1");
    assert_eq!(one, found("2"));
    assert_eq!(one, found("5"));
}

#[test]
fn clean_runs_of_any_number_of_jobs_cover_the_same() {
    let covered = |jobs: &str| {
        let report = json(&teardown(&["fuzz", "--ops", "24000", "--jobs", jobs, "--format", "json"]));
        ["sequences", "pairs", "overlaps", "counters", "boundaries"].map(|key| report[key].clone())
    };
    assert_eq!(covered("1"), covered("3"));
}

#[test]
fn what_was_saved_replays_with_its_fault_and_is_clean_without() {
    let directory = tempfile::tempdir().expect("a directory");
    for fault in ["skip-flush", "free-before-flush", "drop-ipi", "local-flush-only"] {
        let file = path(&directory, fault);
        let output = teardown(&["fuzz", "--ops", "32000", "--fault", fault, "-o", &file]);
        assert_eq!(output.status.code(), Some(1), "{fault}: {output:?}");
        let story = text(&output);
        assert!(story.contains("violation: ") && story.contains("NOT CLEAN"), "{fault}: {story}");
        let again = teardown(&["replay", &file, "--fault", fault]);
        assert_eq!(again.status.code(), Some(1), "{fault}");
        assert!(story.ends_with(&text(&again)), "{fault}: another story: {}", text(&again));
        let clean = teardown(&["replay", &file]);
        assert_eq!(clean.status.code(), Some(0), "{fault}: {}", text(&clean));
        assert!(text(&clean).ends_with("clean\n"), "{fault}");
    }
}

#[test]
fn a_replay_as_json_tells_each_violation() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = path(&directory, "failure");
    teardown(&["fuzz", "--ops", "32000", "--fault", "skip-flush", "-o", &file]);
    let report = json(&teardown(&["replay", &file, "--fault", "skip-flush", "--format", "json"]));
    assert_eq!(report["clean"], false);
    let told = &report["told"][0];
    for key in ["kind", "what", "address", "frame"] {
        assert!(told[key].is_string(), "{key} in {told}");
    }
    assert!(told["cpu"].is_u64() && told["story"].is_array(), "{told}");
    assert!(report["sequence"].as_str().is_some_and(|text| text.ends_with("end\n")), "{report}");
}

#[test]
fn wrong_words_and_files_are_refused_with_2() {
    let directory = tempfile::tempdir().expect("a directory");
    let broken = path(&directory, "broken");
    std::fs::write(&broken, "mmu-gather sequence 1\ncpus 4\nseed 1\nmmu pcid intel keeper\n0 leap\nend\n")
        .expect("written");
    for (args, said) in [
        (&["fuzz", "--jobs", "0"][..], "--jobs"),
        (&["fuzz", "--fault", "none"], "--fault"),
        (&["replay"], "FILE"),
        (&["replay", "/nonexistent/sequence"], "/nonexistent/sequence"),
        (&["replay", &broken], ":5: expected an operation"),
    ] {
        let output = teardown(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(error.contains(said), "{args:?}: {error}");
    }
}
