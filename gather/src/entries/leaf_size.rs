//! Which leaves the loop looks for: 4 KiB ones, or large ones.

use mmu_pagetable::Level;
use x86_64::structures::paging::PageTableFlags;

/// The leaves that a table has.
pub(crate) trait Leaves: Copy {
    /// The bits that each of them has.
    const BITS: PageTableFlags;
    /// The level of the table.
    fn level(self) -> Level;
}

/// Pages of 4 KiB, in a table of the last level.
#[derive(Clone, Copy)]
pub(crate) struct Small;

/// Pages of 2 MiB or 1 GiB, in a table of this level, next to links to tables.
#[derive(Clone, Copy)]
pub(crate) struct Large(pub(crate) Level);

impl Leaves for Small {
    const BITS: PageTableFlags = PageTableFlags::PRESENT;
    #[inline(always)]
    fn level(self) -> Level {
        Level::Pte
    }
}

impl Leaves for Large {
    const BITS: PageTableFlags = PageTableFlags::PRESENT.union(PageTableFlags::HUGE_PAGE);
    #[inline(always)]
    fn level(self) -> Level {
        self.0
    }
}
