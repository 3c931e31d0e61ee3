//! The command `teardown run` as a person meets it: reports, exit codes, errors.

mod common;

use std::process::{Command, Stdio};

use serde_json::Value;

use common::{assert_clean, json, stderr, stdout, teardown};

const SMALL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/layouts/redis-swapped.layout");
const DENSE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/layouts/sqlite-query.layout");

#[test]
fn a_layout_is_torn_down_without_a_violation_or_a_leak() {
    let output = teardown(&["run", "--layout", DENSE, "--format", "json"]);
    let report = json(&output);
    assert_clean(&report);
    let layout = &report["layouts"][0];
    assert_eq!(layout["name"], "sqlite-query");
    assert_eq!(layout["pages"], 180_432);
    for key in ["vmas", "batches", "forced_flushes", "max_deferred_pages", "max_pages_per_lock"] {
        assert!(layout[key].is_u64(), "{key} in {layout}");
    }
    for (group, key) in [
        ("tables", "pte"),
        ("tables", "pmd"),
        ("tables", "pud"),
        ("flushes", "ranged"),
        ("flushes", "full"),
        ("flushes", "skipped"),
        ("ipis", "sent"),
        ("ipis", "saved"),
    ] {
        assert!(layout[group][key].is_u64(), "{group}.{key} in {layout}");
    }
    assert!(layout["ns_per_page"].as_f64().is_some_and(|ns| ns > 0.0));
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn every_planted_fault_is_found_and_its_story_names_cpu_address_frame_entry_and_when_it_was_freed() {
    for fault in ["skip-flush", "free-before-flush", "drop-ipi", "local-flush-only"] {
        let output = teardown(&["run", "--layout", DENSE, "--fault", fault]);
        assert_eq!(output.status.code(), Some(1), "{fault}: {}", stderr(&output));
        let text = stdout(&output);
        for word in [
            "violation: ",
            "CPU ",
            " address 0x",
            " frame 0x",
            "freed at event ",
            "through its ",
            "NOT CLEAN",
        ] {
            assert!(text.contains(word), "{fault}: no {word:?} in {text}");
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_counts_and_another_seed_others() {
    let counts = |seed: &str| {
        let mut report = json(&teardown(&["run", "--layout", SMALL, "--seed", seed, "--format", "json"]));
        report["layouts"][0]["ns_per_page"] = Value::Null;
        report
    };
    assert_eq!(counts("7"), counts("7"));
    assert_ne!(counts("7"), counts("8"));
}

#[test]
fn without_batch_pages_the_result_is_the_same_and_the_flushes_are_more() {
    let run = |pages: &str| {
        json(&teardown(&["run", "--layout", DENSE, "--batch-pages", pages, "--format", "json"]))
    };
    let (with, without) = (run("19"), run("0"));
    for report in [&with, &without] {
        assert_eq!(report["violations"], 0);
        assert_eq!(report["leaked_frames"], 0);
    }
    assert_eq!(with["layouts"][0]["tables"], without["layouts"][0]["tables"]);
    let forced = |report: &Value| report["layouts"][0]["forced_flushes"].as_u64();
    assert!(forced(&without) > forced(&with), "{with} {without}");
}

#[test]
fn one_cpu_and_many_are_machines_too() {
    for cpus in ["1", "2", "17", "64"] {
        let output = teardown(&["run", "--layout", SMALL, "--cpus", cpus, "--format", "json"]);
        assert_eq!(output.status.code(), Some(0), "{cpus}: {}", stderr(&output));
        assert_eq!(json(&output)["violations"], 0);
    }
}

#[test]
fn a_live_process_is_captured_and_torn_down() {
    // Our own process: it is here, and we may look at it.
    let pid = std::process::id().to_string();
    let output = teardown(&["run", "--pid", &pid, "--format", "json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(json(&output)["layouts"][0]["pages"].as_u64().is_some_and(|pages| pages > 10));
}

#[test]
fn bad_input_gets_one_line_that_names_it_and_exit_code_2() {
    let folder = tempfile::tempdir().expect("a folder");
    let bad = folder.path().join("bad.layout");
    let text = std::fs::read_to_string(SMALL).expect("bundled");
    let cut: String = text.lines().take(20).map(|line| format!("{line}\n")).collect();
    std::fs::write(&bad, cut).expect("written");
    let bad = bad.to_str().expect("UTF-8");
    for (args, expected) in [
        (vec!["run", "--layout", bad], "bad.layout:20: "),
        (vec!["run", "--layout", "/nonexistent"], "cannot read /nonexistent"),
        (vec!["run", "--pid", "2147483647"], "2147483647"),
        (vec!["capture", "--pid", "2147483647"], "2147483647"),
        (vec!["run", "--cpus", "0"], "--cpus"),
        (vec!["run", "--cpus", "65"], "--cpus"),
        (vec!["run", "--batch-pages", "20"], "--batch-pages"),
        (vec!["run", "--no-such-flag"], "--no-such-flag"),
    ] {
        let output = teardown(&args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(expected), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{args:?} did half of it");
    }
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing_behind() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has one");
    let status = Command::new(env!("CARGO_BIN_EXE_teardown"))
        .args(["run", "--layout", SMALL])
        .stdout(full)
        .stderr(Stdio::null())
        .status()
        .expect("the command starts");
    assert_eq!(status.code(), Some(2));
    let pid = std::process::id().to_string();
    let output = teardown(&["capture", "--pid", &pid, "-o", "/nonexistent/x.layout"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("/nonexistent/x.layout"));
}

#[test]
fn a_captured_layout_reads_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("self.layout");
    let file = file.to_str().expect("UTF-8");
    let pid = std::process::id().to_string();
    assert_eq!(teardown(&["capture", "--pid", &pid, "-o", file]).status.code(), Some(0));
    assert_eq!(teardown(&["run", "--layout", file]).status.code(), Some(0));
    let leftovers = std::fs::read_dir(folder.path()).expect("readable").count();
    assert_eq!(leftovers, 1, "a temporary file was left");
}

/// Once, a name could print a line of its own, a verdict for example, and a long one ended the
/// command with a panic.
#[test]
fn text_of_an_input_is_shown_on_one_line_and_obeyed_by_no_terminal() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("x.layout");
    let path = file.to_str().expect("UTF-8");
    let layout = |name: &str, state: &str| {
        let text = format!(
            "mmu-gather layout 1\nname \"{name}\"\ncommand \"x\"\nkernel \"x\"\nthreads 1\ntables 1\n\
             vma 1000-2000 rw-p anon\n {state}\nend vmas=1 runs=1 pages=1\n"
        );
        std::fs::write(&file, text).expect("written");
    };
    for fault in [&[][..], &["--fault", "skip-flush"]] {
        layout("a\\u{a}clean: violations 0\\u{1b}[2K\\u{9b}1A", "anon 0");
        let mut args = vec!["run", "--layout", path];
        args.extend(fault);
        for format in ["text", "json"] {
            let output = teardown(&[&args[..], &["--format", format]].concat());
            let text = stdout(&output);
            assert!(text.contains("\\u{a}clean") || text.contains("\\nclean"), "{text}");
            assert!(text.chars().all(|char| char == '\n' || !char.is_control()), "{text:?}");
            assert!(!text.lines().any(|line| line.starts_with("clean: violations 0\\u")), "{text}");
        }
    }
    layout(&"n".repeat(70_000), "anon 0");
    let output = teardown(&["run", "--layout", path]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(output.stdout.len() < 2000);
    // And what is wrong with it.
    layout("x", "\u{1b}[2K\u{9b}anon 0");
    let output = teardown(&["run", "--layout", path]);
    let error = stderr(&output);
    assert_eq!((output.status.code(), error.lines().count()), (Some(2), 1), "{error:?}");
    assert!(error.contains("`\\u{1b}[2K\\u{9b}anon 0`"), "{error:?}");
    assert!(error.chars().all(|char| char == '\n' || !char.is_control()), "{error:?}");
}
