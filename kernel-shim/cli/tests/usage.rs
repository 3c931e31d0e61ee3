//! Words on the command line that would do nothing, or harm: they are refused, and nothing is lost.

mod common;

use core::time::Duration;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use common::{stderr, stdout, teardown};

const SMALL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/layouts/redis-swapped.layout");
const LOG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/traces/gcc-hello.strace");

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
        (&["run", "--layout", SMALL, "--fault", "local-flush-only", "--cpus", "1"], "--cpus 2"),
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
    let folder = tempfile::tempdir().expect("a folder");
    let Some(full) = full_device(folder.path()) else { return };
    let output = teardown(&["fuzz", "--ops", "32000", "--fault", "skip-flush", "-o", &full]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains(&format!("cannot write {full}")), "{}", stderr(&output));
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

/// Every way to name a file to write.
fn writers(folder: &Path) -> Vec<Vec<String>> {
    let sequence = folder.join("in.sequence");
    let text =
        "mmu-gather sequence 1\ncpus 2\nseed 1\nmmu pcid intel keeper\n0 map m0 40000000+1 anon write\nend\n";
    std::fs::write(&sequence, text).expect("written");
    let sequence = sequence.to_str().expect("UTF-8");
    let pid = std::process::id().to_string();
    let sweep = ["sweep", "--batch", "8", "--size", "33", "--repeat", "0"];
    let of = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let mut all: Vec<Vec<String>> =
        ["--csv", "--json", "--html"].map(|to| of(&[&sweep[..], &[to]].concat())).into();
    all.push(of(&["replay", sequence, "--html"]));
    all.push(of(&["capture", "--pid", &pid, "-o"]));
    all.push(of(&["fuzz", "--ops", "32000", "--fault", "skip-flush", "-o"]));
    all
}

/// A device to which nothing can be written: one of our own for root, who could do harm to the
/// machine's.
fn full_device(folder: &Path) -> Option<String> {
    if std::fs::metadata("/proc/self").expect("Linux has it").uid() != 0 {
        return Some("/dev/full".to_owned());
    }
    let path = folder.join("full").to_str().expect("UTF-8").to_owned();
    let made = Command::new("mknod").args([&path, "c", "1", "7"]).stderr(Stdio::null()).status();
    made.is_ok_and(|status| status.success()).then_some(path)
}

/// As root, `sweep` made files of /dev/full and /dev/stdout.
#[test]
fn every_command_writes_into_what_is_no_file_and_keeps_what_is_there_until_it_is_done() {
    let folder = tempfile::tempdir().expect("a folder");
    for words in writers(folder.path()) {
        let run = |to: &str| {
            let words: Vec<_> = words.iter().map(String::as_str).chain([to]).collect();
            teardown(&words)
        };
        // Of a fuzzer that has found something that is the verdict.
        let (good, failed) = if words[0] == "fuzz" { (Some(1), Some(1)) } else { (Some(0), Some(2)) };
        // A full disk, as far as writing goes. Never the machine's own: root could do it harm.
        if let Some(full) = full_device(folder.path()) {
            let output = run(&full);
            assert_eq!(output.status.code(), failed, "{words:?}: {}", stderr(&output));
            assert!(
                stderr(&output).contains(&format!("cannot write {full}")),
                "{words:?}: {}",
                stderr(&output)
            );
            let kind = std::fs::metadata(&full).expect("it is there").file_type();
            assert!(kind.is_char_device(), "{words:?} took its place");
            if full != "/dev/full" {
                std::fs::remove_file(&full).expect("it is there");
            }
        }
        let pipe = folder.path().join("pipe");
        assert!(Command::new("mkfifo").arg(&pipe).status().expect("Linux has it").success());
        let mut reader = Command::new("cat").arg(&pipe).stdout(Stdio::piped()).spawn().expect("Linux has it");
        assert_eq!(run(pipe.to_str().expect("UTF-8")).status.code(), good, "{words:?}");
        let kind = std::fs::metadata(&pipe).expect("it is there").file_type();
        // If it is none any more, the reader waits for ever.
        let still_a_pipe = kind.is_fifo() || reader.kill().is_err();
        let read = reader.wait_with_output().expect("it ends").stdout;
        assert!(still_a_pipe && !read.is_empty(), "{words:?} took the place of the pipe");
        std::fs::remove_file(&pipe).expect("it is there");
        // The standard output: a pipe, which has no name.
        let output = run("/proc/self/fd/1");
        assert_eq!(output.status.code(), good, "{words:?}: {}", stderr(&output));
        assert!(!output.stdout.is_empty(), "{words:?}");
        // Where nothing can be, before the work begins.
        let output = run("/nonexistent/x");
        assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(2), ""), "{words:?}");
        assert!(stderr(&output).contains("cannot write /nonexistent/x"), "{words:?}: {}", stderr(&output));
        // A link stays one, to a file that is whole.
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        std::fs::write(&file, "old").expect("written");
        std::os::unix::fs::symlink(&file, &link).expect("made");
        assert_eq!(run(link.to_str().expect("UTF-8")).status.code(), good, "{words:?}");
        assert!(std::fs::symlink_metadata(&link).expect("it is there").is_symlink(), "{words:?}");
        assert!(std::fs::read_to_string(&file).expect("text").len() > 40, "{words:?}");
        std::fs::remove_file(link).expect("it is there");
        assert_eq!(
            std::fs::read_dir(folder.path()).expect("readable").count(),
            2,
            "{words:?} left something"
        );
    }
}

#[test]
fn whoever_is_interrupted_leaves_nothing_behind() {
    for signal in ["INT", "TERM"] {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("x.html");
        let mut command = Command::new(env!("CARGO_BIN_EXE_teardown"));
        command.args(["sweep", "--everything", "--html"]).arg(&file).stderr(Stdio::null());
        let mut command = command.spawn().expect("it starts");
        let files = || std::fs::read_dir(folder.path()).expect("readable").count();
        let end = Instant::now() + Duration::from_secs(20);
        while files() == 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!((files(), file.exists()), (1, false), "it has begun, and is not done");
        let kill = Command::new("kill").args([&format!("-{signal}"), &command.id().to_string()]).status();
        assert!(kill.expect("it starts").success());
        assert_eq!(command.wait().expect("it ends").code(), None, "{signal}");
        assert_eq!(files(), 0, "{signal}");
    }
}

/// A sequence of two CPUs where one has nothing cached, so that no request is sent that could be
/// lost.
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
        stderr(&output).contains("--fault skip-flush happened") && stderr(&output).contains("did no harm")
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
    assert!(
        verdict.starts_with("clean except for what the checker would have found, which was off:"),
        "{verdict}"
    );
    assert!(verdict.contains("violations unknown"), "{verdict}");
}
