//! How an entry is cleared, and what that assumes about programs and the page-walk hardware.
#![expect(unsafe_code, reason = "takes entries out, of tables whose lock is held")]

use mmu_pagetable::{Entry, EntryValue, StaleWrites};
use x86_64::structures::paging::PageTableFlags;

/// A way to clear entries.
pub(crate) trait Clear: Copy {
    /// A leaf that has all of these bits can be cleared with a plain store. (Others may allow it,
    /// too: [`take`](Self::take) decides.)
    const ENOUGH: PageTableFlags;
    /// Clears one entry, which held `seen` just now, and returns what it held.
    ///
    /// # Safety
    /// - The lock of the entry's table is held, since before `seen` was read;
    /// - the page is flushed for before it is freed;
    /// - what the implementor says of programs is true.
    unsafe fn take(self, entry: &Entry, seen: EntryValue) -> EntryValue;
}

/// No program runs in the address space any more, so nobody writes through an entry: plain stores
/// clear all of them.
#[derive(Clone, Copy)]
pub(crate) struct NoProgramRuns;

/// Programs may run on other CPUs: a plain store clears an entry in which hardware has nothing
/// left to set, a locked exchange any other.
#[derive(Clone, Copy)]
pub(crate) struct ProgramsMayRun(pub(crate) StaleWrites);

impl Clear for NoProgramRuns {
    const ENOUGH: PageTableFlags = PageTableFlags::PRESENT;

    #[inline(always)]
    unsafe fn take(self, entry: &Entry, _seen: EntryValue) -> EntryValue {
        // SAFETY: passed on to our caller.
        unsafe { entry.get_and_clear_exclusive() }
    }
}

impl Clear for ProgramsMayRun {
    const ENOUGH: PageTableFlags = EntryValue::SETTLED;

    #[inline(always)]
    unsafe fn take(self, entry: &Entry, seen: EntryValue) -> EntryValue {
        // SAFETY: passed on to our caller.
        unsafe { entry.get_and_clear_seen(seen, self.0) }
    }
}
