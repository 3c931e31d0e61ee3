//! What fuzzing and replaying say, as text and as JSON.

use core::fmt::Write;
use core::time::Duration;

use mmu_hosted::{Sequence, Verdict};
use serde_json::{Value, json};

use crate::fuzz::campaign::{FuzzOptions, Fuzzed};

/// Steps of a sequence that is short enough to be printed with its verdict.
const SHORT: usize = 40;

/// One line: how far it has come.
#[must_use]
pub(crate) fn summary(fuzzed: &Fuzzed, time: Duration) -> String {
    let seconds = time.as_secs_f64().max(1e-9);
    let (pairs, all_pairs) = fuzzed.coverage.pairs();
    let (reached, all) = fuzzed.coverage.reached();
    format!(
        "{} sequences, {} operations, {:.0} sequences/s, {:.0} operations/s, \
         {pairs} of {all_pairs} pairs of operations, {reached} of {all} boundaries",
        fuzzed.sequences,
        fuzzed.ops,
        fuzzed.sequences as f64 / seconds,
        fuzzed.ops as f64 / seconds,
    )
}

/// The line that names the boundaries which no sequence has reached, if there are any.
#[must_use]
pub(crate) fn not_reached(fuzzed: &Fuzzed) -> Option<String> {
    let missed = fuzzed.coverage.boundaries().filter(|(_, times)| *times == 0);
    let names: Vec<_> = missed.map(|(boundary, _)| boundary.name()).collect();
    (!names.is_empty()).then(|| format!("not reached: {}", names.join(", ")))
}

/// All of it.
#[must_use]
pub(crate) fn fuzz_json(options: &FuzzOptions, fuzzed: &Fuzzed, time: Duration) -> Value {
    let seconds = time.as_secs_f64().max(1e-9);
    let (pairs, all_pairs) = fuzzed.coverage.pairs();
    let boundaries: serde_json::Map<_, _> = fuzzed
        .coverage
        .boundaries()
        .map(|(boundary, times)| (boundary.name().to_owned(), json!(times)))
        .collect();
    let missed = fuzzed.coverage.boundaries().filter(|(_, times)| *times == 0);
    let missed: Vec<_> = missed.map(|(boundary, _)| boundary.name()).collect();
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
        "pairs": { "covered": pairs, "all": all_pairs },
        "boundaries": { "reached": reached, "all": all, "sequences": boundaries, "not_reached": missed },
        "clean": fuzzed.failure.is_none(),
        "failure": failure,
    })
}

/// What a sequence came to.
#[must_use]
pub(crate) fn verdict_json(sequence: &Sequence, verdict: &Verdict) -> Value {
    let mut told = json!({
        "clean": verdict.is_clean(),
        "sort": verdict.sort(),
        "steps": sequence.steps.len(),
        "sequence": sequence.to_string(),
    });
    match verdict {
        Verdict::Panicked(words) => told["panic"] = json!(words),
        Verdict::Ended(outcome) => {
            told["violations"] = json!(outcome.found.count);
            told["leaked_frames"] = json!(outcome.leaked_frames);
            told["leaked_tables"] = json!(outcome.leaked_tables);
            told["double_frees"] = json!(outcome.double_frees);
            let violations = outcome.found.told.iter().map(|violation| {
                json!({
                    "kind": format!("{:?}", violation.kind),
                    "what": violation.kind.to_string(),
                    "cpu": violation.cpu.number(),
                    "address": format!("{:#x}", violation.address),
                    "frame": format!("{:#x}", violation.frame.start_address()),
                    "freed_at": violation.freed.map(|(step, _)| step),
                    "freed_by": violation.freed.map(|(_, cpu)| cpu.number()),
                    "entry": violation.entry.as_ref().map(ToString::to_string),
                    "story": violation.story.iter().map(ToString::to_string).collect::<Vec<_>>(),
                })
            });
            told["told"] = violations.collect();
        }
    }
    told
}

/// The verdict in words, with its sequence if that is short.
#[must_use]
pub(crate) fn verdict_text(sequence: &Sequence, verdict: &Verdict) -> String {
    let mut told = String::new();
    match verdict {
        Verdict::Panicked(words) => {
            let _ = writeln!(told, "panic: {words}");
        }
        Verdict::Ended(outcome) => {
            for violation in &outcome.found.told {
                let _ = write!(told, "{violation}");
            }
            let _ = writeln!(
                told,
                "violations {}, leaked frames {}, leaked tables {}, double frees {}",
                outcome.found.count, outcome.leaked_frames, outcome.leaked_tables, outcome.double_frees
            );
        }
    }
    if !verdict.is_clean() && sequence.steps.len() <= SHORT {
        told.push_str(&sequence.to_string());
    }
    told.push_str(if verdict.is_clean() { "clean" } else { "NOT CLEAN" });
    told
}
