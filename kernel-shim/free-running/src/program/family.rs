//! fork, exec and exit.

use std::sync::Arc;

use mmu_kernel_shim::Error;

use crate::doing::Doing;
use crate::memory::PAGE;
use crate::program::board::{SharedSpace, Space};
use crate::program::places::{address_of, pages, private_address, stack_address};
use crate::program::worker::{Lost, Worker, visit};
use crate::stamp::{Moves, Stamp};
use crate::violation::ViolationKind;

/// Pages of a stack.
const STACK_PAGES: u64 = 6;

impl Worker<'_> {
    /// Forks a shared address space while others use it, runs the child for a while, and leaves it.
    pub(super) fn fork_and_leave(&mut self, space: &SharedSpace) {
        let start = space.mm.root().start_address().as_u64();
        let child = self.call(Doing::Fork, start, || self.world.kernel.fork(&space.mm, []));
        let Some(child) = child else { return };
        let number = self.board().number_of_a_child();
        self.switch_to(Some(&child));
        self.look_at_copies(space);
        self.write_in_the_child(space, number);
        if self.rng.once_in(3) {
            // The child runs elsewhere now; its pages go, from here.
            self.switch_to(Some(&space.mm));
            self.exit(child);
        } else {
            // Whoever takes it down finds it in CR3 here, perhaps.
            self.go_lazy();
            if let Some(child) = self.board().leave(child) {
                self.exit(child);
            }
            let turns = self.rng.below(100);
            self.linger(turns);
            self.visit_lazily(space);
        }
    }

    /// What parents write after the fork the child must not see: its copies do not change.
    fn look_at_copies(&mut self, space: &SharedSpace) {
        for (owner, published) in (0..).zip(&space.areas) {
            let Some(live) = published.live() else { continue };
            let address = |index| address_of(owner, live.place) + index * PAGE + 8;
            let before: Vec<_> = (0..live.nr_pages).map(|index| self.load(address(index))).collect();
            let turns = self.rng.below(60);
            self.linger(turns);
            for (index, was) in (0..).zip(before) {
                let is = self.load(address(index));
                if is != was {
                    let numbers = [address(index), is.unwrap_or(0), was.unwrap_or(0)];
                    self.violation(ViolationKind::WrittenThoughReadOnly, numbers);
                }
                if let Some(word) = is {
                    self.judge_visited(address(index), word, visit(space.number, owner, index, 0, 0));
                }
            }
        }
    }

    /// What the child writes nobody else sees: others would find a foreign stamp.
    fn write_in_the_child(&mut self, space: &SharedSpace, number: u64) {
        for (owner, published) in (0..).zip(&space.areas) {
            let Some(live) = published.live() else { continue };
            for index in 0..live.nr_pages.min(8) {
                let address = address_of(owner, live.place) + index * PAGE;
                let generation = self.next_generation();
                let stamp =
                    Stamp { space: number, owner, moves: Moves::No, place: live.place, index, generation };
                // The area may have gone before the fork.
                if self.store(address, stamp.to_word()).is_some() {
                    self.judge_own(address, self.load(address), stamp, Lost::Never);
                }
            }
        }
    }

    /// Back from laziness, into the parent.
    fn visit_lazily(&mut self, space: &SharedSpace) {
        self.switch_to(Some(&space.mm));
        self.visit_others(space);
    }

    fn exit(&mut self, mm: Space) {
        let address = mm.root().start_address().as_u64();
        self.call(Doing::Exit, address, || self.world.kernel.exit(&mm));
    }

    /// An address space that another CPU has left, which may still have it loaded lazily.
    pub(super) fn take_down_an_orphan(&mut self) {
        if let Some(orphan) = self.board().take_orphan() {
            self.exit(orphan);
        }
    }

    /// As exec does: a new address space, its stack moved down, the program run, all of it left.
    pub(super) fn exec(&mut self) {
        let root = self.call(Doing::Map, 0, || self.world.kernel.new_mm());
        let Some(mm) = root else { return };
        let number = self.board().number_of_a_child();
        self.switch_to(Some(&mm));
        let (at, shift) = (stack_address(), 100 + self.rng.below(500));
        let generation = self.next_generation();
        let stamp = |index| Stamp {
            space: number,
            owner: self.owner(),
            moves: Moves::No,
            place: 0,
            index,
            generation,
        };
        self.map(&mm, pages(at, STACK_PAGES));
        self.map(&mm, pages(private_address(0), 1));
        let _refused = self.store(private_address(0), stamp(0).to_word());
        for index in 0..STACK_PAGES {
            let _refused = self.store(at + index * PAGE, stamp(index).to_word());
        }
        self.call(Doing::MoveStack, at, || {
            self.world.kernel.move_stack(&mm, pages(at, STACK_PAGES), shift * PAGE)
        });
        for index in 0..STACK_PAGES {
            let address = at - shift * PAGE + index * PAGE;
            self.judge_own(address, self.load(address), stamp(index), Lost::Never);
        }
        self.must_be_gone(at);
        let refused = self.world.kernel.exit(&mm);
        if !matches!(refused, Err(Error::Busy(_))) {
            // It runs here.
            self.violation(ViolationKind::CallFailed, [at, Doing::Exit as u64, 0]);
        }
        self.go_lazy();
        if let Some(mm) = self.board().leave(Arc::clone(&mm)) {
            self.exit(mm);
        }
    }
}
