//! New sequences from ones that went somewhere.
//!
//! | way | what comes out |
//! |---|---|
//! | anew | the same steps in another interleaving, or with another MMU |
//! | changed | the same steps but for a few: moved, doubled, left out, on another CPU or range |
//! | joined | the steps before several rare moments, one after another, each changed a little |
//!
//! A sequence reaches something rare in a few of its steps. Those that are joined try such moments
//! again and again, in other company.

use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::PcidSupport;

use crate::mmu::features::{InvlpgUppers, SettingDirty};
use crate::options::{Adversary, Device};
use crate::random::Choices;
use crate::sequence::op::{MmId, NR_MMS, Op, Step};
use crate::sequence::places::MOST_TOUCHED;
use crate::sequence::quirks::Quirks;
use crate::sequence::text::Sequence;
use crate::vocabulary::{Guarding, Rights, UserAccess};

/// A moment worth going back to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rare<'a> {
    /// The sequence in which it came.
    pub(crate) sequence: &'a Sequence,
    /// The step that was done then; one behind the last for the end.
    pub(crate) step: usize,
}

/// Makes a sequence of at most `length` steps on `nr_cpus` CPUs from those that `pick` gives.
pub(crate) fn mutate<'a>(
    choices: &Choices,
    nr_cpus: u32,
    length: usize,
    mut pick: impl FnMut() -> Rare<'a>,
) -> Sequence {
    let first = pick();
    let mut sequence = Sequence { nr_cpus, steps: Vec::new(), ..first.sequence.clone() };
    match choices.below(8) {
        0 => sequence.steps.clone_from(&first.sequence.steps),
        1 | 2 => {
            sequence.steps.clone_from(&first.sequence.steps);
            change_some(choices, &mut sequence.steps, nr_cpus, 8);
        }
        _ => {
            // The same moment again and again, or another each time.
            let stays = !choices.one_in(4);
            let mut next = first;
            while sequence.steps.len() < length {
                let mut steps = moments_before(choices, next);
                change_some(choices, &mut steps, nr_cpus, 4);
                // Never nothing: the loop must end.
                if steps.is_empty() {
                    steps.push(Step { cpu: cpu(choices, nr_cpus), op: Op::Sync });
                }
                sequence.steps.append(&mut steps);
                if !stays {
                    next = pick();
                }
            }
        }
    }
    sequence.seed = choices.bits();
    if choices.one_in(4) {
        change_machine(choices, &mut sequence);
    }
    sequence.steps.truncate(length);
    for step in &mut sequence.steps {
        step.cpu = low(u64::from(u32::from(step.cpu) % nr_cpus.max(1)));
    }
    sequence
}

/// The steps that led to a moment, with what they need that was done long before: areas, and which
/// programs run.
fn moments_before(choices: &Choices, Rare { sequence, step }: Rare<'_>) -> Vec<Step> {
    let steps = &sequence.steps;
    let end = (step.min(steps.len()) + 1 + choices.pick(6)).min(steps.len());
    let begin = end.saturating_sub(8 << choices.below(3));
    let (earlier, window) = steps.split_at(begin);
    let window = &window[..end - begin];
    let mut needed: Vec<Step> = earlier
        .iter()
        .filter(|step| match step.op {
            Op::Map(mm, range, ..) => window.iter().any(|later| {
                later.op.range().is_some_and(|used| used.intersect(range).is_some())
                    && later.op.mm().is_none_or(|user| user == mm)
            }),
            _ => false,
        })
        .copied()
        .collect();
    // Areas that are mapped again and again: the last few.
    let surplus = needed.len().saturating_sub(4);
    needed.drain(..surplus);
    for cpu in 0..sequence.nr_cpus {
        let runs = |step: &&Step| {
            u32::from(step.cpu) == cpu
                && matches!(step.op, Op::Switch(_) | Op::Lazy | Op::Offline | Op::Online)
        };
        needed.extend(earlier.iter().rev().find(runs));
    }
    needed.extend(window);
    needed
}

/// Changes up to `most` things.
fn change_some(choices: &Choices, steps: &mut Vec<Step>, nr_cpus: u32, most: u64) {
    for _ in 0..choices.below(most + 1) {
        change(choices, steps, nr_cpus);
    }
}

/// Changes one thing.
fn change(choices: &Choices, steps: &mut Vec<Step>, nr_cpus: u32) {
    if steps.is_empty() {
        return;
    }
    let at = choices.pick(steps.len());
    match choices.below(16) {
        0 => drop(steps.remove(at)),
        1 => steps.insert(at, steps[choices.pick(steps.len())]),
        2 => {
            let step = steps.remove(at);
            steps.insert(choices.pick(steps.len() + 1), step);
        }
        3 => {
            // A stretch again, behind itself.
            let end = (at + 1 + choices.pick(12)).min(steps.len());
            let again = steps[at..end].to_vec();
            steps.splice(end..end, again);
        }
        4 | 5 => steps[at].cpu = cpu(choices, nr_cpus),
        6 | 7 => steps[at].op = with_mm(steps[at].op, mm(choices)),
        8 | 9 => {
            let like = steps[choices.pick(steps.len())].op.range();
            if let Some(range) = steps[at].op.range() {
                let other = if choices.one_in(2) { like } else { near(choices, range) };
                steps[at].op = with_range(steps[at].op, other.unwrap_or(range));
            }
        }
        10..13 => {
            // Something else is done there.
            if let Some(range) = steps[at].op.range() {
                let mm = steps[at].op.mm().unwrap_or_else(|| mm(choices));
                let step = Step { cpu: cpu(choices, nr_cpus), op: something(choices, mm, range) };
                if choices.one_in(2) { steps[at] = step } else { steps.insert(at, step) }
            }
        }
        13 => {
            let op = match choices.below(4) {
                0 => Op::Lazy,
                1 => Op::Wake,
                2 => Op::Sync,
                _ => Op::Switch(mm(choices)),
            };
            steps.insert(at, Step { cpu: cpu(choices, nr_cpus), op });
        }
        _ => {
            let seams = u32::from(choices.below(2 << choices.below(6)).to_le_bytes()[0]) + 1;
            let op = Op::Preempt(seams);
            if matches!(steps[at].op, Op::Preempt(_)) {
                steps[at].op = op;
            } else {
                steps.insert(at, Step { cpu: steps[at].cpu, op });
            }
        }
    }
}

fn change_machine(choices: &Choices, sequence: &mut Sequence) {
    match choices.below(6) {
        0 => {
            sequence.pcid = if sequence.pcid == PcidSupport::On { PcidSupport::Off } else { PcidSupport::On };
        }
        1 => {
            let is_blunt = sequence.uppers == InvlpgUppers::All;
            sequence.uppers = if is_blunt { InvlpgUppers::LeadingToAddress } else { InvlpgUppers::All };
        }
        2 => {
            let keeps = sequence.adversary == Adversary::Keeper;
            sequence.adversary = if keeps { Adversary::Forgetter } else { Adversary::Keeper };
        }
        3 => {
            let looks = sequence.dirty == SettingDirty::Checked;
            sequence.dirty = if looks { SettingDirty::Unchecked } else { SettingDirty::Checked };
        }
        4 => sequence.quirks = Quirks::draw(choices),
        _ => {
            let is_there = sequence.device == Device::Present;
            sequence.device = if is_there { Device::Absent } else { Device::Present };
        }
    }
}

fn cpu(choices: &Choices, nr_cpus: u32) -> u16 {
    low(choices.below(u64::from(nr_cpus.max(1))))
}

/// A small number as it is.
fn low(number: u64) -> u16 {
    u16::try_from(number).unwrap_or(0)
}

/// One of a few, mostly: steps must meet.
fn mm(choices: &Choices) -> MmId {
    let most = if choices.one_in(8) { u64::from(NR_MMS) } else { 3 };
    MmId(choices.below(most).to_le_bytes()[0])
}

/// A call on these addresses, or a use of them.
fn something(choices: &Choices, mm: MmId, range: VirtRange) -> Op {
    match choices.below(16) {
        0..2 => Op::Unmap(mm, range),
        2..4 => Op::Discard(mm, range),
        4..6 => Op::Reclaim(mm, self::mm(choices), range),
        6 => Op::Protect(mm, range, if choices.one_in(2) { Rights::Read } else { Rights::Execute }),
        7 => Op::Protect(mm, range, if choices.one_in(2) { Rights::Nothing } else { Rights::Write }),
        8 => Op::Guard(mm, range, if choices.one_in(2) { Guarding::Install } else { Guarding::Remove }),
        9 => Op::Remap(mm, range, range.end().min((1 << 47) - 4096)),
        10 => Op::Fork(mm, self::mm(choices)),
        11 => Op::Touch(touchable(range), UserAccess::Fetch),
        12 => Op::Touch(touchable(range), UserAccess::Read),
        _ => Op::Touch(touchable(range), UserAccess::Write),
    }
}

/// A range beside `range`, or one that is longer or shorter.
fn near(choices: &Choices, range: VirtRange) -> Option<VirtRange> {
    let pages = 1 + choices.below(4);
    let (start, end) = match choices.below(4) {
        0 => (range.start().checked_add(pages << 12)?, range.end().checked_add(pages << 12)?),
        1 => (range.start().checked_sub(pages << 12)?, range.end().checked_sub(pages << 12)?),
        2 => (range.start(), range.end().checked_add(pages << 12)?),
        _ => (range.start(), range.start().checked_add(pages << 12)?),
    };
    // Which side of the addresses of four levels it is on stays.
    let most = if range.end() <= 1 << 47 { 1 << 47 } else { 1 << 56 };
    VirtRange::new(start, end).ok().filter(|range| range.end() <= most)
}

fn touchable(range: VirtRange) -> VirtRange {
    let end = range.end().min(range.start() + MOST_TOUCHED * 4096);
    VirtRange::new(range.start(), end).unwrap_or(range)
}

fn with_range(op: Op, range: VirtRange) -> Op {
    match op {
        Op::Map(mm, _, backing, rights) => Op::Map(mm, range, backing, rights),
        Op::Unmap(mm, _) => Op::Unmap(mm, range),
        Op::Discard(mm, _) => Op::Discard(mm, range),
        Op::Protect(mm, _, rights) => Op::Protect(mm, range, rights),
        Op::Remap(mm, _, to) => Op::Remap(mm, range, to),
        Op::MoveStack(mm, _, pages) => Op::MoveStack(mm, range, pages),
        Op::Reclaim(mm, other, _) => Op::Reclaim(mm, other, range),
        Op::Touch(_, access) => Op::Touch(touchable(range), access),
        Op::Guard(mm, _, guarding) => Op::Guard(mm, range, guarding),
        other => other,
    }
}

fn with_mm(op: Op, mm: MmId) -> Op {
    match op {
        Op::Map(_, range, backing, rights) => Op::Map(mm, range, backing, rights),
        Op::Unmap(_, range) => Op::Unmap(mm, range),
        Op::Discard(_, range) => Op::Discard(mm, range),
        Op::Protect(_, range, rights) => Op::Protect(mm, range, rights),
        Op::Remap(_, range, to) => Op::Remap(mm, range, to),
        Op::MoveStack(_, range, pages) => Op::MoveStack(mm, range, pages),
        Op::Fork(_, child) => Op::Fork(mm, child),
        Op::Exit(_) => Op::Exit(mm),
        Op::Exec(_, pages) => Op::Exec(mm, pages),
        Op::Reclaim(first, _, range) => Op::Reclaim(first, mm, range),
        Op::Switch(_) => Op::Switch(mm),
        Op::Guard(_, range, guarding) => Op::Guard(mm, range, guarding),
        other => other,
    }
}
