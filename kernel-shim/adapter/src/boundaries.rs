//! Corners that are read off the counters of the small kernel.

use mmu_gather::Limits;
use mmu_hosted::{Boundaries, Boundary as B};
use mmu_kernel_shim::Snapshot;

/// What a kernel that had these `limits` has counted.
pub(crate) fn counted(counted: &Snapshot, limits: &Limits) -> Boundaries {
    // A bundle or batch counts as full one slot early.
    let bundle = u64::from(limits.bundle_slots) - 1;
    let batch = u64::from(limits.batch_slots) - 1;
    let all = bundle + batch * u64::from(limits.batch_pages);
    let reached = [
        (B::BundleFull, counted.max_deferred_slots >= bundle),
        (B::BatchFull, counted.max_deferred_slots > bundle + batch),
        (B::GatherFull, counted.max_deferred_slots >= all),
        (B::ForcedFlush, counted.forced_flushes > 0),
        (B::BatchRefused, counted.batches_refused > 0),
        (B::TableBatchFull, counted.max_deferred_tables >= u64::from(limits.table_slots)),
        (B::TableBatchRefused, counted.table_fallbacks > 0),
        (B::DirtyFlush, counted.dirty_flushes > 0),
        (B::NestedGather, counted.nested_flushes > 0),
        (B::DeferredSeen, counted.deferred_seen > 0),
        (B::PteTable, counted.pte_tables > 0),
        (B::PmdTable, counted.pmd_tables > 0),
        (B::PudTable, counted.pud_tables > 0),
        (B::TableRefused, counted.tables_refused > 0),
        (B::Split, counted.splits > 0),
        (B::Ranged, counted.invlpgs > 0),
        (B::CeilingPassed, counted.ceilings_passed > 0),
        (B::GenerationGap, counted.gap_flushes > 0),
        (B::AlreadyCurrent, counted.flushes_skipped > 0),
        (B::LazySkipped, counted.ipis_saved_lazy > 0),
        (B::LazyCaught, counted.lazy_left > 0),
        (B::LazyCaughtUp, counted.caught_up > 0),
        (B::ElsewhereSkipped, counted.ipis_saved_elsewhere > 0),
        (B::Copied, counted.copies > 0),
        (B::SwappedIn, counted.swap_ins > 0),
        (B::GuardKept, counted.guards_kept > 0),
        (B::GuardMet, counted.guard_faults > 0),
        (B::ProtectRetried, counted.protect_retries > 0),
        (B::ForkRetried, counted.fork_retries > 0),
        (B::FrameRefused, counted.frames_refused > 0),
        (B::RunFreed, counted.runs_released > 0),
        (B::ZeroBlock, counted.zero_blocks > 0),
        (B::ZeroBlockReplaced, counted.zero_blocks_replaced > 0),
    ];
    let reached = reached.into_iter().filter(|(_, reached)| *reached);
    reached.fold(Boundaries::default(), |set, (boundary, _)| set.with(boundary))
}
