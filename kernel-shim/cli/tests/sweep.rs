//! The command `teardown sweep` as a person meets it: flags, files, errors; and counts that are the
//! same in every run.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use mmu_cli::input::bundled::LAYOUTS;
use mmu_cli::input::layout::Layout;
use serde_json::Value;

use common::{stderr, teardown};

const SNAPSHOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/sweep.snapshot");

fn sweep(args: &[&str]) -> Output {
    let output = teardown(&[&["sweep"], args].concat());
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
    output
}

fn json(args: &[&str]) -> Value {
    let output = sweep(&[args, &["--format", "json"]].concat());
    serde_json::from_slice(&output.stdout).expect("the report is JSON")
}

fn cells(report: &Value) -> &Vec<Value> {
    report["cells"].as_array().expect("cells are a list")
}

/// The count `name` of the only cell with this setting.
fn count(report: &Value, batch: &str, name: &str) -> u64 {
    let mut found = cells(report).iter().filter(|cell| cell["batch"] == batch);
    let cell = found.next().expect("the setting was swept");
    assert!(found.next().is_none(), "{batch} was swept twice");
    cell["counts"][name].as_u64().expect("a count")
}

/// Runs a sweep that writes `flag`'s file, and reads that.
fn file(flag: &str, args: &[&str]) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("written");
    let name = path.to_str().expect("UTF-8");
    sweep(&[args, &[flag, name]].concat());
    let leftovers = fs::read_dir(folder.path()).expect("readable").count();
    assert_eq!(leftovers, 1, "a temporary file was left");
    fs::read_to_string(path).expect("the file was written")
}

#[test]
fn the_counts_of_a_small_sweep_are_those_of_the_snapshot() {
    let shapes = file(
        "--csv",
        &[
            "--batch",
            "8,64,510,adaptive",
            "--size",
            "33,513",
            "--shape",
            "dense,sparse,areas,huge,shuffled",
            "--cpus",
            "8lazy6",
            "--repeat",
            "0",
        ],
    );
    let axes = file(
        "--csv",
        &[
            "--batch",
            "8,19x510",
            "--size",
            "10000",
            "--cpus",
            "1,2,8lazy6",
            "--ceiling",
            "0,33,never",
            "--refuse",
            "never,7,always",
            "--repeat",
            "0",
        ],
    );
    // Without what was not measured: the last five columns.
    let counted = |line: &str| line.rsplitn(6, ',').last().map(|counts| format!("{counts}\n"));
    let now: String = shapes.lines().chain(axes.lines().skip(1)).filter_map(counted).collect();
    if std::env::var_os("BLESS").is_some() {
        fs::write(SNAPSHOT, &now).expect("the snapshot can be written");
    }
    let before = fs::read_to_string(SNAPSHOT).unwrap_or_default();
    let changed: Vec<String> = before
        .lines()
        .zip(now.lines())
        .filter(|(before, now)| before != now)
        .map(|(before, now)| format!("- {before}\n+ {now}\n"))
        .collect();
    assert!(
        changed.is_empty() && before.len() == now.len(),
        "counts have changed; if that is meant: BLESS=1 cargo test -p mmu-cli --test sweep\n{}\n{}",
        now.lines().next().unwrap_or_default(),
        changed.concat()
    );
}

#[test]
fn counts_do_not_depend_on_how_often_times_are_taken_nor_on_the_other_cells() {
    let counts = |args: &[&str]| {
        let report = json(&[args, &["--shape", "areas,shuffled", "--size", "600"]].concat());
        let of_64 = cells(&report).iter().filter(|cell| cell["batch"] == "64");
        of_64.map(|cell| cell["counts"].clone()).collect::<Vec<Value>>()
    };
    let once = counts(&["--batch", "64", "--repeat", "0"]);
    assert_eq!(once, counts(&["--batch", "unlimited,64,8", "--repeat", "2"]));
    assert_eq!(once.len(), 2);
}

#[test]
fn the_default_sweep_tries_every_value_of_every_axis_one_axis_at_a_time() {
    let report = json(&["--batch", "510", "--repeat", "0"]);
    assert_eq!(cells(&report).len(), 26);
    for (axis, values) in [
        ("shape", "areas chromium-renderer dense huge jvm-g1-thp postgres-backend shuffled sparse"),
        ("cpus", "1 2 8lazy6"),
        ("ceiling", "0 1 33 512 never"),
        ("refuse", "7 always never"),
    ] {
        let seen: BTreeSet<&str> = cells(&report).iter().filter_map(|cell| cell[axis].as_str()).collect();
        assert_eq!(seen.into_iter().collect::<Vec<_>>().join(" "), values, "{axis}");
    }
    let dense = cells(&report).iter().filter(|cell| cell["shape"] == "dense");
    let sizes: BTreeSet<u64> = dense.filter_map(|cell| cell["size"].as_u64()).collect();
    assert_eq!(sizes.into_iter().collect::<Vec<_>>(), [1, 2, 4, 8, 32, 33, 34, 512, 513, 32_768, 262_144]);
}

#[test]
fn lists_are_swept_in_every_combination_and_each_value_once() {
    let report = json(&[
        "--batch",
        "64,510,64",
        "--size",
        "33,1Ki",
        "--shape",
        "W1,sparse",
        "--cpus",
        "1,8lazy6",
        "--ceiling",
        "1,never",
        "--refuse",
        "2,always",
        "--repeat",
        "0",
    ]);
    assert_eq!(cells(&report).len(), 2 * 2 * 2 * 2 * 2 * 2);
    let keys: BTreeSet<String> = cells(&report)
        .iter()
        .map(|cell| {
            ["batch", "size", "shape", "cpus", "ceiling", "refuse"]
                .map(|axis| cell[axis].to_string())
                .join(" ")
        })
        .collect();
    assert_eq!(keys.len(), 64);
    assert!(keys.contains(r#""510" 1024 "dense" "8lazy6" "never" "2""#), "{keys:?}");
}

#[test]
fn a_larger_batch_flushes_less_and_holds_more_until_one_flush_is_enough() {
    let report = json(&["--batch", "8,64,510,2x510,19x510,unlimited", "--size", "10000", "--repeat", "0"]);
    let settings = ["8", "64", "510", "2x510", "19x510", "unlimited"];
    for pair in settings.windows(2) {
        assert!(count(&report, pair[0], "flushes") > count(&report, pair[1], "flushes"), "{pair:?} {report}");
        assert!(
            count(&report, pair[0], "bytes_unfreed_peak") < count(&report, pair[1], "bytes_unfreed_peak"),
            "{pair:?} {report}"
        );
    }
    assert_eq!(count(&report, "unlimited", "flushes"), 1);
    assert_eq!(count(&report, "unlimited", "forced_flushes"), 0);
    // All pages, 20 last-level tables and the two above them.
    assert_eq!(count(&report, "unlimited", "bytes_unfreed_peak"), (10_000 + 20 + 2) * 4096);
}

#[test]
fn adaptive_flushes_as_often_as_the_default_and_holds_half_of_10_000_pages() {
    let report = json(&["--batch", "19x510,adaptive", "--size", "10000", "--repeat", "0"]);
    assert_eq!(count(&report, "adaptive", "flushes"), count(&report, "19x510", "flushes"));
    assert_eq!(count(&report, "19x510", "bytes_unfreed_peak"), 9678 * 4096);
    let held = count(&report, "adaptive", "bytes_unfreed_peak");
    assert!((5000 * 4096..5030 * 4096).contains(&held), "{held}");
}

#[test]
fn lazy_cpus_are_spared_forced_flushes_and_told_when_tables_go() {
    let report = json(&["--batch", "64", "--size", "513", "--cpus", "8lazy6", "--repeat", "0"]);
    let forced = count(&report, "64", "forced_flushes");
    assert_eq!(forced, 7);
    assert_eq!(count(&report, "64", "flushes"), forced + 1);
    assert_eq!(count(&report, "64", "ipis_avoided_lazy"), 6 * forced);
    assert_eq!(count(&report, "64", "ipis_sent"), forced + 7);
}

#[test]
fn one_cpu_sends_no_interrupt_and_refused_pages_leave_the_slots_on_the_stack() {
    let report =
        json(&["--batch", "19x510", "--size", "513", "--cpus", "1", "--refuse", "always", "--repeat", "0"]);
    assert_eq!(count(&report, "19x510", "ipis_sent"), 0);
    assert_eq!(count(&report, "19x510", "batch_pages_peak"), 0);
    assert_eq!(count(&report, "19x510", "forced_flushes"), 513 / 7);
}

#[test]
fn the_ceiling_decides_between_single_pages_and_whole_contexts() {
    for (ceiling, invlpgs, contexts) in [("0", 0, 2), ("32", 0, 2), ("33", 66, 0), ("never", 66, 0)] {
        let report = json(&["--batch", "510", "--size", "33", "--ceiling", ceiling, "--repeat", "0"]);
        assert_eq!(count(&report, "510", "invlpgs"), invlpgs, "ceiling {ceiling}");
        assert_eq!(count(&report, "510", "contexts_dropped"), contexts, "ceiling {ceiling}");
    }
}

#[test]
fn times_are_measured_and_interrupts_modelled_and_neither_is_among_the_counts() {
    let args = ["--batch", "8,510", "--size", "513", "--ipi-ns", "2000", "--repeat", "3"];
    let report = json(&args);
    assert_eq!(report["model"]["ipi_ns"], 2000);
    for cell in cells(&report) {
        assert_eq!(cell["counts"]["pages"], 513);
        let median = cell["measured"]["ns_per_page_median"].as_f64().expect("measured");
        let least = cell["measured"]["ns_per_page_min"].as_f64().expect("measured");
        assert!(0.0 < least && least <= median, "{cell}");
        assert_eq!(cell["measured"]["samples"], 3);
        let counts = cell["counts"].as_object().expect("an object");
        assert!(counts.values().all(Value::is_u64), "{cell}");
        assert!(!counts.keys().any(|key| key.contains("ns")), "{cell}");
    }
    assert!(report["answer"]["choice"].is_string(), "{report}");
    for key in ["gather", "stack", "cpu", "mm", "table", "frame"] {
        assert!(report["memory"][key].as_u64().is_some_and(|bytes| bytes > 0), "{key}");
    }
    assert!(report["memory"]["gather"].as_u64().is_some_and(|bytes| bytes <= 256));
}

#[test]
fn csv_has_a_header_and_a_row_for_each_cell_and_json_written_to_a_file_is_the_same() {
    let csv =
        file("--csv", &["--batch", "8,19x510", "--size", "33,512", "--repeat", "1", "--ipi-ns", "3000"]);
    let mut lines = csv.lines();
    assert_eq!(
        lines.next(),
        Some(
            "batch,shape,size_pages,cpus,ceiling_pages,refuse,pages,tables,flushes,pages_per_flush,full_flushes,\
             forced_flushes,invlpgs,contexts_dropped,ipis_sent,ipis_avoided_lazy,batch_pages_peak,bytes_unfreed_peak,\
             longest_stretch_pages,measured_ns_per_page_median,measured_ns_per_page_min,measured_samples,\
             modelled_ipi_ns,modelled_ns_per_page"
        )
    );
    let rows: Vec<Vec<&str>> = lines.map(|line| line.split(',').collect()).collect();
    assert_eq!(rows.len(), 4);
    for row in &rows {
        assert_eq!(row.len(), 24, "{row:?}");
        let number = |column: usize| row[column].parse::<f64>().expect("a number");
        // 33 pages a flush, or all 512, or 7 of them; each flush an interrupt of 3000 ns.
        let modelled = number(19) + number(14) * 3000.0 / number(6);
        assert!((modelled - number(23)).abs() < 0.01, "{row:?}");
    }
    let written = file("--json", &["--batch", "8", "--size", "33", "--repeat", "0"]);
    let written: Value = serde_json::from_str(&written).expect("JSON");
    assert_eq!(written["cells"], json(&["--batch", "8", "--size", "33", "--repeat", "0"])["cells"]);
}

#[test]
fn the_page_needs_nothing_else_and_names_axes_and_units() {
    let page = file(
        "--html",
        &["--batch", "8,510,adaptive", "--size", "33,2Ki", "--cpus", "2,8lazy6", "--repeat", "2"],
    );
    for fetched in ["http:", "https:", "src=", "<link", "<script", "@import", "url(", "<img", "<iframe"] {
        assert!(!page.contains(fetched), "{fetched} in the page");
    }
    for words in [
        "Take ",
        "prefers-color-scheme: dark",
        ">batch setting (slots)<",
        ">ns per page",
        ">pages per flush",
        ">IPIs per 1000 pages",
        ">bytes unfreed at peak",
        ">pages in a stretch",
        "measured, median",
        "modelled, 1000 ns an IPI",
        ">counted<",
        "8 CPUs, 6 lazy",
        "12 rows",
    ] {
        assert!(page.contains(words), "no {words:?} in the page");
    }
    // Two views, by size and by CPUs; in each, a line differs from the next in colour, dash and
    // mark.
    assert_eq!(page.matches("class=\"view\"").count(), 2);
    for style in [
        "c0\"><path class=\"line\" stroke-dasharray=\"\"",
        "c1\"><path class=\"line\" stroke-dasharray=\"8 4\"",
    ] {
        assert!(page.contains(style), "no {style}");
    }
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    assert_eq!(page.matches("<g ").count(), page.matches("</g>").count());
    assert!(!page.contains("NaN") && !page.contains("inf"), "a number that is none");
}

#[test]
fn without_times_there_is_no_choice_and_the_page_says_so() {
    let page = file("--html", &["--batch", "8,510", "--size", "513", "--repeat", "0"]);
    assert!(page.contains("No choice: nothing was timed."));
    assert!(!page.contains("measured, median"));
    let text = sweep(&["--batch", "8,510", "--size", "1", "--repeat", "1"]).stdout;
    let text = String::from_utf8_lossy(&text);
    assert!(text.contains("no choice: under these conditions every setting flushes equally often"), "{text}");
}

#[test]
fn bad_input_names_what_was_expected_and_ends_with_2() {
    for (args, expected) in [
        (["--batch", "511"], "9 to 510 slots"),
        (["--batch", "7"], "expected 8 (the slots on the stack)"),
        (["--batch", "0x510"], "19x510"),
        (["--batch", "2x511"], "2 to 510 slots"),
        (["--batch", "510,large"], "adaptive"),
        (["--size", "0"], "from 1 to 1Mi"),
        (["--size", "2Mi"], "from 1 to 1Mi"),
        (["--size", "1Gi"], "such as 513 or 32Ki"),
        (
            ["--shape", "square"],
            "dense (W1), sparse (W3), areas (W4), huge (W5), shuffled (W6), or a bundled process",
        ),
        (["--cpus", "8lazy8"], "one at least is not"),
        (["--cpus", "65"], "1 to 64 CPUs"),
        (["--ceiling=-1", "--repeat=0"], "or never"),
        (["--ceiling", "always"], "or never"),
        (["--refuse", "1"], "never, always, or N from 2 on"),
        (["--refuse", "sometimes"], "never, always"),
        (["--repeat", "1002"], "--repeat"),
        (["--ipi-ns", "fast"], "--ipi-ns"),
        (["--csv", "/nonexistent/x.csv"], "cannot write /nonexistent/x.csv"),
        (["--html", "/nonexistent/x.html"], "cannot write /nonexistent/x.html"),
        (["--layout", "/nonexistent/x.layout"], "cannot read /nonexistent/x.layout"),
        (["--layout", "/dev/null"], "/dev/null:"),
        (["--everything", "--size=33"], "--everything"),
    ] {
        let output = teardown(&[&["sweep"], &args[..]].concat());
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(expected), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty(), "{args:?} did half of it");
    }
}

#[test]
fn what_the_machine_has_no_frames_for_is_left_out_by_name() {
    let report = json(&["--batch", "8", "--shape", "dense,huge", "--size", "64Ki", "--repeat", "0"]);
    assert_eq!(cells(&report).len(), 1);
    assert_eq!(report["left_out"][0]["shape"], "huge");
    let output = teardown(&["sweep", "--batch", "8", "--shape", "huge", "--size", "64Ki", "--repeat", "0"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("huge, 64Ki pages"), "{}", stderr(&output));
}

#[test]
fn files_appear_whole_or_not_at_all() {
    let folder = tempfile::tempdir().expect("a folder");
    let csv = folder.path().join("x.csv");
    let status = Command::new(env!("CARGO_BIN_EXE_teardown"))
        .args([
            "sweep",
            "--batch",
            "8",
            "--size",
            "33",
            "--repeat",
            "0",
            "--html",
            "/nonexistent/x.html",
            "--csv",
        ])
        .arg(&csv)
        .stderr(Stdio::null())
        .status()
        .expect("the command starts");
    assert_eq!(status.code(), Some(2));
    assert_eq!(fs::read_dir(folder.path()).expect("readable").count(), 0);
    let full = fs::OpenOptions::new().write(true).open(Path::new("/dev/full")).expect("Linux has one");
    let status = Command::new(env!("CARGO_BIN_EXE_teardown"))
        .args(["sweep", "--batch", "8", "--size", "33", "--repeat", "0"])
        .stdout(full)
        .stderr(Stdio::null())
        .status()
        .expect("the command starts");
    assert_eq!(status.code(), Some(2));
}

#[test]
fn of_a_real_process_all_that_is_resident_waits_if_nothing_is_flushed_before_the_end() {
    for name in ["jvm-g1-thp", "postgres-backend", "redis-swapped"] {
        let text = LAYOUTS.iter().find(|bundled| bundled.name == name).expect("bundled").text;
        let layout = Layout::parse(name, text).expect("bundled");
        let report = json(&["--batch", "unlimited", "--shape", name, "--size", "33,513", "--repeat", "0"]);
        // Of its own size, whatever --size says, and therefore once.
        assert_eq!(cells(&report).len(), 1);
        let totals = layout.totals();
        let leaves = totals.nr_anon + totals.nr_file + totals.nr_huge / 512;
        assert_eq!(count(&report, "unlimited", "pages"), leaves, "{name}");
        assert_eq!(cells(&report)[0]["size"], leaves, "{name}");
        // Fewer than a batch of tables, so no flush is forced; 2 MiB leaves weigh what they are.
        let tables = count(&report, "unlimited", "tables");
        assert!(tables < 511, "{name}: {tables}");
        let held = (totals.nr_resident() + tables) * 4096;
        assert_eq!(count(&report, "unlimited", "bytes_unfreed_peak"), held, "{name}");
    }
}

#[test]
fn a_layout_file_is_swept_like_the_bundled_one_of_its_name() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/layouts/redis-bgsave-child.layout");
    let options = ["--batch", "64", "--cpus", "2,8lazy6", "--repeat", "0"];
    let from_file = json(&[&["--layout", path], &options[..]].concat());
    assert_eq!(
        from_file["cells"],
        json(&[&["--shape", "redis-bgsave-child"], &options[..]].concat())["cells"]
    );
    assert_eq!(cells(&from_file).len(), 2);
    assert!(count(&json(&["--batch", "64", "--layout", path, "--repeat", "0"]), "64", "pages") > 1000);
}

#[test]
fn layout_files_of_one_name_are_told_apart_and_odd_names_break_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let text = |name| LAYOUTS.iter().find(|bundled| bundled.name == name).expect("bundled").text;
    let paths =
        [("a,<b>.layout", "sqlite-query"), ("a__b_.layout", "redis-bgsave-child")].map(|(file, bundled)| {
            let path = folder.path().join(file);
            fs::write(&path, text(bundled)).expect("written");
            path.to_str().expect("UTF-8").to_owned()
        });
    let report = json(&["--batch", "8", "--repeat", "0", "--layout", &paths[0], "--layout", &paths[1]]);
    let shapes: Vec<&str> = cells(&report).iter().filter_map(|cell| cell["shape"].as_str()).collect();
    assert_eq!(shapes, ["a__b_", "a__b_-2"]);
    assert_ne!(cells(&report)[0]["counts"], cells(&report)[1]["counts"]);
}

#[test]
fn the_memory_tables_of_the_readme_are_what_a_sweep_finds() {
    let readme =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md")).expect("readable");
    let text = sweep(&["--size", "32Ki", "--repeat", "0"]).stdout;
    let text = String::from_utf8_lossy(&text).into_owned();
    let mut settings = 0;
    for words in text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()) {
        // A row: setting, bar, pages, tables, flushes, seven numbers, batch pages, bytes, unit,
        // stretch, bar, two dashes.
        let [batch, "|", _, _, flushes, _, _, _, _, _, _, _, batch_pages, bytes, unit, _, "|", "-", "|", "-"] =
            words[..]
        else {
            continue;
        };
        settings += 1;
        let row = format!("| {batch} | {bytes} {unit} | {batch_pages} | {flushes} |");
        assert!(readme.contains(&row), "not in README.md: {row}");
    }
    assert_eq!(settings, 9, "{text}");
    let memory = &json(&["--batch", "8", "--size", "1", "--repeat", "0"])["memory"];
    for (what, key) in [
        ("a gather, on the stack", "gather"),
        ("each CPU", "cpu"),
        ("each address space", "mm"),
        ("each table: its lock, and the note of its used lines", "table"),
        ("each frame, with counts and free list of the benches' machine", "frame"),
    ] {
        let row = format!("| {what} | {} |", memory[key]);
        assert!(readme.contains(&row), "not in README.md: {row}");
    }
}
