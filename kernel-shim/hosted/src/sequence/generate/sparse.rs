//! Sequences with few things far apart: more tables than the ceiling, pages of 1 GiB, more than 64
//! CPUs.

use mmu_gather::pagetable::{Level, VirtRange};

use crate::sequence::generate::maker::{Maker, small};
use crate::sequence::op::{MmId, Op};
use crate::vocabulary::{Backing, Rights, UserAccess};

/// More tables, or large pages, than are invalidated one by one; with some to spare.
const MORE_THAN_CEILING: u64 = 36;

/// The most pages of a giant area that are moved: each costs an entry, after a split.
const MOST_MOVED: u64 = 600;

impl Maker<'_> {
    /// A call on more tables, or on more large pages, than the ceiling.
    pub(super) fn begin_sparse(&mut self) {
        let mm = self.mm();
        let (size, backing) = match self.choices.below(4) {
            // A page table for each.
            0 => (Level::Pmd, Backing::Anon),
            // A page directory for each.
            1 => (Level::Pud, Backing::Anon),
            2 => (Level::Pmd, Backing::Zeroes),
            _ => (Level::Pud, Backing::Giant),
        };
        let span = size.entry_span();
        let start = self.base().next_multiple_of(span);
        let nr = MORE_THAN_CEILING + self.choices.below(6);
        let most = self.places.0.user_end();
        let start = start.min(most - nr * span) & !(span - 1);
        let area = self.places.cut(start, nr * span / 4096);
        self.then(self.cpu(), Op::Map(mm, area, backing, Rights::Write));
        let programs = self.run_programs(mm);
        let access = if backing == Backing::Anon { UserAccess::Write } else { UserAccess::Read };
        for (place, cpu) in (0..nr).zip(programs.cycle()) {
            // One page in each, not always the first.
            let page = area.start() + place * span + self.choices.below(3) * 0x1000;
            self.then(cpu, Op::Touch(self.places.cut(page, 1), access));
        }
        let op = match self.choices.below(5) {
            0 => Op::Protect(mm, area, Rights::Nothing),
            1 => Op::Discard(mm, area),
            2 if backing == Backing::Anon => Op::Remap(mm, area, (area.start() ^ 1 << 40) % (most >> 1)),
            3 => Op::Exit(mm),
            _ => Op::Unmap(mm, area),
        };
        self.then(self.cpu(), op);
    }

    /// Most CPUs have one address space loaded, the last ones above all.
    pub(super) fn begin_crowded(&mut self, nr_steps: usize) {
        let mm = MmId(0);
        let all = small(self.nr_cpus.into());
        let some = usize::from(all).min(nr_steps / 2);
        for cpu in (0..all).rev().take(some) {
            self.then(cpu, Op::Switch(mm));
        }
        let area = self.places.cut(self.places.nth(1), 8);
        self.then(0, Op::Map(mm, area, Backing::Anon, Rights::Write));
        self.then(0, Op::Sync);
        for cpu in [all - 1, all - 2, all - 3, 64, 1] {
            self.then(cpu, Op::Touch(self.places.cut(area.start(), 4), UserAccess::Write));
        }
    }

    /// Something with pages of 1 GiB. What is done to a part splits them: into pages of 2 MiB, if
    /// the part ends where one of these does.
    pub(super) fn giants(&mut self) -> Op {
        let mm = MmId(u8::from(self.choices.one_in(4)));
        let whole = self.giant();
        let part = self.part_of_giant(whole);
        match self.choices.below(64) {
            0..14 => Op::Map(mm, whole, Backing::Giant, Rights::Write),
            14..18 => Op::Unmap(mm, whole),
            18..20 => Op::Unmap(mm, part),
            20..23 => Op::Discard(mm, whole),
            23..26 => Op::Discard(mm, part),
            26..29 => Op::Protect(mm, whole, self.rights()),
            29..32 => Op::Protect(mm, part, self.rights()),
            32..33 => {
                let part = self.part_of(part, MOST_MOVED);
                Op::Remap(mm, part, part.start() ^ Level::P4d.entry_span())
            }
            33..35 => Op::Fork(mm, MmId(2)),
            35..36 => Op::Reclaim(mm, MmId(0), part),
            36..37 => Op::Exit(mm),
            37..42 => Op::Switch(mm),
            42..44 => Op::Lazy,
            44..46 => Op::Wake,
            46..54 => Op::Touch(self.part_of(part, 8), UserAccess::Read),
            _ => Op::Touch(self.part_of(part, 8), UserAccess::Write),
        }
    }

    /// One page of 1 GiB, or two: in one of three places, at the end of a table of them.
    fn giant(&self) -> VirtRange {
        let span = Level::Pud.entry_span();
        let first = Level::Pud.table_span() - span + self.choices.below(3) * span;
        self.places.cut(first, (1 + self.choices.below(2)) * (span / 4096))
    }

    fn part_of_giant(&self, whole: VirtRange) -> VirtRange {
        let block = Level::Pmd.entry_span();
        if self.choices.one_in(2) {
            return self
                .places
                .cut(whole.start() + self.choices.below(40) * 4096, 1 + self.choices.below(600));
        }
        let start = whole.start() + self.choices.below(4) * block;
        self.places.cut(start, (1 + self.choices.below(4)) * (block / 4096))
    }
}
