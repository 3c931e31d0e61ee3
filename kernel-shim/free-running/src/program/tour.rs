//! The phase in which everything happens, in every address space.

use mmu_kernel_shim::Protection;

use crate::doing::Doing;
use crate::memory::{PAGE, is_poison};
use crate::program::board::{Live, OWN_SPACES, SHARED_SPACES, SharedSpace};
use crate::program::places::{MOST_PAGES, PLACES, address_of, pages, private_address};
use crate::program::worker::{Lost, Worker, visit};
use crate::stamp::{Moves, Stamp};
use crate::violation::ViolationKind;

/// Visits of other CPUs' pages in one round.
const VISITS: u64 = 96;

impl Worker<'_> {
    pub(crate) fn tour(&mut self) {
        while self.goes_on() {
            let which = self.rng.below(SHARED_SPACES as u64);
            let space = &self.board().shared[usize::try_from(which).unwrap_or(0)];
            self.round(space);
            if self.rng.once_in(2) {
                self.round_alone();
            }
            match self.rng.below(24) {
                0..4 => self.rest(),
                4 => {
                    let turns = self.rng.below(400);
                    self.go_off(turns);
                }
                5 | 6 => self.reclaim(),
                7..10 => self.fork_and_leave(space),
                10 => self.exec(),
                11 => self.take_down_an_orphan(),
                _ => {}
            }
        }
    }

    /// An area comes, is used by everybody, changes, and goes.
    fn round(&mut self, space: &SharedSpace) {
        self.switch_to(Some(&space.mm));
        let mut live = self.map_area(space);
        self.visit_others(space);
        self.check_own(space, live);
        match self.rng.below(8) {
            0..3 => live = self.discard_and_stamp(space, live),
            3 => self.protect_for_a_while(space, live),
            4 => live = self.move_elsewhere(space, live),
            _ => {}
        }
        self.end_area(space, live);
    }

    fn stamp_of(&self, space: &SharedSpace, live: Live, index: u64) -> Stamp {
        let Live { generation, place, .. } = live;
        Stamp { space: space.number, owner: self.owner(), moves: Moves::No, place, index, generation }
    }

    /// Maps an area at one of this CPU's places, where none of its own is, and stamps every page.
    fn map_area(&mut self, space: &SharedSpace) -> Live {
        let nr_pages = if self.rng.once_in(3) { 1 } else { 1 + self.rng.below(MOST_PAGES) };
        let live = Live { generation: self.next_generation(), place: self.rng.below(PLACES), nr_pages };
        let start = address_of(self.owner(), live.place);
        self.map(&space.mm, pages(start, nr_pages));
        space.areas[self.number].publish(live);
        self.stamp_pages(space, live, Moves::No);
        live
    }

    fn stamp_pages(&self, space: &SharedSpace, live: Live, moves: Moves) {
        let start = address_of(self.owner(), live.place);
        for index in 0..live.nr_pages {
            let stamp = Stamp { moves, ..self.stamp_of(space, live, index) };
            if self.store(start + index * PAGE, stamp.to_word()).is_none() {
                self.violation(ViolationKind::CallFailed, [start + index * PAGE, Doing::Fault as u64, 0]);
            }
        }
    }

    /// Uses pages that other CPUs have mapped, or had.
    pub(super) fn visit_others(&mut self, space: &SharedSpace) {
        for number in 0..VISITS {
            let owner = self.rng.below(space.areas.len() as u64);
            let published = &space.areas[usize::try_from(owner).unwrap_or(0)];
            let Some(live) = published.live() else { continue };
            let dead = published.dead();
            let index = self.rng.below(live.nr_pages);
            let address = address_of(owner, live.place) + index * PAGE;
            let Live { generation, place, .. } = live;
            let of = Stamp { space: space.number, owner, moves: Moves::No, place, index, generation };
            if let Some(word) = self.load(address) {
                self.judge(address, word, of, dead);
            }
            let second = address + 8;
            if self.rng.once_in(2) {
                let stamp = visit(space.number, owner, index, self.owner(), generation << 8 | number);
                let _refused = self.store(second, stamp.to_word());
            } else if let Some(word) = self.load(second) {
                let of = visit(space.number, owner, index, 0, 0);
                self.judge_visited(second, word, of);
            }
        }
    }

    /// What was read in the second word of a page: something a visitor of this very page wrote.
    pub(super) fn judge_visited(&self, address: u64, word: u64, of: Stamp) {
        if word == 0 {
            return;
        }
        if is_poison(word) {
            self.violation(ViolationKind::FreedPageRead, [address, word, 0]);
        } else if !Stamp::from_word(word).is_of_the_page_of(of) {
            self.violation(ViolationKind::ForeignPage, [address, word, of.to_word()]);
        }
    }

    fn check_own(&self, space: &SharedSpace, live: Live) {
        let start = address_of(self.owner(), live.place);
        for index in 0..live.nr_pages {
            let address = start + index * PAGE;
            let stamp = self.stamp_of(space, live, index);
            self.judge_own(address, self.load(address), stamp, Lost::MayBe);
        }
    }

    /// MADV_DONTNEED, a few times: flushes under the map lock held for reading overlap.
    fn discard_and_stamp(&mut self, space: &SharedSpace, mut live: Live) -> Live {
        let start = address_of(self.owner(), live.place);
        for _ in 0..1 + self.rng.below(4) {
            self.discard(&space.mm, pages(start, live.nr_pages));
            space.areas[self.number].publish_dead(live.generation);
            live.generation = self.next_generation();
            space.areas[self.number].publish(live);
            for index in 0..live.nr_pages {
                let address = start + index * PAGE;
                match self.load(address) {
                    Some(0) => {}
                    word => self.judge(
                        address,
                        word.unwrap_or(1),
                        self.stamp_of(space, live, index),
                        live.generation - 1,
                    ),
                }
            }
            self.stamp_pages(space, live, Moves::No);
            self.visit_others(space);
        }
        live
    }

    /// mprotect, and back: in between nobody writes.
    fn protect_for_a_while(&mut self, space: &SharedSpace, live: Live) {
        let start = address_of(self.owner(), live.place);
        let range = pages(start, live.nr_pages);
        self.protect(&space.mm, range, Protection::Read);
        let second_words = |worker: &Self| -> Vec<_> {
            (0..live.nr_pages).map(|index| worker.load(start + index * PAGE + 8)).collect()
        };
        let before = second_words(self);
        let turns = self.rng.below(200);
        self.linger(turns);
        for (index, (was, is)) in (0..).zip(before.into_iter().zip(second_words(self))) {
            // Reclaim loses what was written: nothing is there then.
            if is != was && is != Some(0) {
                let address = start + index * PAGE + 8;
                let numbers = [address, is.unwrap_or(0), was.unwrap_or(0)];
                self.violation(ViolationKind::WrittenThoughReadOnly, numbers);
            }
        }
        self.protect(&space.mm, range, Protection::Write);
    }

    /// mremap to another place of this CPU's. What is at the new place is stamped anew.
    fn move_elsewhere(&mut self, space: &SharedSpace, live: Live) -> Live {
        let place = (live.place + 1 + self.rng.below(PLACES - 1)) % PLACES;
        let moved = Live { place, generation: self.next_generation(), ..live };
        let (from, to) = (address_of(self.owner(), live.place), address_of(self.owner(), place));
        self.stamp_pages(space, live, Moves::Soon);
        self.call(Doing::Move, from, || {
            self.world.kernel.mremap(&space.mm, pages(from, live.nr_pages), pages(to, live.nr_pages))
        });
        for index in 0..live.nr_pages {
            let address = to + index * PAGE;
            let stamp = Stamp { moves: Moves::Soon, ..self.stamp_of(space, live, index) };
            self.judge_own(address, self.load(address), stamp, Lost::MayBe);
        }
        self.stamp_pages(space, moved, Moves::No);
        let published = &space.areas[self.number];
        published.publish(moved);
        published.publish_dead(live.generation);
        self.must_be_gone(from);
        moved
    }

    /// munmap: by a CPU that runs the address space, by one that does not, and by a lazy one.
    fn end_area(&mut self, space: &SharedSpace, live: Live) {
        let start = address_of(self.owner(), live.place);
        let range = pages(start, live.nr_pages);
        match self.rng.below(8) {
            0 => {
                let (_, elsewhere) = self.own_space();
                self.switch_to(Some(&elsewhere));
                self.unmap(&space.mm, range);
            }
            1 => {
                self.go_lazy();
                self.unmap(&space.mm, range);
            }
            2 => {
                // A kernel that flushes with interrupts off answers others from where it waits.
                use mmu_kernel_shim::Machine;
                self.world.machine.without_interrupts(|| self.unmap(&space.mm, range));
                self.must_be_gone(start);
            }
            _ => {
                self.unmap(&space.mm, range);
                self.must_be_gone(start);
            }
        }
        space.areas[self.number].publish_dead(live.generation);
    }

    fn own_space(&mut self) -> (u64, crate::program::board::Space) {
        let which = self.rng.below(OWN_SPACES as u64);
        self.board().own[self.number][usize::try_from(which).unwrap_or(0)].clone()
    }

    /// In an address space that only this CPU runs, whose frames were others' a moment ago: nobody
    /// else writes there.
    fn round_alone(&mut self) {
        let (number, mm) = self.own_space();
        self.switch_to(Some(&mm));
        let (place, nr_pages) = (self.rng.below(8), 1 + self.rng.below(16));
        let generation = self.next_generation();
        let stamp =
            |index| Stamp { space: number, owner: self.owner(), moves: Moves::No, place, index, generation };
        let start = private_address(place);
        self.map(&mm, pages(start, nr_pages));
        for index in 0..nr_pages {
            let _refused = self.store(start + index * PAGE, stamp(index).to_word());
        }
        self.linger(20);
        for index in 0..nr_pages {
            let address = start + index * PAGE;
            self.judge_own(address, self.load(address), stamp(index), Lost::Never);
            if let Some(word @ 1..) = self.load(address + 8) {
                self.violation(ViolationKind::OwnPageChanged, [address + 8, word, 0]);
            }
        }
        self.unmap(&mm, pages(start, nr_pages));
        self.must_be_gone(start);
    }

    /// Only kernel threads run for a while; the CPU still guesses.
    fn rest(&mut self) {
        self.go_lazy();
        let turns = self.rng.below(300);
        self.linger(turns);
    }

    /// Pages of two areas go to swap, whoever owns them and wherever this CPU is.
    fn reclaim(&mut self) {
        let mut victims = Vec::new();
        for _ in 0..2 {
            let space =
                &self.board().shared[usize::try_from(self.rng.below(SHARED_SPACES as u64)).unwrap_or(0)];
            let owner = self.rng.below(space.areas.len() as u64);
            let live = space.areas[usize::try_from(owner).unwrap_or(0)].live();
            if let Some(live) = live {
                victims.push((&*space.mm, pages(address_of(owner, live.place), live.nr_pages)));
            }
        }
        let start = victims.first().map_or(0, |(_, range)| range.start());
        self.call(Doing::Reclaim, start, || {
            self.world.kernel.reclaim(victims);
            Ok(())
        });
    }
}
