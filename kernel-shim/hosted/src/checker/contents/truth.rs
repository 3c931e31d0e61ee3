//! What each program is to read.
//!
//! A page that was never written to reads what its area shows; another what was last written to it.
//! Each *page* here is half a page of the machine: the halves are written to one by one.
//!
//! Where that is not one word but one of several, because a call that discards is under way, any of
//! them is right.

use std::collections::BTreeMap;

use mmu_gather::pagetable::VirtRange;
use rustc_hash::FxHashMap;
use x86_64::structures::paging::PhysFrame;

use crate::checker::contents::words::{HALF_SHIFT, Word};
use crate::vocabulary::{Contents, Moment, Shows};

/// The truth about all address spaces that the kernel has told of.
#[derive(Debug, Default)]
pub(crate) struct Truth {
    spaces: FxHashMap<PhysFrame, Space>,
    files: Files,
}

/// By file, page, and half: what was last written to a page of a file.
type Files = FxHashMap<(u32, u64, u64), Word>;

/// One address space.
#[derive(Clone, Debug, Default)]
struct Space {
    /// By first address.
    areas: BTreeMap<u64, Area>,
    /// By number: private pages that were written to.
    pages: FxHashMap<u64, Page>,
    /// Calls under way.
    discards: Vec<(VirtRange, Moment)>,
    moves: Vec<Move>,
}

/// What was known of a part of it.
struct Part {
    areas: Vec<(u64, Area)>,
    pages: Vec<(u64, Page)>,
}

#[derive(Clone, Copy, Debug)]
struct Area {
    end: u64,
    shows: Shows,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Move {
    from: VirtRange,
    to: u64,
}

/// What a page holds that was written to.
#[derive(Clone, Debug)]
struct Page {
    last: Possible,
    /// What else it may hold.
    others: Vec<Possible>,
    /// The frame that a program has used it in.
    used_in: Option<PhysFrame>,
}

#[derive(Clone, Copy, Debug)]
struct Possible {
    word: Word,
    /// When it was written; [`ALWAYS`] for what the area shows.
    since: Moment,
}

/// No call that discards makes it less possible.
const ALWAYS: Moment = Moment(u64::MAX);

/// What a page reads that was never written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unwritten {
    /// This.
    Word(Word),
    /// What was last written to this page of a file.
    Shared(u32, u64, u64),
    /// Nobody knows, or there is no area.
    Anything,
}

/// A page that was written to, for a comparison at rest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Written {
    pub(crate) root: PhysFrame,
    pub(crate) address: u64,
    /// What is to be in it; what it reads if nothing is there; and the frame it was used in.
    pub(crate) word: Word,
    pub(crate) if_empty: Option<Word>,
    pub(crate) used_in: Option<PhysFrame>,
}

impl Truth {
    /// Takes a change that the kernel tells.
    pub(crate) fn changes(&mut self, change: Contents) {
        match change {
            Contents::Shown { root, range, shows } => {
                let space = self.spaces.entry(root).or_default();
                space.take(range);
                space.areas.insert(range.start(), Area { end: range.end(), shows });
            }
            Contents::Gone { root, range } => {
                let Some(space) = self.spaces.get_mut(&root) else { return };
                space.take(range);
                if space.areas.is_empty() {
                    self.spaces.remove(&root);
                }
            }
            Contents::Discarding { root, range, began } => {
                self.spaces.entry(root).or_default().discards.push((range, began));
            }
            Contents::Discarded { root, range, began } => {
                if let Some(space) = self.spaces.get_mut(&root) {
                    space.discarded(&self.files, range, began);
                }
            }
            Contents::Moving { root, from, to } => {
                if let Some(space) = self.spaces.get_mut(&root) {
                    space.moving(Move { from, to });
                }
            }
            Contents::Moved { root, from, to } => {
                if let Some(space) = self.spaces.get_mut(&root) {
                    space.moves.retain(|moving| *moving != Move { from, to });
                }
            }
            Contents::Forked { parent, child } => {
                let Some(mut copy) = self.spaces.get(&parent).cloned() else { return };
                for page in copy.pages.values_mut() {
                    page.used_in = None;
                }
                self.spaces.insert(child, copy);
            }
        }
    }

    /// A program has read `found`, in `frame`: what it should have read instead, if that is wrong.
    pub(crate) fn reads(
        &mut self,
        root: PhysFrame,
        address: u64,
        (frame, found): (PhysFrame, Word),
    ) -> Option<Word> {
        let space = self.spaces.get_mut(&root)?;
        let (first, second) = space.pages_at(address >> HALF_SHIFT);
        if let Some(second) = second {
            // It may have moved, or may not.
            let wrong = space.is_wrong(&self.files, first, found)?;
            return space.is_wrong(&self.files, second, found).and(Some(wrong));
        }
        let wrong = space.is_wrong(&self.files, first, found);
        let is_settled = !space.is_being_discarded(first);
        if let Some(page) = space.pages.get_mut(&first) {
            page.used_in = Some(frame);
            if is_settled && (wrong.is_some() || !page.others.is_empty()) {
                // Now it is known. What is wrong is told once.
                page.last.word = found;
                page.others.clear();
            }
        }
        wrong
    }

    /// A program has written `word`, in `frame`.
    pub(crate) fn writes(
        &mut self,
        root: PhysFrame,
        address: u64,
        (frame, word): (PhysFrame, Word),
        now: Moment,
    ) {
        let Some(space) = self.spaces.get_mut(&root) else { return };
        let (first, second) = space.pages_at(address >> HALF_SHIFT);
        let is_settled = second.is_none() && !space.is_being_discarded(first);
        for number in [Some(first), second].into_iter().flatten() {
            let new = Possible { word, since: now };
            if let Some(page) = space.pages.get_mut(&number) {
                page.used_in = Some(frame);
                if is_settled {
                    page.others.clear();
                } else {
                    page.others.push(page.last);
                }
                page.last = new;
                continue;
            }
            let others = match space.unwritten(number) {
                Unwritten::Shared(file, page, half) => {
                    self.files.insert((file, page, half), word);
                    continue;
                }
                Unwritten::Anything => continue,
                Unwritten::Word(_) if is_settled => Vec::new(),
                Unwritten::Word(word) => vec![Possible { word, since: ALWAYS }],
            };
            space.pages.insert(number, Page { last: new, others, used_in: Some(frame) });
        }
    }

    /// An entry maps another page from now on: nobody has used it there.
    pub(crate) fn mapped(&mut self, root: PhysFrame, address: u64) {
        let space = self.spaces.get_mut(&root);
        let Some(space) = space.filter(|space| !space.pages.is_empty()) else { return };
        for half in 0..2 {
            if let Some(page) = space.pages.get_mut(&(address >> HALF_SHIFT | half)) {
                page.used_in = None;
            }
        }
    }

    /// The pages of which it is known, while nothing goes on, what a program has written there.
    pub(crate) fn written(&self) -> impl Iterator<Item = Written> + '_ {
        self.spaces.iter().flat_map(|(root, space)| {
            let settled = space.pages.iter().filter(|(_, page)| page.others.is_empty());
            settled.map(|(number, page)| Written {
                root: *root,
                address: number << HALF_SHIFT,
                word: page.last.word,
                if_empty: match space.unwritten(*number) {
                    Unwritten::Word(word) => Some(word),
                    Unwritten::Shared(..) | Unwritten::Anything => None,
                },
                used_in: page.used_in,
            })
        })
    }
}

impl Space {
    /// Takes out what is known of a range: its areas, or their parts, and its pages.
    fn take(&mut self, range: VirtRange) -> Part {
        self.cut(range.start());
        self.cut(range.end());
        let starts: Vec<u64> =
            self.areas.range(range.start()..range.end()).map(|(start, _)| *start).collect();
        let areas = starts.iter().filter_map(|start| Some((*start, self.areas.remove(start)?))).collect();
        let (first, end) = (range.start() >> HALF_SHIFT, range.end() >> HALF_SHIFT);
        let pages = if end - first < self.pages.len() as u64 {
            (first..end).filter_map(|number| Some((number, self.pages.remove(&number)?))).collect()
        } else {
            let inside: Vec<u64> =
                self.pages.keys().copied().filter(|number| (first..end).contains(number)).collect();
            inside.iter().filter_map(|number| Some((*number, self.pages.remove(number)?))).collect()
        };
        Part { areas, pages }
    }

    /// Makes two areas of one that has `at` inside.
    fn cut(&mut self, at: u64) {
        let Some((start, area)) = self.areas.range_mut(..at).next_back() else { return };
        if area.end <= at {
            return;
        }
        let upper = Area { end: area.end, shows: from_page(area.shows, (at - start) >> 12) };
        area.end = at;
        self.areas.insert(at, upper);
    }

    fn moving(&mut self, moving: Move) {
        let Move { from, to } = moving;
        let Part { areas, pages } = self.take(from);
        let offset = |address: u64| address - from.start() + to;
        for (start, area) in areas {
            self.areas.insert(offset(start), Area { end: offset(area.end), ..area });
        }
        for (number, page) in pages {
            self.pages.insert(offset(number << HALF_SHIFT) >> HALF_SHIFT, page);
        }
        self.moves.push(moving);
    }

    /// The page that a program finds at the page with this number; two, where a move is under way
    /// from one place to another that it overlaps.
    fn pages_at(&self, number: u64) -> (u64, Option<u64>) {
        for Move { from, to } in &self.moves {
            let address = number << HALF_SHIFT;
            if from.contains(address) {
                let has_moved = address - from.start() + to;
                let is_target = (*to..to + from.len_bytes()).contains(&address);
                return (has_moved >> HALF_SHIFT, is_target.then_some(number));
            }
        }
        (number, None)
    }

    fn is_being_discarded(&self, number: u64) -> bool {
        self.discards.iter().any(|(range, _)| range.contains(number << HALF_SHIFT))
    }

    /// A call that discards returns: what was there before it began is not there any more.
    fn discarded(&mut self, files: &Files, range: VirtRange, began: Moment) {
        let before = self.discards.len();
        self.discards.retain(|(_, other)| *other != began);
        if self.discards.len() == before {
            return;
        }
        let Part { areas, pages } = self.take(range);
        self.areas.extend(areas);
        for (number, mut page) in pages {
            let Unwritten::Word(word) = self.unwritten_of(files, number) else { continue };
            page.others.push(page.last);
            page.others.retain(|possible| possible.since >= began);
            // In the order of time, as far as it is known.
            if let Some(last) = page.others.pop() {
                page.others.push(Possible { word, since: ALWAYS });
                self.pages.insert(number, Page { last, ..page });
            }
        }
    }

    /// What should have been found, if `found` is wrong.
    fn is_wrong(&self, files: &Files, number: u64, found: Word) -> Option<Word> {
        let unwritten = || self.unwritten_of(files, number);
        if let Some(page) = self.pages.get(&number) {
            let is_right = page.last.word == found
                || page.others.iter().any(|possible| possible.word == found)
                || self.is_being_discarded(number)
                    && matches!(unwritten(), Unwritten::Word(word) if word == found);
            return (!is_right).then_some(page.last.word);
        }
        match unwritten() {
            Unwritten::Word(word) => (word != found).then_some(word),
            Unwritten::Shared(file, page, half) => {
                let word = files.get(&(file, page, half)).copied().unwrap_or(Word::of_a_file(file, page));
                (word != found).then_some(word)
            }
            Unwritten::Anything => None,
        }
    }

    /// As [`unwritten`](Self::unwritten); of a private page of a file that others have written to,
    /// nobody knows when it was copied.
    fn unwritten_of(&self, files: &Files, number: u64) -> Unwritten {
        match self.area_at(number) {
            Some(Shows::PrivateFile { file, first }) if files.contains_key(&(file, first, number & 1)) => {
                Unwritten::Anything
            }
            _ => self.unwritten(number),
        }
    }

    fn unwritten(&self, number: u64) -> Unwritten {
        match self.area_at(number) {
            Some(Shows::Zeroes) => Unwritten::Word(Word::ZEROES),
            Some(Shows::PrivateFile { file, first }) => Unwritten::Word(Word::of_a_file(file, first)),
            Some(Shows::SharedFile { file, first }) => Unwritten::Shared(file, first, number & 1),
            Some(Shows::Anything) | None => Unwritten::Anything,
        }
    }

    /// What is shown at the page with this number; of a file, the page of the file.
    fn area_at(&self, number: u64) -> Option<Shows> {
        let address = number << HALF_SHIFT;
        let (start, area) = self.areas.range(..=address).next_back()?;
        (address < area.end).then(|| from_page(area.shows, (address - start) >> 12))
    }
}

/// What an area shows from its `number`th page on.
const fn from_page(shows: Shows, number: u64) -> Shows {
    match shows {
        Shows::PrivateFile { file, first } => Shows::PrivateFile { file, first: first.wrapping_add(number) },
        Shows::SharedFile { file, first } => Shows::SharedFile { file, first: first.wrapping_add(number) },
        Shows::Zeroes | Shows::Anything => shows,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checker::contents::words::{Words, Writer};
    use crate::checker::ledger::frame_numbered;

    /// Words that programs have written, each another.
    fn written<const N: usize>() -> [Word; N] {
        let mut words = Words::new(1);
        let root = frame_numbered(0);
        [(); N].map(|()| words.write(root.start_address(), Writer { root, address: 0 }))
    }

    fn range(first: u64, end: u64) -> VirtRange {
        VirtRange::new(first << 12, end << 12).expect("a good range")
    }

    struct One {
        truth: Truth,
        root: PhysFrame,
    }

    impl One {
        /// Sixteen pages of zeroes.
        fn new() -> Self {
            let root = frame_numbered(7);
            let mut truth = Truth::default();
            truth.changes(Contents::Shown { root, range: range(0, 16), shows: Shows::Zeroes });
            Self { truth, root }
        }

        fn writes(&mut self, page: u64, word: Word, now: u64) {
            self.truth.writes(self.root, page << 12, (self.root, word), Moment(now));
        }

        fn may_read(&mut self, page: u64, word: Word) -> bool {
            // A copy, for what was read is known from then on.
            let spaces = self.truth.spaces.clone();
            let wrong = self.truth.reads(self.root, page << 12, (self.root, word));
            self.truth.spaces = spaces;
            wrong.is_none()
        }
    }

    #[test]
    fn a_page_reads_what_was_written_last_and_before_that_what_its_area_shows() {
        let [old, new] = written();
        let mut one = One::new();
        assert!(one.may_read(3, Word::ZEROES) && !one.may_read(3, old));
        one.writes(3, old, 1);
        one.writes(3, new, 1);
        assert!(one.may_read(3, new) && !one.may_read(3, old) && !one.may_read(3, Word::ZEROES));
        assert!(one.may_read(4, Word::ZEROES) && !one.may_read(4, new));
    }

    #[test]
    fn while_a_call_discards_either_is_right_and_afterwards_only_what_is_not_from_before() {
        let [before, during, after] = written();
        let mut one = One::new();
        let (root, all, began) = (one.root, range(0, 16), Moment(5));
        one.writes(3, before, 4);
        one.writes(4, before, 4);
        one.truth.changes(Contents::Discarding { root, range: all, began });
        assert!(one.may_read(3, before) && one.may_read(3, Word::ZEROES));
        one.writes(3, during, 5);
        assert!([before, during, Word::ZEROES].into_iter().all(|word| one.may_read(3, word)));
        one.truth.changes(Contents::Discarded { root, range: all, began });
        assert!(one.may_read(3, during) && one.may_read(3, Word::ZEROES) && !one.may_read(3, before));
        assert!(one.may_read(4, Word::ZEROES) && !one.may_read(4, before));
        one.writes(3, after, 5);
        assert!(one.may_read(3, after) && !one.may_read(3, during));
    }

    #[test]
    fn pages_that_move_are_found_at_either_place_until_they_have_moved() {
        let [word, other] = written();
        let mut one = One::new();
        let (root, from, to) = (one.root, range(0, 4), 8 << 12);
        one.writes(2, word, 1);
        one.truth.changes(Contents::Gone { root, range: range(8, 12) });
        one.truth.changes(Contents::Moving { root, from, to });
        assert!(one.may_read(2, word) && one.may_read(10, word) && !one.may_read(10, Word::ZEROES));
        one.writes(2, other, 1);
        one.truth.changes(Contents::Moved { root, from, to });
        assert!(one.may_read(10, other) && !one.may_read(10, word) && !one.may_read(11, word));
    }

    #[test]
    fn a_child_reads_what_the_parent_had_and_nothing_that_it_writes_later() {
        let [shared, later] = written();
        let mut one = One::new();
        one.writes(2, shared, 1);
        let (parent, child) = (one.root, frame_numbered(8));
        one.truth.changes(Contents::Forked { parent, child });
        one.writes(2, later, 1);
        one.root = child;
        assert!(one.may_read(2, shared) && !one.may_read(2, later));
        one.truth.changes(Contents::Gone { root: child, range: range(0, 16) });
        assert!(one.may_read(2, later), "no area is there, and nobody looks");
    }

    #[test]
    fn what_one_writes_to_a_shared_file_another_reads_and_a_part_of_an_area_shows_its_part() {
        let [word] = written();
        let mut one = One::new();
        let shows = |first| Shows::SharedFile { file: 3, first };
        let (root, other) = (one.root, frame_numbered(8));
        one.truth.changes(Contents::Shown { root, range: range(16, 24), shows: shows(100) });
        one.truth.changes(Contents::Shown { root: other, range: range(0, 8), shows: shows(104) });
        one.truth.changes(Contents::Gone { root: other, range: range(0, 1) });
        assert!(one.may_read(21, Word::of_a_file(3, 105)) && !one.may_read(21, Word::of_a_file(3, 104)));
        one.writes(21, word, 1);
        one.root = other;
        assert!(one.may_read(1, word) && !one.may_read(2, word));
    }
}
