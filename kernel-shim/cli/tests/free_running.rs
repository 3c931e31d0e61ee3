//! `teardown fuzz --free-running` as a person meets it. How fast it goes depends on the host, and
//! so does whether a run shows anything: nothing is asserted of that.

mod common;

use std::os::unix::process::CommandExt;
use std::process::Command;

use common::{json, stderr, stdout, teardown};

fn path(directory: &tempfile::TempDir, name: &str) -> String {
    directory.path().join(name).to_str().expect("a path of this host").to_owned()
}

#[test]
fn a_run_that_finds_nothing_is_clean_or_says_that_it_tested_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = path(&directory, "failure");
    let output = teardown(&["fuzz", "--free-running", "--time", "1", "--format", "json", "-o", &file]);
    let report = json(&output);
    assert_eq!(report["violations"].as_array().map(Vec::len), Some(0), "{report}");
    match output.status.code() {
        Some(0) => assert_eq!(report["clean"], true, "{report}"),
        Some(2) => {
            assert!(report["not_tested"].is_string(), "{report}");
            assert!(stderr(&output).contains("not tested: "), "{}", stderr(&output));
        }
        _ => panic!("{output:?}"),
    }
    assert!(report["counts"]["accesses"].as_u64() > Some(0), "{report}");
    assert!(report["accesses_per_second"].as_f64() > Some(0.0), "{report}");
    assert!(!std::path::Path::new(&file).exists(), "nothing failed");
}

#[test]
fn a_planted_fault_is_found_and_saved_with_what_led_to_it() {
    let directory = tempfile::tempdir().expect("a directory");
    for fault in ["skip-flush", "free-before-flush", "drop-ipi", "local-flush-only"] {
        let file = path(&directory, fault);
        let output = teardown(&["fuzz", "--free-running", "--time", "60", "--fault", fault, "-o", &file]);
        assert_eq!(output.status.code(), Some(1), "{fault}: {output:?}");
        assert!(stdout(&output).contains("violation: CPU "), "{fault}: {}", stdout(&output));
        let saved = std::fs::read_to_string(&file).expect("saved");
        for part in ["# free-running, ", "violation: ", "# the last events", "begins "] {
            assert!(saved.contains(part), "{fault}: no {part} in {saved}");
        }
    }
}

/// One of the cores that this process may use.
fn one_core() -> libc::cpu_set_t {
    // SAFETY: a set of CPUs is plain words, and all zeroes is the empty one.
    let mut cores: libc::cpu_set_t = unsafe { core::mem::zeroed() };
    // SAFETY: writes a set of this function's own, of the size it says.
    let refused = unsafe { libc::sched_getaffinity(0, size_of_val(&cores), &raw mut cores) };
    assert_eq!(refused, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: reads a set of this function's own.
    let is_there = |core: &usize| unsafe { libc::CPU_ISSET(*core, &cores) };
    let core = (0..1024).find(is_there).expect("this process runs somewhere");
    // SAFETY: as above.
    let mut one: libc::cpu_set_t = unsafe { core::mem::zeroed() };
    // SAFETY: writes a set of this function's own, which has 1024 places.
    unsafe { libc::CPU_SET(core, &mut one) };
    one
}

#[test]
fn cpus_that_take_turns_on_one_core_have_tested_nothing() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_teardown"));
    command.args(["fuzz", "--free-running", "--time", "2", "--cpus", "2"]);
    let core = one_core();
    let confine = move || {
        // SAFETY: reads a set of this function's own, of the size it says.
        match unsafe { libc::sched_setaffinity(0, size_of_val(&core), &raw const core) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec it makes one system call, and touches nothing of this process.
    unsafe { command.pre_exec(confine) };
    let output = command.output().expect("the command starts");
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(stderr(&output).contains("not tested: "), "{}", stderr(&output));
    assert!(!stdout(&output).contains("clean"), "{}", stdout(&output));
}

#[test]
fn what_a_free_run_cannot_do_is_refused() {
    for (args, said) in [
        (&["--free-running", "--ops", "5"][..], "--ops"),
        (&["--free-running", "--jobs", "2"], "--jobs"),
        (&["--free-running", "--length", "9"], "--length"),
        (&["--free-running", "--corpus", "somewhere"], "--corpus"),
        (&["--free-running", "--unguided"], "--unguided"),
        (&["--free-running", "--cpus", "1"], "2 to 8"),
        (&["--free-running", "--cpus", "9"], "2 to 8"),
        (&["--interrupts", "polled", "--ops", "160"], "--free-running"),
    ] {
        let output = teardown(&[&["fuzz"], args].concat());
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stdout(&output));
        assert!(stderr(&output).contains(said), "{args:?}: {}", stderr(&output));
    }
}
