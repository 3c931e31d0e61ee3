//! The counts of gathers begun and not yet flushed. Linux: tlb_flush_pending, one for each mm.

#[cfg(not(mmu_loom))]
use core::sync::atomic::{AtomicU64, Ordering};
#[cfg(mmu_loom)]
use loom::sync::atomic::{AtomicU64, Ordering};

/// One count. It has 64 bits, because a gather that is forgotten (`mem::forget`) counts for ever:
/// no number of them makes the count wrap.
#[derive(Debug)]
pub(crate) struct Count(AtomicU64);

impl Count {
    fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    #[inline(always)]
    pub(crate) fn get(&self) -> u64 {
        // ORDERING: acquire, pairs with `close`: its flush comes before what follows here.
        self.0.load(Ordering::Acquire)
    }

    #[inline(always)]
    pub(crate) fn open(&self) {
        // ORDERING: the unlock of a table lock that this gather takes makes the count visible to
        // whoever takes that lock next: a gather that passes over an entry which this one cleared
        // sees the count, too (rule G6).
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    #[inline(always)]
    pub(crate) fn close(&self) {
        // ORDERING: release, so that the count goes down after the flush. Pairs with the load in
        // `get`: whoever sees this gather closed finds its flush completed.
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// How many stripes an address space has. Two threads at work in different tables share one by
/// chance once in sixteen times, and flush more than they must then. (Under loom, which tries every
/// order of the loads, two show as much.)
pub(crate) const NR_STRIPES: usize = if cfg!(mmu_loom) { 2 } else { 16 };

/// The count of a stripe, in a cache line of its own: threads that unmap in different tables write
/// no line in common here.
#[derive(Debug)]
#[repr(align(64))]
struct Stripe(Count);

/// The counts of gathers that look into one table or two.
#[derive(Debug)]
pub(crate) struct Stripes([Stripe; NR_STRIPES]);

impl Stripes {
    /// The count that is `index` modulo their number.
    #[inline(always)]
    pub(crate) const fn count(&self, index: u8) -> &Count {
        &self.0[index as usize % NR_STRIPES].0
    }

    /// The gathers in all of them together.
    #[inline]
    pub(crate) fn sum(&self) -> u64 {
        self.0.iter().map(|stripe| stripe.0.get()).sum()
    }

    /// Whether a gather is counted in any of them.
    #[inline(never)]
    pub(crate) fn any_open(&self) -> bool {
        self.0.iter().fold(0, |any, stripe| any | stripe.0.get()) != 0
    }
}

/// The gathers open on one address space: 1 KiB for the stripes, and 8 bytes.
#[derive(Debug)]
pub(crate) struct OpenGathers<'a> {
    pub(crate) everywhere: &'a Count,
    pub(crate) stripes: &'a Stripes,
}

impl<'a> OpenGathers<'a> {
    /// The counts of a new address space.
    pub(crate) fn none() -> (Count, Stripes) {
        (Count::new(), Stripes(core::array::from_fn(|_| Stripe(Count::new()))))
    }

    /// How many gathers are open, a gather of two stripes counted twice.
    #[inline]
    pub(crate) fn sum(&self) -> u64 {
        self.everywhere.get() + self.stripes.sum()
    }
}
