//! What a gather knows about the entries it has cleared, until they are flushed for.

use mmu_pagetable::StaleWrites;

use crate::cut_leaf::CutLeaf;
use crate::limits::GatherMode;
use crate::queue::waiting::Covered;
use crate::range::FlushRange;

/// What is known until the flush.
pub(crate) struct State {
    pub(crate) mode: GatherMode,
    pub(crate) pfn_maps: PfnMaps,
    pub(crate) range: FlushRange,
    /// Whether flushes that others owe were seen under a table lock: the next flush is of the whole address space.
    pub(crate) deferred: DeferredFlushes,
    /// Whether this gather took rights away since its last flush ([`MmuGather::changed`]): CPUs may write still.
    pub(crate) rights: StaleWrites,
    pub(crate) phase: Phase,
    /// A large leaf that a range cut, and that was left alone.
    pub(crate) cut: Option<CutLeaf>,
    /// The last flush. INVARIANT: while `range` is empty it covers everything that waits.
    pub(crate) receipt: Option<Covered>,
}

/// Whether flushes of reclaim, or of a call that unwound, were seen to be owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeferredFlushes {
    NotSeen,
    Seen,
}

/// Whether the gather can finish itself when it is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Yes: entries are cleared and noted, and what waits is in the queues.
    Open,
    /// The kernel is carrying out a flush, or is being handed what waits. If the gather is dropped now the kernel's own code
    /// has unwound: doing it again might unwind again, which aborts, and would free some of it twice. What waits leaks.
    InKernel,
}

/// Whether entries of a [`PfnMap`](crate::VmaKind::PfnMap) area were cleared. Sticky: a later area does not undo it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PfnMaps {
    NotSeen,
    Seen,
}
