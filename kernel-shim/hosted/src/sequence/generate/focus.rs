//! Sequences in which all CPUs work on a few pages.

use mmu_gather::pagetable::VirtRange;

use crate::sequence::generate::maker::{Maker, small};
use crate::sequence::op::{MmId, Op};
use crate::vocabulary::{Backing, Rights, Supply, UserAccess};

/// Pages that a focused sequence works on.
pub(super) const FOCUS_PAGES: u64 = 4;

/// Pages for which a gather without batch pages has room, in kernels with the least room there may
/// be; a multiple of it in others, mostly.
const ROOM: u64 = 3;

impl Maker<'_> {
    /// Two calls drop the same pages at the same time, just after programs have read them: pages of
    /// a file, clean, and cached so that they may be written to.
    pub(super) fn crossing_discards(&mut self, base: u64) -> Op {
        let mm = MmId(0);
        let whole = self.places.cut(base, 2 * FOCUS_PAGES);
        let other = if self.choices.one_in(2) { whole } else { self.part_of(whole, 1) };
        for op in [Op::Touch(whole, UserAccess::Read), Op::Discard(mm, whole), Op::Discard(mm, other)] {
            self.then(self.cpu(), op);
        }
        Op::Touch(whole, UserAccess::Read)
    }

    /// Something with one or two of a few pages.
    pub(super) fn focused(&mut self, mm: MmId, base: u64, switches: u64, guards: u64, mostly: Backing) -> Op {
        let first = base + self.choices.below(FOCUS_PAGES) * 4096;
        let pages = if self.choices.one_in(4) { 1 + self.choices.below(FOCUS_PAGES) } else { 1 };
        let range = self.places.cut(first, pages);
        let whole = self.places.cut(base, if mostly == Backing::Folios { 32 } else { 2 * FOCUS_PAGES });
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
                    Backing::Huge | Backing::Clean | Backing::Zeroes => self.large(whole),
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
        let whole = self.large(range);
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

    /// Gathers get no batch pages: each flushes every few pages, with no lock held, and goes on in
    /// the same table.
    pub(super) fn begin_scarce(&mut self) {
        self.then(0, Op::Batches(Supply::Never));
    }

    /// Programs use a few pages, which are then discarded: as many of them as a gather has room for
    /// without batch pages, and one more, which reclaim takes at the same time. Whoever looks at
    /// that one finds nothing, with no lock between the two held for long.
    pub(super) fn taken_while_discarded(&mut self, base: u64) -> Op {
        let mm = MmId(u8::from(self.choices.one_in(6)));
        // In half of them, one visit of the table comes after a flush, in the others two.
        let before = ROOM * (1 + self.choices.below(2));
        let whole = self.places.cut(base, before + 1);
        let last = self.places.cut(base + before * 4096, 1);
        if self.choices.one_in(3) {
            self.then(self.cpu(), Op::Map(mm, whole, Backing::Anon, Rights::Write));
        }
        let cpus = [self.cpu(), self.cpu()];
        for cpu in cpus {
            self.then(cpu, Op::Switch(mm));
            self.then(cpu, Op::Touch(whole, UserAccess::Write));
        }
        let discard = (self.cpu(), Op::Discard(mm, whole));
        let reclaim = (self.cpu(), Op::Reclaim(mm, self.mm(), last));
        let is_first = self.choices.one_in(2);
        for (cpu, op) in if is_first { [reclaim, discard] } else { [discard, reclaim] } {
            if matches!(op, Op::Reclaim(..)) || self.choices.one_in(4) {
                let seams = 1 + u32::from(small(self.choices.below(10)));
                self.then(cpu, Op::Preempt(seams));
            }
            self.then(cpu, op);
        }
        Op::Touch(last, UserAccess::Write)
    }
}
