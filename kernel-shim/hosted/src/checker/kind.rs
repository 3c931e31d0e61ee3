//! What can go wrong.

use core::fmt;

/// What can go wrong, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ViolationKind {
    /// A program can reach a page that was freed, or did.
    PageReachableAfterFree,
    /// A page walk can reach a table that was freed, or did.
    TableReachableAfterFree,
    /// A device can reach a page or a table that was freed, or did: it was not told to forget.
    DeviceReachesAfterFree,
    /// An unmapping returned while a CPU could still use an address.
    AddressUsableAfterUnmap,
    /// A call that discards pages returned while a CPU could still use what it had cached before.
    PageUsableAfterDiscard,
    /// A call that takes rights away returned while a CPU could still use them.
    RightsUsableAfterProtect,
    /// A CPU has cached one page in two sizes for one address, and runs a program.
    TwoPageSizes,
    /// A page that is free is mapped.
    FreePageMapped,
    /// A table was freed although not all of its entries are empty.
    TableFreedInUse,
    /// An entry that is not empty is in a line that its table is noted not to use: a walk would
    /// pass it by.
    EntryNotNoted,
    /// A page is mapped by more or by fewer entries than its count says.
    CountsDisagree,
    /// There are more or fewer places in swap, or guards, in page tables than the kernel was told
    /// of.
    MeaningsDisagree,
    /// A frame was freed by a CPU that held the lock of a page table.
    FreedUnderTableLock,
    /// A CPU that held the lock of a page table waited for others to flush, and not for the sake of
    /// dirty pages.
    WaitedUnderTableLock,
    /// A frame was freed by a CPU that held a map lock, in a call that is to free after it has
    /// dropped the lock.
    FreedUnderMapLock,
    /// A CPU that held a map lock waited for others to flush, in a call that is to wait after it
    /// has dropped the lock.
    WaitedUnderMapLock,
    /// A CPU did more between two preemption points than it may, whatever the range.
    NoPreemptionPoint,
    /// A CPU has cached what its page tables no longer say, and its slot claims that it has not.
    SlotIsOlder,
    /// A CPU has an address space in CR3 and is not in its cpumask.
    NotInCpumask,
    /// A program wrote to a page of a file, and the kernel does not know that it is dirty.
    WriteLost,
    /// A program can write to a page of a file, unseen, that nothing maps any more.
    WritableThoughUnmapped,
}

impl fmt::Display for ViolationKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PageReachableAfterFree => "a program can still reach a page that was freed",
            Self::TableReachableAfterFree => "a page walk can still reach a table that was freed",
            Self::DeviceReachesAfterFree => {
                "a device that walks page tables can still reach a frame that was freed"
            }
            Self::AddressUsableAfterUnmap => {
                "an address can still be used although its unmapping has returned"
            }
            Self::PageUsableAfterDiscard => {
                "what was cached before a call that discards can still be used although it has returned"
            }
            Self::RightsUsableAfterProtect => {
                "rights can still be used although the call that takes them away has returned"
            }
            Self::TwoPageSizes => "a program can use two page sizes for one address",
            Self::FreePageMapped => "a free page is mapped",
            Self::TableFreedInUse => "a table was freed that still had entries",
            Self::EntryNotNoted => "an entry is in a line that its table is noted not to use",
            Self::CountsDisagree => "a page is not mapped as often as its count says",
            Self::MeaningsDisagree => {
                "page tables hold other places in swap, or guards, than the kernel knows of"
            }
            Self::FreedUnderTableLock => "a frame was freed under the lock of a page table",
            Self::WaitedUnderTableLock => "a CPU waited for others under the lock of a page table",
            Self::FreedUnderMapLock => {
                "a frame was freed under the map lock by a call that is to free after it"
            }
            Self::WaitedUnderMapLock => {
                "a CPU waited for others under the map lock in a call that is to wait after it"
            }
            Self::NoPreemptionPoint => "a CPU did too much between two preemption points",
            Self::SlotIsOlder => {
                "a CPU has cached what page tables no longer say, though its slot is at the newest generation"
            }
            Self::NotInCpumask => "a CPU has an address space in CR3 and is not in its cpumask",
            Self::WriteLost => "a program wrote to a page of a file, and nobody knows that it is dirty",
            Self::WritableThoughUnmapped => {
                "a program can write to a page of a file that nothing maps any more"
            }
        })
    }
}
