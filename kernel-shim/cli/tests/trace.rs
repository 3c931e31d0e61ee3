//! The command `teardown trace` as a person meets it: reports, exit codes, errors.

mod common;

use std::path::{Path, PathBuf};

use serde_json::Value;

use common::{assert_clean, json, stderr, stdout, teardown};

/// Small logs of several threads, of several processes, with forks, with calls that wait for one
/// another.
const SMALL: [&str; 4] = ["redis-bgsave", "rustc-hello", "python-numpy", "sort-parallel"];

fn log(name: &str) -> String {
    format!("{}/../../tests/traces/{name}.strace", env!("CARGO_MANIFEST_DIR"))
}

/// A file in a folder that goes with the test.
fn written(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).expect("written");
    path
}

#[test]
fn every_bundled_log_replays_without_a_violation_or_a_leak() {
    let output = teardown(&["trace", "--format", "json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = json(&output);
    assert_clean(&report);
    let logs = report["layouts"].as_array().expect("one entry a log");
    assert_eq!(logs.len(), mmu_cli::input::bundled::TRACES.len());
    for log in logs {
        assert!(log["pages"].as_u64().is_some_and(|pages| pages > 100), "{log}");
        assert!(log["tables"]["pte"].as_u64().is_some_and(|tables| tables > 0), "{log}");
        assert!(log["ns_per_page"].as_f64().is_some_and(|ns| ns > 0.0), "{log}");
    }
    let of = |name: &str| logs.iter().find(|log| log["name"] == name).expect("bundled");
    assert!(of("node-worker")["ipis"]["sent"].as_u64() > Some(1000), "its threads share an address space");
}

#[test]
fn every_planted_fault_is_found_and_told() {
    for fault in ["skip-flush", "free-before-flush", "drop-ipi", "local-flush-only"] {
        let output = teardown(&["trace", &log("redis-bgsave"), "--fault", fault]);
        assert_eq!(output.status.code(), Some(1), "{fault}: {}", stderr(&output));
        let text = stdout(&output);
        for word in
            ["redis-bgsave: violation: ", "CPU ", " address 0x", " frame 0x", "through its ", "NOT CLEAN"]
        {
            assert!(text.contains(word), "{fault}: no {word:?} in {text}");
        }
    }
}

#[test]
fn the_same_seed_replays_the_same_and_another_seed_otherwise() {
    let counts = |seed: &str| {
        let mut report = json(&teardown(&["trace", &log("rustc-hello"), "--seed", seed, "--format", "json"]));
        assert_clean(&report);
        report["layouts"][0]["ns_per_page"] = Value::Null;
        report
    };
    assert_eq!(counts("3"), counts("3"));
    assert_ne!(counts("3"), counts("4"));
}

#[test]
fn one_cpu_many_cpus_no_batch_pages_and_no_checker_are_machines_too() {
    for flags in
        [["--cpus", "1"], ["--cpus", "3"], ["--cpus", "64"], ["--batch-pages", "0"], ["--checker", "off"]]
    {
        let logs = SMALL.map(log);
        let mut args = vec!["trace", "--format", "json"];
        args.extend(logs.iter().map(String::as_str));
        args.extend(flags);
        let output = teardown(&args);
        assert_eq!(output.status.code(), Some(0), "{flags:?}: {}", stderr(&output));
        let mut report = json(&output);
        if flags == ["--checker", "off"] {
            // Nobody looked.
            assert_eq!(report["violations"].take(), Value::Null);
            report["violations"] = 0.into();
        }
        assert_clean(&report);
    }
}

#[test]
fn a_log_that_stops_anywhere_ends_with_every_process_taken_down() {
    let folder = tempfile::tempdir().expect("a folder");
    let whole = std::fs::read_to_string(log("redis-bgsave")).expect("bundled");
    let nr_lines = whole.lines().count();
    for nr_left in (1..8).map(|eighth| nr_lines * eighth / 8) {
        let text: String = whole.lines().take(nr_left).map(|line| format!("{line}\n")).collect();
        let path = written(folder.path(), "cut.strace", &text);
        let output = teardown(&["trace", path.to_str().expect("UTF-8"), "--format", "json"]);
        assert_eq!(output.status.code(), Some(0), "{nr_left} lines: {}", stderr(&output));
        assert_clean(&json(&output));
    }
}

#[test]
fn bad_input_gets_one_line_that_names_it_and_exit_code_2_before_anything_runs() {
    let folder = tempfile::tempdir().expect("a folder");
    let good = log("sort-parallel");
    let start = "7 execve(\"/bin/x\", [\"x\"], 0x7ffe /* 1 var */) = 0\n";
    let file =
        |name: &str, text: &str| written(folder.path(), name, text).to_str().expect("UTF-8").to_owned();
    let not_a_log = file("not.strace", "Lorem ipsum dolor sit amet\n");
    let empty = file("empty.strace", "");
    let unaligned = file("unaligned.strace", &format!("{start}7 munmap(0x7f0000000123, 4096) = 0\n"));
    let overflow =
        file("overflow.strace", &format!("{start}7 munmap(0x7f0000000000, 18446744073709551615) = 0\n"));
    let other = file("other.strace", &format!("{start}7 brk(NULL) = 0xaaaaf1e30000\n"));
    let binary = folder.path().join("binary.strace");
    std::fs::write(&binary, [0xff, 0xfe, 0x00, 0x9f]).expect("written");
    for (args, expected) in [
        (vec!["trace", &good, &not_a_log], "not.strace:1: expected"),
        (vec!["trace", &good, &empty], "empty.strace:1: expected"),
        (vec!["trace", &unaligned, &good], "unaligned.strace:2: expected"),
        (vec!["trace", &overflow], "overflow.strace:2: expected"),
        (vec!["trace", &other], "other.strace:2: expected an address in the user half of x86_64"),
        (vec!["trace", binary.to_str().expect("UTF-8")], "binary.strace:1: expected memory calls"),
        (vec!["trace", "/dev/zero"], "/dev/zero:1: expected a line of text"),
        (vec!["trace", folder.path().to_str().expect("UTF-8")], "it is a folder"),
        (vec!["trace", "/nonexistent.strace"], "cannot read /nonexistent.strace"),
        (vec!["trace", &good, "--cpus", "0"], "--cpus"),
        (vec!["trace", &good, "--fault", "bad-luck"], "--fault"),
        (vec!["trace", "--layout", &good], "--layout"),
    ] {
        let output = teardown(&args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(expected), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{args:?} did half of it");
    }
}

#[test]
fn a_mapping_over_one_whose_munmap_is_lost_replaces_it_and_that_is_counted() {
    let map = |len, at| {
        format!("7 mmap(NULL, {len}, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = {at}\n")
    };
    let first = map(16384, "0x7f0000000000");
    for (second, count) in [
        (map(8192, "0x7f0000001000"), 1),
        (map(8192, "0x7f0000000000") + &map(8192, "0x7f0000001000"), 2),
        (map(8192, "0x7f0000004000"), 0),
        ("7 munmap(0x7f0000000000, 16384) = 0\n".to_owned() + &map(8192, "0x7f0000001000"), 0),
        (
            map(8192, "0x7f0000010000")
                + "7 mremap(0x7f0000010000, 8192, 8192, MREMAP_MAYMOVE) = 0x7f0000002000\n",
            1,
        ),
        ("7 brk(NULL) = 0x7efffffff000\n7 brk(0x7f0000001000) = 0x7f0000001000\n".to_owned(), 1),
    ] {
        let (log, note, verdict) = reported(&format!("{EXEC}{first}{second}"));
        assert_eq!(log["replaced_areas"], count, "{second}");
        assert_eq!(note.contains("replaced whose munmap the log does not have"), count > 0, "{note}");
        assert!(verdict.starts_with("clean: "), "{verdict}");
    }
}

#[test]
fn what_was_only_assumed_to_be_there_gives_way() {
    let folder = tempfile::tempdir().expect("a folder");
    // The program's own area; a stack's place; a shared mapping made twice; moves over areas that
    // are neighbours here.
    let text = "7 execve(\"/bin/x\", [\"x\"], 0x7ffe /* 1 var */) = 0\n\
                7 mprotect(0x555555554000, 8192, PROT_READ) = 0\n\
                7 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x555555555000\n\
                7 mmap(NULL, 67108864, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7ffffbfff000\n\
                7 mmap(NULL, 4096, PROT_READ|PROT_WRITE, MAP_SHARED|MAP_ANONYMOUS, -1, 0) = 0x7f0000000000\n\
                7 mremap(0x7f0000000000, 0, 4096, MREMAP_MAYMOVE) = 0x7f0000008000\n\
                7 mmap(NULL, 16384, PROT_NONE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000010000\n\
                7 mprotect(0x7f0000010000, 8192, PROT_READ|PROT_WRITE) = 0\n\
                7 mremap(0x7f0000010000, 16384, 12288, MREMAP_MAYMOVE|MREMAP_FIXED, 0x7f0000020000) = 0x7f0000020000\n\
                7 mremap(0x7f0000020000, 12288, 4096, MREMAP_MAYMOVE) = 0x7f0000020000\n\
                7 mremap(0x7f0000020000, 4096, 4096, MREMAP_MAYMOVE|MREMAP_DONTUNMAP) = 0x7f0000030000\n\
                7 munmap(0x7f0000020000, 4096) = 0\n\
                7 brk(NULL) = 0x555555600123\n\
                7 brk(0x555555700000) = 0x555555700000\n\
                7 brk(0x555555650000) = 0x555555650000\n\
                7 brk(0x555555800000) = 0x555555800000\n\
                7 vfork() = 8\n\
                8 execve(\"/bin/y\", [\"y\"], 0x7ffe /* 1 var */) = 0\n\
                8 exit_group(0) = ?\n\
                7 fork() = 9\n\
                9 munmap(0x7f0000000000, 4096) = 0\n\
                9 exit_group(0) = ?\n";
    let path = written(folder.path(), "odd.strace", text);
    let path = path.to_str().expect("UTF-8");
    for seed in ["1", "2", "3", "4"] {
        let output = teardown(&["trace", path, "--seed", seed, "--format", "json"]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_clean(&json(&output));
    }
    let text = String::from_utf8(teardown(&["trace", path]).stdout).expect("UTF-8");
    assert!(text.contains("odd: 22 calls, 3 threads, 3 address spaces; 1 area assumed"), "{text}");
}

#[test]
fn guard_pages_of_a_log_are_put_in_place_where_memory_is_private() {
    let folder = tempfile::tempdir().expect("a folder");
    let log = |advice: &str| {
        let text = format!(
            "7 execve(\"/bin/x\", [\"x\"], 0x7ffe /* 1 var */) = 0\n\
             7 mmap(NULL, 65536, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000000000\n\
             7 mmap(NULL, 65536, PROT_READ|PROT_WRITE, MAP_SHARED|MAP_ANONYMOUS, -1, 0) = 0x7f0000010000\n\
             7 madvise(0x7f0000000000, 131072, {advice}) = 0\n\
             7 madvise(0x7f0000000000, 65536, MADV_DONTNEED) = 0\n\
             7 mremap(0x7f0000000000, 65536, 65536, MREMAP_MAYMOVE) = 0x7f0000200000\n\
             7 fork() = 8\n\
             8 munmap(0x7f0000200000, 8192) = 0\n\
             7 exit_group(0) = ?\n8 exit_group(0) = ?\n"
        );
        written(folder.path(), "guard.strace", &text).to_str().expect("UTF-8").to_owned()
    };
    let replayed = |path: &str, format| {
        let output = teardown(&["trace", path, "--format", format]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        output
    };
    let path = log("MADV_GUARD_INSTALL");
    let guarded = json(&replayed(&path, "json"));
    assert_clean(&guarded);
    // The shared half of it.
    let text = String::from_utf8(replayed(&path, "text").stdout).expect("UTF-8");
    assert!(text.contains("1 madvise call without effect on pages"), "{text}");
    // Programs get fewer pages where they are refused.
    let free = json(&replayed(&log("MADV_MERGEABLE"), "json"));
    let pages = |report: &Value| report["layouts"][0]["pages"].as_u64().expect("a count");
    assert!(pages(&guarded) < pages(&free), "{guarded}");
}

const EXEC: &str = "7 execve(\"/bin/x\", [\"x\"], 0x7ffe /* 1 var */) = 0\n";

/// The report of a log as JSON, and as text its note and the verdict.
fn reported(text: &str) -> (Value, String, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = written(folder.path(), "x.strace", text);
    let path = path.to_str().expect("UTF-8");
    let output = teardown(&["trace", path, "--format", "json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = String::from_utf8_lossy(&teardown(&["trace", path]).stdout).into_owned();
    let note = text.lines().find(|line| line.starts_with("x: ")).unwrap_or_default();
    let verdict = text.lines().last().unwrap_or_default();
    (json(&output)["layouts"][0]["log"].clone(), note.to_owned(), verdict.to_owned())
}

/// Once they were left out, and the rest was called clean.
#[test]
fn what_is_not_replayed_is_counted_by_name_and_said_with_the_verdict() {
    let (log, _, verdict) = reported(&format!(
        "{EXEC}7 shmat(3, NULL, 0) = 0x7f0000000000\n7 shmdt(0x7f0000000000) = 0\n7 shmdt(0x7f0000000000) = -1 EINVAL (x)\n\
         7 fork() = 6\n6 brk(NULL) = 0x5000\n\
         8 munmap(0x7f0000000000, 4096) = 0\n8 munmap(0x7f0000000000, 4096) = 0\n9 munmap(0x7f0000000000, 4096) = 0\n7 exit_group(0) = ?\n"
    ));
    assert_eq!(log["dropped"], serde_json::json!({ "shmat": 1, "shmdt": 1 }));
    assert_eq!((&log["dropped_thread_calls"], &log["dropped_threads"]), (&3.into(), &2.into()));
    assert!(
        verdict.starts_with(
            "clean except for the calls that were not made (1 shmat, 1 shmdt, 3 calls of 2 threads that the log does not start): "
        ),
        "{verdict}"
    );
    let (log, _, verdict) = reported(&format!("{EXEC}7 exit_group(0) = ?\n"));
    assert_eq!(log["dropped"], serde_json::json!({}));
    assert!(verdict.starts_with("clean: "), "{verdict}");
}

#[test]
fn calls_by_their_older_and_newer_names_are_replayed() {
    for (map, exit) in [("mmap2", "_exit"), ("old_mmap", "exit"), ("mmap", "exit_group")] {
        let (log, _, verdict) = reported(&format!(
            "{EXEC}7 {map}(NULL, 8192, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0xf7f00000\n\
             7 pkey_mprotect(0xf7f00000, 4096, PROT_READ, 1) = 0\n7 munmap(0xf7f00000, 8192) = 0\n\
             7 execveat(3, \"x\", [\"x\"], NULL, 0) = 0\n7 {exit}(0) = ?\n"
        ));
        assert_eq!((&log["calls"], &log["address_spaces"]), (&6.into(), &2.into()), "{map}, {exit}: {log}");
        assert!(verdict.starts_with("clean: "), "{verdict}");
    }
}

/// Once, the address space of the thread that had the number before was never taken down, and the
/// engine was blamed.
#[test]
fn a_thread_that_starts_itself_or_one_that_runs_is_bad_input() {
    let folder = tempfile::tempdir().expect("a folder");
    for (text, line) in [
        ("7 clone(child_stack=NULL, flags=SIGCHLD) = 7\n", 2),
        ("7 fork() = 8\n7 clone(child_stack=NULL, flags=CLONE_VM) = 8\n", 3),
        ("7 fork() = 8\n8 vfork() = 7\n", 3),
    ] {
        let path = written(folder.path(), "x.strace", &format!("{EXEC}{text}"));
        let output = teardown(&["trace", path.to_str().expect("UTF-8")]);
        assert_eq!(output.status.code(), Some(2), "{text}");
        let said = format!("x.strace:{line}: expected the number of a new thread");
        assert!(stderr(&output).contains(&said), "{text}: {}", stderr(&output));
    }
    // A number is used again when its thread has ended.
    let path =
        written(folder.path(), "x.strace", &format!("{EXEC}7 fork() = 8\n8 exit(0) = ?\n7 fork() = 8\n"));
    assert_eq!(teardown(&["trace", path.to_str().expect("UTF-8")]).status.code(), Some(0));
}

#[test]
fn what_was_skipped_lost_or_assumed_is_said_with_its_line() {
    let map = "mmap(NULL, 1048576, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000000000";
    let (log, note, verdict) = reported(&format!(
        "7 brk(NULL) = 0x555500000000\n7 {map}\nhello\n8 madvise(0x7f0000000000, 1048576, MADV_DONTNEED) = 0\n\
         9 munmap(0x7f0000000000, 4096) = 0\n7 <... munmap resumed>) = 0\n7 mprotect(0x7f0000000000, 4096\n7 exit_group(0) = ?\n"
    ));
    assert_eq!((&log["calls"], &log["threads"], &log["address_spaces"]), (&5.into(), &3.into(), &1.into()));
    assert_eq!((&log["output_lines"], &log["first_output_line"]), (&1.into(), &3.into()));
    assert!(note.contains("1 line of output skipped from line 3 on"), "{note}");
    assert!(note.contains("ASSUMED: 2 threads are of the only process that they can be of"), "{note}");
    let not_made = "1 call without its start from line 6 on, 1 broken call from line 7 on";
    assert!(
        verdict.contains(&format!("clean except for the calls that were not made ({not_made})")),
        "{verdict}"
    );
}

#[test]
fn a_log_that_was_mostly_not_understood_has_no_verdict() {
    let folder = tempfile::tempdir().expect("a folder");
    let lost = "7 <... munmap resumed>) = 0\n";
    for (nr_lost, status) in [(2, 0), (3, 2)] {
        let text = format!("{EXEC}7 brk(NULL) = 0x5000\n{}", lost.repeat(nr_lost));
        let path = written(folder.path(), "x.strace", &text);
        let output = teardown(&["trace", path.to_str().expect("UTF-8")]);
        assert_eq!(output.status.code(), Some(status), "{}", stderr(&output));
        assert_eq!(stdout(&output).contains("NOT UNDERSTOOD, most of a log"), status == 2);
        assert_eq!(stderr(&output).contains("most of its calls were not understood"), status == 2);
    }
}

/// Threads share translations: what one gives up, the CPUs of the others must forget.
#[test]
fn threads_that_the_log_does_not_start_are_interrupted() {
    let folder = tempfile::tempdir().expect("a folder");
    let text: String = (0..20)
        .map(|round| {
            let (at, thread) = (0x7f00_0000_0000_u64 + round * 0x10_0000, 10 + round % 3);
            format!(
                "{thread} mmap(NULL, 1048576, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = {at:#x}\n\
                 {thread} madvise({at:#x}, 524288, MADV_DONTNEED) = 0\n"
            )
        })
        .collect();
    let path = written(folder.path(), "x.strace", &text);
    let report = json(&teardown(&["trace", path.to_str().expect("UTF-8"), "--format", "json"]));
    assert_clean(&report);
    assert!(report["layouts"][0]["ipis"]["sent"].as_u64() > Some(10), "{report}");
}
