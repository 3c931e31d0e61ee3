//! `teardown boot`, as far as it goes without an emulator, and with one where it is installed.

use clap::Parser;
use mmu_cli::boot::error::BootError;
use mmu_cli::boot::report::BootReport;
use mmu_cli::commands::boot::{BootArgs, boot};

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    args: BootArgs,
}

fn args(words: &[&str]) -> BootArgs {
    Line::parse_from(["boot"].iter().chain(words)).args
}

/// Boots if QEMU is there; says so if it is not.
fn booted(words: &[&str]) -> Option<BootReport> {
    match boot(&args(words)) {
        Ok(report) => Some(report),
        Err(error @ BootError::NoQemu(_)) => {
            eprintln!("not run: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn without_an_emulator_one_line_says_how_to_get_it() {
    let error = boot(&args(&["--qemu", "/nowhere/qemu"])).expect_err("there is no such file").to_string();
    assert!(error.contains("/nowhere/qemu") && error.contains("apt-get install"), "{error}");
    assert_eq!(error.lines().count(), 1);
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    for words in [
        ["--workload", "layout", "--cpus", "2"],
        ["--fault", "skip-remote-flush", "--cpus", "1"],
        ["--fault", "free-before-flush", "--cpus", "1"],
        ["--fault", "free-before-flush", "--workload", "rivals"],
        ["--fault", "free-before-flush", "--workload", "swap"],
        ["--memory", "32M", "--cpus", "2"],
    ] {
        assert!(matches!(boot(&args(&words)), Err(BootError::Usage(_))), "{words:?}");
    }
    assert!(matches!(boot(&args(&["--layout", "/nowhere.layout"])), Err(BootError::Input(_))));
}

#[test]
fn booted_and_hosted_machines_count_the_same() {
    for nr_cpus in ["1", "3"] {
        let Some(report) = booted(&["--workload", "drill", "--cpus", nr_cpus]) else { return };
        assert!(report.is_clean(), "{nr_cpus} CPUs: {report:?}");
        assert!(report.comparisons.iter().any(|comparison| comparison.of == "drill"));
    }
}

#[test]
fn as_many_cpus_start_as_a_set_has_room_for() {
    let Some(report) = booted(&["--workload", "drill", "--cpus", "64"]) else { return };
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn a_layout_is_built_and_taken_down_on_emulated_hardware() {
    let layout = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/layouts/redis-swapped.layout");
    let Some(report) = booted(&["--layout", layout, "--cpus", "2"]) else { return };
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.report.layouts[0].name, "redis-swapped");
    assert_eq!(report.layout_pages.map(|(planned, all)| planned == all), Some(true));
}

#[test]
fn a_flush_that_a_cpu_skips_is_seen_in_memory() {
    for fault in ["skip-local-flush", "skip-remote-flush", "free-before-flush"] {
        let words = ["--workload", "short", "--cpus", "2", "--fault", fault];
        let Some(report) = booted(&words) else { return };
        assert_eq!((report.ending, report.report.violations), ("violation", 1), "{fault}: {report:?}");
        let story = &report.report.told_violations[0];
        for word in ["cpu ", "address 0x", "read ", "expected ", "frame 0x", "freed at step "] {
            assert!(story.contains(word), "{fault}: no {word:?} in {story}");
        }
    }
}

#[test]
fn rivals_and_swap_see_a_flush_that_a_cpu_skips() {
    for (workload, fault) in [
        ("rivals", "skip-local-flush"),
        ("rivals", "skip-remote-flush"),
        ("swap", "skip-local-flush"),
        ("swap", "skip-remote-flush"),
    ] {
        let words = ["--workload", workload, "--cpus", "2", "--fault", fault];
        let Some(report) = booted(&words) else { return };
        assert_eq!((report.ending, report.report.violations), ("violation", 1), "{words:?}: {report:?}");
        let story = &report.report.told_violations[0];
        assert!(story.contains("a program read a frame that was freed"), "{words:?}: {story}");
    }
}

#[test]
fn a_hang_ends_with_the_state_of_every_cpu() {
    let Some(report) = booted(&["--workload", "hang", "--watchdog", "1", "--cpus", "2"]) else { return };
    assert_eq!(report.ending, "hang");
    let story = &report.report.told_violations[0];
    assert!(story.contains("cpu 0: in ring 0, hanging on purpose") && story.contains("cpu 1: "), "{story}");
}
