//! Calls of a run: how many were made, and which of them met on one address space.

use core::fmt;
use std::sync::Mutex;

use mmu_gather::pagetable::VirtRange;

use crate::kernel::NotDone;
use crate::mutex::lock;
use crate::sequence::op::Op;

/// What came of the steps of one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tally {
    /// So many were done.
    pub done: u64,
    /// So many the kernel refused.
    pub refused: u64,
    /// So many were skipped, because the kernel has no such call.
    pub skipped: u64,
}

/// What came of the steps, by operation. 2 MiB pages are an operation of their own here, because a
/// kernel may have `map` without them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Calls(Box<[Tally; NR_CALLS]>);

const NR_CALLS: usize = Op::WORDS.len() + 1;
/// The number of what fills an area with 2 MiB pages.
pub(crate) const POPULATE: usize = Op::WORDS.len();

impl Calls {
    /// Each operation by its word, with what came of it.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, Tally)> + '_ {
        Op::WORDS.into_iter().chain(["populate"]).zip(*self.0)
    }

    /// What came of the operation with this word; nothing if there is none.
    #[must_use]
    pub fn of(&self, word: &str) -> Tally {
        self.iter().find(|(name, _)| *name == word).map(|(_, tally)| tally).unwrap_or_default()
    }

    /// Whether the kernel has skipped steps of this operation.
    pub(crate) fn are_missing(&self, op: Op) -> bool {
        self.0[op.number()].skipped > 0
    }

    /// Adds those of another run.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(&*other.0) {
            mine.done += theirs.done;
            mine.refused += theirs.refused;
            mine.skipped += theirs.skipped;
        }
    }

    /// Counts a call of operation `number`.
    pub(crate) fn count(&mut self, number: usize, result: Result<(), NotDone>) {
        let tally = &mut self.0[number];
        match result {
            Ok(()) => tally.done += 1,
            Err(NotDone::Refused) => tally.refused += 1,
            Err(NotDone::Missing) => tally.skipped += 1,
        }
    }
}

impl fmt::Display for Calls {
    /// A line for each operation that came up.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (word, Tally { done, refused, skipped }) in self.iter() {
            if (done, refused, skipped) != (0, 0, 0) {
                write!(f, "{word:<10} {done:>8} done")?;
                if refused != 0 {
                    write!(f, ", {refused} refused")?;
                }
                if skipped != 0 {
                    write!(f, ", {skipped} skipped: the kernel has no such call")?;
                }
                writeln!(f)?;
            }
        }
        Ok(())
    }
}

/// What a call may do to others that run at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// It changes areas, or leaves a flush to others: what another has promised of the same
    /// addresses may not hold when that one returns.
    Changes,
    /// It puts nothing where another has promised that there is nothing.
    LeavesPromises,
}

/// Whether another call that changes areas ran on the same addresses at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Met {
    /// None.
    Nobody,
    /// One did.
    Another,
}

/// The calls that run on one address space now.
#[derive(Debug, Default)]
pub(crate) struct Running(Mutex<Vec<Call>>);

#[derive(Debug)]
struct Call {
    /// All calls of a run have different ones.
    number: usize,
    range: VirtRange,
    effect: Effect,
    met: Met,
}

impl Running {
    /// Makes a call on `range`; whether it met another.
    pub(crate) fn call<R>(&self, range: VirtRange, effect: Effect, call: impl FnOnce() -> R) -> (R, Met) {
        let number = self.begin(range, effect);
        let result = call();
        (result, self.end(number))
    }

    fn begin(&self, range: VirtRange, effect: Effect) -> usize {
        let mut running = lock(&self.0);
        let mut met = Met::Nobody;
        for other in running.iter_mut().filter(|other| other.range.intersect(range).is_some()) {
            if effect == Effect::Changes {
                other.met = Met::Another;
            }
            if other.effect == Effect::Changes {
                met = Met::Another;
            }
        }
        let number = running.iter().map(|call| call.number + 1).max().unwrap_or(0);
        running.push(Call { number, range, effect, met });
        number
    }

    fn end(&self, number: usize) -> Met {
        let mut running = lock(&self.0);
        let place = running.iter().position(|call| call.number == number);
        place.map_or(Met::Another, |place| running.swap_remove(place).met)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, end: u64) -> VirtRange {
        VirtRange::new(first << 12, end << 12).expect("a good range")
    }

    #[test]
    fn a_call_meets_what_changes_its_addresses_while_it_runs_and_nothing_else() {
        let met = |other: VirtRange, effect| {
            let running = Running::default();
            let inner = || running.call(other, effect, || ()).1;
            let (inner, outer) = running.call(range(4, 8), Effect::Changes, inner);
            // Whoever begins later meets what runs already.
            assert_eq!(inner == Met::Another, other.intersect(range(4, 8)).is_some());
            // Nothing runs any more.
            assert_eq!(running.call(range(0, 100), Effect::Changes, || ()).1, Met::Nobody);
            outer
        };
        assert_eq!(met(range(7, 9), Effect::Changes), Met::Another);
        assert_eq!(met(range(8, 9), Effect::Changes), Met::Nobody);
        assert_eq!(met(range(0, 4), Effect::Changes), Met::Nobody);
        assert_eq!(met(range(4, 8), Effect::LeavesPromises), Met::Nobody);
    }
}
