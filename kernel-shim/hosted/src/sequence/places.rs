//! Where sequences work, and with how much of it at once.

use mmu_gather::pagetable::Level;

/// Places where tables of every level begin and end: bottom and top of user space, 2 MiB, 1 GiB and
/// 512 GiB edges.
pub(crate) const PLACES: [u64; 7] = [
    0x1_0000,
    Level::Pmd.table_span(),
    2 * Level::Pmd.table_span() - 0x10_0000,
    Level::Pmd.table_span() + Level::Pmd.entry_span() - 0x8000,
    Level::Pud.table_span() - 0x10_0000,
    3 * Level::Pmd.table_span(),
    (1 << 47) - 0x40_0000,
];

/// Places that there are with page tables of five levels: around the end of what four levels reach,
/// and where a table of the fourth level begins and ends.
pub(crate) const HIGH_PLACES: [u64; 4] = [
    (1 << 47) - 0x10_0000,
    (1 << 48) - 0x10_0000,
    (1 << 48) + Level::Pmd.table_span() - 0x10_0000,
    (1 << 56) - 0x40_0000,
];

/// Pages of one touch, each of which may fault.
pub(crate) const MOST_TOUCHED: u64 = 64;
