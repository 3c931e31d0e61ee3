//! What people have at hand goes in: text of /proc, standard input, and files that somebody or
//! something has damaged.

mod common;

use core::time::Duration;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use common::{assert_clean, json, stderr, stdout, teardown};
use mmu_cli::input::bundled::{LAYOUTS, TRACES};

fn written(folder: &Path, name: &str, text: &[u8]) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).expect("written");
    path.to_str().expect("UTF-8").to_owned()
}

const MAPS: &str = "\
55d000000000-55d000002000 r-xp 00001000 fd:00 1234                       /usr/bin/a
55d000003000-55d000004000 rw-p 00000000 00:00 0
7f0000200000-7f0000600000 rw-p 00000000 00:00 0
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
";

const SMAPS: &str = "\
7f0000200000-7f0000800000 rw-p 00000000 00:00 0
Size:               6144 kB
Rss:                2056 kB
Private_Dirty:      2056 kB
Anonymous:          2056 kB
AnonHugePages:      2048 kB
Swap:                 12 kB
VmFlags: rd wr mr mw me ac sd
";

#[test]
fn maps_and_smaps_are_run_and_what_was_assumed_is_said() {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, text, pages, said) in [
        ("a.maps", MAPS, 2 + 1 + 1024 + 33, "a.maps: which pages are there was assumed: of 4 areas"),
        ("b.smaps", SMAPS, 514, "b.smaps: smaps says how many pages are there"),
    ] {
        let path = written(folder.path(), name, text.as_bytes());
        let output = teardown(&["run", "--layout", &path, "--format", "json"]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let report = json(&output);
        assert_clean(&report);
        assert_eq!(report["layouts"][0]["pages"], pages, "{report}");
        assert!(stderr(&output).contains(said), "{}", stderr(&output));
        // The layout that convert writes is the same, and nothing is left to assume.
        let converted = folder.path().join(format!("{name}.layout"));
        let converted = converted.to_str().expect("UTF-8");
        assert_eq!(teardown(&["convert", &path, "-o", converted]).status.code(), Some(0));
        let again = teardown(&["run", "--layout", converted, "--format", "json"]);
        assert_eq!(json(&again)["layouts"][0]["pages"], pages);
        assert_eq!(stderr(&again), "");
        let swept = teardown(&["sweep", "--layout", &path, "--batch", "64", "--repeat", "0"]);
        assert_eq!(swept.status.code(), Some(0), "{}", stderr(&swept));
        assert!(stderr(&swept).contains(said), "{}", stderr(&swept));
    }
}

#[test]
fn a_file_of_another_kind_gets_a_hint() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = written(folder.path(), "x.strace", b"7 brk(NULL) = 0x5000\n");
    let output = teardown(&["run", "--layout", &path]);
    assert_eq!(output.status.code(), Some(2));
    let said = stderr(&output);
    assert!(
        said.contains("x.strace:1: expected") && said.contains("`teardown trace` takes logs of strace"),
        "{said}"
    );
    for device in ["/dev/zero", "/dev/urandom"] {
        for command in [["run", "--layout"].as_slice(), &["replay"], &["convert"], &["trace"]] {
            let output = teardown(&[command, &[device]].concat());
            assert_eq!(output.status.code(), Some(2), "{command:?} {device}: {}", stderr(&output));
        }
        if device == "/dev/zero" {
            assert!(stderr(&teardown(&["run", "--layout", device])).contains("/dev/zero:1: "));
        }
    }
}

#[test]
fn a_dash_is_standard_input() {
    let log = b"7 brk(NULL) = 0x5000\n7 brk(0x9000) = 0x9000\n";
    let sequence = mmu_hosted::generate(1, 2, 10).to_string();
    for (args, text) in [
        (["run", "--layout", "-"].as_slice(), MAPS.as_bytes()),
        (&["run", "--layout", "-"], SMAPS.as_bytes()),
        (&["run", "--layout", "-"], LAYOUTS[0].text.as_bytes()),
        (&["convert", "-"], MAPS.as_bytes()),
        (&["trace", "-"], log),
        (&["replay", "-"], sequence.as_bytes()),
    ] {
        let mut child = start(args);
        child.stdin.take().expect("piped").write_all(text).expect("read");
        let output = child.wait_with_output().expect("ends");
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
        assert!(!stdout(&output).is_empty(), "{args:?}");
    }
}

fn start(args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_teardown"));
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("the command starts")
}

/// Repeatable numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        usize::try_from(self.0 >> 33).expect("31 bits") % most.max(1)
    }

    /// The text with one to four changes.
    fn damage(&mut self, text: &[u8]) -> Vec<u8> {
        const WORDS: [&str; 12] = [
            "0",
            "1",
            "4096",
            "140737488351232",
            "18446744073709551615",
            "0x7ffffffff000",
            "-1",
            "NULL",
            "\u{1b}[2J",
            "\"",
            "MAP_FIXED|MAP_SHARED",
            "<unfinished ...>",
        ];
        let mut bytes = text.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            let line_start = bytes[..at].iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
            let line_end =
                bytes[at..].iter().position(|&byte| byte == b'\n').map_or(bytes.len(), |end| at + end + 1);
            match self.below(7) {
                0 if !bytes.is_empty() => bytes[at] = self.below(256).to_le_bytes()[0],
                1 => bytes.truncate(at),
                2 => drop(bytes.drain(line_start..line_end)),
                3 => {
                    let line = bytes[line_start..line_end].to_vec();
                    let place = self.below(bytes.len() + 1);
                    bytes.splice(place..place, line);
                }
                // A number becomes another.
                4 => {
                    let end = at + bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                    bytes.splice(at..end, WORDS[self.below(WORDS.len())].bytes());
                }
                5 => drop(bytes.splice(at..at, WORDS[self.below(WORDS.len())].bytes())),
                _ => drop(bytes.drain(at..bytes.len().min(at + 1 + self.below(6)))),
            }
        }
        bytes
    }
}

/// The first lines of a text.
fn start_of(text: &str, nr_lines: usize) -> String {
    text.lines().take(nr_lines).map(|line| format!("{line}\n")).collect()
}

const VARIANTS: usize = 2100;

#[test]
fn damaged_files_end_with_a_verdict_or_an_error() {
    let mut inputs: Vec<(&[&str], String)> = Vec::new();
    for bundled in TRACES {
        inputs.push((&["trace", "--cpus", "2", "--checker", "off"], start_of(bundled.text, 25)));
    }
    for bundled in LAYOUTS {
        inputs.push((&["convert"], start_of(bundled.text, 40)));
        inputs.push((&["run", "--cpus", "1", "--checker", "off", "--layout"], MAPS.to_owned() + SMAPS));
    }
    for seed in 0..10 {
        inputs.push((&["replay"], mmu_hosted::generate(seed, 2, 8).to_string()));
    }
    let folder = tempfile::tempdir().expect("a folder");
    let begun = Instant::now();
    let run = |first: usize| {
        let mut clean = 0;
        for number in (first..VARIANTS).step_by(2) {
            let (args, text) = &inputs[number % inputs.len()];
            let variant = Random(number as u64).damage(text.as_bytes());
            let path = written(folder.path(), &format!("{number}.txt"), &variant);
            let args = [args, [path.as_str()].as_slice()].concat();
            let mut child = start(&args);
            drop(child.stdin.take());
            let started = Instant::now();
            while child.try_wait().expect("a child").is_none() {
                if started.elapsed() > Duration::from_secs(20) {
                    child.kill().expect("a child");
                    panic!("{args:?} hangs: {}", String::from_utf8_lossy(&variant));
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            let output = child.wait_with_output().expect("a child");
            let said = stderr(&output);
            let is_fine = matches!(output.status.code(), Some(0..=2)) && !said.contains("panicked");
            assert!(is_fine, "{args:?}: {:?} {said}\n{}", output.status, String::from_utf8_lossy(&variant));
            // Nobody can make a violation with a log or a layout.
            assert!(args[0] == "replay" || output.status.code() != Some(1), "{args:?}: {said}");
            assert!(output.status.code() != Some(2) || said.starts_with("teardown: "), "{args:?}: {said}");
            clean += usize::from(output.status.code() == Some(0));
            std::fs::remove_file(&path).expect("written");
        }
        clean
    };
    let clean: usize = std::thread::scope(|scope| {
        let other = scope.spawn(|| run(1));
        run(0) + other.join().expect("no variant failed")
    });
    // Some are taken and some are not.
    assert!(clean > VARIANTS / 10 && clean < VARIANTS, "{clean} of {VARIANTS} after {:?}", begun.elapsed());
    eprintln!("{clean} of {VARIANTS} in {:?}", begun.elapsed());
}
