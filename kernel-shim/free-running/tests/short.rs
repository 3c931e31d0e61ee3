//! Short runs: the small kernel as it is, and with something wrong. Rates depend on the host, so
//! nothing is asserted of them.

use core::time::Duration;

use mmu_free_running::{Interrupts, Options, PlantedFault, Report, ViolationKind, run};

fn run_with(options: Options) -> Report {
    run(&options, |_, _| {}).expect("the host has threads")
}

fn found_with(fault: PlantedFault, nr_cpus: usize) -> Report {
    // It ends with the first violation, which comes within a fraction of this.
    let report = run_with(Options { fault, nr_cpus, time: Duration::from_secs(60), ..Options::default() });
    assert!(!report.violations.is_empty(), "{fault:?} was not found: {:?}", report.totals);
    assert!(report.totals.faults > 0 || fault == PlantedFault::FreeBeforeFlush, "{:?}", report.totals);
    report
}

#[test]
fn the_kernel_as_it_is_shows_programs_nothing_of_what_is_gone() {
    let report = run_with(Options { time: Duration::from_millis(1500), ..Options::default() });
    assert!(report.violations.is_empty(), "{}", report.failure_file());
    let totals = report.totals;
    for (name, count) in totals.fields() {
        let may_be_none = ["met", "faults"].contains(&name);
        assert!(count > 0 || may_be_none, "no {name} in {totals:?}");
    }
}

#[test]
fn interrupts_that_are_polled_only_send_no_signals() {
    let interrupts = Interrupts::Polled;
    let time = Duration::from_secs(1);
    let report = run_with(Options { time, interrupts, nr_cpus: 4, ..Options::default() });
    assert!(report.violations.is_empty(), "{}", report.failure_file());
    assert_eq!(report.totals.signals, 0);
}

#[test]
fn a_flush_that_drops_nothing_is_found() {
    found_with(PlantedFault::SkipFlush, 2);
}

#[test]
fn pages_that_are_freed_before_the_flush_are_found() {
    found_with(PlantedFault::FreeBeforeFlush, 2);
}

#[test]
fn a_request_that_is_answered_and_not_carried_out_is_found_with_what_led_to_it() {
    let report = found_with(PlantedFault::DropIpi, 3);
    let file = report.failure_file();
    for part in ["violation: ", "dead up to", "takes its mail", "INVLPG"] {
        assert!(file.contains(part), "no {part} in {file}");
    }
}

#[test]
fn a_lost_interrupt_ends_the_run_and_it_says_who_waits_for_whom() {
    let patience = Duration::from_secs(1);
    let fault = PlantedFault::LoseInterrupt;
    let report = run_with(Options { fault, patience, time: Duration::from_secs(60), ..Options::default() });
    // A debug build of the engine gives up first, and says whom it waits for.
    let kinds: Vec<_> = report.violations.iter().map(|violation| violation.kind).collect();
    assert!(
        kinds.iter().any(|kind| matches!(kind, ViolationKind::Stuck | ViolationKind::Panicked)),
        "{}",
        report.failure_file()
    );
    if kinds.contains(&ViolationKind::Stuck) {
        let words = report.stuck.join("\n");
        assert!(words.contains("waits for an answer of CPU "), "{words}");
    }
}
