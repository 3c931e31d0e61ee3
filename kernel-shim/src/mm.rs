//! An address space: areas, paging structures, the map lock.

use core::fmt;

use mmu_gather::pagetable::Level;
use x86_64::structures::paging::PhysFrame;

use crate::locks::map_lock::{MapLock, MapRead, MapWrite};
use crate::machine::{Machine, UnderMapLock};
use crate::vma::VmaTree;

/// An address space. Linux: mm_struct.
///
/// CPUs that have it loaded keep it alive (by `Arc`); its tables go when
/// [`Kernel::exit`](crate::Kernel::exit) is called.
pub struct Mm<M: Machine> {
    pub(crate) engine: mmu_gather::Mm<M::Bits>,
    vmas: MapLock<M::Relax>,
}

impl<M: Machine> Mm<M> {
    /// An address space without areas.
    pub(crate) const fn new(engine: mmu_gather::Mm<M::Bits>) -> Self {
        Self { engine, vmas: MapLock::new() }
    }

    /// Takes the map lock for reading. Under it the call does no more than `most`.
    pub(crate) fn read<'m>(&'m self, machine: &'m M, most: UnderMapLock) -> MapRead<'m, M> {
        self.vmas.read(machine, self.root(), most)
    }

    /// Takes the map lock for writing. Under it the call does no more than `most`.
    pub(crate) fn write<'m>(&'m self, machine: &'m M, most: UnderMapLock) -> MapWrite<'m, M> {
        self.vmas.write(machine, self.root(), most)
    }

    /// The engine's part.
    #[must_use]
    pub const fn engine(&self) -> &mmu_gather::Mm<M::Bits> {
        &self.engine
    }

    /// The frame that CR3 points to.
    #[must_use]
    pub const fn root(&self) -> PhysFrame {
        self.engine.space().root()
    }

    /// How many areas it has.
    #[must_use]
    pub fn nr_vmas(&self) -> usize {
        self.vmas.peek(VmaTree::len)
    }

    /// A copy of its areas.
    #[must_use]
    pub fn vmas(&self) -> VmaTree {
        self.vmas.peek(VmaTree::clone)
    }

    /// Tables linked, by level: PTE, PMD, PUD.
    #[must_use]
    pub fn nr_tables(&self) -> [u64; 3] {
        [Level::Pte, Level::Pmd, Level::Pud].map(|level| self.engine.space().nr_tables(level))
    }
}

impl<M: Machine> fmt::Debug for Mm<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mm").field("engine", &self.engine).finish_non_exhaustive()
    }
}
