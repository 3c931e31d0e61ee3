//! What can go wrong.

use core::fmt;

/// What can go wrong, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ViolationKind {
    /// A program uses a frame that the kernel never told to be in use.
    NeverAllocated,
    /// A page was given out that was lent to a gather: both write to it.
    LentPageGivenOut,
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
    /// A new area was mapped while a CPU could still use what was mapped there before.
    OldPageUsableAfterMap,
    /// A call that takes rights away returned while a CPU could still use them.
    RightsUsableAfterProtect,
    /// A CPU has cached one page in two sizes for one address, and runs a program.
    TwoPageSizes,
    /// A page that is free is mapped.
    FreePageMapped,
    /// A table was freed although not all of its entries are empty.
    TableFreedInUse,
    /// A frame was freed that was not in use.
    FreedTwice,
    /// A frame was given out that was in use.
    GivenOutTwice,
    /// An entry that is not empty is in a line that its table is noted not to use: a walk would
    /// pass it by.
    EntryNotNoted,
    /// An entry means something where no area is.
    EntryOutsideAreas,
    /// An entry allows a program more than its area does.
    MoreThanAreaAllows,
    /// An entry lets a program write to a page that others read, too.
    SharedPageWritable,
    /// A program was allowed to write to a page as its only user, and a CPU could still use it for
    /// another.
    OwnedThoughCached,
    /// An entry maps a page that its area does not show.
    WrongPageMapped,
    /// An entry maps for a program what is no page of a program: a table, a batch page, a frame
    /// that the machine does not have.
    NoPageMapped,
    /// A program reads what a program of another address space has written.
    ContentOfAnother,
    /// A program reads what was in a frame when it was given out.
    ContentLeft,
    /// A program reads zeroes, or a page of a file, where it has written.
    ContentLost,
    /// A program reads what it has written before, or elsewhere.
    ContentOfElsewhere,
    /// An entry has bits set that nobody has asked for.
    StrayBits,
    /// An entry does not say what its area asks for, of how a page is cached, say.
    BitsLost,
    /// A page was used, and its entry does not say so any more.
    AccessForgotten,
    /// A call that discards pages returned and has left one.
    PageLeftByDiscard,
    /// An address space has more or fewer tables than it counts.
    TablesMiscounted,
    /// A page has more or fewer references than users.
    ReferencesDisagree,
    /// A frame is in use, and nothing accounts for it while nothing is going on.
    FrameUnaccounted,
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
    /// A CPU that runs a program has cached what page tables no longer say, and nothing is going on
    /// that could still flush it.
    StaleAtRest,
    /// A CPU has an address space in CR3 and is not in its cpumask.
    NotInCpumask,
    /// A program wrote to a page, and the kernel does not know that it is dirty.
    WriteLost,
    /// A program can write to a page of a file, unseen, that nothing maps any more.
    WritableThoughUnmapped,
    /// A call flushed everything, or a CPU did, and pages were enough.
    WholeFlushForPages,
    /// A flush was asked for, or made, and nothing had changed since the last.
    FlushedInVain,
    /// More pages were invalidated than had changed.
    TooManyPagesFlushed,
    /// A call flushed more often than its size explains.
    TooManyFlushes,
    /// A CPU was interrupted that need not have been.
    AskedInVain,
    /// A switch gave up what was cached, and could have kept it.
    PcidNotKept,
    /// A call took more batch pages than its size explains.
    TooManyBatchPages,
    /// A call took the lock of a table more often than its size explains.
    TooManyLocks,
    /// A CPU did more under a map lock than its call explains.
    TooMuchUnderMapLock,
}

impl ViolationKind {
    /// Whether the frame was freed before.
    pub(crate) const fn is_after_free(self) -> bool {
        matches!(
            self,
            Self::PageReachableAfterFree | Self::TableReachableAfterFree | Self::DeviceReachesAfterFree
        )
    }

    /// Whether it is about what a call did, not about an address and a frame.
    pub(crate) const fn is_of_a_call(self) -> bool {
        matches!(
            self,
            Self::WholeFlushForPages
                | Self::FlushedInVain
                | Self::TooManyPagesFlushed
                | Self::TooManyFlushes
                | Self::AskedInVain
                | Self::PcidNotKept
                | Self::TooManyBatchPages
                | Self::TooManyLocks
                | Self::TooMuchUnderMapLock
        )
    }

    /// The rule that is broken, in a sentence.
    #[must_use]
    pub const fn rule(self) -> &'static str {
        match self {
            Self::PageReachableAfterFree | Self::TableReachableAfterFree => {
                "Rule G1: a frame or table is freed only after every CPU that may hold it has flushed: in `free_pages` and `free_tables`, and not where its entry is cleared. A CPU whose CR3 was loaded past `switch_mm` (or `init_cpu`, `enter_lazy_tlb`) is unknown to the engine, and is not asked to flush."
            }
            Self::DeviceReachesAfterFree => {
                "Rule G1: a frame or table is freed only after secondary TLBs were told to forget it, too."
            }
            Self::AddressUsableAfterUnmap | Self::PageUsableAfterDiscard | Self::RightsUsableAfterProtect => {
                "When a call returns, every entry that it cleared or restricted has been flushed (rule G2: a flush covers them all). What the kernel writes by hand it tells the gather: `changed`."
            }
            Self::OldPageUsableAfterMap => {
                "The map lock is held until the flush has returned: what comes next at the same addresses finds that every CPU has forgotten what was there."
            }
            Self::TwoPageSizes => {
                "Before a page is mapped in another size, every CPU must have forgotten the old one: a split flushes first."
            }
            Self::FreePageMapped | Self::CountsDisagree | Self::FreedTwice | Self::GivenOutTwice => {
                "Rule G5: what is queued is released once, and what is mapped is not free."
            }
            Self::NeverAllocated => {
                "Whoever takes a frame from the kernel's allocator tells the machine: `HostedMachine::allocated(frame, role)`. What is not told cannot be checked."
            }
            Self::LentPageGivenOut => {
                "A page that `allocate_batch` lends is used by nobody else until `free_batch` takes it back."
            }
            Self::EntryOutsideAreas
            | Self::MoreThanAreaAllows
            | Self::WrongPageMapped
            | Self::NoPageMapped
            | Self::StrayBits
            | Self::BitsLost => {
                "What page tables say is what areas say, or less: every entry is checked against the area it is in."
            }
            Self::ContentOfAnother | Self::ContentLeft | Self::ContentLost | Self::ContentOfElsewhere => {
                "A program reads what it has written last, or what its area shows: a page is filled before it is mapped, and copied, moved or swapped as a whole."
            }
            Self::AccessForgotten => {
                "A page keeps its accessed bit when its entry moves, is split, or changes its rights."
            }
            Self::SharedPageWritable | Self::OwnedThoughCached => {
                "A page that others use, too, is copied before a program may write to it, and nobody else can still use it then."
            }
            Self::PageLeftByDiscard => {
                "A discarded range is empty when the call returns, but for what was faulted in meanwhile."
            }
            Self::TablesMiscounted => "Every table that is linked is counted, and no other.",
            Self::ReferencesDisagree | Self::FrameUnaccounted => {
                "Rule G5: everything queued is released exactly once, so that nothing is lost or held when nothing is going on."
            }
            Self::TableFreedInUse => {
                "Rule P3: a table is freed when all 512 entries are empty, never by guess. `free_pgtables` was told of too much room: `Bounds::between` takes the end of the area that stays below and the start of the one that stays above."
            }
            Self::EntryNotNoted => {
                "Rule P4: where used lines are noted, the line of every entry that is not empty is noted."
            }
            Self::MeaningsDisagree => {
                "What an entry means besides a page is the kernel's: the kernel is told once of each entry that is dropped, and says which entries stay."
            }
            Self::FreedUnderTableLock | Self::WaitedUnderTableLock => {
                "Rule G3: nothing is freed and no answer is awaited under the lock of a page table, but for dirty and moved pages."
            }
            Self::FreedUnderMapLock | Self::WaitedUnderMapLock => {
                "The kernel's own rule: what a call says it does after it drops the map lock, it does after it drops the map lock."
            }
            Self::NoPreemptionPoint => {
                "Rule G7: the work between two preemption points is bounded, whatever the range."
            }
            Self::SlotIsOlder => {
                "Rule T2: a slot at a generation promises that nothing older is cached there."
            }
            Self::StaleAtRest => {
                "Rule G2: when every call has returned, every entry that they cleared or restricted has been flushed on each CPU that runs programs there."
            }
            Self::NotInCpumask => {
                "Rule T4: a CPU joins the cpumask of an address space before it loads it, and stays while it has it."
            }
            Self::WriteLost => {
                "Rule P1: hardware may set the dirty bit at any time, and whatever changes an entry keeps it or hands it on."
            }
            Self::WritableThoughUnmapped => {
                "Rule G3: a dirty page of a file is flushed for before its table's lock is dropped."
            }
            Self::WholeFlushForPages
            | Self::FlushedInVain
            | Self::TooManyPagesFlushed
            | Self::TooManyFlushes
            | Self::AskedInVain
            | Self::PcidNotKept
            | Self::TooManyBatchPages
            | Self::TooManyLocks
            | Self::TooMuchUnderMapLock => {
                "What a call costs is explained by its size, or by what else goes on: the kernel has promised it (`Kernel::promises_cost`)."
            }
        }
    }
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
            Self::OldPageUsableAfterMap => {
                "what was mapped at an address before can still be used although a new area is mapped there"
            }
            Self::NeverAllocated => {
                "a program uses a page or a page table whose frame was never told as `allocated`"
            }
            Self::FreedTwice => "a frame was freed that was not in use",
            Self::GivenOutTwice => "a frame was given out that was in use",
            Self::LentPageGivenOut => "a page was given out that is lent to a gather",
            Self::RightsUsableAfterProtect => {
                "rights can still be used although the call that takes them away has returned"
            }
            Self::TwoPageSizes => "a program can use two page sizes for one address",
            Self::FreePageMapped => "a free page is mapped",
            Self::TableFreedInUse => "a table was freed that still had entries",
            Self::EntryNotNoted => "an entry is in a line that its table is noted not to use",
            Self::EntryOutsideAreas => "an entry means something where no area is",
            Self::MoreThanAreaAllows => "an entry allows a program more than its area does",
            Self::SharedPageWritable => "an entry lets a program write to a page that others read, too",
            Self::OwnedThoughCached => {
                "a program may write to a page as its only user, and a CPU can still use it for another"
            }
            Self::WrongPageMapped => "an entry maps a page that its area does not show",
            Self::NoPageMapped => "an entry maps for a program what is no page of a program",
            Self::ContentOfAnother => "a program reads what another has written",
            Self::ContentLeft => "a program reads what was left in a page that it was given",
            Self::ContentLost => "a program reads a page as if it had not written to it",
            Self::ContentOfElsewhere => "a program reads what it has written before, or elsewhere",
            Self::AccessForgotten => "a page was used, and its entry does not say so any more",
            Self::StrayBits => "an entry has bits set that nobody has asked for",
            Self::BitsLost => "an entry has lost bits that its area asks for",
            Self::PageLeftByDiscard => "a call that discards has returned and has left a page",
            Self::TablesMiscounted => "an address space has more or fewer tables than it counts",
            Self::ReferencesDisagree => "a page has more or fewer references than users",
            Self::FrameUnaccounted => "a frame is in use, and nothing accounts for it",
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
            Self::StaleAtRest => {
                "a CPU that runs a program has cached what page tables no longer say, and nobody is flushing"
            }
            Self::NotInCpumask => "a CPU has an address space in CR3 and is not in its cpumask",
            Self::WriteLost => "a program wrote to a page, and nobody knows that it is dirty",
            Self::WritableThoughUnmapped => {
                "a program can write to a page of a file that nothing maps any more"
            }
            Self::WholeFlushForPages => "a whole address space was flushed where pages were enough",
            Self::FlushedInVain => "a flush was made for which nothing had changed",
            Self::TooManyPagesFlushed => "more pages were invalidated than had changed",
            Self::TooManyFlushes => "a call flushed more often than its size explains",
            Self::AskedInVain => "a CPU was interrupted that need not have been",
            Self::PcidNotKept => "a switch gave up what was cached, and could have kept it",
            Self::TooManyBatchPages => "a call took more batch pages than its size explains",
            Self::TooManyLocks => "a call took the lock of a table more often than its size explains",
            Self::TooMuchUnderMapLock => "a CPU did more under a map lock than its call explains",
        })
    }
}
