//! The small kernel as the kit wants it.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use mmu_gather::pagetable::{Decoded, EntryValue, Level, NonPresent, VirtRange};
use mmu_gather::tlb::{CpuId, CtxId};
use mmu_hosted::{
    Backing, Boundaries, CostPromise, Execution, FiveLevels, Guarding, HostedMachine, NotDone, Options,
    Place, Preemption, Promises, ReclaimAndExit, Rights, Supply, UserAccess, ViolationKind,
};
use mmu_kernel_shim::{
    Asked, Config, Discarding, Error, Kernel, Misbehaviour, PageContent, Scarce, Snapshot, Vma,
};
use x86_64::structures::paging::PhysFrame;

use crate::boundaries::counted;
use crate::machine::Hosted;
use crate::program::{HostedKernel, HostedMm};
use crate::tables_against_frames::compare_tables_with_frames;
use crate::views::{View, look};
use crate::words;

/// What was asked for, of what, each time that it was noted.
pub(crate) type AskedOf = Vec<(Scarce, Asked)>;

/// The small kernel, which a sequence runs on.
#[derive(Debug)]
pub struct ShimKernel {
    pub(crate) kernel: HostedKernel,
    promises: Promises,
    cost: Option<CostPromise>,
    /// What gathers get, whatever the sequence says.
    supply: Option<Supply>,
    /// Where what programs can see is noted.
    seen: Option<Arc<Mutex<Vec<View>>>>,
    /// Where it is noted, whenever something can always be had again, what was asked for before.
    asked: Option<Arc<Mutex<AskedOf>>>,
}

impl ShimKernel {
    /// Boots it.
    ///
    /// # Errors
    /// If the machine has no frame for the kernel's root table.
    pub fn boot(machine: &Arc<HostedMachine>, config: Config) -> io::Result<Self> {
        let cost = match config.discarding {
            Discarding::AtOnce => {
                Some(CostPromise { limits: config.limits, flush_ceiling: config.flush_ceiling })
            }
            // It goes over the pages twice, to show races: there is nothing to be promised.
            Discarding::WriteProtectedFirst => None,
        };
        let kernel = Kernel::boot(Hosted::from(Arc::clone(machine)), config).map_err(io::Error::other)?;
        Ok(Self { kernel, promises: Promises::ByTheKernel, cost, supply: None, seen: None, asked: None })
    }

    /// The runner says what calls have promised, besides the kernel.
    #[must_use]
    pub fn with_promises_by_the_runner(self) -> Self {
        Self { promises: Promises::ByTheRunner, ..self }
    }

    /// It promises this of its costs, however it was booted.
    #[must_use]
    pub fn with_promised_cost(self, cost: CostPromise) -> Self {
        Self { cost: Some(cost), ..self }
    }

    /// Gathers get batch pages as `supply` says, and not as the sequence does; what programs can
    /// see at rest is noted in `seen`.
    pub(crate) fn noting(self, supply: Supply, seen: Arc<Mutex<Vec<View>>>) -> Self {
        self.kernel.set_batch_supply(words::supply(supply));
        Self { supply: Some(supply), seen: Some(seen), ..self }
    }

    /// What programs can see at rest is noted in `seen`, and what calls have asked for in `asked`.
    pub(crate) fn telling(self, seen: Arc<Mutex<Vec<View>>>, asked: Arc<Mutex<AskedOf>>) -> Self {
        Self { seen: Some(seen), asked: Some(asked), ..self }
    }

    fn note_asked(&self, what: Scarce, supply: Supply) {
        if let Some(asked) = &self.asked
            && supply == Supply::Always
        {
            asked.lock().unwrap_or_else(PoisonError::into_inner).push((what, self.kernel.asked(what)));
        }
    }

    /// A page of a file that a program wrote to must be known to be dirty once nothing maps it.
    fn look_for_lost_writes(&self) {
        let machine = self.kernel.machine();
        for frame in self.kernel.cached_pages() {
            if machine.was_written(frame) && !self.kernel.frames().meta(frame).is_dirty() {
                machine.report_violation(ViolationKind::WriteLost, 0, frame);
            }
        }
    }
}

impl mmu_hosted::Kernel for ShimKernel {
    const FIVE_LEVELS: FiveLevels = FiveLevels::Known;
    const MOST_CPUS: u32 = Options::MOST_CPUS;

    type Mm = Arc<HostedMm>;

    fn start_cpu(&self) {
        self.kernel.start_cpu();
    }

    fn flush_interrupt(&self) {
        self.kernel.flush_interrupt();
    }

    fn new_mm(&self) -> Result<Self::Mm, NotDone> {
        answer(self.kernel.new_mm())
    }

    fn root(&self, mm: &Self::Mm) -> PhysFrame {
        mm.root()
    }

    fn map(&self, mm: &Self::Mm, range: VirtRange, backing: Backing, rights: Rights) -> Result<(), NotDone> {
        answer(self.kernel.mmap(mm, Vma { range, area: words::area(range.start(), backing, rights) }))
    }

    fn fault(&self, mm: &Self::Mm, address: u64, access: UserAccess) -> Result<(), NotDone> {
        let answered = self.kernel.handle_fault(mm, address, words::access_of_program(access));
        answered.map_err(|_| NotDone::Refused)
    }

    fn unmap(&self, mm: &Self::Mm, range: VirtRange) -> Result<(), NotDone> {
        answer(self.kernel.munmap(mm, range))
    }

    fn switch_to(&self, mm: Option<&Self::Mm>) {
        self.kernel.switch_to(mm);
    }

    fn exit(&self, mm: &Self::Mm) -> Result<(), NotDone> {
        let exited = self.kernel.exit(mm);
        assert!(matches!(exited, Ok(()) | Err(Error::Busy(_))), "the last program has left: {exited:?}");
        answer(exited)
    }

    fn execution(&self) -> Execution {
        Execution::WhereAllowed
    }

    fn promises(&self) -> Promises {
        self.promises
    }

    fn promises_cost(&self) -> Option<CostPromise> {
        self.cost
    }

    fn preemption(&self) -> Preemption {
        Preemption::Full
    }

    fn has(&self, _backing: Backing) -> bool {
        true
    }

    fn reclaim_and_exit(&self) -> ReclaimAndExit {
        // Reclaim finds no area in what has exited, and takes nothing there.
        ReclaimAndExit::AtOnce
    }

    fn ctx_id(&self, mm: &Self::Mm) -> Option<CtxId> {
        Some(mm.engine().context().ctx_id())
    }

    fn go_lazy(&self) -> Result<(), NotDone> {
        self.kernel.go_lazy();
        Ok(())
    }

    fn stop_cpu(&self) -> Result<(), NotDone> {
        self.kernel.stop_cpu();
        Ok(())
    }

    fn populate(&self, mm: &Self::Mm, range: VirtRange, backing: Backing) -> Result<(), NotDone> {
        let content = match backing {
            Backing::Clean => PageContent::CleanBlock,
            Backing::Giant => PageContent::DeviceGiant,
            _ => PageContent::AnonBlock,
        };
        answer(self.kernel.populate(mm, range, content))
    }

    fn discard(&self, mm: &Self::Mm, range: VirtRange) -> Result<(), NotDone> {
        answer(self.kernel.madvise_dontneed(mm, range))
    }

    fn guard(&self, mm: &Self::Mm, range: VirtRange, guarding: Guarding) -> Result<(), NotDone> {
        answer(match guarding {
            Guarding::Install => self.kernel.guard_install(mm, range),
            Guarding::Remove => self.kernel.guard_remove(mm, range),
        })
    }

    fn protect(&self, mm: &Self::Mm, range: VirtRange, rights: Rights) -> Result<(), NotDone> {
        answer(self.kernel.mprotect(mm, range, words::protection(rights)))
    }

    fn remap(&self, mm: &Self::Mm, from: VirtRange, to: VirtRange) -> Result<(), NotDone> {
        answer(self.kernel.mremap(mm, from, to))
    }

    fn move_stack(&self, mm: &Self::Mm, inside: u64, pages: u64) -> Result<(), NotDone> {
        let stack = mm.vmas().find(inside).map(|vma| vma.range).ok_or(NotDone::Refused)?;
        answer(self.kernel.move_stack(mm, stack, pages * 4096))
    }

    fn fork(&self, mm: &Self::Mm) -> Result<Self::Mm, NotDone> {
        answer(self.kernel.fork(mm, []))
    }

    fn reclaim(&self, ranges: [(&Self::Mm, VirtRange); 2]) -> Result<(), NotDone> {
        self.kernel.reclaim(ranges.map(|(mm, range)| (&**mm, range)));
        Ok(())
    }

    fn set_batch_supply(&self, supply: Supply) -> Result<(), NotDone> {
        self.note_asked(Scarce::Batches, supply);
        self.kernel.set_batch_supply(words::supply(self.supply.unwrap_or(supply)));
        Ok(())
    }

    fn set_table_supply(&self, supply: Supply) -> Result<(), NotDone> {
        self.note_asked(Scarce::Tables, supply);
        self.kernel.set_table_supply(words::supply(supply));
        Ok(())
    }

    fn set_frame_supply(&self, supply: Supply) -> Result<(), NotDone> {
        self.note_asked(Scarce::Frames, supply);
        self.kernel.set_frame_supply(words::supply(supply));
        Ok(())
    }

    fn drop_caches(&self) {
        self.look_for_lost_writes();
        self.kernel.drop_caches();
    }

    fn check_at_rest(&self, machine: &HostedMachine, mms: &[Self::Mm]) {
        let engines: Vec<_> = mms.iter().map(|mm| mm.engine()).collect();
        machine.compare_caches_with_slots(&self.kernel, &engines);
        compare_tables_with_frames(&self.kernel, mms);
        machine.compare_contents(place_in_swap);
        if let Some(seen) = &self.seen {
            seen.lock().unwrap_or_else(PoisonError::into_inner).push(look(&self.kernel, mms));
        }
    }

    fn reached(&self) -> Boundaries {
        counted(&self.kernel.counters().snapshot(), &self.kernel.config().limits)
    }

    fn counters(&self) -> &'static [&'static str] {
        &Snapshot::NAMES
    }

    fn counted(&self, cpu: CpuId, counts: &mut [u64]) {
        counts.copy_from_slice(&self.kernel.counters().of_cpu(cpu).snapshot().values());
    }

    fn double_frees(&self) -> u64 {
        self.kernel.counters().snapshot().double_frees
    }

    fn nr_faults(&self) -> u64 {
        match self.kernel.config().misbehaviour {
            Misbehaviour::Absent => 0,
            Misbehaviour::FreeBeforeFlush => self.kernel.counters().snapshot().leaves,
        }
    }
}

/// Where the page is that an entry names which maps none.
fn place_in_swap(entry: u64) -> Option<Place> {
    match EntryValue::from_bits(entry).decode(Level::Pte) {
        Decoded::NonPresent(NonPresent::Swap { slot, .. }) => Some(Place::Swap { slot }),
        _ => None,
    }
}

fn answer<T>(result: Result<T, Error>) -> Result<T, NotDone> {
    result.map_err(|_| NotDone::Refused)
}
