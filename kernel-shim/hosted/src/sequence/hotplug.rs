//! CPUs that go off and come back in a sequence that was made up without.

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
    let mut are_off = 0u64;
    let mut steps = Vec::with_capacity(sequence.steps.len() * 5 / 4);
    let mut switch = |steps: &mut Vec<Step>, cpu: u8| {
        let bit = 1 << cpu;
        let op = if are_off & bit == 0 { Op::Offline } else { Op::Online };
        are_off ^= bit;
        steps.push(Step { cpu, op });
        are_off
    };
    let mut off_now = 0;
    for step in sequence.steps {
        if choices.one_in(SWITCH_EVERY) {
            // The first stays: at most 64 CPUs there are.
            off_now = switch(&mut steps, 1 + choices.below(others).to_le_bytes()[0]);
        }
        // Steps on CPUs that are off are lost; few shall be.
        if off_now >> (step.cpu % 64) & 1 != 0 && !choices.one_in(3) {
            off_now = switch(&mut steps, step.cpu);
        }
        steps.push(step);
    }
    Sequence { steps, ..sequence }
}
