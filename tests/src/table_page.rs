//! A table and its lock.

use mmu_gather::pagetable::{TableLock, UsedLines};
use spin::RelaxStrategy;

/// A table and, beside it, its lock and the note of its used lines, which a kernel keeps in its
/// `struct page`.
#[repr(C, align(4096))]
pub(crate) struct TablePage {
    pub(crate) entries: [u64; 512],
    pub(crate) lock: TableLock<Deadlock>,
    pub(crate) used_lines: UsedLines,
}

/// What a CPU does while it waits for a lock: it panics, because the only thread would wait for
/// ever.
#[derive(Debug)]
pub struct Deadlock;

impl RelaxStrategy for Deadlock {
    fn relax() {
        panic!("deadlock: a table lock is wanted that is held already");
    }
}
