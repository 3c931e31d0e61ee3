//! Flushing on every CPU that must flush, and waiting until each of them has.
#![expect(unsafe_code, reason = "runs this CPU's part of a flush")]

use crate::cpu_state::Concern;
use crate::cpuset::{CpuBits, CpuId, CpuSet};
use crate::delivery::ask;
use crate::flush::{flush_tlb_func, flush_tlb_func_inlined};
use crate::generation::{CtxId, MmContext, TlbGen};
use crate::mistakes::{check_cr3, check_place};
use crate::mmu::{Cpus, EarlyAnswer, OnlineCpus, TlbEvent};
use crate::request::{FlushKind, FlushRequest, FreedTables, PageSpan};

/// The receipt of a completed flush.
///
/// Holding one proves that every CPU which had to be told has answered: no CPU uses a translation
/// of this context older than the generation. CPUs that were not told will compare generations
/// before they use the context again. It cannot be copied, and only the flush functions make one.
#[derive(Debug)]
#[must_use = "frames stay pending until a receipt is used to free them"]
pub struct Flushed {
    scope: Option<(CtxId, TlbGen)>,
}

impl Flushed {
    const fn of_mm(ctx_id: CtxId, tlb_gen: TlbGen) -> Self {
        Self { scope: Some((ctx_id, tlb_gen)) }
    }

    const fn of_batch() -> Self {
        Self { scope: None }
    }

    /// Whether this is the receipt of a flush of `mm`. A receipt of another address space, or of a
    /// batch over several, proves nothing about `mm`.
    #[must_use]
    pub fn is_of<B: CpuBits>(&self, mm: &MmContext<B>) -> bool {
        self.scope.is_some_and(|(ctx_id, _)| ctx_id == mm.ctx_id())
    }

    /// The context, and the generation it was flushed up to; `None` for a batch over several
    /// contexts.
    #[must_use]
    pub const fn scope(&self) -> Option<(CtxId, TlbGen)> {
        self.scope
    }
}

/// Makes every CPU forget `span` of `mm`; returns when no CPU can use a translation older than the
/// call.
///
/// The entries were changed before the call. CPUs that have `mm` loaded and run programs are
/// interrupted. When tables go, so is every other CPU in the cpumask; else lazy CPUs find out when
/// they wake, and CPUs that have something else loaded when they come back. A span of more than
/// [`single_page_flush_ceiling`](Cpus::single_page_flush_ceiling) pages becomes a full flush, and
/// so does a span that ends before it begins.
///
/// # Context
/// Not in an interrupt handler, nor while this CPU flushes. Interrupts on, unless requests go by
/// mail; no lock held that an interrupt handler takes; may be called under a table lock, which only
/// flushes that must come before it drops should do (rule G3). Never sleeps, but waits for other
/// CPUs.
///
/// # Source
/// Linux: flush_tlb_mm_range, arch/x86/mm/tlb.c.
///
/// # Example
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/doc/machine.rs"));
/// # fn main() {
/// use mmu_tlb::{CtxIds, FreedTables, MmContext, PageSpan, flush_tlb_mm_range, switch_mm};
///
/// // `Machine` is the example of `Cpus`.
/// let (machine, ids) = (Machine::default(), CtxIds::new());
/// let root = PhysFrame::containing_address(x86_64::PhysAddr::new(0x1000));
/// // SAFETY: one source of names, one root.
/// let mm = Box::pin(unsafe { MmContext::new(&ids, root) });
/// // SAFETY: this thread is the CPU, and `mm` lives to the end.
/// unsafe { switch_mm(&machine, CpuId::new(0), Some(mm.as_ref())) };
/// machine.did.take();
///
/// // The entries of two pages were cleared. With the receipt their frames may be freed.
/// let span = PageSpan { start: 0x7000, end: 0x9000, stride_shift: 12 };
/// let flushed = flush_tlb_mm_range(&machine, &mm, span, FreedTables::No);
/// assert!(flushed.is_of(&mm));
/// assert_eq!(machine.did.take(), ["INVLPG 0x7000", "INVLPG 0x8000"]);
/// # }
/// ```
#[inline(never)]
pub fn flush_tlb_mm_range<C: Cpus>(
    cpus: &C,
    mm: &MmContext<C::Bits>,
    span: PageSpan,
    tables: FreedTables,
) -> Flushed {
    let nr_pages = span.nr_pages();
    // A span that ends before it begins has `u64::MAX` pages. A ceiling of `u64::MAX` must not let
    // it pass either.
    if nr_pages > cpus.single_page_flush_ceiling() || nr_pages == u64::MAX {
        let changed = if nr_pages == u64::MAX { None } else { Some(span) };
        return flush_full(cpus, mm, changed, tables);
    }
    let tlb_gen = cpus.pinned(|here| {
        cpus.observe(TlbEvent::Requested { pages: Some(nr_pages), tables });
        raise_and_flush(cpus, here, mm, Some(span), tables, |tlb_gen| FlushKind::Range { mm, tlb_gen, span })
    });
    cpus.invalidate_secondary(mm.ctx_id(), Some(span));
    Flushed::of_mm(mm.ctx_id(), tlb_gen)
}

/// Makes every CPU forget all of `mm`, tables included, lazy CPUs too.
///
/// # Context
/// As for [`flush_tlb_mm_range`].
///
/// # Source
/// Linux: flush_tlb_mm, arch/x86/include/asm/tlbflush.h.
pub fn flush_tlb_mm<C: Cpus>(cpus: &C, mm: &MmContext<C::Bits>) -> Flushed {
    flush_full(cpus, mm, None, FreedTables::Yes)
}

/// Flushes all of `mm`. `changed` is what was changed, if the caller knows.
#[inline(never)]
fn flush_full<C: Cpus>(
    cpus: &C,
    mm: &MmContext<C::Bits>,
    changed: Option<PageSpan>,
    tables: FreedTables,
) -> Flushed {
    // Read before the generation rises: a flush that is deferred later may be of entries cleared
    // too late for this flush. Where the caller knows what was changed, secondary TLBs are told of
    // that only, so such a flush does not make up for what others owe.
    let deferred = if changed.is_none() { mm.deferred_flushes() } else { None };
    cpus.between_flush_steps();
    let tlb_gen = cpus.pinned(|here| {
        cpus.observe(TlbEvent::Requested { pages: None, tables });
        raise_and_flush(cpus, here, mm, changed, tables, |tlb_gen| FlushKind::Mm { mm, tlb_gen })
    });
    cpus.invalidate_secondary(mm.ctx_id(), changed);
    if let Some(deferred) = deferred {
        cpus.between_flush_steps();
        mm.deferred_flushes_done(deferred);
    }
    Flushed::of_mm(mm.ctx_id(), tlb_gen)
}

/// Raises the generation, and has every CPU that must be told flush up to it. Pinned to `here`.
///
/// Inlined into its two callers, one for each kind of request, and what only other CPUs need is
/// kept out of line. So on the path without IPIs the request stays in registers.
#[inline(always)]
fn raise_and_flush<'m, C: Cpus>(
    cpus: &C,
    here: CpuId,
    mm: &'m MmContext<C::Bits>,
    changed: Option<PageSpan>,
    tables: FreedTables,
    kind: impl FnOnce(TlbGen) -> FlushKind<'m, C::Bits>,
) -> TlbGen {
    check_place(mm);
    check_cr3(cpus, here, mm);
    // T1: before looking which CPUs must be told, and even if none must.
    let tlb_gen = mm.raise_tlb_gen();
    cpus.observe(TlbEvent::Raised { ctx_id: mm.ctx_id(), tlb_gen, span: changed });
    let request = FlushRequest::from_flush(kind(tlb_gen), tables, here);
    let targets = match cpus.online_cpus() {
        OnlineCpus::Many if mm.cpumask().has_others(here) => cpus_to_interrupt(cpus, mm, here, tables),
        OnlineCpus::Many | OnlineCpus::One => None,
    };
    match targets {
        // SAFETY: pinned to `here`, interrupts off.
        None => flush_here(cpus, mm, here, || unsafe { flush_tlb_func_inlined(cpus, here, &request) }),
        Some(targets) => interrupt(cpus, mm, &targets, request),
    }
    tlb_gen
}

/// The initiator's own part of a request: runs `flush`, with interrupts off, if this CPU has `mm`
/// loaded. Pinned to `here`.
#[inline(always)]
fn flush_here<C: Cpus>(cpus: &C, mm: &MmContext<C::Bits>, here: CpuId, flush: impl FnOnce()) {
    if cpus.cpu_state(here).has_loaded(mm) {
        cpus.without_interrupts(flush);
    }
}

/// Sends `request` to `targets`, carries it out here meanwhile, and waits for all answers. Kept out
/// of line so that the path without IPIs holds the request in registers.
#[inline(never)]
fn interrupt<C: Cpus>(
    cpus: &C,
    mm: &MmContext<C::Bits>,
    targets: &CpuSet<C::Bits>,
    request: FlushRequest<'_, C::Bits>,
) {
    let here = request.initiator();
    ask(cpus, targets, &request, || {
        // SAFETY: pinned to `here`, interrupts off.
        flush_here(cpus, mm, here, || unsafe { flush_tlb_func(cpus, here, &request) });
    });
    // Not in this crate's unit tests, which record what the flush itself reads.
    if cfg!(all(debug_assertions, not(test))) {
        check_answers(cpus, mm, targets, &request);
    }
    cpus.observe(TlbEvent::IpisSent(targets.len()));
}

/// Checks that each CPU that was told, and this one, has reached the generation that the request
/// asks for, if it has `mm` loaded (rule T2). Debug builds only, because it costs two reads of each
/// target's lines.
fn check_answers<C: Cpus>(
    cpus: &C,
    mm: &MmContext<C::Bits>,
    targets: &CpuSet<C::Bits>,
    request: &FlushRequest<'_, C::Bits>,
) {
    let (FlushKind::Range { tlb_gen, .. } | FlushKind::Mm { tlb_gen, .. }) = *request.kind() else { return };
    for cpu in targets.iter().chain([request.initiator()]) {
        let state = cpus.cpu_state(cpu);
        // The CPU may switch meanwhile: what is read counts only if it had `mm` loaded before and
        // after.
        if !state.has_loaded(mm) {
            continue;
        }
        let slot = state.slot(state.loaded_asid());
        let settled = state.has_loaded(mm) && slot == state.slot(state.loaded_asid());
        if settled && slot.ctx_id == Some(mm.ctx_id()) && slot.tlb_gen < tlb_gen {
            let (ctx_id, initiator) = (mm.ctx_id(), request.initiator());
            cpus.answered_early(&EarlyAnswer {
                cpu,
                initiator,
                ctx_id,
                reached: slot.tlb_gen,
                asked: tlb_gen,
            });
        }
    }
}

/// Decides which other CPUs must be interrupted for a flush of `mm`: of those in the cpumask, each
/// whose [`concern`](crate::CpuTlb::concern) says so; if tables go, each that is not off (rule T5).
///
/// Linux: should_flush_tlb, and the choice between cpumask and condition in native_flush_tlb_multi.
///
/// `None` if there are none, because a set may be large.
#[inline(never)]
fn cpus_to_interrupt<C: Cpus>(
    cpus: &C,
    mm: &MmContext<C::Bits>,
    here: CpuId,
    tables: FreedTables,
) -> Option<CpuSet<C::Bits>> {
    let mut targets: Option<CpuSet<C::Bits>> = None;
    let mut add = |cpu| targets.get_or_insert_with(CpuSet::empty).insert(cpu);
    let (mut lazy, mut elsewhere) = (0, 0);
    mm.cpumask().for_each_but(here, |cpu| {
        match cpus.cpu_state(cpu).concern(Some(mm)) {
            // It walks nothing, and would never answer.
            Concern::Offline => elsewhere += 1,
            // T5: speculation on a lazy CPU still walks the tables.
            _ if tables == FreedTables::Yes => add(cpu),
            Concern::MustFlush => add(cpu),
            Concern::Lazy => lazy += 1,
            Concern::Elsewhere => elsewhere += 1,
        }
    });
    if lazy + elsewhere > 0 {
        cpus.observe(TlbEvent::IpisSaved { lazy, elsewhere });
    }
    targets
}

/// Makes reclaim's deferred flushes of `mm`, if any may be outstanding.
///
/// Whoever takes a table lock and draws conclusions from an empty entry must call this first:
/// reclaim may have cleared the entry, and its flush may be still to come.
///
/// # Context
/// Under the table lock in question; then as for [`flush_tlb_mm_range`].
///
/// # Source
/// Linux: flush_tlb_batched_pending, mm/rmap.c.
pub fn flush_tlb_batched_pending<C: Cpus>(cpus: &C, mm: &MmContext<C::Bits>) {
    if mm.has_deferred_flushes() {
        let _made_up_for = flush_tlb_mm(cpus, mm);
    }
}

/// Has every CPU in `cpumask` bring what it has loaded up to date.
pub(crate) fn flush_all_updated<C: Cpus>(cpus: &C, cpumask: &CpuSet<C::Bits>) -> Flushed {
    cpus.observe(TlbEvent::Requested { pages: None, tables: FreedTables::No });
    cpus.pinned(|here| {
        let request = FlushRequest::from_flush(FlushKind::AllUpdated, FreedTables::No, here);
        let mut targets = CpuSet::empty();
        let mut lazy = 0;
        cpumask.for_each_but(here, |cpu| match cpus.cpu_state(cpu).concern(None) {
            Concern::Lazy => lazy += 1,
            Concern::Offline | Concern::Elsewhere => {}
            Concern::MustFlush => targets.insert(cpu),
        });
        if lazy > 0 {
            cpus.observe(TlbEvent::IpisSaved { lazy, elsewhere: 0 });
        }
        let meanwhile = || {
            if cpumask.contains(here) {
                // SAFETY: pinned to `here`, interrupts off.
                cpus.without_interrupts(|| unsafe { flush_tlb_func(cpus, here, &request) });
            }
        };
        if targets.is_empty() {
            meanwhile();
        } else {
            ask(cpus, &targets, &request, meanwhile);
            cpus.observe(TlbEvent::IpisSent(targets.len()));
        }
    });
    Flushed::of_batch()
}

impl<B: CpuBits> MmContext<B> {
    /// Whether any CPU in the cpumask really has this address space in CR3, by its own account.
    ///
    /// For assertions before a root is freed; the answer is final only when no CPU can switch to it
    /// any more.
    #[must_use]
    pub fn is_loaded_somewhere<C: Cpus<Bits = B>>(&self, cpus: &C) -> bool {
        self.cpumask().iter().any(|cpu| cpus.cpu_state(cpu).has_loaded(self))
    }

    /// Whether any CPU may have this address space in CR3: a CPU that is between two spaces may
    /// still be on its way out.
    ///
    /// Where this says yes, [`flush_tlb_mm`] makes sure: a CPU answers once it has arrived
    /// elsewhere.
    #[must_use]
    pub fn may_be_loaded_somewhere<C: Cpus<Bits = B>>(&self, cpus: &C) -> bool {
        self.cpumask().iter().any(|cpu| cpus.cpu_state(cpu).may_have_loaded(self))
    }
}
