//! What a gather owes while it is open: to be counted, and to flush for what it cleared.

use core::mem;

use crate::levels::context::TlbContext;
use crate::mm::MmOf;
use crate::overlap::reach::Counted;

/// One count in [`Mm::open_gathers`].
///
/// If a call of the kernel's own unwinds before this is closed, the count goes down all the same,
/// and the flush that did not come is left to whoever looks next.
#[must_use]
pub(crate) struct OpenGather<'a, C: TlbContext, R: Counted> {
    mm: &'a MmOf<C>,
    reach: R,
}

impl<'a, C: TlbContext, R: Counted> OpenGather<'a, C, R> {
    #[inline(always)]
    pub(crate) fn new(mm: &'a MmOf<C>, reach: R) -> Self {
        reach.open(&mm.gathers());
        Self { mm, reach }
    }

    /// The count of a gather that is being dropped.
    pub(crate) const fn taken_over(mm: &'a MmOf<C>, reach: R) -> Self {
        Self { mm, reach }
    }

    /// How far the gather reaches.
    #[inline(always)]
    pub(crate) const fn reach(&self) -> R {
        self.reach
    }

    /// Closes a gather that has cleared nothing.
    #[inline(always)]
    pub(crate) fn close_unused(self) {
        self.close_after(|| ());
    }

    /// Flushes, then closes the gather.
    #[inline(always)]
    pub(crate) fn close_after<T>(self, flush: impl FnOnce() -> T) -> T {
        let flushed = close_after(self.mm, self.reach, flush);
        mem::forget(self);
        flushed
    }
}

impl<C: TlbContext, R: Counted> Drop for OpenGather<'_, C, R> {
    fn drop(&mut self) {
        self.mm.context().owe_flush();
        self.reach.close(&self.mm.gathers());
    }
}

/// Flushes, then counts one gather out. If `flush` unwinds the count stays: what counts the gather
/// as open is dropped then, and closes it.
#[inline(always)]
pub(crate) fn close_after<C: TlbContext, R>(
    mm: &MmOf<C>,
    reach: impl Counted,
    flush: impl FnOnce() -> R,
) -> R {
    let flushed = flush();
    // INVARIANT: G6, the count goes down only after the flush.
    reach.close(&mm.gathers());
    flushed
}

/// Notes, when it is dropped, that entries were cleared for which nobody is going to flush.
/// Forgotten where all went well.
pub(crate) struct OwesFlush<'a, C: TlbContext>(pub(crate) &'a C);

impl<C: TlbContext> Drop for OwesFlush<'_, C> {
    fn drop(&mut self) {
        self.0.owe_flush();
    }
}
