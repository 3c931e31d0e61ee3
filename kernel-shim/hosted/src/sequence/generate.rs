//! Making up sequences: few address spaces, few places, many boundaries.
//!
//! | manner | what it is good at |
//! |---|---|
//! | wide | every operation on every place: tables, boundaries, capacities |
//! | dense | as wide, but it begins with a call on more pages than a table has, all of them there |
//! | lives | address spaces come and go, more than a CPU has slots for |
//! | focus | all CPUs on a few pages: two calls meet on one entry that a third CPU has cached |

use core::ops::Range;
use std::collections::VecDeque;

use mmu_gather::pagetable::{Level, VirtRange};
use mmu_gather::tlb::PcidSupport;

use crate::memory::index;
use crate::mmu::features::{InvlpgUppers, SettingDirty};
use crate::options::{Adversary, Device};
use crate::random::Choices;
use crate::sequence::op::{MmId, NR_MMS, Op, Step};
use crate::sequence::places::{MOST_TOUCHED, PLACES};
use crate::sequence::text::Sequence;
use crate::vocabulary::{Backing, Guarding, Rights, Supply, UserAccess};

/// Pages that a focused sequence works on.
const FOCUS_PAGES: u64 = 4;

/// The fewest pages of an area that is filled: more than a table has.
const DENSE_PAGES: u64 = 520;

/// Steps between two points at which all caches are compared with memory.
const SYNC_EVERY: u64 = 24;

/// Makes up a sequence of `nr_steps` steps.
#[must_use]
pub fn generate(seed: u64, nr_cpus: u32, nr_steps: usize) -> Sequence {
    let choices = Choices::new(seed);
    let manner = match choices.below(256) {
        0..92 => Manner::Wide,
        // Few: one costs as much as two others.
        92..96 => Manner::Dense,
        96..128 => Manner::Lives,
        _ => Manner::Focus {
            place: choices.pick(PLACES.len()),
            switches: choices.below(4) * 4,
            // Where guards are, programs are refused: not everywhere.
            guards: if choices.one_in(4) { 8 } else { 0 },
            // Programs that share pages until one of them writes.
            forks: if choices.one_in(4) { 4 } else { 0 },
            // A lost dirty bit is seen in shared pages of a file only, and reclaim takes large
            // pages only if they are clean.
            mostly: match choices.below(16) {
                0..4 => Backing::Shared,
                4..6 => Backing::Clean,
                _ => Backing::Anon,
            },
        },
    };
    let mut maker = Maker { choices: &choices, nr_cpus, manner, mapped: Vec::new(), next: VecDeque::new() };
    if manner == Manner::Dense {
        maker.begin_dense();
    }
    let steps = (0..nr_steps).map(|_| maker.step()).collect();
    Sequence {
        nr_cpus,
        seed: choices.bits(),
        pcid: if choices.one_in(4) { PcidSupport::Off } else { PcidSupport::On },
        uppers: if choices.one_in(3) { InvlpgUppers::LeadingToAddress } else { InvlpgUppers::All },
        adversary: if choices.one_in(8) { Adversary::Forgetter } else { Adversary::Keeper },
        dirty: if choices.one_in(2) { SettingDirty::Unchecked } else { SettingDirty::Checked },
        device: if choices.one_in(4) { Device::Present } else { Device::Absent },
        steps,
    }
}

/// What a sequence is mostly made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Wide,
    Dense,
    Lives,
    Focus {
        /// Where all of it happens.
        place: usize,
        /// So many operations of 64 are switches.
        switches: u64,
        /// So many of the others have to do with guards.
        guards: u64,
        /// So many are forks, of address spaces that are all used alike.
        forks: u64,
        /// What is behind most areas.
        mostly: Backing,
    },
}

struct Maker<'a> {
    choices: &'a Choices,
    nr_cpus: u32,
    manner: Manner,
    /// What comes next, whatever the manner: what a CPU does that was told to be preempted in it,
    /// or how a sequence begins.
    next: VecDeque<Step>,
    /// What was mapped so far, as far as this knows: places worth going back to.
    mapped: Vec<(MmId, VirtRange)>,
}

impl Maker<'_> {
    fn step(&mut self) -> Step {
        if let Some(step) = self.next.pop_front() {
            return step;
        }
        if let Manner::Focus { place, forks, .. } = self.manner
            && self.choices.below(64) < forks
        {
            self.part(PLACES[place]);
            return self.step();
        }
        let cpu = self.cpu();
        if self.choices.one_in(SYNC_EVERY) {
            return Step { cpu, op: Op::Sync };
        }
        let op = match self.manner {
            Manner::Wide | Manner::Dense => self.wide(),
            Manner::Lives if self.choices.one_in(3) => {
                let (mm, _) = self.somewhere();
                if self.choices.one_in(3) { Op::Exit(mm) } else { Op::Switch(mm) }
            }
            Manner::Lives => self.wide(),
            // Now and then something else happens, too.
            Manner::Focus { .. } if self.choices.one_in(12) => self.wide(),
            Manner::Focus { place, switches, guards, forks, mostly } => {
                let mm = if forks > 0 { self.mm() } else { MmId(u8::from(self.choices.one_in(4))) };
                self.focused(mm, PLACES[place], switches, guards, mostly)
            }
        };
        let step = Step { cpu, op };
        let is_long = !matches!(op, Op::Map(..) | Op::Lazy | Op::Batches(_) | Op::Tables(_));
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

    /// While a CPU is at this step, others work on the same pages, or on a part of them.
    fn meet(&mut self, Step { cpu, op }: Step) {
        let Some(range) = op.range().filter(|_| self.nr_cpus > 1) else { return };
        let mm = op.mm().unwrap_or(MmId(0));
        for _ in 0..1 + self.choices.below(3) {
            let by = 1 + self.choices.below(u64::from(self.nr_cpus) - 1);
            // Below 64.
            let other = ((u64::from(cpu) + by) % u64::from(self.nr_cpus)).to_le_bytes()[0];
            let op = self.meeting(mm, range);
            self.then(other, op);
        }
    }

    /// A fork of pages that are in use, and then somebody does something to those of the one while
    /// a
    /// program writes to those of the other.
    fn part(&mut self, base: u64) {
        let (parent, nr_cpus) = (self.mm(), u64::from(self.nr_cpus));
        let child = MmId((parent.0 + 1 + u8::from(self.choices.one_in(2))) % NR_MMS);
        let shared = up_to(base + self.choices.below(FOCUS_PAGES) * 4096, 1 + self.choices.below(2));
        let first = self.choices.below(nr_cpus);
        // Below 64.
        let [one, other, third] = [0, 1, 2].map(|by| ((first + by) % nr_cpus).to_le_bytes()[0]);
        let (loser, writer) = if self.choices.one_in(4) { (child, parent) } else { (parent, child) };
        if self.choices.one_in(2) {
            self.then(one, Op::Map(parent, up_to(base, 2 * FOCUS_PAGES), Backing::Anon, Rights::Write));
        }
        self.then(one, Op::Switch(parent));
        self.then(one, Op::Touch(shared, UserAccess::Write));
        // Who shares the pages from now on runs before anything is done to them.
        self.then(third, Op::Sync);
        self.then(third, Op::Fork(parent, child));
        self.then(third, Op::Sync);
        self.then(one, Op::Switch(loser));
        self.then(other, Op::Switch(writer));
        self.then(one, Op::Touch(shared, UserAccess::Read));
        if self.choices.one_in(2) {
            self.then(third, Op::Sync);
        }
        self.then(third, Op::Preempt(1 + u32::from(self.choices.below(24).to_le_bytes()[0])));
        let op = self.meeting(loser, shared);
        self.then(third, op);
        self.then(other, Op::Touch(shared, UserAccess::Write));
    }

    /// What meets another call on `range`: on all of it, on a half, or on what lies behind.
    fn meeting(&self, mm: MmId, range: VirtRange) -> Op {
        let half = range.start() + (range.nr_pages() / 2) * 4096;
        let part = match self.choices.below(8) {
            0 => VirtRange::new(range.start(), half),
            1 => VirtRange::new(half, range.end()),
            // What lies behind it, as long.
            2 => VirtRange::new(range.end(), (range.end() + range.len_bytes()).min(1 << 47)),
            _ => Ok(range),
        };
        let range = part.unwrap_or(range);
        match self.choices.below(16) {
            0..2 => Op::Unmap(mm, range),
            2..5 => Op::Discard(mm, range),
            5..7 => Op::Reclaim(mm, self.mm(), range),
            7 => Op::Protect(mm, range, self.rights()),
            8 => Op::Remap(mm, range, range.end().min((1 << 47) - 4096)),
            9 => Op::Fork(mm, self.mm()),
            10 => Op::Switch(mm),
            11 => Op::Touch(self.part_of(range, 8), UserAccess::Read),
            _ => Op::Touch(self.part_of(range, 8), UserAccess::Write),
        }
    }

    /// A call that goes through more small pages than a table has, all of them there, and in use on
    /// several CPUs.
    fn begin_dense(&mut self) {
        let mm = self.mm();
        // Mostly large pages that are split: each page of the others costs a fault.
        let area = if self.choices.one_in(4) { self.fill_with_pages(mm) } else { self.fill_by_splitting(mm) };
        self.mapped.push((mm, area));
        let op = match self.choices.below(6) {
            0 => Op::Protect(mm, area, if self.choices.one_in(2) { Rights::Nothing } else { Rights::Read }),
            1 => Op::Unmap(mm, area),
            2 => Op::Discard(mm, area),
            3 => Op::Reclaim(mm, mm, area),
            4 => Op::Fork(mm, MmId((mm.0 + 1) % NR_MMS)),
            _ => Op::Remap(mm, area, self.base()),
        };
        self.then(self.cpu(), op);
    }

    /// Programs write to every page of an area, each to some parts of it.
    fn fill_with_pages(&mut self, mm: MmId) -> VirtRange {
        let area = up_to(self.base(), DENSE_PAGES + self.choices.below(480));
        let backing = match self.choices.below(8) {
            0..5 => Backing::Anon,
            5 => Backing::Private,
            6 => Backing::Shared,
            _ => Backing::Pfn,
        };
        self.then(self.cpu(), Op::Map(mm, area, backing, Rights::Write));
        let programs = self.run_programs(mm);
        let parts = (area.start()..area.end()).step_by(index(MOST_TOUCHED * 4096));
        for (start, cpu) in parts.zip(programs.cycle()) {
            let pages = MOST_TOUCHED.min((area.end() - start) / 4096);
            self.then(cpu, Op::Touch(up_to(start, pages), UserAccess::Write));
        }
        area
    }

    /// Two large pages are split by a call on the last small pages of the one and the first of the
    /// other.
    fn fill_by_splitting(&mut self, mm: MmId) -> VirtRange {
        // In the first 2 MiB nothing large can be.
        let area = large(up_to(self.base().max(Level::Pmd.entry_span()), DENSE_PAGES));
        self.then(self.cpu(), Op::Map(mm, area, Backing::Huge, Rights::Write));
        let programs = self.run_programs(mm);
        let before = 1 + self.choices.below(40);
        let around = area.start() + Level::Pmd.entry_span() - before * 4096;
        let around = up_to(around, before + 1 + self.choices.below(40));
        let op = match self.choices.below(3) {
            0 => Op::Protect(mm, around, self.rights()),
            1 => Op::Discard(mm, around),
            _ => Op::Guard(mm, around, Guarding::Install),
        };
        self.then(self.cpu(), op);
        for cpu in programs {
            self.then(cpu, Op::Touch(self.part_of(area, 24), UserAccess::Write));
        }
        area
    }

    /// Up to four CPUs run programs in `mm` next: which.
    fn run_programs(&mut self, mm: MmId) -> Range<u8> {
        // The area is there before anybody uses it.
        self.then(self.cpu(), Op::Sync);
        let cpus = 0..self.nr_cpus.min(4).to_le_bytes()[0];
        for cpu in cpus.clone() {
            self.then(cpu, Op::Switch(mm));
        }
        cpus
    }

    fn then(&mut self, cpu: u8, op: Op) {
        self.next.push_back(Step { cpu, op });
    }

    /// Something with one or two of a few pages.
    fn focused(&mut self, mm: MmId, base: u64, switches: u64, guards: u64, mostly: Backing) -> Op {
        let first = base + self.choices.below(FOCUS_PAGES) * 4096;
        let pages = if self.choices.one_in(4) { 1 + self.choices.below(FOCUS_PAGES) } else { 1 };
        let range = VirtRange::new(first, (first + pages * 4096).min(1 << 47));
        let range = range.unwrap_or_else(|_| VirtRange::of_entry(Level::Pte, first));
        let whole = VirtRange::new(base, base + 2 * FOCUS_PAGES * 4096).unwrap_or(range);
        if self.choices.below(64) < switches {
            return Op::Switch(mm);
        }
        if self.choices.below(64) < guards {
            return Op::Guard(mm, range, self.guarding());
        }
        if mostly == Backing::Clean {
            return self.focused_on_large(mm, range);
        }
        match self.choices.below(64) {
            0..8 => {
                let backing = match self.choices.below(16) {
                    0..10 => mostly,
                    10..12 => Backing::Private,
                    12..14 => Backing::Shared,
                    14 => Backing::Pfn,
                    _ => Backing::Huge,
                };
                let range = match backing {
                    Backing::Huge | Backing::Clean => large(whole),
                    _ if self.choices.one_in(4) => range,
                    _ => whole,
                };
                Op::Map(mm, range, backing, Rights::Write)
            }
            8..11 => Op::Unmap(mm, range),
            11..12 => Op::Unmap(mm, whole),
            // All of it at times: whole cache lines of entries.
            12..20 => Op::Discard(mm, if self.choices.one_in(4) { whole } else { range }),
            20..24 => Op::Reclaim(mm, mm, range),
            24..26 => Op::Reclaim(mm, self.mm(), range),
            26..30 => Op::Protect(mm, range, self.rights()),
            30..31 => Op::Remap(mm, range, whole.end()),
            31..32 => Op::Fork(mm, MmId(2)),
            32..36 => Op::Switch(mm),
            36..38 => Op::Lazy,
            38..41 => Op::Wake,
            41..48 => Op::Touch(range, UserAccess::Read),
            // Clean pages are few where most programs write.
            48..58 if mostly == Backing::Shared => Op::Touch(range, UserAccess::Read),
            _ => Op::Touch(if self.choices.one_in(2) { whole } else { range }, UserAccess::Write),
        }
    }

    /// Something with the large pages around `range`, which come clean and go whole: what is done
    /// to a part splits them.
    fn focused_on_large(&self, mm: MmId, range: VirtRange) -> Op {
        let whole = large(range);
        let range = range.intersect(whole).unwrap_or(whole);
        match self.choices.below(64) {
            0..12 => Op::Map(mm, whole, Backing::Clean, Rights::Write),
            12..18 => Op::Unmap(mm, whole),
            18..28 => Op::Reclaim(mm, self.mm(), range),
            28..32 => Op::Discard(mm, whole),
            32..34 => Op::Discard(mm, self.part_of(range, 2)),
            34..36 => Op::Protect(mm, whole, self.rights()),
            36..37 => Op::Protect(mm, self.part_of(range, 2), self.rights()),
            37..40 => Op::Remap(mm, whole, whole.end()),
            40..41 => Op::Fork(mm, MmId(2)),
            41..45 => Op::Switch(mm),
            45..46 => Op::Lazy,
            46..48 => Op::Wake,
            48..49 => Op::Touch(self.part_of(range, 8), UserAccess::Write),
            _ => Op::Touch(self.part_of(range, 8), UserAccess::Read),
        }
    }

    /// Any operation, anywhere.
    fn wide(&mut self) -> Op {
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
            31..32 => Op::Exit(mm),
            32..35 => Op::Reclaim(mm, self.mm(), range),
            35..54 => {
                let access = if self.choices.one_in(3) { UserAccess::Read } else { UserAccess::Write };
                Op::Touch(self.part_of(range, 24), access)
            }
            54..58 => Op::Switch(mm),
            58..60 => Op::Lazy,
            60..62 => Op::Wake,
            62 => Op::Batches(self.supply()),
            _ => Op::Tables(if self.choices.one_in(3) { self.supply() } else { Supply::Always }),
        }
    }

    fn map(&mut self) -> Op {
        let (mm, place) = (self.mm(), self.place());
        let backing = match self.choices.below(16) {
            0..7 => Backing::Anon,
            7 => Backing::Huge,
            8 => Backing::Clean,
            9..11 => Backing::Private,
            11..13 => Backing::Shared,
            13 => Backing::Pfn,
            _ => Backing::Stack,
        };
        let is_large = matches!(backing, Backing::Huge | Backing::Clean);
        let range = if is_large { large(place) } else { place };
        self.mapped.push((mm, range));
        if self.mapped.len() > 16 {
            self.mapped.remove(0);
        }
        let rights = if self.choices.one_in(8) { Rights::Read } else { Rights::Write };
        Op::Map(mm, range, backing, rights)
    }

    /// A place that was mapped, or a part of it, or anywhere.
    fn somewhere(&self) -> (MmId, VirtRange) {
        if self.mapped.is_empty() || self.choices.one_in(12) {
            return (self.mm(), self.place());
        }
        let (mm, range) = self.mapped[self.choices.pick(self.mapped.len())];
        let part = if self.choices.one_in(2) { range } else { self.part_of(range, range.nr_pages()) };
        (mm, part)
    }

    fn part_of(&self, range: VirtRange, most: u64) -> VirtRange {
        let skipped = self.choices.below(range.nr_pages());
        let pages = 1 + self.choices.below((range.nr_pages() - skipped).min(most));
        let start = range.start() + skipped * 4096;
        VirtRange::new(start, start + pages * 4096).unwrap_or(range)
    }

    fn place(&self) -> VirtRange {
        let base = self.base();
        let pages = match self.choices.below(16) {
            0..8 => 1 + self.choices.below(8),
            8..12 => 1 + self.choices.below(40),
            12..15 => 1 + self.choices.below(300),
            _ => 1 + self.choices.below(1200),
        };
        up_to(base, pages)
    }

    fn base(&self) -> u64 {
        PLACES[self.choices.pick(PLACES.len())] + self.choices.below(4) * 0x4000
    }

    fn cpu(&self) -> u8 {
        // At most 64.
        self.choices.below(u64::from(self.nr_cpus)).to_le_bytes()[0]
    }

    fn mm(&self) -> MmId {
        MmId(self.choices.below(u64::from(NR_MMS)).to_le_bytes()[0])
    }

    fn rights(&self) -> Rights {
        match self.choices.below(4) {
            0 => Rights::Nothing,
            1 => Rights::Read,
            _ => Rights::Write,
        }
    }

    fn guarding(&self) -> Guarding {
        if self.choices.one_in(2) { Guarding::Remove } else { Guarding::Install }
    }

    fn supply(&self) -> Supply {
        match self.choices.below(4) {
            0 => Supply::Never,
            // Small numbers: 2 to 9.
            1 => Supply::ExceptEvery(2 + u32::from(self.choices.below(8).to_le_bytes()[0])),
            _ => Supply::Always,
        }
    }
}

/// So many pages from `base`, which is aligned and in user space, or as many as there are.
fn up_to(base: u64, pages: u64) -> VirtRange {
    let end = (base + pages * 4096).min(1 << 47);
    VirtRange::new(base, end).unwrap_or_else(|_| VirtRange::of_entry(Level::Pte, base))
}

/// The range rounded out to whole 2 MiB pages, at most two of them.
fn large(range: VirtRange) -> VirtRange {
    let span = Level::Pmd.entry_span();
    let start = range.start() & !(span - 1);
    let end = range.end().next_multiple_of(span).min(start + 2 * span).min(1 << 47);
    VirtRange::new(start.max(span), end.max(2 * span)).unwrap_or(range)
}
