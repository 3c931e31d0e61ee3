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
        let op = self.meeting(loser, shared);
        self.held_up(third, 24, op);
        self.then(other, Op::Touch(shared, UserAccess::Write));
    }

    /// Reclaim is held up between its note that it owes a flush and the flush. Others look at what
    /// it has emptied, one of them perhaps while a third makes up for a part of what is owed; and a
    /// program still has all of it cached.
    pub(super) fn owed(&mut self, base: u64) {
        let (mm, nr_cpus) = (MmId(u8::from(self.choices.one_in(4))), u64::from(self.nr_cpus));
        let whole = self.places.cut(base, FOCUS_PAGES);
        let is_large = self.choices.one_in(2);
        let (backing, whole) =
            if is_large { (Backing::Clean, self.large(whole)) } else { (Backing::Anon, whole) };
        let first = self.choices.below(nr_cpus);
        let [program, reclaimer, asker, other] = [0, 1, 2, 3].map(|by| small((first + by) % nr_cpus));
        if is_large || self.choices.one_in(2) {
            self.then(asker, Op::Map(mm, whole, backing, Rights::Write));
        }
        self.then(program, Op::Switch(mm));
        let used = if is_large { UserAccess::Read } else { UserAccess::Write };
        let touched = if is_large { self.places.cut(whole.start(), 1) } else { whole };
        self.then(program, Op::Touch(touched, used));
        let taken = if is_large || self.choices.one_in(2) { whole } else { self.part_of(whole, FOCUS_PAGES) };
        self.held_up(reclaimer, 32, Op::Reclaim(mm, self.mm(), taken));
        if self.choices.one_in(2) {
            let part = self.part_of(whole, 1);
            self.held_up(other, 16, Op::Discard(mm, part));
        }
        let part = if is_large { whole } else { self.part_of(whole, FOCUS_PAGES) };
        let op = match self.choices.below(8) {
            0..5 => Op::Discard(mm, part),
            5 => Op::Unmap(mm, part),
            _ => Op::Remap(mm, part, whole.end()),
        };
        self.then(asker, op);
        self.then(program, Op::Touch(touched, used));
    }

    /// A call that takes rights away before it drops pages is held up in between. Another drops the
    /// same pages meanwhile, and a program may still write through what its CPU has cached. The
    /// pages are of a file, and clean: the write is lost, or it is not.
    pub(super) fn rights_go(&mut self, base: u64) {
        let (mm, nr_cpus) = (MmId(0), u64::from(self.nr_cpus));
        let whole = self.places.cut(base, if self.choices.one_in(3) { 2 * FOCUS_PAGES } else { 2 });
        let first = self.choices.below(nr_cpus);
        let [program, one, other] = [0, 1, 2].map(|by| small((first + by) % nr_cpus));
        if self.choices.one_in(4) {
            self.then(one, Op::Map(mm, whole, Backing::Shared, Rights::Write));
        }
        self.then(program, Op::Switch(mm));
        self.then(program, Op::Discard(mm, whole));
        self.then(program, Op::Touch(whole, UserAccess::Read));
        self.held_up(one, 8 << self.choices.below(4), Op::Discard(mm, whole));
        if self.choices.one_in(3) {
            self.then(other, Op::Discard(mm, whole));
        } else {
            // One page is dropped in a way of its own.
            for page in 0..2 {
                let part = self.places.cut(base + page * 4096, 1);
                self.then(other, Op::Discard(mm, part));
            }
        }
        self.then(program, Op::Touch(whole, UserAccess::Read));
        self.then(program, Op::Sync);
    }

    /// A call that is preempted after one of its first `most` seams.
    fn held_up(&mut self, cpu: u16, most: u64, op: Op) {
        self.then(cpu, Op::Preempt(1 + u32::from(small(self.choices.below(most)))));
        self.then(cpu, op);
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
