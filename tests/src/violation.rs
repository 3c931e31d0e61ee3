//! What counts as a violation.

use mmu_gather::tlb::CpuId;
use x86_64::structures::paging::PhysFrame;

/// A broken rule: by the engine, or by a test on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A page was freed while a CPU could still reach it at this address.
    PageFreedTooEarly(PhysFrame, CpuId, u64),
    /// A table was freed while a CPU, perhaps a lazy one, could still continue a walk of this
    /// address from it.
    TableFreedTooEarly(PhysFrame, CpuId, u64),
    /// A table was freed while it was still linked below a root.
    TableFreedWhileLinked(PhysFrame),
    /// What was freed as a table is not a table, or not any more.
    TableFreedTwice(PhysFrame),
    /// A table was freed with entries in it.
    TableFreedFull(PhysFrame),
    /// More references on a page were given up than it had.
    PageReleasedTwice(PhysFrame),
    /// A page was freed that the kernel does not know.
    UnknownPageReleased(PhysFrame),
    /// A page was freed while its mapcount was not zero.
    PageFreedWhileMapped(PhysFrame),
    /// A mapcount went away while a CPU could still write to the page at this address.
    RmapRemovedTooEarly(PhysFrame, CpuId, u64),
    /// A program reached a freed page.
    FreedPageUsed(PhysFrame, CpuId, u64),
    /// A walk went through a freed table.
    FreedTableWalked(PhysFrame, CpuId, u64),
    /// A CPU has an address space in CR3 and is not in its cpumask.
    LoadedButNotInCpumask(CpuId),
    /// A slot promises a generation that its address space has not reached.
    SlotAheadOfItsMm(CpuId),
    /// Something was done under a table lock that must not be.
    UnderALock(&'static str),
}
