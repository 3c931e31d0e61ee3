//! The number of a CPU, and sets of such numbers.

use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};

use mmu_gather::tlb::CpuId;

/// As many CPUs as a [`CpuMask`] has bits.
pub const MAX_CPUS: usize = 64;

/// The number of a CPU: 0 for the one that booted, then in the order in which they came up, without
/// gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpuIndex(u32);

impl CpuIndex {
    /// The CPU that booted.
    pub const FIRST: Self = Self(0);

    /// Returns the CPU with this number.
    ///
    /// # Panics
    ///
    /// From [`MAX_CPUS`] on.
    #[must_use]
    pub const fn new(index: u32) -> Self {
        assert!((index as usize) < MAX_CPUS, "no such CPU");
        Self(index)
    }

    /// Returns the number.
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0
    }

    /// Returns what the engine calls this CPU.
    #[must_use]
    pub const fn id(self) -> CpuId {
        CpuId::new(self.0)
    }

    /// Returns the number as an index into arrays of [`MAX_CPUS`].
    #[must_use]
    pub const fn get(self) -> usize {
        // The remainder changes nothing; with it, such an index needs no bounds check.
        self.0 as usize % MAX_CPUS
    }
}

impl fmt::Display for CpuIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where the number of a CPU is kept; 0 at first.
#[derive(Debug)]
pub(crate) struct AtomicCpuIndex(AtomicU32);

impl AtomicCpuIndex {
    pub(crate) const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    pub(crate) fn load(&self) -> CpuIndex {
        CpuIndex(self.0.load(Ordering::Relaxed))
    }

    pub(crate) fn store(&self, index: CpuIndex) {
        self.0.store(index.0, Ordering::Relaxed);
    }
}

/// A set of CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuMask(u64);

impl CpuMask {
    /// The set without members.
    pub const EMPTY: Self = Self(0);

    /// Returns the set of the CPUs `0..count`.
    #[must_use]
    pub const fn first(count: u32) -> Self {
        Self(u64::MAX.unbounded_shr(u64::BITS - count))
    }

    /// Returns the set of one CPU.
    #[must_use]
    pub const fn only(cpu: CpuIndex) -> Self {
        Self(1 << cpu.0)
    }

    /// Returns the set whose members are the bits of `bits`.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Returns one bit a member.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Returns the set with `cpu`.
    #[must_use]
    pub const fn with(self, cpu: CpuIndex) -> Self {
        Self(self.0 | 1 << cpu.0)
    }

    /// Returns the set without `cpu`.
    #[must_use]
    pub const fn without(self, cpu: CpuIndex) -> Self {
        Self(self.0 & !(1 << cpu.0))
    }

    /// Returns whether `cpu` is a member.
    #[must_use]
    pub const fn contains(self, cpu: CpuIndex) -> bool {
        self.0 >> cpu.0 & 1 == 1
    }

    /// Returns whether there is no member.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Returns the number of members.
    #[must_use]
    pub const fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// Returns the members, lowest first.
    pub fn iter(self) -> impl Iterator<Item = CpuIndex> {
        let mut bits = self.0;
        core::iter::from_fn(move || {
            (bits != 0).then(|| {
                let lowest = bits.trailing_zeros();
                bits &= bits - 1;
                CpuIndex(lowest)
            })
        })
    }
}

impl FromIterator<CpuIndex> for CpuMask {
    fn from_iter<I: IntoIterator<Item = CpuIndex>>(cpus: I) -> Self {
        cpus.into_iter().fold(Self::EMPTY, Self::with)
    }
}

impl FromIterator<CpuId> for CpuMask {
    fn from_iter<I: IntoIterator<Item = CpuId>>(ids: I) -> Self {
        ids.into_iter().map(|id| CpuIndex::new(id.number())).collect()
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec::Vec;

    use super::{CpuIndex, CpuMask};

    #[test]
    fn a_mask_lists_its_members_lowest_first() {
        let mask = CpuMask::only(CpuIndex::new(63)).with(CpuIndex::FIRST).with(CpuIndex::new(5));
        let members: Vec<usize> = mask.iter().map(CpuIndex::get).collect();
        assert_eq!(members, [0, 5, 63]);
        assert_eq!(mask.count(), 3);
        assert!(
            mask.contains(CpuIndex::new(5)) && !mask.without(CpuIndex::new(5)).contains(CpuIndex::new(5))
        );
    }

    #[test]
    #[should_panic(expected = "no such CPU")]
    fn a_cpu_beyond_the_mask_cannot_be_named() {
        let _ = CpuIndex::new(64);
    }
}
