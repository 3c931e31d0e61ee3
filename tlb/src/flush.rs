//! A flush request, the decision what one CPU does about it, and the doing.
#![expect(unsafe_code, reason = "follows loaded_mm and loads CR3")]

use core::fmt;

use crate::cpu_state::{Asid, CpuTlb, Laziness, LoadedMm};
use crate::cpuset::{CpuBits, CpuId};
use crate::generation::{MmContext, TlbGen};
use crate::mmu::{CachedTranslations, Cpus, TlbEvent};
use crate::switch;

/// A run of pages of one size: `start..end` in bytes, every `1 << stride_shift` bytes a page to invalidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageSpan {
    /// First byte, aligned to the stride.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// 12, 21 or 30: the smallest page size whose entry was changed. One INVLPG drops a page whatever its size. (64 and more are
    /// taken modulo 64.)
    pub stride_shift: u32,
}

impl PageSpan {
    /// How many INVLPGs it takes. A span that ends before it begins is more than any ceiling allows: `u64::MAX`.
    #[must_use]
    #[inline]
    pub const fn nr_pages(self) -> u64 {
        match self.end.checked_sub(self.start) {
            // Both addresses are user ones where it matters: this saturates for no other.
            Some(length) => length.saturating_add((1 << self.shift()) - 1) >> self.shift(),
            None => u64::MAX,
        }
    }

    /// The stride, as the processor shifts by it.
    #[inline]
    const fn shift(self) -> u32 {
        self.stride_shift & (u64::BITS - 1)
    }

    /// The addresses to invalidate; of a span that makes no sense, none.
    #[inline]
    pub fn pages(self) -> impl Iterator<Item = u64> {
        let nr_pages = match self.nr_pages() {
            u64::MAX => 0,
            nr_pages => nr_pages,
        };
        (0..nr_pages).map(move |page| self.start.wrapping_add(page << self.shift()))
    }
}

/// Whether page tables were freed along with the entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreedTables {
    /// Only leaves were changed: lazy CPUs may wait until they wake.
    No,
    /// Tables go: every CPU in the cpumask must drop its paging-structure caches, lazy ones too (rule T5).
    Yes,
}

/// The three kinds of flush. Linux encodes them in the mm, end and new_tlb_gen of flush_tlb_info.
#[derive(Debug)]
pub enum FlushKind<'a, B: CpuBits> {
    /// Part of one address space: all that changed between generation `tlb_gen` - 1 and `tlb_gen` lies in `span`.
    Range {
        /// Whose.
        mm: &'a MmContext<B>,
        /// Up to here.
        tlb_gen: TlbGen,
        /// Where.
        span: PageSpan,
    },
    /// All of one address space, up to `tlb_gen`.
    Mm {
        /// Whose.
        mm: &'a MmContext<B>,
        /// Up to here.
        tlb_gen: TlbGen,
    },
    /// Whatever is loaded, up to whatever generation it has reached: the flush of a reclaim batch.
    AllUpdated,
}

/// A request as it travels to other CPUs. Linux: struct flush_tlb_info.
///
/// A CPU believes what it says: only the flush functions make one, or who answers for its contents.
#[doc(alias = "flush_tlb_info")]
#[derive(Debug)]
pub struct FlushRequest<'a, B: CpuBits> {
    kind: FlushKind<'a, B>,
    tables: FreedTables,
    initiator: CpuId,
}

impl<'a, B: CpuBits> FlushRequest<'a, B> {
    /// A request put together by hand: by a kernel that sends requests as messages and rebuilds them on arrival.
    ///
    /// # Safety
    /// `kind` says no more than is true: its address space has reached the generation it names, and all that changed between
    /// the generation before and that one lies in its span. A CPU that carries it out counts itself up to date.
    #[must_use]
    pub const unsafe fn new(kind: FlushKind<'a, B>, tables: FreedTables, initiator: CpuId) -> Self {
        Self { kind, tables, initiator }
    }

    #[inline(always)]
    pub(crate) const fn made(kind: FlushKind<'a, B>, tables: FreedTables, initiator: CpuId) -> Self {
        Self { kind, tables, initiator }
    }

    /// What to forget.
    #[must_use]
    #[inline]
    pub const fn kind(&self) -> &FlushKind<'a, B> {
        &self.kind
    }

    /// Whether tables go too.
    #[must_use]
    #[inline]
    pub const fn tables(&self) -> FreedTables {
        self.tables
    }

    /// The CPU that asks and waits.
    #[must_use]
    #[inline]
    pub const fn initiator(&self) -> CpuId {
        self.initiator
    }

    /// The part of the request that decides.
    #[must_use]
    #[inline]
    pub const fn wanted(&self) -> Wanted {
        match self.kind {
            FlushKind::Range { tlb_gen, .. } => Wanted::Range(tlb_gen),
            FlushKind::Mm { tlb_gen, .. } => Wanted::Mm(tlb_gen),
            FlushKind::AllUpdated => Wanted::AllUpdated,
        }
    }
}

/// What a request wants, without naming whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A range, to reach this generation.
    Range(TlbGen),
    /// Everything of one address space, to reach this generation.
    Mm(TlbGen),
    /// Everything of the loaded address space, whatever it is.
    AllUpdated,
}

/// What this CPU has loaded, seen from a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadedIs {
    /// The kernel's own: nothing to flush.
    Init,
    /// What the request names, or anything for [`Wanted::AllUpdated`].
    Requested,
    /// Some other address space.
    Other,
}

/// Everything the decision depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Situation {
    /// What is loaded.
    pub loaded: LoadedIs,
    /// Whether the CPU merely borrows it.
    pub laziness: Laziness,
    /// The generation of the CPU's slot for it.
    pub local_gen: TlbGen,
    /// The generation the address space has reached.
    pub mm_gen: TlbGen,
}

/// What a CPU does about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing, and the slot stays as it is.
    Nothing(WhyNothing),
    /// Takes itself out of the cpumask: it runs something else.
    LeaveCpumask,
    /// Goes to the kernel's own address space, and takes itself out of the cpumask; the slot keeps its old generation.
    LoadInit,
    /// Invalidates the pages named and raises the slot to this generation.
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
/// A ranged flush is enough only from the generation just before the one asked for (rule T3); and it is refused, merely
/// as an optimisation, when the address space has moved on meanwhile: the full flush then spares the next request.
///
/// # Panics
/// In a debug build, in a situation that cannot be: a slot ahead of its address space, a generation asked for that it has not
/// reached.
///
/// # Source
/// Linux: flush_tlb_func, arch/x86/mm/tlb.c.
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

/// Does on this CPU what `request` asks. An embedder's handler for the flush interrupt calls this, and nothing else of
/// this crate.
///
/// # Context
/// Interrupts are off. Allocates nothing, takes no lock, sleeps never.
///
/// # Safety
/// Runs on `cpu` with interrupts off from before the call until after it.
///
/// # Source
/// Linux: flush_tlb_func, arch/x86/mm/tlb.c.
pub unsafe fn flush_tlb_func<C: Cpus>(cpus: &C, cpu: CpuId, request: &FlushRequest<'_, C::Bits>) {
    // SAFETY: passed on to our caller.
    unsafe { carry_out(cpus, cpu, request) };
}

/// The same, inlined: whoever made the request knows its kind.
///
/// # Safety
/// As for [`flush_tlb_func`].
#[inline(always)]
pub(crate) unsafe fn carry_out<C: Cpus>(cpus: &C, cpu: CpuId, request: &FlushRequest<'_, C::Bits>) {
    let state = cpus.cpu_state(cpu);
    // SAFETY: interrupts are off on this CPU, so it cannot switch under us.
    let loaded = unsafe { state.loaded_mm() };
    let target = match request.kind {
        FlushKind::Range { mm, .. } | FlushKind::Mm { mm, .. } => Some(mm),
        FlushKind::AllUpdated => None,
    };
    let asid = state.loaded_asid();
    let local_gen = state.slot(asid).tlb_gen;
    let wanted = request.wanted();
    // The generation is read before anything is flushed: what is filled in afterwards comes from tables at least as new.
    // That is why the slot may be raised to it. It is not read at all, because every CPU that flushes `mm` writes its
    // line, when the slot shows that the request is satisfied.
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
    let situation = Situation { loaded: loaded_is, laziness: state.laziness(), local_gen, mm_gen };
    let event = match plan(wanted, situation) {
        Action::Nothing(_) => TlbEvent::AlreadyCurrent,
        Action::LeaveCpumask => {
            if let Some(mm) = target {
                // Between two spaces this CPU has joined the next one's mask already; interrupts are off then, so a
                // request never finds it there.
                mm.cpumask().clear(cpu);
            }
            TlbEvent::AlreadyCurrent
        }
        Action::LoadInit => {
            // SAFETY: on this CPU, interrupts off.
            unsafe { switch::switch_mm(cpus, cpu, None) };
            // After CR3: from here on nobody asks this CPU. A context that the request does not name may be gone by now, for
            // whoever looks for CPUs that have it loaded finds none; the one it names lives, for the initiator waits.
            if let Some(mm) = target {
                mm.cpumask().clear(cpu);
            }
            TlbEvent::LeftLazyMm
        }
        Action::Pages(raise_to) => {
            let (LoadedMm::Mm(mm), FlushKind::Range { span, .. }) = (&loaded, &request.kind) else { return };
            for page in span.pages() {
                cpus.invlpg(page);
            }
            // INVARIANT: T2, every change between local_gen and raise_to lies in the pages just invalidated.
            state.set_slot(asid, mm.ctx_id(), raise_to);
            TlbEvent::FlushedPages(span.nr_pages())
        }
        Action::All(raise_to) => {
            let LoadedMm::Mm(mm) = loaded else { return };
            flush_context(cpus, state, mm, asid, raise_to);
            match request.kind {
                FlushKind::Range { .. } => TlbEvent::FlushedAllForPages,
                FlushKind::Mm { .. } | FlushKind::AllUpdated => TlbEvent::FlushedAll,
            }
        }
    };
    cpus.observe(event);
}

/// Drops everything cached of the loaded `mm` and raises its slot. Interrupts off, on this CPU.
#[inline(never)]
pub(crate) fn flush_context<C: Cpus>(
    cpus: &C,
    state: &CpuTlb<C::Bits>,
    mm: &MmContext<C::Bits>,
    asid: Asid,
    raise_to: TlbGen,
) {
    // SAFETY: `mm` is loaded already: its root maps the kernel and lives. Flushing is always legal.
    unsafe { cpus.load_cr3(mm.root(), asid.pcid(cpus.pcid_support()), CachedTranslations::Flush) };
    // INVARIANT: T2, all of the context was dropped after `raise_to` had been read.
    state.set_slot(asid, mm.ctx_id(), raise_to);
}

impl fmt::Display for PageSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x} by {} KiB", self.start, self.end, (1u64 << self.shift()) >> 10)
    }
}
