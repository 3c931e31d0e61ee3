//! Sequences that went somewhere new, and which to go on from.
//!
//! A sequence is kept if it has a [`Feature`] that none before it had. What comes next starts from
//! features that few sequences had: the rarest of a few that are drawn.

use std::sync::Arc;

use crate::random::Choices;
use crate::sequence::{Feature, Rare, Sequence, mutate};

/// Sequences worth going on from.
#[derive(Clone, Debug)]
pub struct Corpus {
    kept: Vec<Arc<Sequence>>,
    /// Every feature that was seen, by class, in the order of their coming.
    known: [Vec<Known>; Feature::CLASSES],
    /// Where each feature is in its class, plus one.
    places: Box<[u16]>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    /// How many sequences had it.
    times: u32,
    /// The sequence that had it, and in which step.
    kept: u32,
    step: u16,
}

/// Features that are drawn, of which the rarest is gone on from.
const DRAWN: usize = 6;

/// One sequence in so many is made from what is kept. They find about as much as those that are
/// made
/// up, and each costs a third more.
const MADE_FROM_KEPT: u64 = 4;

/// Which class is gone on from how often.
const CLASSES: [usize; 8] = [0, 0, 0, 0, 1, 2, 2, 3];

impl Default for Corpus {
    fn default() -> Self {
        Self { kept: Vec::new(), known: Default::default(), places: vec![0; Feature::ALL].into_boxed_slice() }
    }
}

impl Corpus {
    /// Nothing is kept.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many sequences are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// How many features were seen.
    #[must_use]
    pub fn nr_features(&self) -> usize {
        self.known.iter().map(Vec::len).sum()
    }

    /// A sequence was run, and had these features, each in this step. Which of them none before it
    /// had: it is kept if there are any.
    pub fn add(&mut self, sequence: &Sequence, features: &[(Feature, u16)]) -> Vec<(Feature, u16)> {
        let kept = u32::try_from(self.kept.len()).unwrap_or(u32::MAX);
        let mut new = Vec::new();
        for &(feature, step) in features {
            let place = &mut self.places[usize::from(feature.0)];
            let class = &mut self.known[feature.class()];
            if let Some(known) = usize::from(*place).checked_sub(1) {
                class[known].times = class[known].times.saturating_add(1);
            } else if let Ok(next) = u16::try_from(class.len() + 1) {
                *place = next;
                class.push(Known { times: 1, kept, step });
                new.push((feature, step));
            }
        }
        if !new.is_empty() {
            self.kept.push(Arc::new(sequence.clone()));
        }
        new
    }

    /// A new sequence of at most `length` steps, from what is kept; none if it shall be made up:
    /// now and then, and as long as nothing is kept.
    #[must_use]
    pub fn next(&self, choices: &Choices, nr_cpus: u32, length: usize) -> Option<Sequence> {
        if self.is_empty() || !choices.one_in(MADE_FROM_KEPT) {
            return None;
        }
        Some(mutate(choices, nr_cpus, length, || self.pick(choices)))
    }

    fn pick(&self, choices: &Choices) -> Rare<'_> {
        let class = CLASSES[choices.pick(CLASSES.len())];
        let others = || self.known.iter().find(|class| !class.is_empty());
        let class = Some(&self.known[class]).filter(|class| !class.is_empty()).or_else(others);
        let class = class.map_or(&[][..], Vec::as_slice);
        let mut rarest = class[choices.pick(class.len())];
        for _ in 1..DRAWN {
            let other = class[choices.pick(class.len())];
            if other.times < rarest.times {
                rarest = other;
            }
        }
        let sequence = &self.kept[rarest.kept as usize];
        Rare { sequence, step: rarest.step.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sequence::generate;

    fn features(numbers: &[u16]) -> Vec<(Feature, u16)> {
        numbers.iter().map(|number| (Feature(*number), number % 40)).collect()
    }

    fn corpus() -> Corpus {
        let mut corpus = Corpus::new();
        for number in 0..40_u16 {
            let sequence = generate(number.into(), 1 + u32::from(number % 8), 60);
            let class = (number % 4) << 14;
            let new = corpus.add(&sequence, &features(&[class | number, class | 1000]));
            assert!(new.contains(&(Feature(class | number), (class | number) % 40)));
        }
        corpus
    }

    #[test]
    fn only_a_sequence_with_something_new_is_kept_and_for_that() {
        let mut corpus = Corpus::new();
        let sequence = generate(1, 4, 10);
        assert!(corpus.next(&Choices::new(1), 4, 10).is_none(), "there is nothing to go on from");
        assert_eq!(corpus.add(&sequence, &features(&[3, 70, 0xc000])).len(), 3);
        assert_eq!(corpus.add(&sequence, &features(&[70, 3])), []);
        assert_eq!(corpus.add(&sequence, &features(&[3, 71])), features(&[71]));
        assert_eq!((corpus.len(), corpus.nr_features()), (2, 4));
    }

    #[test]
    fn what_is_made_from_others_is_a_sequence_and_reads_back_the_same() {
        let corpus = corpus();
        let mut made = 0;
        for (seed, turn) in (0..4000_u64).zip(0..) {
            let (nr_cpus, length) = ([1, 2, 4, 7, 64][turn % 5], 1 + turn % 170);
            let Some(sequence) = corpus.next(&Choices::new(seed), nr_cpus, length) else { continue };
            made += 1;
            assert_eq!(sequence.nr_cpus, nr_cpus);
            assert!((1..=length).contains(&sequence.steps.len()), "seed {seed}");
            assert!(sequence.steps.iter().all(|step| u32::from(step.cpu) < nr_cpus), "seed {seed}");
            assert_eq!(Sequence::parse(&sequence.to_string()).as_ref(), Ok(&sequence), "seed {seed}");
            assert_eq!(corpus.next(&Choices::new(seed), nr_cpus, length), Some(sequence), "seed {seed}");
        }
        assert!((800..1200).contains(&made), "{made} of 4000");
    }

    #[test]
    fn the_rare_is_gone_on_from_more_often_than_the_common() {
        let mut corpus = Corpus::new();
        // Features of one class: ten that every sequence has, and one that only the last has.
        let common: Vec<u16> = (0..10).collect();
        for seed in 0..20 {
            corpus.add(&generate(seed, 4, 10), &features(&common));
        }
        let rare = generate(99, 4, 10);
        corpus.add(&rare, &features(&[11]));
        let choices = Choices::new(1);
        let times = (0..1000).filter(|_| *corpus.pick(&choices).sequence == rare).count();
        assert!(times > 300, "{times} of 1000, by chance 91");
    }
}
