//! What a fuzzing run says, as text and as JSON.

use core::time::Duration;

use mmu_hosted::Pairs;
use serde_json::{Value, json};

use crate::fuzz::campaign::{FolderReport, Fuzzed};
use crate::fuzz::folder::{Done, Unread};
use crate::fuzz::options::FuzzOptions;
use crate::output::escape::escaped;
use crate::output::verdict::verdict_json;
use crate::output::words::counted;

/// One line: how far it has come.
#[must_use]
pub(crate) fn summary(fuzzed: &Fuzzed, time: Duration) -> String {
    let seconds = time.as_secs_f64().max(1e-9);
    let (pairs, all_pairs) = (fuzzed.coverage.followed.len(), Pairs::all().len());
    let (reached, all) = fuzzed.coverage.reached();
    format!(
        "{}, {}, {:.0} sequences/s, {:.0} operations/s, \
         {pairs} of {all_pairs} pairs of operations, {reached} of {all} boundaries",
        counted(fuzzed.sequences, "sequence", "sequences"),
        counted(fuzzed.ops, "operation", "operations"),
        fuzzed.sequences as f64 / seconds,
        fuzzed.ops as f64 / seconds,
    )
}

/// The names of a list that are printed.
const NAMED: usize = 8;

/// The lines that name what no sequence has reached: boundaries, counters of the kernel, pairs of
/// operations.
#[must_use]
pub(crate) fn not_reached(fuzzed: &Fuzzed) -> Vec<String> {
    let coverage = &fuzzed.coverage;
    let mut lines = Vec::new();
    let mut line = |what: &str, names: &[String]| {
        if !names.is_empty() {
            lines.push(format!("{what}: {}", names.join(", ")));
        }
    };
    let names = |names: Vec<&str>| names.into_iter().map(str::to_owned).collect::<Vec<_>>();
    line("boundaries not reached", &names(coverage.not_reached()));
    line("never counted by the kernel", &names(coverage.never_counted()));
    let followed = ("followed one another", &coverage.followed, Pairs::all());
    let overlapped = ("overlapped", &coverage.overlapped, Pairs::that_can_overlap());
    for (what, pairs, all) in [followed, overlapped] {
        let missing: Vec<_> =
            pairs.missing(&all).map(|(first, second)| format!("{first}+{second}")).collect();
        if let Some(more) = missing.len().checked_sub(NAMED).filter(|more| *more > 0) {
            let first = missing[..NAMED].join(", ");
            line(
                &format!("{} of {} pairs of operations never {what}", missing.len(), all.len()),
                &[format!("{first} and {more} more")],
            );
        } else {
            let number = counted(missing.len() as u64, "pair", "pairs");
            line(&format!("{number} of operations never {what}"), &missing);
        }
    }
    lines
}

/// The lines about what is kept: in this run, and in the folder of the campaign.
#[must_use]
pub(crate) fn kept(fuzzed: &Fuzzed) -> Vec<String> {
    let Some(FolderReport { this_build, other_builds, unread, not_written }) = &fuzzed.folder else {
        return Vec::new();
    };
    let mut lines = vec![format!(
        "in this corpus: {}, {}, over {}; {} kept, with {}",
        counted(this_build.sequences, "sequence", "sequences"),
        counted(this_build.ops, "operation", "operations"),
        duration(*this_build),
        counted(fuzzed.kept.0 as u64, "sequence", "sequences"),
        counted(fuzzed.kept.1 as u64, "feature", "features"),
    )];
    if other_builds.sequences > 0 {
        lines.push(format!(
            "and with other builds of the engine or the checker: {}, {}, over {}",
            counted(other_builds.sequences, "sequence", "sequences"),
            counted(other_builds.ops, "operation", "operations"),
            duration(*other_builds),
        ));
    }
    if let Unread { files: files @ 1.., first: Some(first) } = unread {
        let files = counted(*files as u64, "file", "files");
        lines.push(format!(
            "{files} in the corpus not understood and passed over; the first is {}",
            escaped(first)
        ));
    }
    lines.extend(not_written.as_ref().map(|why| format!("not all could be saved in the corpus: {why}")));
    lines
}

fn duration(Done { seconds, .. }: Done) -> String {
    match seconds {
        ..100.0 => format!("{seconds:.1} seconds"),
        ..6000.0 => format!("{:.1} minutes", seconds / 60.0),
        _ => format!("{:.2} hours", seconds / 3600.0),
    }
}

fn pairs_json(pairs: &Pairs, all: &Pairs) -> Value {
    let missing: Vec<_> = pairs.missing(all).map(|(first, second)| json!([first, second])).collect();
    json!({ "covered": all.len() - missing.len(), "all": all.len(), "not_covered": missing })
}

fn done_json(done: Done) -> Value {
    json!({ "sequences": done.sequences, "operations": done.ops, "seconds": done.seconds })
}

/// All of it.
#[must_use]
pub(crate) fn fuzz_json(options: &FuzzOptions, fuzzed: &Fuzzed, time: Duration) -> Value {
    let seconds = time.as_secs_f64().max(1e-9);
    let boundaries: serde_json::Map<_, _> = fuzzed
        .coverage
        .boundaries()
        .map(|(boundary, times)| (boundary.name().to_owned(), json!(times)))
        .collect();
    let coverage = &fuzzed.coverage;
    let counters: serde_json::Map<_, _> =
        coverage.counters.iter().map(|(name, most)| ((*name).to_owned(), json!(most))).collect();
    let folder = fuzzed.folder.as_ref().map(|folder| {
        json!({
            "this_build": done_json(folder.this_build),
            "other_builds": done_json(folder.other_builds),
            "unread_files": folder.unread.files,
            "first_unread": folder.unread.first,
            "not_written": folder.not_written,
        })
    });
    let (reached, all) = fuzzed.coverage.reached();
    let failure = fuzzed.failure.as_ref().map(|failure| {
        let mut told = verdict_json(&failure.shrunk, &failure.verdict);
        told["number"] = json!(failure.number);
        told["found_steps"] = json!(failure.found.steps.len());
        told
    });
    json!({
        "seed": options.seed,
        "jobs": options.jobs,
        "cpus": options.nr_cpus,
        "length": options.length,
        "sequences": fuzzed.sequences,
        "operations": fuzzed.ops,
        "seconds": seconds,
        "sequences_per_second": fuzzed.sequences as f64 / seconds,
        "operations_per_second": fuzzed.ops as f64 / seconds,
        "pairs": pairs_json(&coverage.followed, &Pairs::all()),
        "overlaps": pairs_json(&coverage.overlapped, &Pairs::that_can_overlap()),
        "counters": { "most_in_a_sequence": counters, "never_counted": coverage.never_counted() },
        "kept": { "sequences": fuzzed.kept.0, "features": fuzzed.kept.1 },
        "corpus": folder,
        "boundaries": { "reached": reached, "all": all, "sequences": boundaries, "not_reached": coverage.not_reached() },
        "clean": fuzzed.failure.is_none(),
        "failure": failure,
    })
}
