//! The lock of a table as this kernel has it: when it is dropped, other CPUs may run.
#![expect(unsafe_code, reason = "a lock that the engine believes in; one type in the place of another")]

use core::fmt;
use core::marker::PhantomData;

use mmu_gather::pagetable::{Lock, TableLock};

use crate::machine::Machine;

/// The guard of the lock inside.
type Inside<'l, M> = <TableLock<<M as Machine>::Relax> as Lock>::Guard<'l>;

/// A [`TableLock`] whose guard calls [`Machine::unlocked`] once the lock is free.
///
/// What a call does after it has dropped a table lock, and believes to be as it was under the lock,
/// is found wrong only if others run right there.
#[repr(transparent)]
pub struct SeamLock<M: Machine>(TableLock<M::Relax>, PhantomData<fn() -> M>);

/// Holds the lock until it is dropped.
pub struct SeamGuard<'l, M: Machine>
where
    M::Relax: 'l,
{
    // Fields are dropped in this order.
    _lock: Inside<'l, M>,
    _after: AfterUnlock<M>,
}

struct AfterUnlock<M: Machine>(PhantomData<fn() -> M>);

impl<M: Machine> SeamLock<M> {
    /// The same lock, seen so.
    #[inline]
    pub(crate) const fn around(lock: &TableLock<M::Relax>) -> &Self {
        // SAFETY: `Self` is transparent over it.
        unsafe { &*core::ptr::from_ref(lock).cast::<Self>() }
    }

    /// Whether somebody holds it.
    #[must_use]
    #[inline]
    pub fn is_locked(&self) -> bool {
        self.0.is_locked()
    }
}

impl<M: Machine> Drop for AfterUnlock<M> {
    #[inline]
    fn drop(&mut self) {
        M::unlocked();
    }
}

// SAFETY: the lock inside is one; what follows the drop of its guard takes nothing back.
unsafe impl<M: Machine> Lock for SeamLock<M> {
    type Guard<'a>
        = SeamGuard<'a, M>
    where
        Self: 'a;

    #[inline]
    fn lock(&self) -> SeamGuard<'_, M> {
        SeamGuard { _lock: Lock::lock(&self.0), _after: AfterUnlock(PhantomData) }
    }

    #[inline]
    fn try_lock(&self) -> Option<SeamGuard<'_, M>> {
        let lock = Lock::try_lock(&self.0)?;
        Some(SeamGuard { _lock: lock, _after: AfterUnlock(PhantomData) })
    }
}

impl<M: Machine> fmt::Debug for SeamLock<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SeamLock").field(&self.is_locked()).finish()
    }
}

impl<'l, M: Machine> fmt::Debug for SeamGuard<'l, M>
where
    M::Relax: 'l,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SeamGuard")
    }
}
