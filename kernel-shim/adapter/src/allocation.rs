//! Allocation failure, request by request: each that an operation makes is refused in turn.
//!
//! A state is made, and an operation runs on it, once for each request of it for a batch page, a
//! table or a frame, which alone is refused. Whatever is refused, programs then see what they saw
//! before the operation, or what they see after it; and when it is done again, with nothing
//! refused, they see what they would have seen. Steps run one after the other, with all checks.

use core::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use mmu_hosted::{HostedMachine, Pace, Sequence, Verdict};
use mmu_kernel_shim::{Asked, Scarce, Site};

use crate::judge::Trial;
use crate::kernel::AskedOf;
use crate::views::View;

/// What an operation may leave behind when a request of it is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Nothing: all of it was done, or nothing.
    Clean,
    /// Some of its pages, which it comes to one after the other, are as after it, the others as
    /// before.
    InPart,
    /// As `InPart`; and what is there keeps a second try from doing the rest.
    InTheWay,
    /// It is several calls, each with a case of its own: what those before the refusal, and those
    /// after it, come to. A second try begins anew, and does all.
    OfACall,
}

/// An operation on a state, both in the language of sequences: a line for each step.
#[derive(Clone, Copy, Debug)]
pub struct Case<'a> {
    /// The steps that make the state.
    pub state: &'a str,
    /// The step that is to fail.
    pub op: &'a str,
    /// What it may leave behind.
    pub refusal: Refusal,
}

/// One request that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Refused {
    /// What was asked for.
    pub scarce: Scarce,
    /// Where.
    pub site: Site,
    /// Which of the operation's requests for that it was, from 1.
    pub number: u32,
}

/// What is wrong after a request was refused, or without.
#[derive(Clone, Debug)]
pub struct Wrong {
    /// What was refused, if anything was.
    pub refused: Option<Refused>,
    /// What is wrong.
    pub words: String,
    /// The sequence that shows it.
    pub sequence: Sequence,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.refused {
            Some(Refused { scarce, site, number }) => {
                write!(f, "request {number} for {scarce:?}, at {site:?}, refused: {}", self.words)?;
            }
            None => write!(f, "nothing refused: {}", self.words)?,
        }
        write!(f, "\n{}", self.sequence)
    }
}

/// What can be asked for, with the word of the operation that makes it scarce.
const ALL: [(Scarce, &str); 3] =
    [(Scarce::Batches, "batches"), (Scarce::Tables, "tables"), (Scarce::Frames, "frames")];

/// What one run showed.
struct Shown {
    asked: Asked,
    /// Before the operation, after it, and after it was done once more.
    views: [View; 3],
}

/// Refuses each request of the operation in turn; those that there are.
///
/// # Errors
/// If the host refuses memory. In the answer: the first thing that is wrong.
pub fn refuse_each(case: &Case<'_>) -> io::Result<Result<Vec<Refused>, Wrong>> {
    let mut all = Vec::new();
    for (scarce, word) in ALL {
        let plenty = match shown(case, scarce, word, u32::MAX)? {
            Ok(plenty) => plenty,
            Err(wrong) => return Ok(Err(wrong)),
        };
        // It may ask more often once something is refused.
        for number in 1.. {
            let short = match shown(case, scarce, word, number)? {
                Ok(short) => short,
                Err(wrong) => return Ok(Err(wrong)),
            };
            let Some(site) = short.asked.refused else { break };
            let refused = Refused { scarce, site, number };
            if let Some(words) = difference(case, scarce, &plenty, &short) {
                let sequence = sequence(case, word, number);
                return Ok(Err(Wrong { refused: Some(refused), words, sequence }));
            }
            all.push(refused);
        }
    }
    Ok(Ok(all))
}

/// What programs see that they must not, if one request was refused.
fn difference(case: &Case<'_>, scarce: Scarce, plenty: &Shown, short: &Shown) -> Option<String> {
    let [before, after, again] = &plenty.views;
    let [_, found, found_again] = &short.views;
    // Rule G4: without a batch page a gather flushes sooner, and that is all.
    let is_refused = scarce != Scarce::Batches
        && match case.refusal {
            Refusal::Clean => found == before,
            Refusal::InPart | Refusal::InTheWay => found == before || is_between(found, before, after),
            Refusal::OfACall => true,
        };
    if found != after && !is_refused {
        return Some(format!(
            "afterwards there are {}; before it {}, and without a refusal {}",
            Counted(found),
            Counted(before),
            Counted(after)
        ));
    }
    // A second try does what the first has not done, or what a second call does.
    let is_done = found_again == after && is_refused || found_again == again && found == after;
    let is_in_the_way = case.refusal == Refusal::InTheWay && found_again == found;
    (!is_done && !is_in_the_way).then(|| {
        format!(
            "done once more, there are {}; without a refusal {}, and if it is done twice {}",
            Counted(found_again),
            Counted(after),
            Counted(again)
        )
    })
}

/// What can be seen, in numbers.
struct Counted<'a>(&'a View);

impl fmt::Display for Counted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let View { areas, written, guarded } = self.0;
        write!(f, "{} areas, {} written pages and {} guards", areas.len(), written.len(), guarded.len())
    }
}

/// Whether each page is as in one of the two.
fn is_between(found: &View, one: &View, other: &View) -> bool {
    fn are_between<T: PartialEq>(found: &[T], one: &[T], other: &[T]) -> bool {
        found.iter().all(|item| one.contains(item) || other.contains(item))
            && one.iter().filter(|item| other.contains(item)).all(|item| found.contains(item))
    }
    (found.areas == one.areas || found.areas == other.areas)
        && are_between(&found.written, &one.written, &other.written)
        && are_between(&found.guarded, &one.guarded, &other.guarded)
}

fn sequence(case: &Case<'_>, word: &str, number: u32) -> Sequence {
    let Case { state, op, .. } = case;
    let text = format!(
        "mmu-gather sequence 1\ncpus 2\nseed 1\nmmu pcid intel keeper\n{}\n0 sync\n0 {word} nth-{number}\n{op}\n\
         0 {word} always\n0 sync\n{op}\n0 sync\nend\n",
        state.trim()
    );
    Sequence::parse(&text).unwrap_or_else(|error| panic!("{error}: a case is made of steps\n{text}"))
}

fn shown(case: &Case<'_>, scarce: Scarce, word: &str, number: u32) -> io::Result<Result<Shown, Wrong>> {
    let sequence = sequence(case, word, number);
    let trial = Trial::default();
    let (seen, asked) = (Arc::<Mutex<Vec<View>>>::default(), Arc::<Mutex<AskedOf>>::default());
    let boot = |machine: &Arc<HostedMachine>| {
        Ok(trial.boot(machine)?.telling(Arc::clone(&seen), Arc::clone(&asked)))
    };
    let in_turn = mmu_hosted::Trial { pace: Pace::OneAtATime, ..trial.of_the_machine() };
    let run = mmu_hosted::judge(&sequence, in_turn, boot)?;
    let take = |asked: &Mutex<AskedOf>| {
        let asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.iter().find(|(what, _)| *what == scarce).map(|(_, asked)| *asked)
    };
    let asked = take(&asked).unwrap_or(Asked { requests: 0, refused: None });
    let refused = asked.refused.map(|site| Refused { scarce, site, number });
    let wrong = |words: String| Ok(Err(Wrong { refused, words, sequence: sequence.clone() }));
    match &run.verdict {
        Verdict::Ended(outcome) if outcome.is_clean() => {}
        Verdict::Ended(outcome) => return wrong(format!("{}: {outcome:?}", run.verdict.sort())),
        Verdict::Panicked(words) => return wrong(words.clone()),
    }
    let seen = core::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
    // The runner looks once more at the end, and a state may have looks of its own.
    let views = seen.len().checked_sub(4).and_then(|first| seen.get(first..first + 3));
    match views {
        Some([before, after, again]) => {
            Ok(Ok(Shown { asked, views: [before.clone(), after.clone(), again.clone()] }))
        }
        _ => wrong(format!("{} looks, where four are made", seen.len())),
    }
}
