//! What all manners choose from, and any operation anywhere.

use std::collections::VecDeque;

use mmu_gather::pagetable::{Level, PagingMode, VirtRange};

use crate::memory::index;
use crate::random::Choices;
use crate::sequence::op::{MmId, Op, Step};
use crate::sequence::places::{HIGH_PLACES, PLACES};
use crate::vocabulary::{Backing, Guarding, Rights, Supply, UserAccess};

/// Steps between two points at which all caches are compared with memory.
const SYNC_EVERY: u64 = 24;

/// What a sequence is mostly made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    Wide,
    Dense,
    Sparse,
    Crowd,
    Lives,
    Giants,
    Focus {
        /// Where all of it happens.
        place: u64,
        /// So many operations of 64 are switches.
        switches: u64,
        /// So many of the others have to do with guards.
        guards: u64,
        /// So many are forks, of address spaces that are all used alike.
        forks: u64,
        /// What is behind most areas.
        mostly: Backing,
        /// Whether gathers find no batch pages: they flush every few pages.
        scarce: bool,
        /// So many meet a flush that reclaim owes.
        owed: u64,
        /// So many meet a call that takes rights away before it drops pages.
        rights_go: u64,
    },
}

/// Where sequences work on a machine of this mode.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places(pub(super) PagingMode);

impl Places {
    /// One of them. With five levels, every other one is among those that only these have.
    pub(super) fn nth(self, number: u64) -> u64 {
        let among = match self.0 {
            PagingMode::FiveLevel if number & 1 == 0 => &HIGH_PLACES[..],
            PagingMode::FourLevel | PagingMode::FiveLevel => &PLACES[..],
        };
        among[index((number >> 1) % among.len() as u64)]
    }

    /// As many pages of `range` as user space has, which begins there.
    pub(super) fn cut(self, start: u64, pages: u64) -> VirtRange {
        let end = (start + pages * 4096).min(self.0.user_end());
        VirtRange::new(start, end).unwrap_or_else(|_| VirtRange::of_entry(Level::Pte, start))
    }
}

pub(super) struct Maker<'a> {
    pub(super) choices: &'a Choices,
    pub(super) places: Places,
    pub(super) nr_cpus: u32,
    /// Address spaces that it uses.
    pub(super) nr_mms: u8,
    manner: Manner,
    /// What comes next, whatever the manner: what a CPU does that was told to be preempted in it,
    /// or how a sequence begins.
    next: VecDeque<Step>,
    /// What was mapped so far, as far as this knows: places worth going back to.
    pub(super) mapped: Vec<(MmId, VirtRange)>,
}

impl<'a> Maker<'a> {
    pub(super) fn new(
        choices: &'a Choices,
        places: Places,
        nr_cpus: u32,
        nr_mms: u8,
        manner: Manner,
    ) -> Self {
        Self { choices, places, nr_cpus, nr_mms, manner, mapped: Vec::new(), next: VecDeque::new() }
    }
}

impl Maker<'_> {
    pub(super) fn step(&mut self) -> Step {
        if let Some(step) = self.next.pop_front() {
            return step;
        }
        if let Manner::Focus { place, forks, .. } = self.manner
            && self.choices.below(64) < forks
        {
            self.part(place);
            return self.step();
        }
        if let Manner::Focus { place, owed, rights_go, .. } = self.manner
            && owed + rights_go > 0
        {
            let number = self.choices.below(64);
            if number < owed {
                self.owed(place);
                return self.step();
            }
            if number < owed + rights_go {
                self.rights_go(place);
                return self.step();
            }
        }
        let cpu = self.cpu();
        if self.choices.one_in(SYNC_EVERY) {
            return Step { cpu, op: Op::Sync };
        }
        let op = match self.manner {
            Manner::Wide | Manner::Dense | Manner::Sparse => self.wide(),
            Manner::Crowd => self.focused(self.one_of_two(), self.places.nth(1), 4, 0, Backing::Anon),
            Manner::Giants => self.giants(),
            Manner::Lives if self.choices.one_in(3) => {
                let (mm, _) = self.somewhere();
                match self.choices.below(6) {
                    0 => Op::Exit(mm),
                    1 => Op::Exec(mm, 1 + self.choices.below(600)),
                    _ => Op::Switch(mm),
                }
            }
            Manner::Lives => self.wide(),
            // Now and then something else happens, too.
            Manner::Focus { .. } if self.choices.one_in(12) => self.wide(),
            Manner::Focus { scarce: true, place, .. } if self.choices.one_in(4) => {
                self.taken_while_discarded(place)
            }
            Manner::Focus { place, mostly: Backing::Shared, .. } if self.choices.one_in(16) => {
                self.crossing_discards(place)
            }
            Manner::Focus { place, switches, guards, forks, mostly, .. } => {
                let mm = if forks > 0 { self.mm() } else { self.one_of_two() };
                self.focused(mm, place, switches, guards, mostly)
            }
        };
        let step = Step { cpu, op };
        let is_long = !matches!(op, Op::Map(..) | Op::Lazy | Op::Batches(_) | Op::Tables(_) | Op::Frames(_));
        if is_long && self.choices.one_in(8) {
            self.next.push_back(step);
            if self.choices.one_in(2) {
                self.meet(step);
            }
            // Mostly early: short calls have few seams.
            let most = 2 << self.choices.below(6);
            let seams = u32::from(self.choices.below(most).to_le_bytes()[0]) + 1;
            return Step { cpu, op: Op::Preempt(seams) };
        }
        step
    }

    pub(super) fn then(&mut self, cpu: u16, op: Op) {
        self.next.push_back(Step { cpu, op });
    }

    /// Any operation, anywhere.
    pub(super) fn wide(&mut self) -> Op {
        let (mm, range) = self.somewhere();
        match self.choices.below(64) {
            0..10 => self.map(),
            10..17 => Op::Unmap(mm, range),
            17..22 => Op::Discard(mm, range),
            22..24 => Op::Guard(mm, range, self.guarding()),
            24..27 => Op::Protect(mm, range, self.rights()),
            27..29 => Op::Remap(mm, range, self.place().start()),
            29..30 => Op::MoveStack(mm, range, 1 + self.choices.below(600)),
            30..31 => Op::Fork(mm, self.mm()),
            31..32 if self.choices.one_in(4) => Op::Exec(mm, 1 + self.choices.below(600)),
            31..32 => Op::Exit(mm),
            32..35 => Op::Reclaim(mm, self.mm(), range),
            35..54 => {
                let access = if self.choices.one_in(3) { UserAccess::Read } else { UserAccess::Write };
                Op::Touch(self.part_of(range, 24), access)
            }
            54..58 => Op::Switch(mm),
            58..60 => Op::Lazy,
            60..62 => Op::Wake,
            62 if self.choices.one_in(4) => Op::Frames(self.one_frame()),
            62 => Op::Batches(self.supply()),
            63 if self.choices.one_in(4) => Op::Frames(self.one_frame()),
            _ => Op::Tables(if self.choices.one_in(3) { self.supply() } else { Supply::Always }),
        }
    }

    fn map(&mut self) -> Op {
        let (mm, place) = (self.mm(), self.place());
        let backing = match self.choices.below(16) {
            0..5 => Backing::Anon,
            5 => Backing::Folios,
            6 => Backing::Zeroes,
            7 => Backing::Huge,
            8 => Backing::Clean,
            9..11 => Backing::Private,
            11..13 => Backing::Shared,
            13 => Backing::Pfn,
            _ => Backing::Stack,
        };
        let is_large = matches!(backing, Backing::Huge | Backing::Clean | Backing::Zeroes);
        let range = if is_large { self.large(place) } else { place };
        self.mapped.push((mm, range));
        if self.mapped.len() > 16 {
            self.mapped.remove(0);
        }
        let rights = if self.choices.one_in(8) { Rights::Read } else { Rights::Write };
        Op::Map(mm, range, backing, rights)
    }

    /// A place that was mapped, or a part of it, or anywhere.
    pub(super) fn somewhere(&self) -> (MmId, VirtRange) {
        if self.mapped.is_empty() || self.choices.one_in(12) {
            return (self.mm(), self.place());
        }
        let (mm, range) = self.mapped[self.choices.pick(self.mapped.len())];
        let part = if self.choices.one_in(2) { range } else { self.part_of(range, range.nr_pages()) };
        (mm, part)
    }

    pub(super) fn part_of(&self, range: VirtRange, most: u64) -> VirtRange {
        let skipped = self.choices.below(range.nr_pages());
        let pages = 1 + self.choices.below((range.nr_pages() - skipped).min(most));
        let start = range.start() + skipped * 4096;
        VirtRange::new(start, start + pages * 4096).unwrap_or(range)
    }

    pub(super) fn place(&self) -> VirtRange {
        let base = self.base();
        let pages = match self.choices.below(16) {
            0..8 => 1 + self.choices.below(8),
            8..12 => 1 + self.choices.below(40),
            12..15 => 1 + self.choices.below(300),
            _ => 1 + self.choices.below(1200),
        };
        self.places.cut(base, pages)
    }

    pub(super) fn base(&self) -> u64 {
        self.places.nth(self.choices.bits()) + self.choices.below(4) * 0x4000
    }

    pub(super) fn cpu(&self) -> u16 {
        small(self.choices.below(u64::from(self.nr_cpus)))
    }

    /// The first address space, mostly, or the second.
    fn one_of_two(&self) -> MmId {
        MmId(u8::from(self.choices.one_in(4)))
    }

    pub(super) fn mm(&self) -> MmId {
        MmId(self.choices.below(u64::from(self.nr_mms)).to_le_bytes()[0])
    }

    pub(super) fn rights(&self) -> Rights {
        match self.choices.below(4) {
            0 => Rights::Nothing,
            1 => Rights::Read,
            _ => Rights::Write,
        }
    }

    pub(super) fn guarding(&self) -> Guarding {
        if self.choices.one_in(2) { Guarding::Remove } else { Guarding::Install }
    }

    /// One frame is refused, mostly: programs that get none do nothing any more.
    fn one_frame(&self) -> Supply {
        if self.choices.one_in(4) { Supply::ExceptEvery(5) } else { self.one(24) }
    }

    /// One of the next `most` requests is refused.
    fn one(&self, most: u64) -> Supply {
        Supply::Nth(1 + u32::from(self.choices.below(most).to_le_bytes()[0]))
    }

    fn supply(&self) -> Supply {
        match self.choices.below(4) {
            0 => Supply::Never,
            // Small numbers: 2 to 9.
            1 => Supply::ExceptEvery(2 + u32::from(self.choices.below(8).to_le_bytes()[0])),
            2 if self.choices.one_in(2) => self.one(8),
            _ => Supply::Always,
        }
    }

    /// The range rounded out to whole 2 MiB pages, at most two of them.
    pub(super) fn large(&self, range: VirtRange) -> VirtRange {
        let span = Level::Pmd.entry_span();
        let start = range.start() & !(span - 1);
        let most = self.places.0.user_end();
        let end = range.end().next_multiple_of(span).min(start + 2 * span).min(most);
        VirtRange::new(start.max(span), end.max(2 * span)).unwrap_or(range)
    }
}

/// A number of a CPU as it is.
pub(super) fn small(number: u64) -> u16 {
    u16::try_from(number).unwrap_or(0)
}
