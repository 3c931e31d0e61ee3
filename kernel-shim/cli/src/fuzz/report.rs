//! What a fuzzing run says, as text and as JSON.

use core::time::Duration;

use serde_json::{Value, json};

use crate::fuzz::campaign::{FuzzOptions, Fuzzed};
use crate::output::verdict::verdict_json;
use crate::output::words::counted;

/// One line: how far it has come.
#[must_use]
pub(crate) fn summary(fuzzed: &Fuzzed, time: Duration) -> String {
    let seconds = time.as_secs_f64().max(1e-9);
    let (pairs, all_pairs) = fuzzed.coverage.pairs();
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

/// The line that names the boundaries which no sequence has reached, if there are any.
#[must_use]
pub(crate) fn not_reached(fuzzed: &Fuzzed) -> Option<String> {
    let missed = fuzzed.coverage.boundaries().filter(|(_, times)| *times == 0);
    let names: Vec<_> = missed.map(|(boundary, _)| boundary.name()).collect();
    (!names.is_empty()).then(|| format!("boundaries not reached: {}", names.join(", ")))
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
