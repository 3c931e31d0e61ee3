//! The shortest form of a sequence that fails.

use std::io;
use std::sync::Arc;

use mmu_gather::pagetable::PagingMode;

use crate::kernel::Kernel;
use crate::machine::HostedMachine;
use crate::mmu::features::SettingDirty;
use crate::options::Device;
use crate::sequence::calls::Calls;
use crate::sequence::quirks::Quirk;
use crate::sequence::text::{NR_FRAMES, Sequence};
use crate::sequence::trial::Trial;
use crate::sequence::verdict::{Verdict, judge};

/// How many other seeds a shorter sequence is tried with: leaving a step out changes every choice
/// after it.
const SEEDS_TRIED: u64 = 6;

/// Leaves steps out while the same sort of failure stays: halves first, single ones at the end.
/// Then what the machine need not be, and the steps that only that machine needed.
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
    let half = sequence.steps.len().div_ceil(2);
    let mut best = without_steps((sequence.clone(), verdict), half, trial, &sort, &make)?;
    while let Some(plainer) = on_a_plainer_machine(&best.0, trial, &sort, &make)? {
        best = without_steps(plainer, 1, trial, &sort, &make)?;
    }
    Ok(best)
}

/// Leaves steps out, `chunk` at a time at first, until no single one can go.
fn without_steps<K: Kernel>(
    mut best: (Sequence, Verdict),
    mut chunk: usize,
    trial: Trial,
    sort: &str,
    make: &impl Fn(&Arc<HostedMachine>) -> io::Result<K>,
) -> io::Result<(Sequence, Verdict)> {
    loop {
        let mut shorter = false;
        let mut at = 0;
        while at < best.0.steps.len() {
            let mut candidate = best.0.clone();
            candidate.steps.drain(at..(at + chunk).min(best.0.steps.len()));
            match fails_like(&candidate, trial, sort, SEEDS_TRIED, make)? {
                Some(found) => {
                    best = found;
                    shorter = true;
                }
                None => at += chunk,
            }
        }
        if chunk <= 1 && !shorter {
            return Ok(best);
        }
        if !shorter || chunk > 1 {
            chunk = chunk.div_ceil(2);
        }
    }
}

/// Leaves out what the machine need not be while the same sort of failure stays, so that what is
/// left has to do with it; `None` if nothing can go.
///
/// Each may have changed the seed, and with that which steps are needed.
fn on_a_plainer_machine<K: Kernel>(
    sequence: &Sequence,
    trial: Trial,
    sort: &str,
    make: &impl Fn(&Arc<HostedMachine>) -> io::Result<K>,
) -> io::Result<Option<(Sequence, Verdict)>> {
    let mut found = None;
    let nr_plainings = PLAINER.len() + Quirk::ALL.len();
    for number in 0..nr_plainings {
        let best = found.as_ref().map_or(sequence, |(best, _): &(Sequence, Verdict)| best);
        let mut candidate = best.clone();
        match PLAINER.get(number) {
            Some(make_plainer) => make_plainer(&mut candidate),
            None => candidate.quirks = best.quirks.without(Quirk::ALL[number - PLAINER.len()]),
        }
        if candidate == *best {
            continue;
        }
        if let Some(plainer) = fails_like(&candidate, trial, sort, SEEDS_TRIED, make)? {
            found = Some(plainer);
        }
    }
    Ok(found)
}

/// What takes a word from the header. With four levels, there is nothing where only five levels
/// reach: a sequence that goes there keeps its five.
const PLAINER: [fn(&mut Sequence); 4] = [
    |sequence| sequence.nr_frames = NR_FRAMES,
    |sequence| {
        let end = PagingMode::FourLevel.user_end();
        if sequence.steps.iter().all(|step| step.op.end() <= end) {
            sequence.paging = PagingMode::FourLevel;
        }
    },
    |sequence| sequence.device = Device::Absent,
    |sequence| sequence.dirty = SettingDirty::Checked,
];

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
