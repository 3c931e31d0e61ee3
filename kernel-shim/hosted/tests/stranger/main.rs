//! The kit on a kernel that it does not know, which is clean, and with each of its mistakes.

#[path = "../../examples/stranger/ipis.rs"]
mod ipis;
#[path = "../../examples/stranger/kernel.rs"]
mod kernel;
#[path = "../../examples/stranger/kit.rs"]
mod kit;
#[path = "../../../tests/lines/mod.rs"]
mod lines;
#[path = "../../examples/stranger/mistake.rs"]
mod mistake;

mod guide;

use core::time::Duration;
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Weak};
use std::{fs, io};

use mmu_hosted::{
    Boundary, Calls, FuzzOptions, HostedMachine, MachineFault, Report, Sequence, Trial, Verdict,
    ViolationKind, fuzz, generate, judge, replay,
};

use kernel::Stranger;
use mistake::Mistake;

fn options() -> FuzzOptions {
    FuzzOptions { sequences: 300, ..FuzzOptions::default() }
}

fn made_with(mistake: Mistake) -> impl Fn(&Arc<HostedMachine>) -> io::Result<Stranger> {
    move |machine| Ok(Stranger::with(machine, mistake))
}

fn fuzzed(mistake: Mistake) -> Report {
    fuzz(&options(), made_with(mistake)).expect("memory")
}

/// The kinds of violation that the short sequence shows; nothing else may be wrong with it.
fn kinds(mistake: Mistake) -> Vec<ViolationKind> {
    let report = fuzzed(mistake);
    let failure = report.failure.as_ref().unwrap_or_else(|| panic!("{mistake:?} is not found"));
    assert!(matches!(failure.verdict, Verdict::Ended(_)), "{report}");
    failure.found.told.iter().map(|violation| violation.kind).collect()
}

/// The words with which the short sequence ends.
fn words(mistake: Mistake) -> String {
    let report = fuzzed(mistake);
    match report.failure.unwrap_or_else(|| panic!("{mistake:?} is not found")).verdict {
        Verdict::Panicked(words) => words,
        Verdict::Ended(outcome) => panic!("{mistake:?}: {outcome:?}"),
    }
}

#[test]
fn a_kernel_without_a_mistake_is_clean_and_what_it_lacks_is_counted() {
    let report = fuzzed(Mistake::Absent);
    assert!(report.is_clean(), "{report}");
    assert_eq!(report.sequences, 300);
    let calls = ["map", "unmap", "discard", "protect", "exit", "touch", "switch", "lazy", "sync"];
    for word in calls.into_iter().chain(["offline", "online"]) {
        let tally = report.calls.of(word);
        assert!(tally.done > 100 && tally.skipped == 0, "{word}: {tally:?}");
    }
    for word in ["fork", "remap", "movestack", "reclaim", "guard", "populate", "batches", "tables"] {
        let tally = report.calls.of(word);
        assert!(tally.done == 0 && tally.skipped > 10, "{word}: {tally:?}");
    }
    let told = report.to_string();
    assert!(
        told.contains("reclaim           0 done, ") && told.contains("the kernel has no such call"),
        "{told}"
    );
    assert!(told.contains("refused: the kernel said no"), "{told}");
    let all = Boundary::ALL.len();
    let reached = report.reached.iter().count();
    assert!(told.contains(&format!("boundaries reached: {reached} of {all}")), "{told}");
    for boundary in Boundary::ALL {
        assert_eq!(told.contains(boundary.name()), !report.reached.has(boundary), "{boundary}: {told}");
    }
}

#[test]
fn rights_that_no_gather_was_told_of_are_found() {
    assert!(kinds(Mistake::ChangedForgotten).contains(&ViolationKind::RightsUsableAfterProtect));
}

#[test]
fn a_page_that_is_freed_when_its_entry_is_cleared_is_found() {
    assert!(kinds(Mistake::FreedWhenUnmapped).contains(&ViolationKind::PageReachableAfterFree));
}

#[test]
fn a_map_lock_that_is_dropped_before_the_flush_is_found() {
    let failure = fuzzed(Mistake::LockDroppedEarly).failure.expect("it is found");
    let found: Vec<_> = failure.found.told.iter().map(|violation| violation.kind).collect();
    assert_eq!(found, [ViolationKind::OldPageUsableAfterMap]);
    // The munmap that dropped it has begun, and has not returned.
    let told = failure.found.told[0].to_string();
    let munmaps: Vec<_> = told.lines().filter(|line| line.contains("of the sequence, unmap m")).collect();
    assert!(munmaps.len() == 1 && munmaps[0].ends_with("begins"), "{told}");
}

#[test]
fn a_frame_that_was_never_told_is_named_where_a_program_first_uses_it() {
    assert_eq!(kinds(Mistake::AllocationsNotTold).first(), Some(&ViolationKind::NeverAllocated));
}

#[test]
fn an_interrupt_that_is_never_sent_is_told_from_a_handler_that_does_nothing() {
    let words = words(Mistake::InterruptsNotSent);
    assert!(words.contains("no interrupt was sent to it since it last answered"), "{words}");
    assert!(!words.contains("has run its handler"), "{words}");
}

#[test]
fn a_flush_that_a_planted_fault_has_skipped_is_in_the_story() {
    let trial = Trial { fault: MachineFault::SkipFlush, ..Trial::default() };
    let report = fuzz(&FuzzOptions { trial, ..options() }, made_with(Mistake::Absent)).expect("memory");
    let told = report.failure.expect("it is found").found.told;
    assert!(told.iter().any(|violation| violation.to_string().contains("does nothing (a planted fault)")));
}

#[test]
fn a_rule_says_where_else_to_look() {
    assert!(ViolationKind::TableFreedInUse.rule().contains("`Bounds::between`"));
    assert!(ViolationKind::PageReachableAfterFree.rule().contains("past `switch_mm`"));
}

#[test]
fn a_page_that_is_never_freed_is_counted() {
    let report = fuzzed(Mistake::NeverFreed);
    let told = report.to_string();
    let Some(Verdict::Ended(outcome)) = report.failure.map(|failure| failure.verdict) else {
        panic!("it is not found");
    };
    assert!(told.contains("lost: a page in frame") && told.contains("given out"), "{told}");
    assert!(outcome.leaked_frames > 0 && outcome.leaked_tables == 0, "{outcome:?}");
}

#[test]
fn a_page_that_is_freed_twice_is_found() {
    let report = fuzzed(Mistake::FreedTwice);
    let failure = report.failure.expect("it is found");
    let found: Vec<_> = failure.found.told.iter().map(|violation| violation.kind).collect();
    assert!(found.contains(&ViolationKind::FreedTwice), "{found:?}");
}

#[test]
fn a_handler_that_answers_nothing_ends_the_run_and_is_named() {
    let words = words(Mistake::HandlerDoesNothing);
    assert!(words.contains("does not end") && words.contains("waits for the answer of"), "{words}");
    assert!(words.contains("something it waits for never happens"), "{words}");
    assert!(words.contains("was sent the flush interrupt, has run its handler"), "{words}");
    assert!(!words.contains("no interrupt was sent to it"), "{words}");
}

#[test]
fn what_a_kernel_may_have_of_its_own_is_clean() {
    for mistake in [Mistake::AbsentWithOwnIpis, Mistake::AbsentWithUsedLines] {
        let report = fuzzed(mistake);
        assert!(report.is_clean(), "{mistake:?}: {report}");
    }
}

#[test]
fn a_flush_with_interrupts_off_is_named_where_calls_to_other_cpus_need_them_on() {
    let words = words(Mistake::InterruptsOff);
    assert!(words.contains("does not end") && words.contains("waits for the answer of CPU"), "{words}");
    assert!(words.contains("has its interrupts off: a CPU that waits"), "{words}");
}

#[test]
fn a_cpu_that_goes_off_and_does_not_say_so_is_named() {
    let words = words(Mistake::OffInTheMask);
    assert!(words.contains("it is off, and offline_cpu was not the last that it ran"), "{words}");
}

#[test]
fn a_batch_page_that_reaches_into_another_frame_is_named_before_a_gather_writes_to_it() {
    let words = words(Mistake::BatchPageShort);
    assert!(words.contains("begins 0x800 bytes into frame") && words.contains("allocate_batch"), "{words}");
}

#[test]
fn a_page_that_a_gather_has_and_a_program_gets_is_found() {
    assert_eq!(kinds(Mistake::LentPageMapped).first(), Some(&ViolationKind::LentPageGivenOut));
}

#[test]
fn a_page_that_free_batch_keeps_is_named_with_what_it_was() {
    let report = fuzzed(Mistake::FreeBatchForgotten);
    let told = report.to_string();
    let Some(Verdict::Ended(outcome)) = report.failure.map(|failure| failure.verdict) else {
        panic!("it is not found");
    };
    assert!(outcome.lost.iter().any(|lost| lost.is_lent), "{told}");
    assert!(told.contains("allocate_batch has lent it, and free_batch has not given it back"), "{told}");
}

#[test]
fn a_fault_that_maps_with_a_table_locked_ends_the_run() {
    let words = words(Mistake::MapsUnderTableLock);
    assert!(words.contains("does not end") && words.contains("tried to take a lock"), "{words}");
    assert!(words.contains("has tried to take it again: a fault maps"), "{words}");
}

/// What `mistake` prints, and how the process ends that makes it: only another process can see
/// that.
fn process_with(mistake: Mistake, name: &str) -> (ExitStatus, String) {
    const INSIDE: &str = "MMU_HOSTED_INSIDE";
    let inside = format!("{mistake:?}");
    if std::env::var(INSIDE).is_ok_and(|mistake| mistake == inside) {
        let patience = if mistake == Mistake::LockOfStd { 1 } else { 20 };
        let options = FuzzOptions { patience: Duration::from_secs(patience), ..options() };
        let report = fuzz(&options, made_with(mistake)).expect("memory");
        panic!("it came back: {report}");
    }
    if std::env::var_os(INSIDE).is_some() {
        return (ExitStatus::default(), String::new());
    }
    let myself = std::env::current_exe().expect("the path of this test");
    let output = Command::new(myself).args(["--exact", name]).env(INSIDE, inside).output().expect("it runs");
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_lock_of_std_ends_the_process_with_the_sequence() {
    let (status, told) = process_with(Mistake::LockOfStd, "a_lock_of_std_ends_the_process_with_the_sequence");
    assert_eq!(status.code(), Some(101), "{told}");
    assert!(told.contains("a lock of std?") && told.contains("mmu-gather sequence 1"), "{told}");
    assert!(told.contains("Cpus::wait_for_answers is not overridden"), "{told}");
}

/// Ten seconds, or twenty if others had a turn since the interrupt was sent, where the engine alone
/// would wait for two minutes.
#[test]
fn a_wait_for_answers_that_is_left_out_ends_the_process_and_is_named() {
    let (status, told) = process_with(
        Mistake::WaitLeftOut,
        "a_wait_for_answers_that_is_left_out_ends_the_process_and_is_named",
    );
    assert_eq!(status.code(), Some(101), "{told}");
    assert!(
        told.contains("Cpus::wait_for_answers") && told.contains("overridden with the machine's"),
        "{told}"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn an_instruction_of_ring_0_ends_the_process_and_is_named_with_the_seed() {
    use std::os::unix::process::ExitStatusExt;

    let name = "an_instruction_of_ring_0_ends_the_process_and_is_named_with_the_seed";
    for mistake in [Mistake::InvlpgLeftOut, Mistake::LoadCr3LeftOut, Mistake::InterruptsLeftOut] {
        let (status, told) = process_with(mistake, name);
        if status.success() && told.is_empty() {
            // This process was started for another of them.
            continue;
        }
        assert_eq!(status.signal(), Some(11), "{mistake:?}: {told}");
        assert!(
            told.contains("is Cpus::invlpg, load_cr3 or without_interrupts overridden"),
            "{mistake:?}: {told}"
        );
        assert!(told.contains("The sequence that runs has seed "), "{mistake:?}: {told}");
    }
}

/// Debug builds of the engine name these themselves, and the run ends with their words. Release
/// builds do not look, and what they lead to is found.
#[test]
fn what_the_engine_names_ends_the_run_with_its_words() {
    let mut not_named = Vec::new();
    for (mistake, said) in [
        (Mistake::SwitchOfItsOwn, "T4: "),
        (Mistake::OneCpuState, "T2: "),
        (Mistake::HandlerNamesAnother, "flush_interrupt was called for CPU"),
        (Mistake::NeighboursForgotten, "(`Bounds::between`)"),
        (Mistake::DirtyTables, "A new table reads as zero"),
        (Mistake::BatchPageNotAligned, "is not aligned"),
        (Mistake::PcidsSaidOn, "CR4.PCIDE is clear"),
        (Mistake::AcknowledgedFirst, "the target acknowledged, before flush_tlb_func had run there"),
        (Mistake::ReturnsAtOnce, "flush_others returned"),
        (Mistake::OneCountOfAnswers, "each request has a count of answers of its own"),
        (Mistake::MeanwhileForgotten, "flush_others has not called `meanwhile`"),
        (Mistake::EntriesPastUsedLines, "entries were written past `LockedTable::entry`"),
        (Mistake::MmMoves, "neither moved nor copied"),
    ] {
        let report = fuzzed(mistake);
        let is_named = match report.failure.as_ref().map(|failure| &failure.verdict) {
            None => false,
            Some(Verdict::Panicked(words)) => !cfg!(debug_assertions) || words.contains(said),
            Some(Verdict::Ended(_)) => !cfg!(debug_assertions),
        };
        if !is_named {
            not_named.push(format!("{mistake:?}: {report}"));
        }
    }
    assert!(not_named.is_empty(), "{}", not_named.join("\n"));
}

#[test]
fn an_assertion_of_the_kernel_ends_the_run_with_its_words() {
    assert_eq!(words(Mistake::UnmapPanics), "more areas than expected");
}

#[test]
fn what_fails_is_saved_and_fails_again_with_the_same_words() {
    let folder = std::env::temp_dir().join(format!("mmu-hosted-{}", std::process::id()));
    let path = folder.join("saved").join("stranger.sequence");
    let made = made_with(Mistake::ChangedForgotten);
    let report = fuzz(&FuzzOptions { reproducer: Some(path.clone()), ..options() }, &made).expect("memory");
    let told = |report: &Report| {
        let failure = report.failure.as_ref().expect("it fails");
        failure.found.told.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert!(report.to_string().contains(&format!("saved as {}", path.display())), "{report}");
    let text = fs::read_to_string(&path).expect("it was written");
    assert_eq!(Sequence::kernel_in(&text), Some(core::any::type_name::<Stranger>()), "{text}");
    for _ in 0..2 {
        let again = replay(&text, Trial::default(), &made).expect("memory");
        assert_eq!(told(&again), told(&report));
    }
    let mended = replay(&text, Trial::default(), made_with(Mistake::Absent)).expect("memory");
    assert!(mended.is_clean(), "{mended}");
    fs::remove_dir_all(&folder).expect("it is ours");
}

#[test]
fn a_text_that_is_no_sequence_is_refused_at_its_line() {
    let refused = replay("mmu-gather sequence 1\ncpus x\n", Trial::default(), made_with(Mistake::Absent));
    let error = refused.expect_err("no CPU");
    assert_eq!(
        (error.kind(), error.to_string().split(':').next()),
        (io::ErrorKind::InvalidData, Some("line 2"))
    );
    assert!(format!("{error:?}").contains("line 2: expected cpus and a number"), "{error:?}");
}

#[test]
fn a_run_that_is_given_up_gives_its_machine_back() {
    for mistake in [Mistake::UnmapPanics, Mistake::BatchPageShort] {
        let failing: Sequence = fuzzed(mistake).failure.expect("it is found").sequence;
        let mut machine = Weak::new();
        let run = judge(&failing, Trial::default(), |made| {
            machine = Arc::downgrade(made);
            made_with(mistake)(made)
        });
        assert!(matches!(run.expect("memory").verdict, Verdict::Panicked(_)));
        assert_eq!(machine.strong_count(), 0, "{mistake:?}");
    }
}

#[test]
fn a_kernel_that_does_not_boot_is_an_error() {
    let refuses = |_: &Arc<HostedMachine>| -> io::Result<Stranger> { Err(io::Error::other("no memory")) };
    let error = judge(&generate(1, 2, 8), Trial::default(), refuses).expect_err("it does not boot");
    assert_eq!(error.to_string(), "no memory");
}

/// The three that are honest are no mistakes; the lock of `std` has a test of its own.
#[test]
fn the_guide_counts_the_mistakes() {
    let nr_mistakes = Mistake::ALL.len() - 3;
    let guide = include_str!("../../README.md");
    assert!(guide.contains(&format!("{nr_mistakes} mistakes")), "{nr_mistakes} mistakes");
}

#[test]
fn calls_of_two_runs_are_added() {
    let made = made_with(Mistake::Absent);
    let mut sum = Calls::default();
    let mut reports = Vec::new();
    for seed in [1, 2] {
        let report = fuzz(&FuzzOptions { seed, sequences: 3, ..options() }, &made).expect("memory");
        sum.add(&report.calls);
        reports.push(report);
    }
    let done = |calls: &Calls| calls.of("unmap").done;
    assert_eq!(done(&sum), done(&reports[0].calls) + done(&reports[1].calls));
    assert!(reports.iter().all(|report| done(&report.calls) > 0));
}

/// What a stranger writes to be run by the kit, as rustfmt leaves it, without blank lines and
/// comments.
#[test]
fn the_glue_is_as_short_as_the_guide_says() {
    let nr_lines = lines::code_lines(include_str!("../../examples/stranger/kit.rs")).count();
    let guide = include_str!("../../README.md");
    assert!(guide.contains(&format!("{nr_lines} lines")), "{nr_lines} lines");
    assert!(nr_lines <= 64, "{nr_lines} lines");
}
