//! Which sequence comes next: one made up, or one made from those that went somewhere new.
//!
//! Sequences come in rounds. One is made from its number and from what the rounds before the last
//! have found, put together in the order of their numbers. So the number of jobs changes nothing,
//! and a job has to wait only if another is a whole round behind.

use core::time::Duration;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use mmu_hosted::{Choices, Corpus, Feature, Sequence, generate, with_cpus_going_off};

use crate::fuzz::folder::CorpusFolder;
use crate::fuzz::options::{FuzzOptions, Guidance};

/// Sequences of one round.
const ROUND: u64 = 32;

/// Makes sequences, and learns from those that are done.
#[derive(Debug)]
pub(crate) struct Guide {
    /// The number of the first sequence of this run.
    first: u64,
    folder: Option<CorpusFolder>,
    state: Mutex<State>,
    learnt: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// What the rounds so far have found, and the runs before this one.
    corpus: Arc<Corpus>,
    /// How many rounds are in it.
    rounds: u64,
    /// What the round before the last of them knew: the next may still be made from that.
    before: Arc<Corpus>,
    /// Of rounds that are not in it yet.
    done: BTreeMap<u64, (Sequence, Vec<(Feature, u16)>)>,
    /// Why a sequence could not be kept in the folder.
    not_written: Option<io::Error>,
}

impl Guide {
    /// Goes on from what is in the folder, if there is one.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub(crate) fn new(mut folder: Option<CorpusFolder>) -> io::Result<Self> {
        let corpus = Arc::new(folder.as_mut().map(CorpusFolder::load).transpose()?.unwrap_or_default());
        let first = folder.as_ref().map_or(0, |folder| folder.before().next);
        let state = State { before: Arc::clone(&corpus), corpus, ..State::default() };
        Ok(Self { first, folder, state: Mutex::new(state), learnt: Condvar::new() })
    }

    /// The number of the first sequence: those before it were run by earlier runs.
    pub(crate) const fn first(&self) -> u64 {
        self.first
    }

    /// The folder that it works in, if there is one.
    pub(crate) const fn folder(&self) -> Option<&CorpusFolder> {
        self.folder.as_ref()
    }

    /// How many sequences are kept, and how many features they have.
    pub(crate) fn kept(&self) -> (usize, usize) {
        let state = lock(&self.state);
        (state.corpus.len(), state.corpus.nr_features())
    }

    /// The folder, and why a sequence could not be kept in it, if one could not.
    pub(crate) fn into_folder(self) -> (Option<CorpusFolder>, Option<io::Error>) {
        (self.folder, self.state.into_inner().unwrap_or_else(PoisonError::into_inner).not_written)
    }

    /// The sequence with this number; none if it `is_over` before it could be made.
    pub(crate) fn sequence(
        &self,
        options: &FuzzOptions,
        number: u64,
        is_over: impl Fn() -> bool,
    ) -> Option<Sequence> {
        let choices = Choices::new(!seed_of(options.seed, number));
        let needed = ((number - self.first) / ROUND).saturating_sub(1);
        let mut state = lock(&self.state);
        while state.rounds < needed {
            if is_over() {
                return None;
            }
            let waited = self.learnt.wait_timeout(state, Duration::from_millis(100));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let corpus = Arc::clone(if state.rounds == needed { &state.corpus } else { &state.before });
        drop(state);
        if options.guidance == Guidance::Guided
            && let Some(sequence) = corpus.next(&choices, options.nr_cpus, options.length)
        {
            return Some(sequence);
        }
        Some(sequence_of(options, number))
    }

    /// The sequence with this number was run.
    pub(crate) fn done(&self, number: u64, sequence: &Sequence, features: Vec<(Feature, u16)>) {
        let mut state = lock(&self.state);
        let state = &mut *state;
        state.done.insert(number - self.first, (sequence.clone(), features));
        while state.done.range(..(state.rounds + 1) * ROUND).count() as u64 == ROUND {
            state.learn(self.folder.as_ref());
        }
        self.learnt.notify_all();
    }
}

impl State {
    /// All sequences of the next round are done.
    fn learn(&mut self, folder: Option<&CorpusFolder>) {
        let state = self;
        let end = (state.rounds + 1) * ROUND;
        let later = state.done.split_off(&end);
        let round = core::mem::replace(&mut state.done, later);
        state.before = Arc::clone(&state.corpus);
        let corpus = Arc::make_mut(&mut state.corpus);
        for (sequence, features) in round.into_values() {
            let new = corpus.add(&sequence, &features);
            if let Some(folder) = folder.filter(|_| !new.is_empty())
                && let Err(error) = folder.keep(&sequence, &new)
            {
                state.not_written.get_or_insert(error);
            }
        }
        state.rounds += 1;
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The sequence with this number. In one of four, CPUs go off and come back.
fn sequence_of(options: &FuzzOptions, number: u64) -> Sequence {
    let sequence = generate(seed_of(options.seed, number), options.nr_cpus, options.length);
    if number % 4 != 3 {
        return sequence;
    }
    let mut sequence = with_cpus_going_off(sequence);
    sequence.steps.truncate(options.length);
    sequence
}

/// What the sequence with this number is made from.
///
/// The seed is mixed before the number is added. Otherwise runs with neighbouring seeds would share
/// all sequences but one.
fn seed_of(seed: u64, number: u64) -> u64 {
    Choices::new(Choices::new(seed).bits().wrapping_add(number)).bits()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Once, sequence n of seed s was made from s + n: a run with the next seed repeated all but
    /// one.
    #[test]
    fn runs_with_different_seeds_have_no_sequence_in_common() {
        let seeds = (0..40).chain([1 << 32, u64::MAX, u64::MAX - 1, 1_900_000]);
        let all: Vec<_> = seeds.flat_map(|seed| (0..5000).map(move |number| seed_of(seed, number))).collect();
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
    }
}
