//! A fixed piece of work that any machine can do: what it counts must not depend on the machine.
//!
//! One CPU unmaps while the others have the address space loaded, are lazy, or run something else,
//! each in turn and nothing at the same time. So the numbers of interrupts, flushes and freed
//! tables follow from the number of CPUs alone.

use alloc::sync::Arc;
use core::fmt;
use spin::mutex::SpinMutex;

use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CpuId;

use crate::counters::Snapshot;
use crate::fault::{FaultError, UserAccess};
use crate::kernel::Error;
use crate::machine::Machine;
use crate::mm::Mm;
use crate::populate::PageContent;
use crate::vma::{Area, AreaKind, Protection, Vma};
use crate::work::stage::{Stage, program_area};

/// Fewer pages than are worth a full flush.
const FEW: (u64, u64) = (0x10_0000_0000, 16);
/// More pages than are invalidated one by one.
const SOME: (u64, u64) = (0x20_0000_0000, 40);
/// Pages of three last-level tables.
const MANY: (u64, u64) = (0x30_0000_0000, 1100);
/// Two pages of 2 MiB.
const LARGE: (u64, u64) = (0x40_0000_0000, 1024);
/// Pages of a shared file.
const FILE: (u64, u64) = (0x50_0000_0000, 8);
/// Where `SOME` is moved to.
const ELSEWHERE: (u64, u64) = (0x60_0000_0000, 40);

/// Why the work could not be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// The kernel refused a call.
    Kernel(Error),
    /// A program got a signal at this address.
    Signal(u64, FaultError),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Kernel(error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel(error) => write!(f, "the kernel refused: {error}"),
            Self::Signal(address, error) => write!(f, "a program could not use {address:#x}: {error:?}"),
        }
    }
}

impl core::error::Error for Failure {}

/// Does the work and returns what was counted meanwhile; the high-water marks are those of the
/// kernel's whole life.
///
/// # Errors
/// [`Failure`]; there was too little memory, most likely. It needs about 3000 frames.
pub fn drill<S: Stage>(stage: &S) -> Result<Snapshot, Failure> {
    let before = stage.kernel().counters().snapshot();
    let process = DrillProcess::new(stage)?;
    process.pages_go_while_all_run()?;
    process.rights_and_places_change()?;
    process.lazy_cpus_are_passed_by()?;
    process.cpus_elsewhere_are_passed_by()?;
    process.tables_go()?;
    process.exits()?;
    stage.kernel().drop_caches();
    Ok(stage.kernel().counters().snapshot().since(&before))
}

/// Runs `work` on each CPU in `cpus`, one after the other; the first failure counts.
pub(crate) fn on_each<S: Stage>(
    stage: &S,
    cpus: impl Iterator<Item = u32>,
    work: &(dyn Fn(u32) -> Result<(), Failure> + Sync),
) -> Result<(), Failure> {
    for number in cpus {
        let result = SpinMutex::<_>::new(Ok(()));
        stage.on_cpu(CpuId::new(number), &|| *result.lock() = work(number));
        result.into_inner()?;
    }
    Ok(())
}

/// The process that is worked on.
struct DrillProcess<'a, S: Stage> {
    stage: &'a S,
    mm: Arc<Mm<S::Machine>>,
    nr_cpus: u32,
}

impl<'a, S: Stage> DrillProcess<'a, S> {
    /// A process that every CPU runs and has used.
    fn new(stage: &'a S) -> Result<Self, Failure> {
        let kernel = stage.kernel();
        let mm = kernel.new_mm()?;
        let program = program_area();
        kernel.mmap(&mm, program)?;
        kernel.populate(&mm, program.range, PageContent::File)?;
        let shared = Area { kind: AreaKind::FileShared(1), ..Area::anon() };
        for (place, area) in
            [FEW, SOME, MANY, LARGE].map(|place| (place, Area::anon())).into_iter().chain([(FILE, shared)])
        {
            kernel.mmap(&mm, Vma { range: range(place), area })?;
        }
        kernel.populate(&mm, range(LARGE), PageContent::AnonBlock)?;
        let process = Self { stage, mm, nr_cpus: kernel.machine().nr_cpus() };
        process.all_run()?;
        Ok(process)
    }

    fn pages_go_while_all_run(&self) -> Result<(), Failure> {
        let kernel = self.stage.kernel();
        for place in [FEW, SOME, MANY, FILE] {
            self.all_write(place)?;
            kernel.madvise_dontneed(&self.mm, range(place))?;
        }
        // Reads map the page of zeroes, and each write replaces it, on every CPU.
        self.all(&|_| self.touch(FEW, UserAccess::Read))?;
        self.all_write(FEW)
    }

    fn rights_and_places_change(&self) -> Result<(), Failure> {
        let kernel = self.stage.kernel();
        kernel.mprotect(&self.mm, range(FEW), Protection::Read)?;
        kernel.mprotect(&self.mm, range(FEW), Protection::Write)?;
        self.all_write(SOME)?;
        kernel.mremap(&self.mm, range(SOME), range(ELSEWHERE))?;
        self.all_write(ELSEWHERE)
    }

    /// The others stay with the address space without running it, and come back.
    fn lazy_cpus_are_passed_by(&self) -> Result<(), Failure> {
        let kernel = self.stage.kernel();
        self.all_write(FEW)?;
        self.others(&|_| {
            kernel.go_lazy();
            Ok(())
        })?;
        kernel.madvise_dontneed(&self.mm, range(FEW))?;
        kernel.madvise_dontneed(&self.mm, range(ELSEWHERE))?;
        self.all_run()
    }

    /// Every second CPU runs another process meanwhile.
    fn cpus_elsewhere_are_passed_by(&self) -> Result<(), Failure> {
        let kernel = self.stage.kernel();
        let other = kernel.new_mm()?;
        self.all_write(FEW)?;
        self.others(&|number| {
            if number % 2 == 1 {
                kernel.switch_to(Some(&other));
            }
            Ok(())
        })?;
        kernel.madvise_dontneed(&self.mm, range(FEW))?;
        self.write_here(FEW)?;
        kernel.madvise_dontneed(&self.mm, range(FEW))?;
        // Nothing was ever mapped in the other one, so its exit has nothing to flush, and still
        // they must leave it.
        self.others(&|number| {
            if number % 2 == 1 {
                kernel.go_lazy();
            }
            Ok(())
        })?;
        kernel.exit(&other)?;
        self.all_run()
    }

    fn tables_go(&self) -> Result<(), Failure> {
        let kernel = self.stage.kernel();
        for place in [FEW, MANY, LARGE] {
            self.all_write(place)?;
        }
        // Half of a large page: it is split first.
        let (start, nr_pages) = LARGE;
        kernel.munmap(&self.mm, range((start, nr_pages / 4)))?;
        self.all_write((start + nr_pages / 4 * 4096, nr_pages / 4))?;
        kernel.munmap(&self.mm, range(LARGE))?;
        kernel.munmap(&self.mm, range(MANY))?;
        // The others are lazy, and tables go: they must leave.
        self.all_write(FEW)?;
        self.others(&|_| {
            kernel.go_lazy();
            Ok(())
        })?;
        kernel.munmap(&self.mm, range(FEW))?;
        self.all_run()
    }

    fn exits(self) -> Result<(), Failure> {
        let kernel = self.stage.kernel();
        self.all_write(ELSEWHERE)?;
        self.all_write(FILE)?;
        self.all(&|_| {
            kernel.go_lazy();
            Ok(())
        })?;
        kernel.exit(&self.mm)?;
        self.all(&|_| {
            kernel.switch_to(None);
            Ok(())
        })
    }

    fn all_run(&self) -> Result<(), Failure> {
        self.all(&|_| {
            self.stage.kernel().switch_to(Some(&self.mm));
            Ok(())
        })
    }

    fn all_write(&self, place: (u64, u64)) -> Result<(), Failure> {
        self.all(&|_| self.touch(place, UserAccess::Write))
    }

    fn write_here(&self, place: (u64, u64)) -> Result<(), Failure> {
        on_each(self.stage, 0..1, &|_| self.touch(place, UserAccess::Write))
    }

    fn touch(&self, place: (u64, u64), access: UserAccess) -> Result<(), Failure> {
        let touched = self.stage.touch(&self.mm, range(place), access);
        touched.map_err(|(address, error)| Failure::Signal(address, error))
    }

    fn all(&self, work: &(dyn Fn(u32) -> Result<(), Failure> + Sync)) -> Result<(), Failure> {
        on_each(self.stage, 0..self.nr_cpus, work)
    }

    fn others(&self, work: &(dyn Fn(u32) -> Result<(), Failure> + Sync)) -> Result<(), Failure> {
        on_each(self.stage, 1..self.nr_cpus, work)
    }
}

fn range((start, nr_pages): (u64, u64)) -> VirtRange {
    VirtRange::new(start, start + nr_pages * 4096).expect("the places above are good ranges")
}
