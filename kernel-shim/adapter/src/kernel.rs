//! The small kernel as the kit wants it.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CtxId;
use mmu_hosted::{
    Backing, Boundaries, FiveLevels, Guarding, HostedMachine, NotDone, Options, Promises, ReclaimAndExit,
    Rights, Supply, UserAccess, ViolationKind,
};
use mmu_kernel_shim::{Config, Error, Kernel, Misbehaviour, PageContent, Vma};
use x86_64::structures::paging::PhysFrame;

use crate::boundaries::counted;
use crate::machine::Hosted;
use crate::program::{HostedKernel, HostedMm};
use crate::tables_against_frames::compare_tables_with_frames;
use crate::views::{View, look};
use crate::words;

/// The small kernel, which a sequence runs on.
#[derive(Debug)]
pub struct ShimKernel {
    pub(crate) kernel: HostedKernel,
    promises: Promises,
    /// What gathers get, whatever the sequence says.
    supply: Option<Supply>,
    /// Where what programs can see is noted.
    seen: Option<Arc<Mutex<Vec<View>>>>,
}

impl ShimKernel {
    /// Boots it.
    ///
    /// # Errors
    /// If the machine has no frame for the kernel's root table.
    pub fn boot(machine: &Arc<HostedMachine>, config: Config) -> io::Result<Self> {
        let kernel = Kernel::boot(Hosted::from(Arc::clone(machine)), config).map_err(io::Error::other)?;
        Ok(Self { kernel, promises: Promises::ByTheKernel, supply: None, seen: None })
    }

    /// The runner says what calls have promised, besides the kernel.
    #[must_use]
    pub fn with_promises_by_the_runner(self) -> Self {
        Self { promises: Promises::ByTheRunner, ..self }
    }

    /// Gathers get batch pages as `supply` says, and not as the sequence does; what programs can
    /// see at rest is noted in `seen`.
    pub(crate) fn noting(self, supply: Supply, seen: Arc<Mutex<Vec<View>>>) -> Self {
        self.kernel.set_batch_supply(words::supply(supply));
        Self { supply: Some(supply), seen: Some(seen), ..self }
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
        answer(self.kernel.mmap(mm, Vma { range, area: words::area(backing, rights) }))
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

    fn promises(&self) -> Promises {
        self.promises
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
        self.kernel.set_batch_supply(words::supply(self.supply.unwrap_or(supply)));
        Ok(())
    }

    fn set_table_supply(&self, supply: Supply) -> Result<(), NotDone> {
        self.kernel.set_table_supply(words::supply(supply));
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
        if let Some(seen) = &self.seen {
            seen.lock().unwrap_or_else(PoisonError::into_inner).push(look(&self.kernel, mms));
        }
    }

    fn reached(&self) -> Boundaries {
        counted(&self.kernel.counters().snapshot(), &self.kernel.config().limits)
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

fn answer<T>(result: Result<T, Error>) -> Result<T, NotDone> {
    result.map_err(|_| NotDone::Refused)
}
