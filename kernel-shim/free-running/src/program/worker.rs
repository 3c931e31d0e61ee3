//! One CPU: accesses with their faults answered, calls of the kernel, the judgement of what is
//! read.

use core::sync::atomic::Ordering;
use std::sync::Arc;

use mmu_gather::pagetable::VirtRange;
use mmu_kernel_shim::{Area, Error, Protection, UserAccess, Vma};

use crate::cpu::{Cpu, count};
use crate::doing::Doing;
use crate::machine::PageFault;
use crate::memory::is_poison;
use crate::program::board::{Board, Phase, Space, World};
use crate::program::rng::Rng;
use crate::stamp::{Moves, Stamp};
use crate::violation::ViolationKind;

/// What runs on one CPU.
#[derive(Debug)]
pub(crate) struct Worker<'w> {
    pub(crate) world: &'w World,
    pub(crate) cpu: &'w Cpu,
    pub(crate) number: usize,
    pub(crate) rng: Rng,
    /// What it runs now; `None`: the kernel's own address space.
    mm: Option<Space>,
    /// The phase that is on.
    phase: usize,
    /// The last generation that it has given.
    generation: u64,
}

impl<'w> Worker<'w> {
    pub(crate) fn new(world: &'w World, cpu: &'w Cpu, number: usize, seed: u64) -> Self {
        let rng = Rng::new(seed.wrapping_mul(64).wrapping_add(number as u64));
        Self { world, cpu, number, rng, mm: None, phase: 0, generation: 0 }
    }

    /// Starts the CPU, and goes from phase to phase.
    pub(crate) fn run(&mut self) {
        self.world.kernel.start_cpu();
        loop {
            self.meet();
            if self.phases_are_over() {
                break;
            }
            match Phase::with_number(self.phase) {
                Phase::Tour => self.tour(),
                Phase::SwitchDuel | Phase::LazyDuel | Phase::ReclaimDuel => {
                    self.duel(Phase::with_number(self.phase));
                }
                Phase::Crossfire => self.crossfire(),
            }
            self.phase += 1;
        }
        self.switch_to(None);
        if self.number == 0 {
            self.take_down_all();
        } else if self.world.machine.nr_violations() == 0 {
            // Whoever is off is asked for nothing more.
            self.world.kernel.stop_cpu();
        }
    }

    /// When all others are off: takes every address space down, and looks whether all that was used
    /// has come back.
    fn take_down_all(&self) {
        let (world, phases) = (self.world, &self.board().phases);
        while phases.nr_left() < world.machine.cpus().len() - 1 {
            if world.machine.nr_violations() != 0 {
                return;
            }
            world.machine.between_accesses(self.cpu);
            count(&self.cpu.status.progress);
            std::thread::yield_now();
        }
        for mm in world.board.all_spaces() {
            self.call(Doing::Exit, mm.root().start_address().as_u64(), || world.kernel.exit(&mm));
        }
        world.kernel.drop_caches();
        let (pages, tables) = world.kernel.lost();
        let twice = world.kernel.counters().snapshot().double_frees;
        if (pages, tables, twice) != (0, 0, 0) {
            self.violation(ViolationKind::BadAccounts, [twice, pages, tables]);
        }
        let zeroes = world.machine.memory().words(0);
        if zeroes.into_iter().flatten().any(|word| word.load(Ordering::Relaxed) != 0) {
            self.violation(ViolationKind::ZeroPageWritten, [0; 3]);
        }
    }

    /// This CPU is done. Where something was found, the others are still to be answered.
    pub(crate) fn leave(world: &World, cpu: &Cpu) {
        let phases = &world.board.phases;
        phases.leave();
        while world.machine.nr_violations() != 0 && phases.nr_left() < world.machine.cpus().len() {
            world.machine.between_accesses(cpu);
            count(&cpu.status.progress);
            std::thread::yield_now();
        }
    }

    fn phases_are_over(&self) -> bool {
        self.board().phases.are_over() || self.world.machine.nr_violations() != 0
    }

    /// Waits until the next phase begins, or all are over.
    fn meet(&self) {
        let phases = &self.board().phases;
        self.world.machine.begins(self.cpu, Doing::Meet, 0);
        phases.arrive();
        while !phases.has_begun(self.phase) && !self.phases_are_over() {
            self.world.machine.between_accesses(self.cpu);
            count(&self.cpu.status.progress);
            std::thread::yield_now();
        }
    }

    /// Whether the phase goes on.
    pub(crate) fn goes_on(&self) -> bool {
        self.board().phases.is_on(self.phase) && self.world.machine.nr_violations() == 0
    }

    pub(crate) fn board(&self) -> &'w Board {
        &self.world.board
    }

    pub(crate) fn owner(&self) -> u64 {
        self.number as u64
    }

    /// A generation that this CPU has not given before.
    pub(crate) fn next_generation(&mut self) -> u64 {
        self.generation += 1;
        self.generation
    }

    pub(crate) const fn generation(&self) -> u64 {
        self.generation
    }

    /// A little time passes; interrupts are answered, and the CPU guesses.
    pub(crate) fn linger(&self, turns: u64) {
        for _ in 0..turns {
            self.world.machine.between_accesses(self.cpu);
            core::hint::spin_loop();
        }
    }

    /// Loads a word; `None` if the kernel does not answer the fault.
    pub(crate) fn load(&self, address: u64) -> Option<u64> {
        loop {
            match self.load_once(address) {
                Ok(word) => return Some(word),
                Err(PageFault) => self.fault(address, UserAccess::Read)?,
            }
        }
    }

    /// Loads a word if that needs no fault.
    pub(crate) fn load_once(&self, address: u64) -> Result<u64, PageFault> {
        self.world.machine.load(self.cpu, address)
    }

    /// Stores a word; `None` if the kernel does not answer the fault.
    pub(crate) fn store(&self, address: u64, word: u64) -> Option<()> {
        loop {
            match self.world.machine.store(self.cpu, address, word) {
                Ok(()) => return Some(()),
                Err(PageFault) => self.fault(address, UserAccess::Write)?,
            }
        }
    }

    fn fault(&self, address: u64, access: UserAccess) -> Option<()> {
        let mm = self.mm.as_ref()?;
        self.world.machine.begins(self.cpu, Doing::Fault, address);
        let answered = self.world.kernel.handle_fault(mm, address, access);
        self.world.machine.done(self.cpu, Doing::Fault, address);
        answered.ok()
    }

    /// A call of the kernel. One that fails is a violation: there is memory enough, and arguments
    /// make sense.
    pub(crate) fn call<T>(
        &self,
        doing: Doing,
        address: u64,
        call: impl FnOnce() -> Result<T, Error>,
    ) -> Option<T> {
        self.world.machine.begins(self.cpu, doing, address);
        let result = call();
        self.world.machine.done(self.cpu, doing, address);
        if result.is_err() {
            self.violation(ViolationKind::CallFailed, [address, doing as u64, 0]);
        }
        result.ok()
    }

    pub(crate) fn violation(&self, kind: ViolationKind, numbers: [u64; 3]) {
        self.world.machine.violation(self.cpu, kind, numbers);
    }

    pub(crate) fn switch_to(&mut self, mm: Option<&Space>) {
        let address = mm.map_or(0, |mm| mm.root().start_address().as_u64());
        self.world.machine.begins(self.cpu, Doing::Switch, address);
        self.world.kernel.switch_to(mm);
        self.world.machine.done(self.cpu, Doing::Switch, address);
        self.mm = mm.map(Arc::clone);
    }

    pub(crate) fn go_lazy(&self) {
        self.world.machine.begins(self.cpu, Doing::GoLazy, 0);
        self.world.kernel.go_lazy();
        self.world.machine.done(self.cpu, Doing::GoLazy, 0);
    }

    /// Off, and back on the kernel's own address space. Whoever is off takes no interrupts.
    pub(crate) fn go_off(&mut self, turns: u64) {
        use mmu_kernel_shim::Machine;
        self.world.machine.begins(self.cpu, Doing::GoOff, 0);
        self.mm = None;
        self.world.machine.without_interrupts(|| {
            self.world.kernel.stop_cpu();
            (0..turns).for_each(|_| core::hint::spin_loop());
            self.world.kernel.start_cpu();
        });
        self.world.machine.done(self.cpu, Doing::GoOff, 0);
    }

    pub(crate) fn map(&self, mm: &Space, range: VirtRange) {
        let vma = Vma { range, area: Area::anon() };
        self.call(Doing::Map, range.start(), || self.world.kernel.mmap(mm, vma));
    }

    pub(crate) fn unmap(&self, mm: &Space, range: VirtRange) {
        self.call(Doing::Unmap, range.start(), || self.world.kernel.munmap(mm, range));
    }

    pub(crate) fn discard(&self, mm: &Space, range: VirtRange) {
        self.call(Doing::Discard, range.start(), || self.world.kernel.madvise_dontneed(mm, range));
    }

    pub(crate) fn protect(&self, mm: &Space, range: VirtRange, protection: Protection) {
        self.call(Doing::Protect, range.start(), || self.world.kernel.mprotect(mm, range, protection));
    }

    /// What was read at the start of a page that `of` describes, by somebody who knew that `dead`
    /// and all before it were gone.
    pub(crate) fn judge(&self, address: u64, word: u64, of: Stamp, dead: u64) {
        if word == 0 {
            return;
        }
        let stamp = Stamp::from_word(word);
        if is_poison(word) {
            self.violation(ViolationKind::FreedPageRead, [address, word, 0]);
        } else if !stamp.is_of_the_page_of(of) {
            self.violation(ViolationKind::ForeignPage, [address, word, of.to_word()]);
        } else if stamp.generation <= dead {
            self.violation(ViolationKind::DeadPage, [address, word, dead]);
        }
    }

    /// What was read at the start of a page of this CPU's own: what it wrote, or nothing, if pages
    /// there are shared or reclaimed.
    pub(crate) fn judge_own(&self, address: u64, word: Option<u64>, wrote: Stamp, lost: Lost) {
        let wrote = wrote.to_word();
        match word {
            Some(word) if word == wrote => {}
            Some(0) if lost == Lost::MayBe => {}
            Some(word) if is_poison(word) => {
                self.violation(ViolationKind::FreedPageRead, [address, word, 0]);
            }
            word => self.violation(ViolationKind::OwnPageChanged, [address, word.unwrap_or(0), wrote]),
        }
    }

    /// The address can no longer be used.
    pub(crate) fn must_be_gone(&self, address: u64) {
        if let Some(word) = self.load(address) {
            self.violation(ViolationKind::UsedAfterUnmap, [address, word, 0]);
        }
    }
}

/// Whether what was written to a page may be gone: the small kernel neither copies a shared page
/// nor writes one to swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    Never,
    MayBe,
}

/// What a visitor writes into the second word of a page: the page, and a number of its own.
pub(crate) fn visit(space: u64, owner: u64, index: u64, visitor: u64, number: u64) -> Stamp {
    let generation = visitor << 34 | number & 0x3_ffff_ffff;
    // The place may change under the visitor.
    Stamp { space, owner, moves: Moves::Soon, place: 0, index, generation }
}
