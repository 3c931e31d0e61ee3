//! What a run has done, in small pieces that can be compared: features.
//!
//! A run that has one which no run before it had went somewhere new, and is worth going on from.
//!
//! | sort | what it is made of |
//! |---|---|
//! | met | two operations that overlapped, where, and the seam at which one was held |
//! | counted | an operation, and by how much it raised a counter of the kernel |
//! | in all | a counter of the kernel at the end |
//! | reached | an operation, and a boundary that the machine saw it come to |
//! | history | the last three things that were done to one page |
//!
//! Numbers count in steps of about a power of two. What a feature was made of is forgotten: it is a
//! number below [`Feature::ALL`], and two may share one.

use core::hash::{BuildHasher, BuildHasherDefault};
use std::collections::HashMap;

use rustc_hash::FxHasher;

use crate::boundary::Boundaries;
use crate::sequence::op::{MmId, Op};
use crate::vocabulary::{Backing, Guarding, Rights, UserAccess};

type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<FxHasher>>;

/// One piece of what a run has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Feature(pub u16);

impl Feature {
    /// So many there may be.
    pub const ALL: usize = 1 << 16;

    /// So many classes of them there are.
    pub const CLASSES: usize = 4;

    /// Which class it is of: two operations met on the same pages, two met, something was counted
    /// or reached, or a page has seen three things done.
    #[must_use]
    pub const fn class(self) -> usize {
        (self.0 >> 14) as usize
    }

    fn of(sort: Sort, parts: [u64; 4]) -> Self {
        let hash = BuildHasherDefault::<FxHasher>::default().hash_one((sort as u64, parts));
        // The high bits of this hash are the good ones.
        let low: u16 = (hash >> 40 & 0x3fff).try_into().unwrap_or(0);
        let class: u16 = match sort {
            Sort::MetOnPages => 0,
            Sort::Met => 1,
            Sort::Counted | Sort::InAll | Sort::Reached => 2,
            Sort::History => 3,
        };
        Self(class << 14 | low)
    }
}

#[derive(Clone, Copy)]
enum Sort {
    MetOnPages,
    Met,
    Counted,
    InAll,
    Reached,
    History,
}

/// A pair of operations, by their numbers; a set of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pairs([u32; Op::WORDS.len()]);

const _: () = assert!(Op::WORDS.len() <= 32);

impl Default for Pairs {
    fn default() -> Self {
        Self([0; Op::WORDS.len()])
    }
}

impl Pairs {
    /// Adds the pair of these numbers.
    pub fn add(&mut self, first: usize, second: usize) {
        self.0[first] |= 1 << second;
    }

    /// Adds all pairs of another set.
    pub fn add_all(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine |= theirs;
        }
    }

    /// How many are in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(|row| row.count_ones() as usize).sum()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Those that can be in a set of pairs that overlap: nothing goes on beside a `sync`.
    #[must_use]
    pub fn that_can_overlap() -> Self {
        let sync = Op::Sync.number();
        let mut all = Self::all();
        for (number, row) in all.0.iter_mut().enumerate() {
            *row = if number == sync { 0 } else { *row & !(1 << sync) };
        }
        all
    }

    /// All pairs.
    #[must_use]
    pub const fn all() -> Self {
        Self([(1 << Op::WORDS.len()) - 1; Op::WORDS.len()])
    }

    /// Those of `of` that are not in it, by their words.
    pub fn missing<'a>(&'a self, of: &'a Self) -> impl Iterator<Item = (&'static str, &'static str)> + 'a {
        let words = || Op::WORDS.into_iter().enumerate();
        words().flat_map(move |(row, first)| {
            words()
                .filter(move |(column, _)| (of.0[row] & !self.0[row]) >> column & 1 != 0)
                .map(move |(_, second)| (first, second))
        })
    }
}

/// What a run has done.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Features {
    /// Every feature, with the step in which it first came up.
    pub all: Vec<(Feature, u16)>,
    /// Operations of which one ended while another was going on.
    pub overlapped: Pairs,
    /// The counters of the kernel, by their names.
    pub counted: Vec<(&'static str, u64)>,
}

/// Collects the features of a run as it goes.
#[derive(Debug)]
pub(crate) struct Recorder {
    seen: Box<[u64; Feature::ALL / 64]>,
    features: Features,
    names: &'static [&'static str],
    cpus: Vec<Cpu>,
    /// What was done last to each page of each address space, the latest in the lowest byte.
    pages: FastMap<(u8, u64), u32>,
    now: Vec<u64>,
}

#[derive(Debug)]
struct Cpu {
    /// What it is at.
    doing: Option<Op>,
    /// The address space whose programs it runs.
    runs: Option<MmId>,
    /// What the kernel had counted for it before.
    counted: Vec<u64>,
}

/// Pages of a range whose history is kept, at each of its ends.
const PAGES_KEPT: u64 = 3;

impl Recorder {
    pub(crate) fn new(nr_cpus: u32, names: &'static [&'static str]) -> Self {
        let cpu = || Cpu { doing: None, runs: None, counted: vec![0; names.len()] };
        Self {
            seen: Box::new([0; Feature::ALL / 64]),
            features: Features::default(),
            names,
            cpus: (0..nr_cpus).map(|_| cpu()).collect(),
            pages: FastMap::default(),
            now: vec![0; names.len()],
        }
    }

    /// A CPU begins with `op`.
    pub(crate) fn begins(&mut self, cpu: usize, op: Op) {
        self.cpus[cpu].doing = Some(op);
    }

    /// A CPU is done with `op`, the step at `index`. `seams` says where each CPU gave way last, and
    /// `count` what the kernel has counted for this one.
    pub(crate) fn ends(
        &mut self,
        cpu: usize,
        op: Op,
        index: usize,
        seams: impl Fn(usize) -> u8,
        count: impl FnOnce(&mut [u64]),
    ) {
        self.cpus[cpu].doing = None;
        let here = self.place_of(cpu, op);
        for other in 0..self.cpus.len() {
            if let Some(held) = self.cpus[other].doing {
                self.features.overlapped.add(held.number(), op.number());
                let there = self.place_of(other, held);
                let near = nearness(here, there);
                let pair = u64::from(kind(held)) << 8 | u64::from(kind(op));
                let (sort, parts) = if near & 1 != 0 {
                    let before = here.0.zip(here.1).map_or(0, |(mm, (page, _))| self.last_done(mm, page));
                    let who = self.others_run(there.0, cpu, other);
                    (Sort::MetOnPages, [pair, near << 8 | u64::from(seams(other)), before, who])
                } else {
                    (Sort::Met, [pair, near, seams(other).into(), 0])
                };
                self.add(Feature::of(sort, parts), index);
            }
        }
        count(&mut self.now);
        for number in 0..self.now.len() {
            let before = core::mem::replace(&mut self.cpus[cpu].counted[number], self.now[number]);
            if self.now[number] != before {
                let by = self.now[number].wrapping_sub(before);
                let parts = [u64::from(kind(op)), number as u64, bucket(by), 0];
                self.add(Feature::of(Sort::Counted, parts), index);
            }
        }
        match op {
            Op::Switch(mm) => self.cpus[cpu].runs = Some(mm),
            Op::Lazy | Op::Offline => self.cpus[cpu].runs = None,
            _ => {}
        }
        self.note_history(op, here, index);
    }

    /// The run is over: all its features. `reached` is what the machine saw each operation come to.
    pub(crate) fn end(mut self, reached: impl Iterator<Item = Boundaries>) -> Features {
        let last = usize::from(u16::MAX);
        for (number, name) in self.names.iter().enumerate() {
            let each = self.cpus.iter().map(|cpu| cpu.counted[number]);
            let value = if name.starts_with("max_") { each.max().unwrap_or(0) } else { each.sum() };
            self.features.counted.push((name, value));
            if value > 0 {
                self.add(Feature::of(Sort::InAll, [number as u64, bucket(value), 0, 0]), last);
            }
        }
        for (number, boundaries) in reached.enumerate() {
            for boundary in boundaries.iter() {
                let parts = [number as u64, boundary as u64, 0, 0];
                self.add(Feature::of(Sort::Reached, parts), last);
            }
        }
        self.features
    }

    fn add(&mut self, feature: Feature, index: usize) {
        let (word, bit) = (usize::from(feature.0 / 64), 1 << (feature.0 % 64));
        if self.seen[word] & bit == 0 {
            self.seen[word] |= bit;
            self.features.all.push((feature, u16::try_from(index).unwrap_or(u16::MAX)));
        }
    }

    /// The address space that a step works on, and its pages: first, and one behind the last.
    fn place_of(&self, cpu: usize, op: Op) -> (Option<MmId>, Option<(u64, u64)>) {
        let mm = op.mm().or(self.cpus[cpu].runs.filter(|_| matches!(op, Op::Touch(..))));
        (mm, op.range().map(|range| (range.start() >> 12, range.end() >> 12)))
    }

    /// What was done last to a page, before what is done now.
    fn last_done(&self, mm: MmId, page: u64) -> u64 {
        self.pages.get(&(mm.0, page)).map_or(0, |done| u64::from(done & 0xff))
    }

    /// Whether a third CPU runs programs of the address space, and whether `cpu` does.
    fn others_run(&self, mm: Option<MmId>, cpu: usize, other: usize) -> u64 {
        let runs = |cpu: usize| mm.is_some() && self.cpus[cpu].runs == mm;
        let third = (0..self.cpus.len()).any(|third| third != cpu && third != other && runs(third));
        u64::from(third) << 1 | u64::from(runs(cpu))
    }

    fn note_history(&mut self, op: Op, (mm, pages): (Option<MmId>, Option<(u64, u64)>), index: usize) {
        let Some(mm) = mm else { return };
        match op {
            Op::Fork(_, child) => {
                self.pages.retain(|(of, _), _| *of != child.0);
                let copies: Vec<_> = self
                    .pages
                    .iter()
                    .filter(|((of, _), _)| *of == mm.0)
                    .map(|((_, page), done)| (*page, *done))
                    .collect();
                for (page, done) in copies {
                    self.pages.insert((child.0, page), done << 8 | u32::from(kind(op)));
                    self.pages.insert((mm.0, page), done << 8 | u32::from(kind(op)) | 0x80);
                }
                return;
            }
            Op::Exit(_) => return self.pages.retain(|(of, _), _| *of != mm.0),
            _ => {}
        }
        let Some((first, end)) = pages else { return };
        let low = first..end.min(first + PAGES_KEPT);
        let high = low.end.max(end.saturating_sub(PAGES_KEPT))..end;
        let was_moved =
            if let Op::Remap(_, _, to) = op { Some((to >> 12).wrapping_sub(first)) } else { None };
        for page in low.chain(high) {
            let done = self.pages.entry((mm.0, page)).or_default();
            let history = *done << 8 | u32::from(kind(op));
            // The same thing again is no news.
            if history & 0xff != *done & 0xff {
                *done = history;
            }
            if let Some(by) = was_moved {
                self.pages.insert((mm.0, page.wrapping_add(by)), history | 0x80);
            }
            self.add(Feature::of(Sort::History, [u64::from(history & 0xff_ffff), 0, 0, 0]), index);
        }
    }
}

/// Which operation it is, and of which sort: below 128.
fn kind(op: Op) -> u8 {
    let variant: u8 = match op {
        Op::Map(_, _, backing, _) => match backing {
            Backing::Anon | Backing::Stack | Backing::Folios => 0,
            Backing::Huge | Backing::Clean | Backing::Zeroes => 1,
            Backing::Private => 2,
            Backing::Shared | Backing::Pfn | Backing::Giant => 3,
        },
        Op::Protect(_, _, rights) => match rights {
            Rights::Nothing => 0,
            Rights::Read => 1,
            Rights::Write => 2,
            Rights::Execute => 3,
        },
        Op::Touch(_, UserAccess::Write) | Op::Guard(_, _, Guarding::Remove) => 1,
        _ => 0,
    };
    (op.number().to_le_bytes()[0] & 0x1f) | variant << 5
}

/// Whether two steps work on the same address space, and on the same addresses.
fn nearness(
    (mm, pages): (Option<MmId>, Option<(u64, u64)>),
    (other, others): (Option<MmId>, Option<(u64, u64)>),
) -> u64 {
    let meets = match (pages, others) {
        (Some((first, end)), Some((start, last))) => first < last && start < end,
        _ => false,
    };
    u64::from(mm.is_some() && mm == other) << 1 | u64::from(meets)
}

/// 1, 2, 3, 4 to 7, 8 to 15, 16 to 31, and more: sequences shall not get long for its sake.
fn bucket(number: u64) -> u64 {
    if number < 4 { number } else { 2 + u64::from(number.ilog2().min(5)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmu_gather::pagetable::VirtRange;

    const RANGE: VirtRange = match VirtRange::new(0x10_0000, 0x10_4000) {
        Ok(range) => range,
        Err(_) => panic!("a good range"),
    };

    /// What comes of steps one after another on CPU 0.
    fn in_turn(ops: &[Op]) -> Vec<Feature> {
        let mut recorder = Recorder::new(2, &[]);
        for (index, op) in ops.iter().enumerate() {
            recorder.begins(0, *op);
            recorder.ends(0, *op, index, |_| 0, |_| {});
        }
        let features = recorder.end(core::iter::empty());
        assert!(features.overlapped.is_empty(), "there is one CPU");
        features.all.into_iter().map(|(feature, _)| feature).collect()
    }

    #[test]
    fn what_was_done_to_a_page_in_another_order_is_something_else() {
        let mm = MmId(0);
        let (map, read) =
            (Op::Map(mm, RANGE, Backing::Anon, Rights::Write), Op::Protect(mm, RANGE, Rights::Read));
        let (gone, back) = (Op::Reclaim(mm, mm, RANGE), Op::Discard(mm, RANGE));
        let one = in_turn(&[map, read, gone, back]);
        let other = in_turn(&[map, gone, read, back]);
        assert_eq!(one.len(), 4);
        assert!(one.iter().chain(&other).all(|feature| feature.class() == 3));
        assert_ne!(one.last(), other.last());
        assert_eq!(one, in_turn(&[map, read, gone, back]), "the same again is the same");
    }

    #[test]
    fn steps_that_overlap_are_told_from_those_that_follow_one_another() {
        let (mm, other) = (MmId(0), MmId(1));
        let met = |first: Op, second: Op| {
            let mut recorder = Recorder::new(2, &[]);
            recorder.begins(0, first);
            recorder.begins(1, second);
            recorder.ends(1, second, 1, |_| 2, |_| {});
            recorder.ends(0, first, 0, |_| 2, |_| {});
            let features = recorder.end(core::iter::empty());
            assert_eq!(features.overlapped.len(), 1);
            features.all[0].0
        };
        let near = met(Op::Unmap(mm, RANGE), Op::Discard(mm, RANGE));
        let apart = met(Op::Unmap(mm, RANGE), Op::Discard(other, RANGE));
        assert_ne!(near, apart, "another address space");
        assert_eq!((near.class(), apart.class()), (0, 0));
        assert_eq!(met(Op::Unmap(mm, RANGE), Op::Exit(other)).class(), 1, "no pages in common");
    }

    #[test]
    fn a_counter_is_told_with_the_step_that_raised_it_and_once() {
        let mut recorder = Recorder::new(1, &["flushes", "max_pages"]);
        for (index, count) in [[0, 0], [1, 9], [1, 9], [2, 9]].into_iter().enumerate() {
            recorder.begins(0, Op::Lazy);
            recorder.ends(0, Op::Lazy, index, |_| 0, |counts| counts.copy_from_slice(&count));
        }
        let features = recorder.end(core::iter::empty());
        assert_eq!(features.counted, [("flushes", 2), ("max_pages", 9)]);
        // Each raised by one step, and each once more at the end.
        let steps: Vec<u16> = features.all.iter().map(|(_, step)| *step).collect();
        assert_eq!(steps, [1, 1, u16::MAX, u16::MAX]);
    }

    #[test]
    fn pairs_that_are_missing_are_named() {
        let mut pairs = Pairs::default();
        pairs.add(Op::Lazy.number(), Op::Sync.number());
        let missing: Vec<_> = pairs.missing(&Pairs::all()).collect();
        assert_eq!(missing.len() + 1, Pairs::all().len());
        assert!(!missing.contains(&("lazy", "sync")) && missing.contains(&("sync", "lazy")));
        assert!(
            pairs
                .missing(&Pairs::that_can_overlap())
                .all(|(first, second)| first != "sync" && second != "sync")
        );
    }
}
