//! Sequences that begin with a call on more pages than a table has, all of them there.

use core::ops::Range;

use mmu_gather::pagetable::{Level, VirtRange};

use crate::memory::index;
use crate::sequence::generate::maker::{Maker, small};
use crate::sequence::op::{MmId, Op};
use crate::sequence::places::MOST_TOUCHED;
use crate::vocabulary::{Backing, Guarding, Rights, UserAccess};

/// The fewest pages of an area that is filled: more than a table has.
const DENSE_PAGES: u64 = 520;

impl Maker<'_> {
    /// A call that goes through more small pages than a table has, all of them there, and in use on
    /// several CPUs.
    pub(super) fn begin_dense(&mut self) {
        let mm = self.mm();
        // Mostly large pages that are split: each page of the others costs a fault.
        let area = if self.choices.one_in(4) { self.fill_with_pages(mm) } else { self.fill_by_splitting(mm) };
        self.mapped.push((mm, area));
        let op = match self.choices.below(6) {
            0 => Op::Protect(mm, area, if self.choices.one_in(2) { Rights::Nothing } else { Rights::Read }),
            1 => Op::Unmap(mm, area),
            2 => Op::Discard(mm, area),
            3 => Op::Reclaim(mm, mm, area),
            4 => Op::Fork(mm, MmId((mm.0 + 1) % self.nr_mms)),
            _ => Op::Remap(mm, area, self.base()),
        };
        self.then(self.cpu(), op);
    }

    /// Programs write to every page of an area, each to some parts of it.
    fn fill_with_pages(&mut self, mm: MmId) -> VirtRange {
        let area = self.places.cut(self.base(), DENSE_PAGES + self.choices.below(480));
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
            self.then(cpu, Op::Touch(self.places.cut(start, pages), UserAccess::Write));
        }
        area
    }

    /// Two large pages are split by a call on the last small pages of the one and the first of the
    /// other.
    fn fill_by_splitting(&mut self, mm: MmId) -> VirtRange {
        // In the first 2 MiB nothing large can be.
        let area = self.large(self.places.cut(self.base().max(Level::Pmd.entry_span()), DENSE_PAGES));
        self.then(self.cpu(), Op::Map(mm, area, Backing::Huge, Rights::Write));
        let programs = self.run_programs(mm);
        let before = 1 + self.choices.below(40);
        let around = area.start() + Level::Pmd.entry_span() - before * 4096;
        let around = self.places.cut(around, before + 1 + self.choices.below(40));
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
    pub(super) fn run_programs(&mut self, mm: MmId) -> Range<u16> {
        // The area is there before anybody uses it.
        self.then(self.cpu(), Op::Sync);
        let cpus = 0..small(self.nr_cpus.min(4).into());
        for cpu in cpus.clone() {
            self.then(cpu, Op::Switch(mm));
        }
        cpus
    }
}
