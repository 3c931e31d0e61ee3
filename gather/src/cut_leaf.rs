//! A large leaf that a range cut.

use core::fmt;

use mmu_pagetable::{Level, VirtRange};

/// A 2 MiB or 1 GiB leaf that reaches beyond what was to be unmapped. It is still mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CutLeaf {
    /// The first address it maps.
    pub address: u64,
    /// The level of the table that its entry is in: `Pmd` for 2 MiB, `Pud` for 1 GiB.
    pub level: Level,
}

impl CutLeaf {
    /// The addresses it maps.
    #[must_use]
    pub const fn range(&self) -> VirtRange {
        VirtRange::of_entry(self.level, self.address)
    }
}

impl fmt::Display for CutLeaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the large page at {} reaches beyond what is unmapped, and was not split before",
            self.range()
        )
    }
}

impl core::error::Error for CutLeaf {}
