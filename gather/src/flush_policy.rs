//! What a gather must flush, and what it may assume before it has: decided here for the gather and
//! for the path of one table (one_table.rs) alike.

use mmu_pagetable::StaleWrites;
use mmu_tlb::{FreedTables, PageSpan};

use crate::levels::context::TlbContext;
use crate::levels::context::sealed::Sealed;
use crate::levels::flush_tlb::FlushTlb;
use crate::mm::MmOf;
use crate::overlap::reach::Counted;
use crate::platform::{GatherEvent, Platform};
use crate::queue::waiting::Covered;
use crate::state::DeferredFlushes;

/// How much a flush covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// No flush is needed.
    Nothing,
    /// The addresses that the gather cleared.
    Range,
    /// The whole address space, for freed tables too.
    WholeMm,
}

/// Whether an entry without the writable bit may still be written through what a CPU has cached.
///
/// Rights are taken away and flushed for by another gather that is still open (rule G6), by this
/// one (`own`), or by reclaim, whose flushes are noted (`deferred`). If there is none of these,
/// whoever wrote to the entry before its lock was taken here has flushed.
///
/// `others` says whether a gather is open that may have changed an entry of this table. The stripe
/// of the table and the gathers of everywhere are enough: rights are taken away by gathers that
/// reach everywhere, and any other that changed an entry here is counted in the stripe.
#[inline(always)]
pub(crate) const fn stale_writes(others: bool, deferred: DeferredFlushes, own: StaleWrites) -> StaleWrites {
    if others || matches!(deferred, DeferredFlushes::Seen) { StaleWrites::Possible } else { own }
}

/// The scope of a flush before the last one of a gather; `own` is what its own entries need.
///
/// The counts that `reach` asks are enough, as for the last flush.
#[inline(always)]
pub(crate) fn scope_before_the_last<C: TlbContext>(mm: &MmOf<C>, reach: impl Counted, own: Scope) -> Scope {
    if own == Scope::Range && reach.has_others(&mm.gathers()) { Scope::WholeMm } else { own }
}

/// The scope of the last flush of a gather; `own` is what its own entries need.
///
/// Where another gather is open the whole address space is flushed, even if this one cleared
/// nothing: an entry that it found empty may have been cleared by the other, which has not flushed
/// yet (rule G6). So it is where a flush is owed: the other may have unwound and closed since this
/// one looked.
///
/// The counts that `reach` asks are enough: the other cleared an entry of a table that this one
/// looked into, or something larger, which only gathers of everywhere do. Where it is open the
/// whole address space is flushed, not the stripe alone: what the other has cleared may be more
/// than this one was asked for, and a stripe is no range.
#[inline(always)]
pub(crate) fn scope_of_the_last<K: Platform>(
    kernel: &K,
    mm: &MmOf<K::Context>,
    reach: impl Counted,
    own: Scope,
) -> Scope {
    if reach.has_others(&mm.gathers()) {
        kernel.observe_gather(GatherEvent::NestedFlush);
        return Scope::WholeMm;
    }
    kernel.between_gather_steps();
    // Asked last: a gather that unwinds notes what it owes, and then closes.
    if mm.context().has_deferred_flushes() { Scope::WholeMm } else { own }
}

/// Flushes `span`, or the whole address space if `scope` says so or there is no span.
#[inline(always)]
pub(crate) fn flush<K: Platform>(
    kernel: &K,
    mm: &MmOf<K::Context>,
    scope: Scope,
    span: Option<PageSpan>,
    tables: FreedTables,
) -> Covered {
    let span = if scope == Scope::Range { span } else { None };
    flush_context(kernel, mm.context(), span, tables)
}

/// Flushes `span` of `context`, or all of it.
#[inline(always)]
pub(crate) fn flush_context<K: FlushTlb>(
    kernel: &K,
    context: &K::Context,
    span: Option<PageSpan>,
    tables: FreedTables,
) -> Covered {
    match span {
        Some(_) => kernel.flush_tlb(context, span, tables),
        None => context.flush_whole(|| kernel.flush_tlb(context, None, FreedTables::Yes)),
    }
    Covered::after_flush()
}

/// Flushes for dirty pages, then lets them lose their rmaps; `remove_rmaps` gets what `flush`
/// returned.
///
/// This is the stated exception of G3: once the lock of their table drops, writeback may take such
/// a page for clean while another CPU still writes to it through an old entry.
///
/// # Context
/// The lock of the table that mapped the pages is held.
#[inline(always)]
pub(crate) fn flush_dirty<K: Platform, F, R>(
    kernel: &K,
    flush: impl FnOnce() -> F,
    remove_rmaps: impl FnOnce(F) -> R,
) -> R {
    kernel.observe_gather(GatherEvent::DirtyFlush);
    let flushed = flush();
    remove_rmaps(flushed)
}
