//! The verdict of one sequence, as text and as JSON.

use core::fmt::Write;

use mmu_hosted::{Sequence, Verdict};
use serde_json::{Value, json};

/// Steps of a sequence that is short enough to be printed with its verdict.
const SHORT: usize = 40;

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
