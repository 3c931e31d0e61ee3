//! Calls that meet others on the same pages.

use mmu_gather::pagetable::VirtRange;

use crate::sequence::generate::focus::FOCUS_PAGES;
use crate::sequence::generate::maker::{Maker, small};
use crate::sequence::op::{MmId, Op, Step};
use crate::vocabulary::{Backing, Rights, UserAccess};

impl Maker<'_> {
    /// While a CPU is at this step, others work on the same pages, or on a part of them.
    pub(super) fn meet(&mut self, Step { cpu, op }: Step) {
        let Some(range) = op.range().filter(|_| self.nr_cpus > 1) else { return };
        let mm = op.mm().unwrap_or(MmId(0));
        for _ in 0..1 + self.choices.below(3) {
            let by = 1 + self.choices.below(u64::from(self.nr_cpus) - 1);
            let other = small((u64::from(cpu) + by) % u64::from(self.nr_cpus));
            let op = self.meeting(mm, range);
            self.then(other, op);
        }
    }

    /// A fork of pages that are in use, and then somebody does something to those of the one while
    /// a program writes to those of the other.
    pub(super) fn part(&mut self, base: u64) {
        let (parent, nr_cpus) = (self.mm(), u64::from(self.nr_cpus));
        let child = MmId((parent.0 + 1 + u8::from(self.choices.one_in(2))) % self.nr_mms);
        let first_page = base + self.choices.below(FOCUS_PAGES) * 4096;
        let shared = self.places.cut(first_page, 1 + self.choices.below(2));
        let first = self.choices.below(nr_cpus);
        let [one, other, third] = [0, 1, 2].map(|by| small((first + by) % nr_cpus));
        let (loser, writer) = if self.choices.one_in(4) { (child, parent) } else { (parent, child) };
        if self.choices.one_in(2) {
            let area = self.places.cut(base, 2 * FOCUS_PAGES);
            self.then(one, Op::Map(parent, area, Backing::Anon, Rights::Write));
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
        self.then(third, Op::Preempt(1 + u32::from(small(self.choices.below(24)))));
        let op = self.meeting(loser, shared);
        self.then(third, op);
        self.then(other, Op::Touch(shared, UserAccess::Write));
    }

    /// What meets another call on `range`: on all of it, on a half, or on what lies behind.
    fn meeting(&self, mm: MmId, range: VirtRange) -> Op {
        let half = range.start() + (range.nr_pages() / 2) * 4096;
        let end = self.places.0.user_end();
        let part = match self.choices.below(8) {
            0 => VirtRange::new(range.start(), half),
            1 => VirtRange::new(half, range.end()),
            // What lies behind it, as long.
            2 => VirtRange::new(range.end(), (range.end() + range.len_bytes()).min(end)),
            _ => Ok(range),
        };
        let range = part.unwrap_or(range);
        match self.choices.below(16) {
            0..2 => Op::Unmap(mm, range),
            2..5 => Op::Discard(mm, range),
            5..7 => Op::Reclaim(mm, self.mm(), range),
            7 => Op::Protect(mm, range, self.rights()),
            8 => Op::Remap(mm, range, range.end().min(end - 4096)),
            9 => Op::Fork(mm, self.mm()),
            10 => Op::Switch(mm),
            11 => Op::Touch(self.part_of(range, 8), UserAccess::Read),
            _ => Op::Touch(self.part_of(range, 8), UserAccess::Write),
        }
    }
}
