//! The locks of tables, and where a kernel keeps them.
//!
//! | a kernel has | its [`TableMemory::Lock`](crate::TableMemory::Lock) | kept in |
//! |---|---|---|
//! | metadata for each frame | [`TableLock`] | the metadata, one for each table |
//! | no metadata | [`TableLock`] | [`HashedLocks`], a few for all tables, or one |
//! | address spaces that one thread at a time walks | [`NoLock`] | nothing |
//! | locks of its own | its type, with [`Lock`] | wherever they are |
#![expect(unsafe_code, reason = "what is believed of locks")]

use core::fmt;

use spin::mutex::{SpinMutex, SpinMutexGuard};
use spin::{RelaxStrategy, Spin};
use x86_64::structures::paging::PhysFrame;

/// The lock of one table page. It guards the entries of that page against other software, never
/// against hardware.
///
/// `R` decides what a waiting CPU does. It must keep answering flush requests, or two CPUs that
/// wait for each other stop for ever. Linux: `ptlock_ptr`.
#[doc(alias = "ptlock")]
pub type TableLock<R> = SpinMutex<(), R>;

/// A lock that tables can have: [`TableLock`], [`NoLock`], or a type of the kernel's own.
///
/// # Safety
/// - From when [`lock`](Self::lock) or [`try_lock`](Self::try_lock) hands out a guard until it is
///   dropped, no other guard of the same lock is handed out ([`NoLock`] says who sees to it there).
/// - What was done under one guard is seen under the next: dropping a guard is a release, handing
///   one out an acquire.
pub unsafe trait Lock {
    /// Holds the lock until it is dropped.
    type Guard<'a>
    where
        Self: 'a;

    /// Waits until nobody else holds the lock, and takes it. A CPU that waits keeps answering flush
    /// requests.
    fn lock(&self) -> Self::Guard<'_>;

    /// Takes the lock if nobody holds it, and does not wait.
    fn try_lock(&self) -> Option<Self::Guard<'_>>;
}

// SAFETY: a mutex.
unsafe impl<R: RelaxStrategy> Lock for TableLock<R> {
    type Guard<'a>
        = SpinMutexGuard<'a, (), R>
    where
        R: 'a;

    #[inline]
    fn lock(&self) -> SpinMutexGuard<'_, (), R> {
        SpinMutex::lock(self)
    }

    #[inline]
    fn try_lock(&self) -> Option<SpinMutexGuard<'_, (), R>> {
        SpinMutex::try_lock(self)
    }
}

/// The lock of tables that need none, because one thread at a time walks an address space: its
/// owner, who has it by `&mut`, or holds the map lock for writing.
///
/// It locks nothing, takes no memory, and compiles to nothing. A kernel that names it as
/// [`TableMemory::Lock`](crate::TableMemory::Lock) promises that whoever looks at tables below a
/// root, faults and reclaim among them, keeps everybody else away from that root meanwhile.
/// Hardware is not meant: it may walk at any time. Where a call of the engine asks for the map lock
/// for reading at least, it is then held for writing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoLock;

// SAFETY: a kernel that names this type promises that one thread at a time walks below a root, and
// what keeps the others away passes on what was done.
unsafe impl Lock for NoLock {
    type Guard<'a> = ();

    #[inline]
    fn lock(&self) {}

    #[inline]
    fn try_lock(&self) -> Option<()> {
        Some(())
    }
}

/// `N` locks for any number of tables, for a kernel that keeps nothing for each frame. Which of
/// them a table has is decided by the number of its frame.
///
/// Two tables may have the same lock, also two on one path. The engine knows: it never waits for
/// a table lock while it holds another one, and takes no lock twice
/// ([`TableView::lock_both`](crate::TableView::lock_both)). A kernel that holds two locks at once
/// itself takes both with that call, too.
///
/// CPUs that work in different tables wait for each other once in `N` times, so 64 locks or more
/// are few for many CPUs. With one, all tables have the same lock.
///
/// # Panics
/// `HashedLocks<0>` does not compile.
///
/// # Examples
/// ```
/// # use mmu_pagetable::{HashedLocks, Lock};
/// # use x86_64::{PhysAddr, structures::paging::PhysFrame};
/// static LOCKS: HashedLocks<64> = HashedLocks::new();
/// let table = PhysFrame::containing_address(PhysAddr::new(0x5000));
/// let guard = LOCKS.lock_of(table).lock();
/// assert!(LOCKS.lock_of(table).try_lock().is_none());
/// # drop(guard);
/// ```
pub struct HashedLocks<const N: usize, R = Spin>([LineOfItsOwn<R>; N]);

/// A lock that shares its cache line with no other.
#[repr(align(64))]
struct LineOfItsOwn<R>(TableLock<R>);

impl<const N: usize, R: RelaxStrategy> HashedLocks<N, R> {
    /// Locks that nobody holds.
    #[must_use]
    pub const fn new() -> Self {
        const { assert!(N > 0, "tables need at least one lock") };
        Self([const { LineOfItsOwn(TableLock::new(())) }; N])
    }

    /// The lock of the table in `frame`: what a kernel returns from
    /// [`table_lock`](crate::TableMemory::table_lock).
    #[must_use]
    #[inline]
    pub const fn lock_of(&self, frame: PhysFrame) -> &TableLock<R> {
        // Multiplying spreads neighbouring frames over the upper half of the word (Fibonacci
        // hashing); the second product maps that half evenly to 0..N.
        let number = frame.start_address().as_u64() >> 12;
        let spread = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        &self.0[((spread * N as u64) >> 32) as usize % N].0
    }
}

impl<const N: usize, R: RelaxStrategy> Default for HashedLocks<N, R> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize, R> fmt::Debug for HashedLocks<N, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HashedLocks").field("locks", &N).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use x86_64::PhysAddr;

    use super::*;

    fn frame(number: u64) -> PhysFrame {
        PhysFrame::containing_address(PhysAddr::new(number << 12))
    }

    /// How many of 4096 frames, `step` frames apart, have the lock that is most in demand.
    fn most_in_demand(locks: &HashedLocks<64>, step: u64) -> usize {
        let mut demand = [0; 64];
        for number in 0..4096 {
            let lock = locks.lock_of(frame(number * step));
            let place = locks.0.iter().position(|of_them| core::ptr::eq(&raw const of_them.0, lock));
            demand[place.expect("one of them")] += 1;
        }
        demand.into_iter().max().unwrap_or(0)
    }

    #[test]
    fn frames_at_any_distance_spread_over_all_locks() {
        let locks = HashedLocks::<64>::new();
        for step in [1, 2, 3, 8, 64, 511, 512, 513, 4096, 1 << 18] {
            let most = most_in_demand(&locks, step);
            assert!(most <= 128, "{step} frames apart, {most} of 4096 tables have one lock, not 64");
        }
    }

    #[test]
    fn a_frame_has_the_same_lock_every_time_and_one_lock_serves_all() {
        let (many, one) = (HashedLocks::<7>::new(), HashedLocks::<1>::new());
        let first = one.lock_of(frame(0));
        for number in [0, 1, 17, (1 << 40) - 1] {
            assert!(core::ptr::eq(many.lock_of(frame(number)), many.lock_of(frame(number))));
            assert!(core::ptr::eq(one.lock_of(frame(number)), first));
        }
    }

    #[test]
    fn locks_that_share_a_line_with_another_would_be_slow_and_no_lock_takes_no_memory() {
        assert_eq!((size_of::<HashedLocks<8>>(), size_of::<NoLock>()), (8 * 64, 0));
    }
}
