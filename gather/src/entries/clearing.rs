//! How an entry is cleared: what may be assumed of programs and of the hardware meanwhile.
#![expect(unsafe_code, reason = "takes entries out, of tables whose lock is held")]

use mmu_pagetable::{Entry, EntryValue, StaleWrites};
use x86_64::structures::paging::PageTableFlags;

/// How entries are taken out.
pub(crate) trait Clear: Copy {
    /// With these bits a leaf can be taken with a plain store, whatever else it has. (Without them it may be so still.)
    const ENOUGH: PageTableFlags;
    /// Takes the value out of one entry, which held `seen` just now.
    ///
    /// # Safety
    /// The lock of the entry's table is held, since before `seen` was read; the page is flushed for before it is freed; and what
    /// the implementor says of others is true.
    unsafe fn take(self, entry: &Entry, seen: EntryValue) -> EntryValue;
}

/// No program runs in the address space any more: plain stores for all.
#[derive(Clone, Copy)]
pub(crate) struct NoProgramRuns;

/// Other CPUs may walk: plain stores where hardware has nothing left to set, locked exchanges elsewhere.
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
