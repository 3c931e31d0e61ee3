//! What is kept of one address space for its flushes.

use core::ops::Deref;
use core::sync::atomic::{AtomicU64, Ordering};

use mmu_tlb::{CpuBits, MmContext};

/// What a [`MmOf`](crate::MmOf) keeps for its flushes: [`MmContext`], if the engine flushes, or
/// [`OwnContext`], if the kernel does. There is no other.
pub trait TlbContext: sealed::Sealed {
    /// Whether a flush of this address space may be owed: what a gather finds empty may still be
    /// used by a CPU then.
    fn has_deferred_flushes(&self) -> bool;

    /// Notes that entries were cleared for which nobody is going to flush; whoever looks next
    /// flushes the whole address space.
    ///
    /// # Context
    /// The lock of the table whose entries were cleared is held, or they were cleared before it was
    /// dropped last.
    fn owe_flush(&self);
}

pub(crate) mod sealed {
    pub trait Sealed {
        /// Calls `flush`, which flushes the whole address space, and notes that it made up for the
        /// flushes that were owed when it began.
        fn flush_whole(&self, flush: impl FnOnce());
    }
}

impl<B: CpuBits> TlbContext for MmContext<B> {
    #[inline(always)]
    fn has_deferred_flushes(&self) -> bool {
        Self::has_deferred_flushes(self)
    }

    #[inline(always)]
    fn owe_flush(&self) {
        Self::owe_flush(self);
    }
}

impl<B: CpuBits> sealed::Sealed for MmContext<B> {
    #[inline(always)]
    fn flush_whole(&self, flush: impl FnOnce()) {
        // The flush itself notes it.
        flush();
    }
}

/// What is kept of an address space that the kernel itself flushes: whatever the kernel's flush
/// needs to find it (`key`: an ASID, the root, a set of CPUs), and the flushes that are owed.
///
/// It derefs to `key`.
#[derive(Debug)]
pub struct OwnContext<T> {
    key: T,
    /// Flushes that were owed, ever.
    owed: AtomicU64,
    /// How many of them have been made up for. Neither count goes down, and 64 bits do not wrap.
    made_up_for: AtomicU64,
}

impl<T> OwnContext<T> {
    /// The context of an address space that `key` stands for.
    #[must_use]
    pub const fn new(key: T) -> Self {
        Self { key, owed: AtomicU64::new(0), made_up_for: AtomicU64::new(0) }
    }
}

impl<T> Deref for OwnContext<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.key
    }
}

impl<T> TlbContext for OwnContext<T> {
    #[inline]
    fn has_deferred_flushes(&self) -> bool {
        // ORDERING: acquire, pairs with the release in `flush_whole`: whoever finds nothing owed
        // comes after the flush.
        let made_up_for = self.made_up_for.load(Ordering::Acquire);
        // A note made under a table lock is seen by whoever takes that lock next.
        self.owed.load(Ordering::Relaxed) != made_up_for
    }

    #[cold]
    fn owe_flush(&self) {
        // ORDERING: release, pairs with the acquire in `flush_whole`: the flush that makes up for
        // this comes after the entries were cleared.
        self.owed.fetch_add(1, Ordering::Release);
    }
}

impl<T> sealed::Sealed for OwnContext<T> {
    #[inline]
    fn flush_whole(&self, flush: impl FnOnce()) {
        // Read before the flush: one that is owed later may be for entries cleared too late.
        // ORDERING: acquire, pairs with the release in `owe_flush`.
        let owed = self.owed.load(Ordering::Acquire);
        flush();
        if owed != self.made_up_for.load(Ordering::Relaxed) {
            // ORDERING: release, pairs with the acquire in `has_deferred_flushes`. The larger
            // number, because a flush that began later may have ended sooner.
            self.made_up_for.fetch_max(owed, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::sealed::Sealed;
    use super::*;

    #[test]
    fn a_whole_flush_makes_up_for_what_was_owed_when_it_began_and_for_nothing_later() {
        let context = OwnContext::new(7);
        assert!(!context.has_deferred_flushes());
        context.owe_flush();
        assert!(context.has_deferred_flushes());
        context.flush_whole(|| context.owe_flush());
        assert!(context.has_deferred_flushes(), "the second came while the flush was under way");
        context.flush_whole(|| ());
        assert!(!context.has_deferred_flushes());
        assert_eq!(*context, 7);
    }

    #[test]
    fn of_two_flushes_at_once_the_one_that_began_first_takes_nothing_back() {
        let context = OwnContext::new(());
        context.owe_flush();
        context.flush_whole(|| {
            context.owe_flush();
            context.flush_whole(|| ());
        });
        assert!(!context.has_deferred_flushes());
    }
}
