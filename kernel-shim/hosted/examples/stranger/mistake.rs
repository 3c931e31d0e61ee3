//! What can be wrong with the kernel.

/// What the kernel does wrong, or what else it has, so that the kit can be seen to find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "only tests name those that end the process")]
pub(crate) enum Mistake {
    /// Nothing.
    Absent,
    /// Nothing, and it has calls to other CPUs of its own.
    AbsentWithOwnIpis,
    /// Nothing, and it keeps used lines.
    AbsentWithUsedLines,
    /// mprotect takes rights away, and tells no gather.
    ChangedForgotten,
    /// A page is freed when its entry is cleared.
    FreedWhenUnmapped,
    /// munmap names no neighbours, although there are some.
    NeighboursForgotten,
    /// The handler of the flush interrupt returns at once.
    HandlerDoesNothing,
    /// A switch loads CR3, and tells the engine nothing.
    SwitchOfItsOwn,
    /// All CPUs have one state.
    OneCpuState,
    /// What is unmapped is not freed.
    NeverFreed,
    /// What is unmapped is freed twice.
    FreedTwice,
    /// A table is given out as it was when it was freed.
    DirtyTables,
    /// The map lock is dropped before the flush.
    LockDroppedEarly,
    /// The handler of the flush interrupt names another CPU than its own.
    HandlerNamesAnother,
    /// PCIDs are said to be on, and are off on some machines.
    PcidsSaidOn,
    /// A batch page begins a byte too late.
    BatchPageNotAligned,
    /// A fault maps its page with a table locked.
    MapsUnderTableLock,
    /// The allocator holds a lock of `std` while it tells the machine.
    LockOfStd,
    /// A call of its own to another CPU is acknowledged before it is carried out.
    AcknowledgedFirst,
    /// `flush_others` calls other CPUs, and does not wait.
    ReturnsAtOnce,
    /// `flush_others` never calls `meanwhile`.
    MeanwhileForgotten,
    /// All its calls to other CPUs share one count of answers.
    OneCountOfAnswers,
    /// munmap, its flush too, is made with interrupts off, which the calls to other CPUs need on.
    InterruptsOff,
    /// Used lines are kept, and a mapper of the kernel's own writes entries.
    EntriesPastUsedLines,
    /// The `Mm` is moved after a CPU has loaded it.
    MmMoves,
    /// A CPU goes off, and does not say so.
    OffInTheMask,
    /// The second half of a batch page is the first of another page.
    BatchPageShort,
    /// A page that is lent to a gather is given to a program, too.
    LentPageMapped,
    /// A page that a gather gives back is not given back to the allocator.
    FreeBatchForgotten,
    /// munmap trips over an assertion of its own.
    UnmapPanics,
    /// Pages are taken for programs, and the machine is not told.
    AllocationsNotTold,
    /// No flush interrupt is ever sent.
    InterruptsNotSent,
    /// `wait_for_answers` is the engine's default.
    WaitLeftOut,
    /// `invlpg` is the engine's default.
    InvlpgLeftOut,
    /// `load_cr3` is the engine's default.
    LoadCr3LeftOut,
    /// `without_interrupts` is the engine's default.
    InterruptsLeftOut,
}

impl Mistake {
    /// All but the lock of `std` and methods left out, which end the process.
    #[allow(dead_code, reason = "the tests name them one by one")]
    pub(crate) const ALL: [Self; 31] = [
        Self::Absent,
        Self::AbsentWithOwnIpis,
        Self::AbsentWithUsedLines,
        Self::ChangedForgotten,
        Self::FreedWhenUnmapped,
        Self::NeighboursForgotten,
        Self::HandlerDoesNothing,
        Self::SwitchOfItsOwn,
        Self::OneCpuState,
        Self::NeverFreed,
        Self::FreedTwice,
        Self::DirtyTables,
        Self::LockDroppedEarly,
        Self::HandlerNamesAnother,
        Self::PcidsSaidOn,
        Self::BatchPageNotAligned,
        Self::MapsUnderTableLock,
        Self::AcknowledgedFirst,
        Self::ReturnsAtOnce,
        Self::MeanwhileForgotten,
        Self::OneCountOfAnswers,
        Self::InterruptsOff,
        Self::EntriesPastUsedLines,
        Self::MmMoves,
        Self::OffInTheMask,
        Self::BatchPageShort,
        Self::LentPageMapped,
        Self::FreeBatchForgotten,
        Self::UnmapPanics,
        Self::AllocationsNotTold,
        Self::InterruptsNotSent,
    ];

    /// Whether the kernel has calls to other CPUs of its own.
    pub(crate) const fn has_own_ipis(self) -> bool {
        matches!(self, Self::AbsentWithOwnIpis | Self::MeanwhileForgotten | Self::InterruptsOff)
            || self.uses_requests_late()
    }

    /// Whether a CPU may look at a request whose flush has returned.
    pub(crate) const fn uses_requests_late(self) -> bool {
        matches!(self, Self::AcknowledgedFirst | Self::ReturnsAtOnce | Self::OneCountOfAnswers)
    }

    /// Whether the kernel keeps used lines.
    pub(crate) const fn keeps_used_lines(self) -> bool {
        matches!(self, Self::AbsentWithUsedLines | Self::EntriesPastUsedLines)
    }
}
