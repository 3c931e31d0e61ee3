//! What one CPU does about a flush request: the decision, and the flush.
#![expect(unsafe_code, reason = "follows loaded_mm and switches away")]

use crate::cpu_state::{Laziness, LoadedMm};
use crate::cpuset::CpuId;
use crate::generation::{MmContext, TlbGen};
use crate::mmu::{Cpus, TlbEvent};
use crate::request::{FlushKind, FlushRequest, Wanted};
use crate::switch::{flush_context, switch_mm};

/// What this CPU has loaded, as a request sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadedIs {
    /// The kernel's own address space: nothing to flush.
    Init,
    /// What the request names; or any address space, for [`Wanted::AllUpdated`].
    Requested,
    /// Some other address space.
    Other,
}

/// Everything that the decision depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Situation {
    /// What is loaded.
    pub loaded: LoadedIs,
    /// Whether the CPU merely borrows what is loaded.
    pub laziness: Laziness,
    /// The generation of the CPU's slot for what is loaded.
    pub local_gen: TlbGen,
    /// The generation that the address space has reached.
    pub mm_gen: TlbGen,
}

/// What a CPU does about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing, and the slot stays as it is.
    Nothing(WhyNothing),
    /// Takes itself out of the cpumask: it runs something else.
    LeaveCpumask,
    /// Goes to the kernel's own address space, and takes itself out of the cpumask; the slot keeps
    /// its old generation.
    LoadInit,
    /// Invalidates the pages that the request names and raises the slot to this generation.
    Pages(TlbGen),
    /// Drops the whole context and raises the slot to this generation.
    All(TlbGen),
}

/// Why nothing needs to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhyNothing {
    /// The kernel's own address space has no user translations.
    Init,
    /// An earlier flush brought the slot to the generation asked for, or beyond.
    AlreadyThere,
}

/// Decides what a CPU in `situation` does about a request. Total, and without side effects.
///
/// A ranged flush is enough only from the generation just before the one asked for (rule T3). It is
/// also refused when the address space has a later generation by now. That is merely an
/// optimisation: the full flush spares the next request.
///
/// # Panics
/// In a debug build, in a situation that cannot be: a slot ahead of its address space, or a
/// generation asked for that the address space has not reached.
///
/// # Source
/// Linux: flush_tlb_func, arch/x86/mm/tlb.c.
///
/// # Example
/// ```
/// use mmu_tlb::{Action, Laziness, LoadedIs, Situation, TlbGen, Wanted, plan};
///
/// let at = |local_gen, laziness| Situation {
///     loaded: LoadedIs::Requested,
///     laziness,
///     local_gen: TlbGen::new(local_gen),
///     mm_gen: TlbGen::new(7),
/// };
/// let wanted = Wanted::Range(TlbGen::new(7));
/// // From the generation before, the pages are enough; a CPU that missed one drops everything.
/// assert_eq!(plan(wanted, at(6, Laziness::Active)), Action::Pages(TlbGen::new(7)));
/// assert_eq!(plan(wanted, at(5, Laziness::Active)), Action::All(TlbGen::new(7)));
/// // A lazy CPU goes to the kernel's own address space instead.
/// assert_eq!(plan(wanted, at(6, Laziness::Lazy)), Action::LoadInit);
/// ```
#[must_use]
#[inline]
pub fn plan(wanted: Wanted, situation: Situation) -> Action {
    let Situation { loaded, laziness, local_gen, mm_gen } = situation;
    match loaded {
        LoadedIs::Other => return Action::LeaveCpumask,
        LoadedIs::Init => return Action::Nothing(WhyNothing::Init),
        LoadedIs::Requested => {}
    }
    if laziness == Laziness::Lazy {
        return Action::LoadInit;
    }
    let asked = match wanted {
        Wanted::Range(tlb_gen) | Wanted::Mm(tlb_gen) => Some(tlb_gen),
        Wanted::AllUpdated => None,
    };
    if local_gen == mm_gen || asked.is_some_and(|asked| asked <= local_gen) {
        return Action::Nothing(WhyNothing::AlreadyThere);
    }
    debug_assert!(local_gen < mm_gen, "T2: slot at {local_gen:?} is ahead of its mm at {mm_gen:?}");
    debug_assert!(asked.is_none_or(|asked| asked <= mm_gen), "T1: asked for {asked:?}, mm at {mm_gen:?}");
    match wanted {
        Wanted::Range(tlb_gen) if tlb_gen == local_gen.next() && tlb_gen == mm_gen => Action::Pages(mm_gen),
        _ => Action::All(mm_gen),
    }
}

/// Does on this CPU what `request` asks. [`flush_interrupt`](crate::flush_interrupt) calls this for
/// each request that came by mail; the handler of a kernel that overrides
/// [`flush_others`](crate::Cpus::flush_others) calls it, and nothing else of this crate.
///
/// # Context
/// Interrupts are off. Allocates nothing, takes no lock, never sleeps.
///
/// # Safety
/// Runs on `cpu` with interrupts off from before the call until after it.
///
/// # Source
/// Linux: flush_tlb_func, arch/x86/mm/tlb.c.
pub unsafe fn flush_tlb_func<C: Cpus>(cpus: &C, cpu: CpuId, request: &FlushRequest<'_, C::Bits>) {
    // SAFETY: passed on to our caller.
    unsafe { flush_tlb_func_inlined(cpus, cpu, request) };
}

/// [`flush_tlb_func`], inlined into the initiator, which knows the kind of its request.
///
/// # Safety
/// As for [`flush_tlb_func`].
#[inline(always)]
pub(crate) unsafe fn flush_tlb_func_inlined<C: Cpus>(
    cpus: &C,
    cpu: CpuId,
    request: &FlushRequest<'_, C::Bits>,
) {
    let state = cpus.cpu_state(cpu);
    // SAFETY: interrupts are off on this CPU, so it cannot switch under us.
    let loaded = unsafe { state.loaded_mm() };
    let target = match *request.kind() {
        FlushKind::Range { mm, .. } | FlushKind::Mm { mm, .. } => Some(mm),
        FlushKind::AllUpdated => None,
    };
    let asid = state.loaded_asid();
    let local_gen = state.slot(asid).tlb_gen;
    let wanted = request.wanted();
    // The generation is read before anything is flushed. What is cached afterwards comes from
    // tables at least as new, so the slot may be raised to this generation. It is not read when the
    // slot shows that the request is satisfied, because every CPU that flushes `mm` writes the
    // line of the generation.
    let generation_of = |mm: &MmContext<C::Bits>| match wanted {
        Wanted::Range(asked) | Wanted::Mm(asked) if asked <= local_gen => local_gen,
        _ => mm.tlb_gen(),
    };
    let (loaded_is, mm_gen) = match (&loaded, target) {
        (LoadedMm::Mm(mm), None) => (LoadedIs::Requested, generation_of(mm)),
        (LoadedMm::Mm(mm), Some(target)) if core::ptr::eq(*mm, target) => {
            (LoadedIs::Requested, generation_of(mm))
        }
        (LoadedMm::Init | LoadedMm::Offline, None) => (LoadedIs::Init, TlbGen::START),
        _ => (LoadedIs::Other, TlbGen::START),
    };
    cpus.between_flush_steps();
    let situation = Situation { loaded: loaded_is, laziness: state.laziness(), local_gen, mm_gen };
    let event = match plan(wanted, situation) {
        Action::Nothing(_) => TlbEvent::AlreadyCurrent,
        Action::LeaveCpumask => {
            if let Some(mm) = target {
                // A CPU that is between two spaces is in the next one's mask already; but
                // interrupts are off then, so no request finds it there.
                mm.cpumask().clear(cpu);
            }
            TlbEvent::AlreadyCurrent
        }
        Action::LoadInit => {
            // SAFETY: on this CPU, interrupts off.
            unsafe { switch_mm(cpus, cpu, None) };
            // After CR3, because from here on nobody asks this CPU. Only the context that the
            // request names is touched: it lives, because the initiator waits. Another context may
            // be gone by now, because whoever looks for CPUs that have it loaded finds none.
            if let Some(mm) = target {
                mm.cpumask().clear(cpu);
            }
            TlbEvent::LeftLazyMm
        }
        Action::Pages(raise_to) => {
            let (LoadedMm::Mm(mm), FlushKind::Range { span, .. }) = (&loaded, request.kind()) else { return };
            for page in span.pages() {
                cpus.invlpg(page);
            }
            cpus.between_flush_steps();
            // INVARIANT: T2, every change between local_gen and raise_to lies in the pages just
            // invalidated.
            state.set_slot(asid, mm.ctx_id(), raise_to);
            TlbEvent::FlushedPages(span.nr_pages())
        }
        Action::All(raise_to) => {
            let LoadedMm::Mm(mm) = loaded else { return };
            flush_context(cpus, state, mm, asid, raise_to);
            match *request.kind() {
                FlushKind::Range { .. } => TlbEvent::FlushedAllForPages,
                FlushKind::Mm { .. } | FlushKind::AllUpdated => TlbEvent::FlushedAll,
            }
        }
    };
    cpus.observe(event);
}
