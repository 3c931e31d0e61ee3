//! CPUs that go off and come back in a sequence that was made up without.

use crate::memory::index;
use crate::random::Choices;
use crate::sequence::op::{Op, Step};
use crate::sequence::text::Sequence;

/// Steps between two at which a CPU is switched.
const SWITCH_EVERY: u64 = 12;

/// The sequence with steps put in at which CPUs go off and come back; its seed decides which.
#[must_use]
pub fn with_cpus_going_off(sequence: Sequence) -> Sequence {
    let others = u64::from(sequence.nr_cpus).saturating_sub(1);
    if others == 0 {
        return sequence;
    }
    let choices = Choices::new(!sequence.seed);
    let mut are_off = vec![false; index(others) + 1];
    let mut steps = Vec::with_capacity(sequence.steps.len() * 5 / 4);
    let switch = |steps: &mut Vec<Step>, are_off: &mut [bool], cpu: u16| {
        let is_off = &mut are_off[usize::from(cpu)];
        let op = if *is_off { Op::Online } else { Op::Offline };
        *is_off = !*is_off;
        steps.push(Step { cpu, op });
    };
    for step in sequence.steps {
        if choices.one_in(SWITCH_EVERY) {
            // The first stays.
            switch(&mut steps, &mut are_off, 1 + low(choices.below(others)));
        }
        // Steps on CPUs that are off are lost; few shall be.
        if are_off.get(usize::from(step.cpu)).is_some_and(|is_off| *is_off) && !choices.one_in(3) {
            switch(&mut steps, &mut are_off, step.cpu);
        }
        steps.push(step);
    }
    Sequence { steps, ..sequence }
}

/// The number of a CPU. There are at most 192.
fn low(number: u64) -> u16 {
    u16::try_from(number).unwrap_or(0)
}
