//! `teardown boot` with an emulator that does not do what it should: one line, exit code 2, and
//! nothing left running.

use core::time::Duration;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Instant;

use tempfile::TempDir;

/// What the image prints when all is well, of `--workload lazy --cpus 4`.
const GOOD: [&str; 5] = [
    "boot: cpus=4 free_mib=400 heap_mib=64 tsc_hz=1 x2apic=false pcid=false invpcid=false",
    "boot: options \"workload=lazy fault=none watchdog=30\"",
    "phase: name=lazy ms=9 pages=100 tables=10 shootdowns=7 ipis=9 faults=100",
    "total: pages=100 tables=10 shootdowns=7 ipis=9 exits=1 lost_frames=0 lost_tables=0 double_frees=0",
    "boot: verdict Pass",
];

/// An emulator: a script that answers `--version`, and then does this.
fn emulator(folder: &TempDir, does: &str) -> PathBuf {
    let path = folder.path().join("qemu");
    let text = format!("#!/bin/sh\n[ \"$1\" = --version ] && echo fake && exit\n{does}\n");
    std::fs::write(&path, text).expect("written");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("it is ours");
    path
}

fn boot(qemu: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_teardown"));
    // Any file will do for an image: it is the emulator who looks into it.
    command.args(["boot", "--image", file!(), "--qemu"]).arg(qemu).args(more);
    if !more.contains(&"--workload") {
        command.args(["--workload", "lazy"]);
    }
    command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    command
}

fn printed(lines: &[&str], then: &str) -> String {
    let lines: String = lines.iter().map(|line| format!("echo '{line}'\n")).collect();
    lines + then
}

/// Exit code 2 and one line, which is returned.
fn refused(output: &Output) -> String {
    let line = String::from_utf8_lossy(&output.stderr).into_owned();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!((output.status.code(), said.as_str()), (Some(2), ""), "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
    line
}

#[test]
fn a_run_of_which_anything_is_missing_is_not_called_clean() {
    let folder = tempfile::tempdir().expect("a folder");
    let good = boot(&emulator(&folder, &printed(&GOOD, "exit 33")), &[]).output().expect("it starts");
    assert_eq!(good.status.code(), Some(0), "{good:?}");
    for (missing, said) in [
        (0, "did not print how many CPUs"),
        (2, "did not run its part `lazy`"),
        (3, "did not print its totals"),
        (4, "did not print a verdict"),
    ] {
        let mut lines = GOOD.to_vec();
        lines.remove(missing);
        let output = boot(&emulator(&folder, &printed(&lines, "exit 33")), &[]).output().expect("it starts");
        assert!(refused(&output).contains(said), "{missing}: {output:?}");
    }
    for (from, to, said) in [
        ("cpus=4", "cpus=1", "4 CPUs were asked for and 1 started"),
        ("shootdowns=7", "shootdowns=0", "no CPU told another to flush"),
    ] {
        let lines: Vec<_> = GOOD.iter().map(|line| line.replace(from, to)).collect();
        let lines: Vec<_> = lines.iter().map(String::as_str).collect();
        let output = boot(&emulator(&folder, &printed(&lines, "exit 33")), &[]).output().expect("it starts");
        assert!(refused(&output).contains(said), "{output:?}");
    }
}

#[test]
fn each_part_of_a_whole_workload_must_have_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let parts = ["threads", "churn", "lazy", "rivals", "swap", "measure"];
    for missing in parts {
        let mut lines = GOOD.map(str::to_owned).to_vec();
        let phases = parts.iter().filter(|part| **part != missing);
        lines.splice(2..3, phases.map(|part| GOOD[2].replace("lazy", part)));
        let lines: Vec<_> = lines.iter().map(String::as_str).collect();
        let qemu = emulator(&folder, &printed(&lines, "exit 33"));
        let more = ["--workload", "short", "--fault", "skip-remote-flush"];
        let output = boot(&qemu, &more).output().expect("it starts");
        assert!(refused(&output).contains(&format!("did not run its part `{missing}`")), "{output:?}");
    }
}

#[test]
fn an_emulator_that_says_nothing_has_shown_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    for status in ["33", "35", "0"] {
        let output = boot(&emulator(&folder, &format!("exit {status}")), &[]).output().expect("it starts");
        assert!(refused(&output).contains("printed nothing"), "{status}: {output:?}");
    }
}

#[test]
fn a_fault_that_nobody_noticed_is_said_to_be_so() {
    let folder = tempfile::tempdir().expect("a folder");
    let qemu = emulator(&folder, &printed(&GOOD, "exit 33"));
    let output = boot(&qemu, &["--fault", "skip-remote-flush"]).output().expect("it starts");
    assert!(refused(&output).contains("the planted fault skip-remote-flush was not noticed"), "{output:?}");
}

#[test]
fn an_emulator_that_somebody_kills_is_no_violation() {
    let folder = tempfile::tempdir().expect("a folder");
    for (how, said) in [
        ("kill -9 $$", "signal 9"),
        ("kill -15 $$", "signal 15"),
        // As QEMU ends when it is asked to.
        ("echo 'qemu: terminating on signal 15 from pid 1 (init)' >&2; exit 0", "terminating on signal 15"),
    ] {
        let output = boot(&emulator(&folder, &printed(&GOOD[..2], how)), &[]).output().expect("it starts");
        assert!(refused(&output).contains(said), "{how}: {output:?}");
    }
}

/// What is left of a process, if anything: its state.
fn state(pid: &str) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next().filter(|state| *state != 'Z')
}

/// The processes that the emulator has started, once it has told.
fn started(folder: &TempDir) -> Vec<String> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let pids = std::fs::read_to_string(folder.path().join("pids")).unwrap_or_default();
        let pids: Vec<_> = pids.split_ascii_whitespace().map(str::to_owned).collect();
        if pids.len() == 2 {
            return pids;
        }
        assert!(Instant::now() < end, "the emulator does not start");
        thread::sleep(Duration::from_millis(20));
    }
}

fn gone(pids: &[String]) -> bool {
    let end = Instant::now() + Duration::from_secs(10);
    while pids.iter().any(|pid| state(pid).is_some()) {
        if Instant::now() > end {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
    true
}

/// One that starts a process of its own, says who they are, and hangs.
fn hanging(folder: &TempDir, first: &str) -> PathBuf {
    let pids = folder.path().join("pids");
    let _ = std::fs::remove_file(&pids);
    emulator(folder, &format!("{first}\nsleep 1000 &\necho $$ $! > {}\nwait", pids.display()))
}

#[test]
fn an_emulator_that_hangs_is_ended_with_all_that_it_has_started() {
    let folder = tempfile::tempdir().expect("a folder");
    for first in ["", "exec >&-", "exec >&- 2>&-", "echo 'boot: cpus=4'"] {
        let start = Instant::now();
        let output = boot(&hanging(&folder, first), &["--timeout", "1"]).output().expect("it starts");
        assert!(refused(&output).contains("did not end within 1 s"), "{first}: {output:?}");
        assert!(start.elapsed() < Duration::from_secs(20), "{first}");
        assert!(gone(&started(&folder)), "{first}: something still runs");
    }
    // One that does not even say what it is.
    let mute = folder.path().join("qemu");
    std::fs::write(&mute, "#!/bin/sh\nsleep 1000\n").expect("written");
    let output = boot(&mute, &["--timeout", "1"]).output().expect("it starts");
    assert!(refused(&output).contains("--version does not end"), "{output:?}");
}

/// Whether this process ignores a signal, and so do those that it starts: `nohup` has HUP ignored.
fn is_ignored(signal: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc is mounted");
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).expect("a mask of signals");
    u64::from_str_radix(mask.trim(), 16).expect("hexadecimal") >> (signal - 1) & 1 == 1
}

#[test]
fn no_emulator_outlives_the_command() {
    let folder = tempfile::tempdir().expect("a folder");
    for (signal, number) in [("INT", 2), ("TERM", 15), ("HUP", 1)] {
        if is_ignored(number) {
            continue;
        }
        let mut command = boot(&hanging(&folder, ""), &[]);
        let mut command = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
        let pids = started(&folder);
        let kill = Command::new("kill").args([&format!("-{signal}"), &command.id().to_string()]).status();
        assert!(kill.expect("it starts").success());
        let status = command.wait().expect("it ends");
        assert_eq!(status.code(), None, "{signal} did not end it, but: {status}");
        assert!(gone(&pids), "{signal}: the emulator still runs");
    }
    // Nothing can be done any more then, but by the kernel.
    let mut command = boot(&hanging(&folder, ""), &[]);
    let mut command = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    let emulator = started(&folder).remove(0);
    command.kill().expect("it runs");
    command.wait().expect("it ends");
    assert!(gone(&[emulator]), "KILL: the emulator still runs");
}
