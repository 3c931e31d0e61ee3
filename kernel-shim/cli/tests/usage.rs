//! Words on the command line that would do nothing, or harm: they are refused, and nothing is lost.

use std::os::unix::fs::FileTypeExt;
use std::process::{Command, Output};

const SMALL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/layouts/redis-swapped.layout");
const LOG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/traces/gcc-hello.strace");

fn teardown(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_teardown")).args(args).output().expect("the command starts")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_flag_that_would_do_nothing_is_refused() {
    for (args, said) in [
        // Those of `run`, and another command after them.
        (&["--fault", "skip-flush", "trace", LOG][..], "--fault"),
        (&["--cpus", "8", "run", "--layout", SMALL], "--cpus"),
        (&["--layout", SMALL, "fuzz", "--ops", "1"], "--layout"),
        // A run of nothing.
        (&["fuzz", "--ops", "0"], "--ops"),
        (&["fuzz", "--time", "0"], "--time"),
        // A fault that nobody looks for, or that cannot happen.
        (&["run", "--layout", SMALL, "--fault", "skip-flush", "--checker", "off"], "--checker"),
        (&["trace", LOG, "--fault", "free-before-flush", "--checker", "off"], "--checker"),
        (&["run", "--layout", SMALL, "--fault", "drop-ipi", "--cpus", "1"], "--cpus 2"),
        (&["trace", LOG, "--fault", "drop-ipi", "--cpus", "1"], "--cpus 2"),
        (&["fuzz", "--ops", "160", "--fault", "drop-ipi", "--cpus", "1"], "--cpus 2"),
        (&["boot", "--fault", "skip-remote-flush", "--workload", "drill"], "--workload"),
        (&["boot", "--fault", "skip-local-flush", "--workload", "self-test"], "--workload"),
        (&["boot", "--fault", "free-before-flush", "--workload", "measure"], "--workload"),
    ] {
        let output = teardown(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stdout(&output));
        assert!(stderr(&output).contains(said), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn flags_alone_are_those_of_run() {
    let output = teardown(&["--layout", SMALL, "--cpus", "2"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains("redis-swapped"), "{}", stdout(&output));
}

#[test]
fn no_time_is_too_long_or_too_short_to_be_told() {
    for seconds in ["0", "18446744073709551615"] {
        // The image is none, so nothing is booted either way.
        let output = teardown(&["boot", "--timeout", seconds, "--image", LOG]);
        assert_eq!(output.status.code(), Some(2), "{seconds}: {}", stderr(&output));
        assert!(!stderr(&output).contains("panicked"), "{seconds}: {}", stderr(&output));
    }
}

#[test]
fn a_failure_that_cannot_be_saved_is_printed_and_still_a_failure() {
    let output =
        teardown(&["fuzz", "--ops", "32000", "--fault", "skip-flush", "-o", "/nonexistent/failure.sequence"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("cannot write /nonexistent/failure.sequence"), "{}", stderr(&output));
    let told = stdout(&output);
    assert!(told.contains("violation: ") && !told.contains("saved as"), "{told}");
    let text = stderr(&output);
    assert!(text.contains("# teardown replay --fault skip-flush FILE\nmmu-gather sequence 1\n"), "{text}");
    assert!(text.ends_with("end\n"), "{text}");
}

#[test]
fn a_layout_goes_into_what_is_no_file_and_does_not_take_its_place() {
    let folder = tempfile::tempdir().expect("a folder");
    let pipe = folder.path().join("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status().expect("Linux has it");
    assert!(made.success());
    let name = pipe.to_str().expect("UTF-8").to_owned();
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || std::fs::read_to_string(pipe)
    });
    let pid = std::process::id().to_string();
    let output = teardown(&["capture", "--pid", &pid, "-o", &name]);
    let still_a_pipe = std::fs::metadata(&pipe).expect("it is there").file_type().is_fifo();
    if !still_a_pipe {
        // Whoever reads waits at a pipe that has no name any more.
        panic!("a file lies where the pipe was");
    }
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let layout = reader.join().expect("no panic").expect("text");
    assert!(layout.starts_with("mmu-gather layout 1\n"), "{layout}");
}

#[test]
fn a_link_stays_a_link_to_what_was_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, link) = (folder.path().join("file"), folder.path().join("link"));
    std::fs::write(&file, "old").expect("written");
    std::os::unix::fs::symlink(&file, &link).expect("made");
    let pid = std::process::id().to_string();
    let output = teardown(&["capture", "--pid", &pid, "-o", link.to_str().expect("UTF-8")]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(std::fs::symlink_metadata(&link).expect("it is there").is_symlink());
    assert!(std::fs::read_to_string(&file).expect("text").starts_with("mmu-gather layout 1\n"));
    assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 2, "a temporary file was left");
}

/// A sequence of two CPUs where one has nothing cached, so that no request is sent that could be lost.
#[test]
fn a_fault_that_never_happened_is_not_called_harmless() {
    let folder = tempfile::tempdir().expect("a folder");
    let short = folder.path().join("short.sequence");
    let text =
        "mmu-gather sequence 1\ncpus 2\nseed 1\nmmu pcid intel keeper\n0 map m0 40000000+1 anon write\nend\n";
    std::fs::write(&short, text).expect("written");
    let short = short.to_str().expect("UTF-8");
    for fault in ["drop-ipi", "free-before-flush"] {
        let output = teardown(&["replay", short, "--fault", fault]);
        assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(2), ""), "{fault}");
        assert!(stderr(&output).contains(&format!("--fault {fault} never happened")), "{}", stderr(&output));
    }
    // CPUs load roots all the same, and drop nothing when they do.
    let output = teardown(&["replay", short, "--fault", "skip-flush"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(
        stderr(&output).contains("--fault skip-flush happened") && stderr(&output).contains("harmed nobody")
    );
    assert_eq!(teardown(&["replay", short]).status.code(), Some(0));
}

#[test]
fn where_nobody_looked_nothing_is_said_of_violations() {
    let output = teardown(&["run", "--layout", SMALL, "--checker", "off", "--format", "json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("the report is JSON");
    assert_eq!((output.status.code(), &report["violations"]), (Some(0), &serde_json::Value::Null));
    assert_eq!(report["leaked_frames"], 0);
    let text = stdout(&teardown(&["run", "--layout", SMALL, "--checker", "off"]));
    let verdict = text.lines().last().unwrap_or_default();
    assert!(verdict.starts_with("clean but for what the checker, which was off,"), "{verdict}");
    assert!(verdict.contains("violations unknown"), "{verdict}");
}
