//! What names a flush: which context, and which generation of it.
#![expect(unsafe_code, reason = "a source of names is taken on trust")]

use core::marker::PhantomPinned;
use core::num::NonZeroU64;

use x86_64::structures::paging::PhysFrame;

use crate::cpuset::{CpuBits, CpuSet};
use crate::sync::{AtomicU64, Ordering, fetch_add_fenced};

/// The unique name of one address space, never zero and never used again.
///
/// Linux: mm_context_t::ctx_id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CtxId(NonZeroU64);

impl CtxId {
    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0.get()
    }

    pub(crate) const fn from_raw(raw: u64) -> Option<Self> {
        match NonZeroU64::new(raw) {
            Some(id) => Some(Self(id)),
            None => None,
        }
    }
}

/// The source of [`CtxId`]s. An embedder keeps exactly one for all address spaces whose CPUs it
/// shares.
///
/// Starts at 2: 1 is the kernel's own address space (Linux: init_mm).
#[derive(Debug)]
pub struct CtxIds(AtomicU64);

impl CtxIds {
    /// A source that has given out no name.
    #[cfg(not(mmu_loom))]
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU64::new(1))
    }

    /// A source that has given out no name.
    #[cfg(mmu_loom)]
    #[must_use]
    pub fn new() -> Self {
        Self(AtomicU64::new(1))
    }

    /// A name that was never given out before. At a billion a second the numbers last 584 years.
    ///
    /// # Panics
    /// When they are used up.
    pub fn allocate(&self) -> CtxId {
        let last = self.0.fetch_add(1, Ordering::Relaxed);
        CtxId::from_raw(last.wrapping_add(1)).expect("fewer than 2^64 address spaces are ever made")
    }
}

impl Default for CtxIds {
    fn default() -> Self {
        Self::new()
    }
}

/// How many flushes of one address space have been asked for.
///
/// `(ctx_id, tlb_gen)` names a flush: whoever is at that generation has forgotten all that was
/// changed before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TlbGen(u64);

impl TlbGen {
    /// The generation of an address space that was never flushed.
    pub const START: Self = Self(0);

    /// Generation number `number`.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The generation after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.wrapping_add(1))
    }
}

/// What this crate keeps of one address space. An embedder puts it in its mm structure.
///
/// A CPU that has the context loaded knows it by its address, so it must not move:
/// [`switch_mm`](crate::switch_mm) takes it pinned, and it is not `Unpin`.
///
/// Linux: mm_context_t and mm_cpumask.
///
/// Two cache lines, aligned to one, so that CPUs that flush different address spaces write no line
/// in common. The generation, which every flush writes, has a line to itself: threads of one
/// program that unmap at the same time read the rest from copies of their own.
#[doc(alias = "mm_context_t")]
#[derive(Debug)]
#[repr(align(64))]
pub struct MmContext<B: CpuBits> {
    ctx_id: CtxId,
    root: PhysFrame,
    tlb_gen: OwnLine,
    cpumask: CpuSet<B>,
    /// Reclaim's deferred flushes: how many were asked for (low half), and up to which of them the
    /// flush is done (high half).
    deferred: AtomicU64,
    /// Where the context is, once a CPU has loaded it; 0 before.
    #[cfg(debug_assertions)]
    place: core::sync::atomic::AtomicUsize,
    _stays_where_it_is: PhantomPinned,
}

/// A number in a cache line of its own.
#[derive(Debug)]
#[repr(align(64))]
struct OwnLine(AtomicU64);

#[cfg(not(mmu_loom))]
static_assertions::const_assert_eq!(align_of::<MmContext<[AtomicU64; 1]>>(), 64);

impl<B: CpuBits> MmContext<B> {
    /// The context of a new address space whose top table is `root`. No CPU may have `root` loaded
    /// yet.
    ///
    /// # Safety
    /// - `ids` is the one source of names for all address spaces of the machine: a CPU's slot and a
    ///   receipt ([`Flushed`](crate::Flushed)) know a context by its name alone;
    /// - `root` is the root of no other context: a flush of that other context would not reach the
    ///   CPUs that have this one loaded.
    #[must_use]
    pub unsafe fn new(ids: &CtxIds, root: PhysFrame) -> Self {
        Self {
            ctx_id: ids.allocate(),
            root,
            tlb_gen: OwnLine(AtomicU64::new(TlbGen::START.0)),
            cpumask: CpuSet::empty(),
            deferred: AtomicU64::new(0),
            #[cfg(debug_assertions)]
            place: core::sync::atomic::AtomicUsize::new(0),
            _stays_where_it_is: PhantomPinned,
        }
    }

    /// Debug builds: a CPU loads the context, which stays here from now on.
    #[cfg(debug_assertions)]
    pub(crate) fn note_place(&self) {
        let here = core::ptr::from_ref(self).addr();
        // A failed exchange means that it has been loaded before, here or elsewhere.
        let _ = self.place.compare_exchange(0, here, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Debug builds: where the context was when a CPU loaded it first, if it is elsewhere now.
    #[cfg(debug_assertions)]
    pub(crate) fn moved_from(&self) -> Option<usize> {
        let before = self.place.load(Ordering::Relaxed);
        (before != 0 && before != core::ptr::from_ref(self).addr()).then_some(before)
    }

    /// The context's unique name.
    #[must_use]
    #[inline]
    pub const fn ctx_id(&self) -> CtxId {
        self.ctx_id
    }

    /// The frame that CR3 must point to.
    #[must_use]
    pub const fn root(&self) -> PhysFrame {
        self.root
    }

    /// The generation that the address space has reached.
    #[must_use]
    #[inline]
    pub fn tlb_gen(&self) -> TlbGen {
        // ORDERING: acquire, pairs with `raise_tlb_gen`: whoever sees a generation sees the page
        // tables as they were when it was raised, and fills its TLB from those or newer ones.
        TlbGen(self.tlb_gen.0.load(Ordering::Acquire))
    }

    /// The CPUs that may have this address space in CR3. A CPU that has it loaded is always a
    /// member; a member may have left already and not yet been taken out. Linux: mm_cpumask.
    #[doc(alias = "mm_cpumask")]
    #[must_use]
    #[inline]
    pub const fn cpumask(&self) -> &CpuSet<B> {
        &self.cpumask
    }

    /// Declares everything older stale and returns the new generation.
    ///
    /// Call it after the page table was changed, and before looking which CPUs must be told (rule
    /// T1). It is a full fence on both sides.
    ///
    /// Linux: inc_mm_tlb_gen.
    #[doc(alias = "inc_mm_tlb_gen")]
    #[inline]
    pub fn raise_tlb_gen(&self) -> TlbGen {
        // ORDERING: the fence before it pairs with the acquire in `tlb_gen`: the page-table change
        // comes first. The fence behind it pairs with the fences of `switch_mm` and of the lazy
        // exit in switch.rs; one of the two must see the other: they the new generation, or we (in
        // the reads that follow) them as CPUs to tell.
        TlbGen(fetch_add_fenced(&self.tlb_gen.0, 1) + 1)
    }

    /// Notes that reclaim cleared entries here and has raised the generation, and that nobody was
    /// told yet.
    pub(crate) fn note_deferred_flush(&self) {
        // The order must be: clear the entry, raise the generation, note it here. All callers hold
        // the table lock of the entry, which orders this note against a call of
        // `has_deferred_flushes` after the same lock was taken.
        let mut word = self.deferred.load(Ordering::Relaxed);
        loop {
            let (pending, flushed) = halves(word);
            // When the count is used up it starts again at "one pending, nothing flushed": one
            // flush too many.
            let new = if pending == u32::MAX { join(1, 0) } else { join(pending + 1, flushed) };
            match self.deferred.compare_exchange_weak(word, new, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return,
                Err(found) => word = found,
            }
        }
    }

    /// Whether flushes of this address space may be owed: reclaim's deferred ones, or those of a
    /// call that unwound.
    ///
    /// Whoever draws conclusions from an empty entry must ask, after taking the lock of the entry's
    /// table: reclaim may have cleared the entry, and its flush may be still to come. A full flush
    /// ([`flush_tlb_mm`](crate::flush_tlb_mm)) makes up for all that is owed when it begins. Make
    /// it at once ([`flush_tlb_batched_pending`](crate::flush_tlb_batched_pending)), or before the
    /// conclusion matters.
    #[must_use]
    #[inline]
    pub fn has_deferred_flushes(&self) -> bool {
        self.deferred_flushes().is_some()
    }

    /// How far the deferred flushes have come, if some may be outstanding.
    #[inline]
    pub(crate) fn deferred_flushes(&self) -> Option<DeferredFlushes> {
        // ORDERING: acquire, pairs with `note_deferred_flush`: the entries that the note stands for
        // are cleared for whoever flushes now.
        let word = self.deferred.load(Ordering::Acquire);
        let (pending, flushed) = halves(word);
        (pending != flushed).then_some(DeferredFlushes(word))
    }

    /// Notes that a full flush of this address space, begun after `deferred` was read, has
    /// completed. Flushes deferred later stay outstanding.
    pub(crate) fn deferred_flushes_done(&self, deferred: DeferredFlushes) {
        let (pending, _) = halves(deferred.0);
        // A failed exchange means that reclaim has deferred more meanwhile. Those stay pending, and
        // so do the ones that were flushed: one flush too many.
        let done = join(pending, pending);
        // ORDERING: release, pairs with the acquire in `deferred_flushes`: whoever finds nothing
        // owed comes after the flush.
        let _ = self.deferred.compare_exchange(deferred.0, done, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Notes that a flush of this address space is owed and nobody may be left to make it.
    /// Everything older is declared stale, and the next to look
    /// ([`has_deferred_flushes`](Self::has_deferred_flushes)) flushes all of it.
    ///
    /// For a caller that cleared entries and cannot go on, because one of the kernel's own
    /// functions that it called unwound.
    ///
    /// # Context
    /// The lock of the table whose entries were cleared is held, or they were cleared before it was
    /// dropped last.
    #[cold]
    pub fn owe_flush(&self) {
        self.raise_tlb_gen();
        self.note_deferred_flush();
    }
}

/// How far the deferred flushes had come when somebody looked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a deferred flush that was seen must be made up for"]
pub(crate) struct DeferredFlushes(u64);

const fn halves(word: u64) -> (u32, u32) {
    ((word & 0xffff_ffff) as u32, (word >> 32) as u32)
}

fn join(pending: u32, flushed: u32) -> u64 {
    u64::from(flushed) << 32 | u64::from(pending)
}

#[cfg(all(test, not(mmu_loom)))]
mod tests {
    use x86_64::PhysAddr;

    use super::*;

    fn context() -> MmContext<[AtomicU64; 1]> {
        // SAFETY: it is flushed nowhere.
        unsafe { MmContext::new(&CtxIds::new(), PhysFrame::containing_address(PhysAddr::new(0x1000))) }
    }

    #[test]
    fn a_count_of_deferred_flushes_that_is_used_up_never_says_that_none_is_pending() {
        for flushed in [0, 1, u32::MAX - 1, u32::MAX] {
            let mm = context();
            mm.deferred.store(join(u32::MAX, flushed), Ordering::Relaxed);
            for _ in 0..3 {
                mm.note_deferred_flush();
                assert!(mm.has_deferred_flushes(), "flushed up to {flushed}");
            }
        }
    }

    #[test]
    fn a_full_flush_makes_up_for_what_was_owed_when_it_began_and_for_nothing_later() {
        let mm = context();
        assert!(!mm.has_deferred_flushes());
        mm.owe_flush();
        let first = mm.deferred_flushes().expect("one is owed");
        mm.owe_flush();
        mm.deferred_flushes_done(first);
        assert!(mm.has_deferred_flushes(), "the second came later");
        let both = mm.deferred_flushes().expect("two are owed");
        mm.deferred_flushes_done(both);
        assert!(!mm.has_deferred_flushes());
    }
}
