//! How an entry is cleared, and what that assumes about programs and the page-walk hardware.
#![expect(unsafe_code, reason = "takes entries out, of tables whose lock is held")]

use mmu_pagetable::{Entry, EntryValue, StaleWrites};
use x86_64::structures::paging::PageTableFlags;

/// A way to clear entries.
pub(crate) trait Clear: Copy {
    /// Whether all of `values` have `leaf_bits`, and are leaves that plain stores can clear:
    /// [`take`](Self::take) of each would store plainly.
    fn can_store(self, values: impl Iterator<Item = EntryValue> + Clone, leaf_bits: PageTableFlags) -> bool;
    /// Clears one entry, which held `seen` just now, and returns what it held.
    ///
    /// # Safety
    /// - The lock of the entry's table is held, since before `seen` was read;
    /// - the page is flushed for before it is freed;
    /// - what the implementor says of programs is true.
    unsafe fn take(self, entry: &Entry, seen: EntryValue) -> EntryValue;
}

/// The bits that all of `values` have.
#[inline(always)]
fn bits_of_all(values: impl Iterator<Item = EntryValue>) -> u64 {
    values.fold(u64::MAX, |all, value| all & value.bits())
}

#[inline(always)]
const fn have(bits: u64, wanted: PageTableFlags) -> bool {
    bits & wanted.bits() == wanted.bits()
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
    #[inline(always)]
    fn can_store(self, values: impl Iterator<Item = EntryValue> + Clone, leaf_bits: PageTableFlags) -> bool {
        have(bits_of_all(values), leaf_bits)
    }

    #[inline(always)]
    unsafe fn take(self, entry: &Entry, _seen: EntryValue) -> EntryValue {
        // SAFETY: passed on to our caller.
        unsafe { entry.get_and_clear_exclusive() }
    }
}

impl Clear for ProgramsMayRun {
    #[inline(always)]
    fn can_store(self, values: impl Iterator<Item = EntryValue> + Clone, leaf_bits: PageTableFlags) -> bool {
        let all = bits_of_all(values.clone());
        // Most often all are written to. If not, and some are read-only, each is looked at.
        have(all, leaf_bits | EntryValue::SETTLED)
            || have(all, leaf_bits | PageTableFlags::ACCESSED)
                && !have(all, PageTableFlags::WRITABLE)
                && EntryValue::are_settled_if_accessed(values, self.0)
    }

    #[inline(always)]
    unsafe fn take(self, entry: &Entry, seen: EntryValue) -> EntryValue {
        // SAFETY: passed on to our caller.
        unsafe { entry.get_and_clear_seen(seen, self.0) }
    }
}
