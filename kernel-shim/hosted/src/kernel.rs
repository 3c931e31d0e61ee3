//! What this machine needs of a kernel: one small trait.

use std::io;
use std::sync::Arc;

use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::{CpuId, CtxId};
use x86_64::structures::paging::PhysFrame;

use crate::boundary::Boundaries;
use crate::checker::cost::state::CostPromise;
use crate::machine::HostedMachine;
use crate::vocabulary::{Backing, Guarding, Rights, Supply, UserAccess};

/// Why a call did nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotDone {
    /// The kernel refused: sequences are made up, and name addresses where nothing is.
    Refused,
    /// The kernel has no such call. It is skipped, and counted.
    Missing,
}

/// Who says what a call has promised when it returns: that nobody can use what it has unmapped,
/// say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promises {
    /// Whoever made the call, where no other call that changes areas there ran meanwhile.
    ByTheRunner,
    /// The kernel itself, under its own lock: [`Note::Unmapped`](crate::Note::Unmapped) and the
    /// others like it. That is sharper, because calls may then meet.
    ByTheKernel,
}

/// Where a thread may go on on another CPU, and another take its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preemption {
    /// Nowhere: a call ends on the CPU that it began on.
    Absent,
    /// Wherever it is not [pinned](HostedMachine::pinned), has interrupts on and holds no table
    /// lock: at any seam.
    Full,
}

/// Whether a kernel keeps programs from executing what is no code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Execution {
    /// It does not: what may be read may be executed.
    Anywhere,
    /// It does, by bit 63 of entries: code is where [`Rights::Execute`] is, and nowhere else.
    WhereAllowed,
}

/// What a kernel knows of page tables with five levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FiveLevels {
    /// Nothing.
    Unknown,
    /// It asks how many there are.
    Known,
}

/// When an address space may exit that reclaim takes pages from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReclaimAndExit {
    /// When reclaim has done with it.
    OneAfterTheOther,
    /// At any time: reclaim finds nothing more in it, and flushes for what it has taken when the
    /// address space may be gone.
    AtOnce,
}

/// A kernel that runs on a [`HostedMachine`].
///
/// The first nine methods are required. The others are calls that a kernel may not have: steps that
/// need one are skipped and counted ([`Calls`](crate::Calls)).
///
/// # Context
/// Every method is called on the CPU that does it ([`HostedMachine::current`]), with interrupts on
/// and no lock held; `flush_interrupt` with interrupts off. CPUs take turns on one thread, so a
/// lock that is held at a seam must be one of `spin`'s that gives way: `spin::mutex::SpinMutex<T,
/// GiveWay>`. A lock of `std` would wait for ever.
pub trait Kernel: Send + Sync + 'static {
    /// Whether the kernel can run where page tables have five levels (CR4.LA57), which it asks for:
    /// [`HostedMachine::paging_mode`]. If not, each machine it runs on has four.
    const FIVE_LEVELS: FiveLevels = FiveLevels::Unknown;

    /// The most CPUs that the kernel has room for. A machine that it runs on has no more, whatever
    /// its sequence says.
    const MOST_CPUS: u32 = 64;

    /// An address space: an `Arc`, say.
    type Mm: Clone + 'static;

    /// Starts this CPU, or starts it again after [`stop_cpu`](Self::stop_cpu): it drops what it may
    /// have cached and loads the kernel's own tables.
    fn start_cpu(&self);

    /// The handler of the flush interrupt, on the CPU that takes it.
    fn flush_interrupt(&self);

    /// A new address space, in which nothing is mapped.
    ///
    /// # Errors
    /// [`NotDone::Refused`] if there is no memory.
    fn new_mm(&self) -> Result<Self::Mm, NotDone>;

    /// The frame that CR3 points to in this address space.
    fn root(&self, mm: &Self::Mm) -> PhysFrame;

    /// Adds an area where none is. Its pages come when programs use them.
    ///
    /// # Errors
    /// [`NotDone::Refused`] if another area is in the way, and for whatever else the kernel does
    /// not like: a backing that it does not have, say.
    fn map(&self, mm: &Self::Mm, range: VirtRange, backing: Backing, rights: Rights) -> Result<(), NotDone>;

    /// Answers a fault: maps the page of `address` if an area allows this access. The program tries
    /// again.
    ///
    /// # Errors
    /// [`NotDone::Refused`]: the program gets a signal.
    fn fault(&self, mm: &Self::Mm, address: u64, access: UserAccess) -> Result<(), NotDone>;

    /// Takes down what is mapped in `range`: areas, parts of areas, or nothing.
    ///
    /// # Errors
    /// [`NotDone::Refused`] if nothing was changed.
    fn unmap(&self, mm: &Self::Mm, range: VirtRange) -> Result<(), NotDone>;

    /// Runs programs of `mm` on this CPU from now on; `None`: of no address space.
    fn switch_to(&self, mm: Option<&Self::Mm>);

    /// Ends the address space, whose last program has left: frees its pages, its tables and its
    /// root. CPUs that went lazy in it may still have it loaded.
    ///
    /// # Errors
    /// [`NotDone::Refused`] if a CPU is still on its way out. It is called again.
    fn exit(&self, mm: &Self::Mm) -> Result<(), NotDone>;

    /// Who says what a call has promised. The answer never changes.
    fn promises(&self) -> Promises {
        Promises::ByTheRunner
    }

    /// What the kernel promises of its costs: that no call does more than its size explains.
    /// Nothing, unless it says so. The answer never changes.
    ///
    /// A kernel that promises has a [`ctx_id`](Self::ctx_id) and tells the notes that the bounds
    /// are made of: see the README.
    fn promises_cost(&self) -> Option<CostPromise> {
        None
    }

    /// Where threads may move from one CPU to another. The answer never changes.
    ///
    /// A kernel that says [`Full`](Preemption::Full) has nothing of its own that belongs to one CPU
    /// in use across a seam but in [`HostedMachine::pinned`] or with interrupts off; it holds no
    /// lock of its own there either, but for one that a waiting thread sleeps for (a map lock).
    /// When a thread arrives, [`switch_to`](Self::switch_to) or [`go_lazy`](Self::go_lazy) is
    /// called on the CPU, as a scheduler would.
    fn preemption(&self) -> Preemption {
        Preemption::Absent
    }

    /// Whether it keeps programs from executing what is no code. The answer never changes.
    fn execution(&self) -> Execution {
        Execution::Anywhere
    }

    /// When an address space may exit that reclaim takes pages from. The answer never changes.
    fn reclaim_and_exit(&self) -> ReclaimAndExit {
        ReclaimAndExit::OneAfterTheOther
    }

    /// Whether it has areas with this backing. Those that it does not have are refused without
    /// asking. A kernel without [`Backing::Giant`] is not asked for areas of more than 256 MiB
    /// either, which would take it long if it goes through them page by page.
    fn has(&self, backing: Backing) -> bool {
        !matches!(backing, Backing::Giant | Backing::Zeroes | Backing::Folios)
    }

    /// The name by which the engine knows the address space, for the device and for timelines.
    fn ctx_id(&self, _mm: &Self::Mm) -> Option<CtxId> {
        None
    }

    /// This CPU runs kernel threads only, and keeps the address space loaded. A kernel that does
    /// not have it switches to `None` instead.
    ///
    /// # Errors
    /// [`NotDone`].
    fn go_lazy(&self) -> Result<(), NotDone> {
        Err(NotDone::Missing)
    }

    /// This CPU is about to be switched off: it says so to the engine
    /// ([`offline_cpu`](mmu_gather::tlb::offline_cpu)). From then on nothing of the kernel runs
    /// there, and interrupts to it are lost, until [`start_cpu`](Self::start_cpu) starts it again.
    ///
    /// # Errors
    /// [`NotDone`].
    fn stop_cpu(&self) -> Result<(), NotDone> {
        Err(NotDone::Missing)
    }

    /// Fills `range`, which is mapped and whole 2 MiB pages long, with 2 MiB pages; or with 1 GiB
    /// pages, if the backing is [`Backing::Giant`]: the range is whole 1 GiB pages long then.
    ///
    /// # Errors
    /// [`NotDone`].
    fn populate(&self, _mm: &Self::Mm, _range: VirtRange, _backing: Backing) -> Result<(), NotDone> {
        Err(NotDone::Missing)
    }

    /// Drops the pages in `range` and keeps the areas: MADV_DONTNEED.
    ///
    /// # Errors
    /// [`NotDone`].
    fn discard(&self, _mm: &Self::Mm, _range: VirtRange) -> Result<(), NotDone> {
        Err(NotDone::Missing)
    }

    /// Installs or removes guard pages: MADV_GUARD_INSTALL, MADV_GUARD_REMOVE.
    ///
    /// # Errors
    /// [`NotDone`].
    fn guard(&self, _mm: &Self::Mm, _range: VirtRange, _guarding: Guarding) -> Result<(), NotDone> {
        Err(NotDone::Missing)
    }

    /// Changes what programs may do in `range`, all of which is mapped: mprotect.
    ///
    /// # Errors
    /// [`NotDone`]; in part of the range it may have been done.
    fn protect(&self, _mm: &Self::Mm, _range: VirtRange, _rights: Rights) -> Result<(), NotDone> {
        Err(NotDone::Missing)
    }

    /// Moves what is mapped in `from` to `to`, of the same length: mremap to a fixed place.
    ///
    /// # Errors
    /// [`NotDone`].
    fn remap(&self, _mm: &Self::Mm, _from: VirtRange, _to: VirtRange) -> Result<(), NotDone> {
        Err(NotDone::Missing)
    }

    /// Moves the area that `inside` lies in, a new program's stack, down by so many pages.
    ///
    /// # Errors
    /// [`NotDone`].
    fn move_stack(&self, _mm: &Self::Mm, _inside: u64, _pages: u64) -> Result<(), NotDone> {
        Err(NotDone::Missing)
    }

    /// A copy of the address space; pages may be shared until they are written.
    ///
    /// # Errors
    /// [`NotDone`].
    fn fork(&self, _mm: &Self::Mm) -> Result<Self::Mm, NotDone> {
        Err(NotDone::Missing)
    }

    /// Takes pages away that programs have not used lately: of one range, then of the other.
    ///
    /// # Errors
    /// [`NotDone`].
    fn reclaim(&self, _ranges: [(&Self::Mm, VirtRange); 2]) -> Result<(), NotDone> {
        Err(NotDone::Missing)
    }

    /// Batch pages get scarce, or not:
    /// [`Pages::allocate_batch`](mmu_gather::Pages::allocate_batch).
    ///
    /// # Errors
    /// [`NotDone`].
    fn set_batch_supply(&self, _supply: Supply) -> Result<(), NotDone> {
        Err(NotDone::Missing)
    }

    /// Page tables get scarce, or not.
    ///
    /// # Errors
    /// [`NotDone`].
    fn set_table_supply(&self, _supply: Supply) -> Result<(), NotDone> {
        Err(NotDone::Missing)
    }

    /// Frames for programs' pages get scarce, or not.
    ///
    /// # Errors
    /// [`NotDone`].
    fn set_frame_supply(&self, _supply: Supply) -> Result<(), NotDone> {
        Err(NotDone::Missing)
    }

    /// Every address space has exited and every CPU has left: frees what the kernel kept for later,
    /// such as pages of files. What is in use after this and was not in use when it had booted was
    /// lost.
    fn drop_caches(&self) {}

    /// Nothing is going on: compares what is there with what should be. `mms` are all address
    /// spaces that have not exited.
    ///
    /// A kernel with the shootdown of the engine compares more with
    /// [`HostedMachine::compare_caches_with_slots`].
    fn check_at_rest(&self, machine: &HostedMachine, mms: &[Self::Mm]) {
        let roots: Vec<PhysFrame> = mms.iter().map(|mm| self.root(mm)).collect();
        machine.compare_caches_with_tables(&roots);
        machine.compare_tables_with_frames(&roots);
        machine.compare_contents(|_| None);
    }

    /// The corners that the kernel knows it has been to, besides those that the machine sees.
    fn reached(&self) -> Boundaries {
        Boundaries::default()
    }

    /// The names of what the kernel counts for each CPU: what it does seldom leads the fuzzer, and
    /// what it never did is told. One that begins with `max_` is a high-water mark, no sum.
    fn counters(&self) -> &'static [&'static str] {
        &[]
    }

    /// What it has counted for this CPU so far, in the order of [`counters`](Self::counters).
    fn counted(&self, _cpu: CpuId, _counts: &mut [u64]) {}

    /// How many frees the kernel noticed by itself of what was not in use.
    fn double_frees(&self) -> u64 {
        0
    }

    /// How often the kernel did what is wrong on purpose.
    fn nr_faults(&self) -> u64 {
        0
    }
}

/// Boots a kernel on `machine`: it is the handler of flush interrupts from now on, and has started
/// every CPU.
///
/// # Errors
/// What `make` returns.
pub fn boot<K: Kernel>(
    machine: &Arc<HostedMachine>,
    make: impl FnOnce(&Arc<HostedMachine>) -> io::Result<K>,
) -> io::Result<Arc<K>> {
    let kernel = Arc::new(make(machine)?);
    // The kernel may own the machine.
    let handler = Arc::downgrade(&kernel);
    if kernel.execution() == Execution::WhereAllowed {
        machine.note_execution_is_a_right();
    }
    machine.set_flush_handler(Box::new(move || {
        // An interrupt that comes after the kernel has no mail.
        if let Some(kernel) = handler.upgrade() {
            kernel.flush_interrupt();
        }
    }));
    for number in 0..machine.nr_cpus() {
        machine.on_cpu(CpuId::new(number), || kernel.start_cpu());
    }
    machine.note_booted();
    Ok(kernel)
}
