//! What a machine adds so that the same work can be done, and counted, on any of them: other CPUs,
//! and programs on them.

use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CpuId;

use crate::fault::{FaultError, UserAccess};
use crate::kernel::Kernel;
use crate::machine::Machine;
use crate::mm::Mm;
use crate::vma::{Area, AreaKind, Protection, Vma};

/// A running kernel, its CPUs, and programs that use memory.
pub trait Stage: Sync {
    /// The machine below the kernel.
    type Machine: Machine;

    /// The kernel, every CPU of which is started and runs nothing.
    fn kernel(&self) -> &Kernel<Self::Machine>;

    /// Runs `work` as kernel code on `cpu`, which has nothing else to do, and returns when it is
    /// done.
    fn on_cpu(&self, cpu: CpuId, work: &(dyn Fn() + Sync));

    /// A program on the calling CPU, which has `mm` loaded, reads or writes one word in each page
    /// of `range`, in order. Faults are answered as they come.
    ///
    /// # Errors
    /// The address, and the fault that was not answered.
    fn touch(
        &self,
        mm: &Mm<Self::Machine>,
        range: VirtRange,
        access: UserAccess,
    ) -> Result<(), (u64, FaultError)>;
}

/// Where the code of programs is mapped: below anything that Linux gives out (vm.mmap_min_addr is
/// 0x10000).
pub const PROGRAM_START: u64 = 0x1000;
/// The file that the code is in; no other file has this number.
pub const PROGRAM_FILE: u32 = u32::MAX;

/// The area that holds the code of programs; one page.
///
/// A machine whose programs are real fills this page of the file before anyone runs; a model leaves
/// it as it is, and counts the same.
#[must_use]
pub fn program_area() -> Vma {
    let range = VirtRange::of_entry(mmu_gather::pagetable::Level::Pte, PROGRAM_START);
    let kind = AreaKind::FileShared(PROGRAM_FILE);
    Vma { range, area: Area { kind, protection: Protection::Read, ..Area::anon() } }
}
