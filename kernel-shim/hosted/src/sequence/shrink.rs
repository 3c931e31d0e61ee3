//! The shortest form of a sequence that fails.

use std::io;
use std::sync::Arc;

use crate::kernel::Kernel;
use crate::machine::HostedMachine;
use crate::sequence::calls::Calls;
use crate::sequence::text::Sequence;
use crate::sequence::trial::Trial;
use crate::sequence::verdict::{Verdict, judge};

/// How many other seeds a shorter sequence is tried with: leaving a step out changes every choice
/// after it.
const SEEDS_TRIED: u64 = 6;

/// Leaves steps out while the same sort of failure stays: halves first, single ones at the end.
///
/// # Errors
/// If the host refuses memory for the machine.
pub fn shrink<K: Kernel>(
    sequence: &Sequence,
    trial: Trial,
    verdict: Verdict,
    make: impl Fn(&Arc<HostedMachine>) -> io::Result<K>,
) -> io::Result<(Sequence, Verdict)> {
    let sort = verdict.sort();
    let mut best = (sequence.clone(), verdict);
    let mut chunk = best.0.steps.len().div_ceil(2);
    loop {
        let mut shorter = false;
        let mut at = 0;
        while at < best.0.steps.len() {
            let mut candidate = best.0.clone();
            candidate.steps.drain(at..(at + chunk).min(best.0.steps.len()));
            match fails_like(&candidate, trial, &sort, SEEDS_TRIED, &make)? {
                Some(found) => {
                    best = found;
                    shorter = true;
                }
                None => at += chunk,
            }
        }
        if chunk <= 1 && !shorter {
            return without_quirks(best, trial, &sort, &make);
        }
        if !shorter || chunk > 1 {
            chunk = chunk.div_ceil(2);
        }
    }
}

/// Leaves quirks of the machine out while the same sort of failure stays, so that those that are
/// left have to do with it.
fn without_quirks<K: Kernel>(
    mut best: (Sequence, Verdict),
    trial: Trial,
    sort: &str,
    make: &impl Fn(&Arc<HostedMachine>) -> io::Result<K>,
) -> io::Result<(Sequence, Verdict)> {
    for quirk in best.0.quirks.iter() {
        let candidate = Sequence { quirks: best.0.quirks.without(quirk), ..best.0.clone() };
        if let Some(found) = fails_like(&candidate, trial, sort, SEEDS_TRIED, make)? {
            best = found;
        }
    }
    Ok(best)
}

/// How many seeds are tried for a sequence without the steps that the kernel skips: all of its
/// interleaving changes.
const SEEDS_TRIED_WITHOUT: u64 = 64;

/// Leaves out the steps of operations that `calls` says the kernel lacks, if the same sort of
/// failure stays: they do nothing but move what the others do in time.
///
/// # Errors
/// If the host refuses memory for the machine.
pub(crate) fn without_lacking<K: Kernel>(
    sequence: Sequence,
    trial: Trial,
    verdict: Verdict,
    calls: &Calls,
    make: &impl Fn(&Arc<HostedMachine>) -> io::Result<K>,
) -> io::Result<(Sequence, Verdict)> {
    let mut shorter = sequence.clone();
    shorter.steps.retain(|step| !calls.are_missing(step.op));
    if shorter.steps.len() < sequence.steps.len()
        && let Some(found) = fails_like(&shorter, trial, &verdict.sort(), SEEDS_TRIED_WITHOUT, make)?
    {
        return Ok(found);
    }
    Ok((sequence, verdict))
}

fn fails_like<K: Kernel>(
    candidate: &Sequence,
    trial: Trial,
    sort: &str,
    seeds: u64,
    make: &impl Fn(&Arc<HostedMachine>) -> io::Result<K>,
) -> io::Result<Option<(Sequence, Verdict)>> {
    for other in 0..seeds {
        let seeded = Sequence { seed: candidate.seed.wrapping_add(other), ..candidate.clone() };
        let verdict = judge(&seeded, trial, make)?.verdict;
        if verdict.sort() == sort {
            return Ok(Some((seeded, verdict)));
        }
    }
    Ok(None)
}
