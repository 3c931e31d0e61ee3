//! Phases that look for one race again and again: a page that is unmapped while CPUs come to it.

use mmu_gather::pagetable::VirtRange;

use crate::doing::Doing;
use crate::memory::is_poison;
use crate::program::board::{Live, Phase, Published, Space};
use crate::program::places::{address_of, pages};
use crate::program::worker::{Lost, Worker};
use crate::stamp::{Moves, Stamp};
use crate::violation::ViolationKind;

/// The place of the page, in a table of its own.
const PLACE: u64 = 4;
/// That of a page that stays, so that the table does.
const ANCHOR: u64 = 5;
/// That of a page whose table goes with it.
const ALONE: u64 = 8;

impl Worker<'_> {
    pub(crate) fn duel(&mut self, phase: Phase) {
        let space = &self.board().duel;
        let (number, mm, published) = (space.number, &space.mm, &space.areas[0]);
        self.switch_to(Some(mm));
        if self.number == 0 {
            self.unmap_again_and_again(number, mm, published, phase);
        } else {
            self.come_and_go(number, mm, published, phase);
        }
    }

    fn unmap_again_and_again(&mut self, number: u64, mm: &Space, published: &Published, phase: Phase) {
        let anchor = pages(address_of(0, ANCHOR), 1);
        self.map(mm, anchor);
        let _refused = self.store(anchor.start(), 1);
        let page = pages(address_of(0, PLACE), 1);
        while self.goes_on() {
            if self.rng.once_in(4) {
                self.unmap_a_table(mm);
            }
            let generation = self.next_generation();
            let stamp =
                Stamp { space: number, owner: 0, moves: Moves::No, place: PLACE, index: 0, generation };
            self.map(mm, page);
            let _refused = self.store(page.start(), stamp.to_word());
            published.publish(Live { generation, place: PLACE, nr_pages: 1 });
            let turns = self.rng.below(60);
            self.linger(turns);
            if phase == Phase::ReclaimDuel {
                self.call(Doing::Reclaim, page.start(), || {
                    self.world.kernel.reclaim([(&**mm, page)]);
                    Ok(())
                });
                // Whatever is there now is new.
                published.publish_dead(generation);
                if self.rng.once_in(2) {
                    self.discard(mm, page);
                }
            }
            self.unmap(mm, page);
            published.publish_dead(generation);
            let turns = self.rng.below(60);
            self.linger(turns);
        }
        self.unmap(mm, anchor);
    }

    /// A page goes with the table below which it is alone: CPUs that are elsewhere leave the
    /// cpumask.
    fn unmap_a_table(&self, mm: &Space) {
        let alone = pages(address_of(0, ALONE), 1);
        self.map(mm, alone);
        let _refused = self.store(alone.start(), 1);
        self.unmap(mm, alone);
    }

    fn come_and_go(&mut self, number: u64, mm: &Space, published: &Published, phase: Phase) {
        let address = address_of(0, PLACE);
        let elsewhere = self.board().own[self.number][0].1.clone();
        let of = Stamp { space: number, owner: 0, moves: Moves::No, place: PLACE, index: 0, generation: 0 };
        while self.goes_on() {
            for _ in 0..1 + self.rng.below(8) {
                let dead = published.dead();
                // Without a fault: what is found must come from the page that was mapped there.
                if let Ok(word) = self.load_once(address) {
                    self.judge(address, word, of, dead);
                }
            }
            let turns = self.rng.below(40);
            match phase {
                Phase::LazyDuel => self.go_lazy(),
                Phase::ReclaimDuel if self.rng.once_in(8) => self.go_off(turns),
                Phase::ReclaimDuel if self.rng.once_in(2) => self.go_lazy(),
                _ => self.switch_to(Some(&elsewhere)),
            }
            self.linger(turns);
            self.switch_to(Some(mm));
        }
    }

    /// Every CPU discards and unmaps a few pages of its own in one address space, with interrupts
    /// on and off, and looks at those of the others.
    pub(crate) fn crossfire(&mut self) {
        use mmu_kernel_shim::Machine;
        let space = &self.board().duel;
        let mm = &space.mm;
        self.switch_to(Some(mm));
        let start = address_of(self.owner(), 0);
        while self.goes_on() {
            let nr_pages = 1 + self.rng.below(3);
            let range = pages(start, nr_pages);
            self.map(mm, range);
            for _ in 0..1 + self.rng.below(8) {
                self.stamp_and_check(space.number, range, nr_pages);
                self.look_at_others(space.areas.len() as u64);
                if self.rng.once_in(3) {
                    self.world.machine.without_interrupts(|| self.discard(mm, range));
                } else {
                    self.discard(mm, range);
                }
                if let Some(word @ 1..) = self.load(start) {
                    self.violation(ViolationKind::DeadPage, [start, word, self.generation()]);
                }
            }
            self.unmap(mm, range);
            self.must_be_gone(start);
        }
    }

    fn stamp_and_check(&mut self, number: u64, range: VirtRange, nr_pages: u64) {
        let generation = self.next_generation();
        for index in 0..nr_pages {
            let address = range.start() + index * 4096;
            let stamp =
                Stamp { space: number, owner: self.owner(), moves: Moves::No, place: 0, index, generation };
            let _refused = self.store(address, stamp.to_word());
            self.judge_own(address, self.load(address), stamp, Lost::Never);
        }
    }

    fn look_at_others(&mut self, owners: u64) {
        let owner = self.rng.below(owners);
        for _ in 0..4 {
            let address = address_of(owner, 0);
            if let Some(word) = self.load(address)
                && is_poison(word)
            {
                self.violation(ViolationKind::FreedPageRead, [address, word, 0]);
            }
        }
    }
}
