//! What a gather knows about the entries it has cleared, until it has flushed for them.

use mmu_pagetable::StaleWrites;

use crate::cut_leaf::CutLeaf;
use crate::limits::GatherMode;
use crate::overlap::reach::Reach;
use crate::queue::waiting::Covered;
use crate::range::FlushRange;

/// What a gather knows until it flushes.
pub(crate) struct State {
    pub(crate) mode: GatherMode,
    /// Where it is counted as open.
    pub(crate) reach: Reach,
    pub(crate) pfn_maps: PfnMaps,
    pub(crate) range: FlushRange,
    /// Whether flushes that others owe were seen under a table lock. If so, the next flush is of
    /// the whole address space.
    pub(crate) deferred: DeferredFlushes,
    /// Whether this gather took rights away since its last flush, so that CPUs may still write
    /// ([`MmuGather::changed`](crate::MmuGather::changed)).
    pub(crate) rights: StaleWrites,
    pub(crate) phase: Phase,
    /// A large leaf that the end of a range cut, and that was left mapped.
    pub(crate) cut: Option<CutLeaf>,
    /// The receipt of the last flush. INVARIANT: while `range` is empty it covers everything that
    /// waits.
    pub(crate) receipt: Option<Covered>,
}

/// Whether a flush was seen to be owed, by reclaim or by a call that unwound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeferredFlushes {
    NotSeen,
    Seen,
}

/// Whether the gather can finish itself when it is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It can: what was cleared is noted, and what waits is in the queues.
    Open,
    /// It cannot: the kernel is carrying out a flush, or is being handed what waits. If the gather
    /// is dropped now, the kernel's own code has unwound. Doing it again might unwind again, which
    /// aborts, and would free some of it twice; so what waits leaks.
    InKernel,
}

/// Whether entries of a [`PfnMap`](crate::VmaKind::PfnMap) area were cleared. It stays so when
/// areas of another kind follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PfnMaps {
    NotSeen,
    Seen,
}
