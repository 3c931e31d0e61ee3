//! Every state that a page can have, in every kind of area, shared or private, with every right:
//! each run ends, and rightly.

use core::time::Duration;
use std::sync::mpsc;
use std::thread;

use mmu_cli::input::layout::{Layout, PageState};
use mmu_cli::output::report::Report;
use mmu_cli::run::pass::RunOptions;
use mmu_cli::run::teardown::run_layout;

const KINDS: [&str; 7] =
    ["anon", "heap", "stack", "file \"f\"", "shared \"m\"", "hugetlb \"h\"", "pfn \"d\""];
const RIGHTS: [&str; 3] = ["---", "r--", "rw-"];
/// A run takes a few hundredths of a second.
const PATIENCE: Duration = Duration::from_secs(120);

/// What becomes of a layout.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Clean,
    /// At this line.
    Refused(usize),
    Wrong(String),
}

fn text(state: PageState, kind: &str, sharing: char, rights: &str) -> String {
    let state = state.word();
    format!(
        "mmu-gather layout 1\nname \"x\"\ncommand \"x\"\nkernel \"x\"\nthreads 1\ntables 1\n\
         vma 200000-400000 {rights}{sharing} {kind}\n {state} 0+512\nend vmas=1 runs=1 pages=512\n"
    )
}

fn verdict(text: &str) -> Verdict {
    let layout = match Layout::parse("x.layout", text) {
        Ok(layout) => layout,
        Err(error) => return Verdict::Refused(error.line),
    };
    let mut report = Report::default();
    match run_layout(&layout, &RunOptions { nr_cpus: 2, ..RunOptions::default() }, &mut report) {
        Ok(()) if report.is_clean() => Verdict::Clean,
        other => Verdict::Wrong(format!("{other:?}, {report:?}")),
    }
}

/// Whether such an area can hold such a page: frames that nobody counts are in areas of such frames
/// and nowhere else, and where no file is there are no pages of one.
fn is_possible(state: PageState, kind: &str) -> bool {
    match kind.split(' ').next() {
        Some("pfn") => state == PageState::Pfn,
        Some("anon" | "heap" | "stack") => {
            !matches!(state, PageState::Pfn | PageState::File | PageState::FileHuge)
        }
        _ => state != PageState::Pfn,
    }
}

/// Once, a write to a large page whose entry did not allow it was answered by nothing, and tried
/// for ever: 23 of these. And pages of the program's own in an area of device frames were never
/// freed, and blamed on the engine.
#[test]
fn every_state_in_every_kind_of_area_ends_with_the_right_verdict() {
    let mut cases = Vec::new();
    for state in PageState::ALL {
        for kind in KINDS {
            for sharing in ['p', 's'] {
                cases.extend(RIGHTS.map(|rights| (state, kind, sharing, rights)));
            }
        }
    }
    assert_eq!(cases.len(), 336);
    let (sender, verdicts) = mpsc::channel();
    let mut wrong = Vec::new();
    for case @ (state, kind, sharing, rights) in cases {
        let sender = sender.clone();
        // One that does not end is left behind; the process ends with the test.
        thread::spawn(move || drop(sender.send((case, verdict(&text(state, kind, sharing, rights))))));
        let expected = if is_possible(state, kind) { Verdict::Clean } else { Verdict::Refused(8) };
        match verdicts.recv_timeout(PATIENCE) {
            Ok((of, verdict)) if of == case && verdict == expected => {}
            Ok((_, verdict)) => wrong.push(format!("{case:?}: {verdict:?}, not {expected:?}")),
            Err(_) => panic!("{case:?} does not end; before it: {wrong:#?}"),
        }
    }
    assert!(wrong.is_empty(), "{} of 336: {wrong:#?}", wrong.len());
}
