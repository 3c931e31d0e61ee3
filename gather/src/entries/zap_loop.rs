//! The loop over the entries of a locked table: the one part of the engine that runs once a page.
//!
//! It goes by whole cache lines. Lines of eight entries that are none, which in sparse memory most are, are passed over; lines of
//! leaves that can all be taken with plain stores are taken; in any other line each entry is looked at alone. It stays a function of
//! its own, so that its few values keep their registers, and knows the embedder's page calls, which are inlined into it.
#![expect(unsafe_code, reason = "takes entries out, of tables whose lock it is shown")]

use core::ops::Range;

use mmu_pagetable::{Decoded, Entry, EntryValue, Level, Lines, LockedTable, StaleWrites, VirtRange};
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

use crate::platform::{Disposition, Fate, Platform, UnmappedLeaf, Vma};
use crate::queue::spare::{LINE, Slots, Spare};
use crate::queue::word::Slot;

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
pub(crate) struct Exclusive;

/// Other CPUs may walk: plain stores where hardware has nothing left to set, locked exchanges elsewhere.
#[derive(Clone, Copy)]
pub(crate) struct Locked(pub(crate) StaleWrites);

impl Clear for Exclusive {
    const ENOUGH: PageTableFlags = PageTableFlags::PRESENT;

    #[inline(always)]
    unsafe fn take(self, entry: &Entry, _seen: EntryValue) -> EntryValue {
        // SAFETY: passed on to our caller.
        unsafe { entry.get_and_clear_exclusive() }
    }
}

impl Clear for Locked {
    const ENOUGH: PageTableFlags = EntryValue::SETTLED;

    #[inline(always)]
    unsafe fn take(self, entry: &Entry, seen: EntryValue) -> EntryValue {
        // SAFETY: passed on to our caller.
        unsafe { entry.get_and_clear_seen(seen, self.0) }
    }
}

/// Which leaves a table has.
pub(crate) trait Leaves: Copy {
    /// The bits that every one has.
    const BITS: PageTableFlags;
    /// The level of the table.
    fn level(self) -> Level;
}

/// Pages of 4 KiB, in a table of the last level.
#[derive(Clone, Copy)]
pub(crate) struct Small;

/// Pages of 2 MiB or 1 GiB, in a table of this level, next to links to tables.
#[derive(Clone, Copy)]
pub(crate) struct Large(pub(crate) Level);

impl Leaves for Small {
    const BITS: PageTableFlags = PageTableFlags::PRESENT;
    #[inline(always)]
    fn level(self) -> Level {
        Level::Pte
    }
}

impl Leaves for Large {
    const BITS: PageTableFlags = PageTableFlags::PRESENT.union(PageTableFlags::HUGE_PAGE);
    #[inline(always)]
    fn level(self) -> Level {
        self.0
    }
}

/// The part of a locked table to go through. It borrows the guard: while there is one, the lock is held.
pub(crate) struct Part<'l> {
    entries: &'l [Entry; 512],
    /// The address of the first entry of the table.
    start: u64,
    used: Lines,
    /// The entry to begin with.
    pub(crate) first: usize,
    /// One past the last entry.
    pub(crate) end: usize,
}

impl<'l> Part<'l> {
    /// The entries of `range`, which lies inside the span of the table; `level` is the table's.
    #[inline]
    pub(crate) fn new<R>(locked: &'l LockedTable<'_, R>, range: VirtRange, level: Level) -> Self {
        Self {
            entries: locked.view().table().entries(),
            start: range.start() & !(level.table_span() - 1),
            used: locked.used_lines(),
            first: level.index(range.start()),
            end: level.index(range.end() - 1) + 1,
        }
    }

    /// The address of an entry.
    #[inline(always)]
    pub(crate) const fn address(&self, index: usize, level: Level) -> u64 {
        self.start + ((index as u64) << level.entry_shift())
    }
}

/// Whether pages must lose their rmap after a flush under the lock that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DelayedRmaps {
    None,
    Some,
}

/// Why the loop stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// At the end, or for want of room.
    Done,
    /// Before an entry that points to a table.
    Table,
}

/// What the loop did.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    /// The first entry not looked at.
    pub(crate) next: usize,
    /// Leaves cleared.
    pub(crate) leaves: usize,
    /// The first leaf cleared; `usize::MAX` so far.
    low: usize,
    /// One past the last leaf cleared.
    high: usize,
    /// Whether something was left where it was, and passed over.
    pub(crate) kept: Kept,
    pub(crate) rmaps: DelayedRmaps,
    pub(crate) stop: Stop,
}

/// Whether all entries that the loop has passed are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    Nothing,
    Something,
}

impl Done {
    #[inline(always)]
    const fn at(first: usize) -> Self {
        Self {
            next: first,
            leaves: 0,
            low: usize::MAX,
            high: 0,
            kept: Kept::Nothing,
            rmaps: DelayedRmaps::None,
            stop: Stop::Done,
        }
    }

    /// The addresses of the leaves cleared.
    #[inline]
    pub(crate) fn cleared(&self, part: &Part<'_>, level: Level) -> Option<VirtRange> {
        let first = part.address(self.low.min(self.high), level);
        VirtRange::new(first, part.address(self.high, level)).ok()
    }

    #[inline(always)]
    fn note(&mut self, cleared: Range<usize>) {
        self.leaves += cleared.len();
        self.low = self.low.min(cleared.start);
        self.high = cleared.end;
    }
}

/// Clears the entries of `part` from `first` on, until its end, until `spare` is full, or before a table.
///
/// # Context
/// The lock of the table is held.
#[inline(never)]
pub(crate) fn zap_entries<K: Platform>(
    kernel: &K,
    vma: &Vma<K::Area>,
    part: &Part<'_>,
    first: usize,
    spare: &mut Spare<'_>,
    leaves: impl Leaves,
    clear: impl Clear,
) -> Done {
    let work = Work { kernel, area: vma.area, start: part.start, leaves, clear };
    let mut done = Done::at(first);
    while done.next < part.end {
        // INVARIANT: P4, what lies between is none.
        let run = part.used.first_run(&(done.next..part.end));
        done.next = run.start;
        if !work.run(&part.entries[run], spare, &mut done) {
            break;
        }
    }
    done
}

/// Clears the entry for the page at `address`; the slot in which the page waits, if it is to be freed.
///
/// # Context
/// As for [`zap_entries`].
#[inline(always)]
pub(crate) fn zap_one<K: Platform>(
    kernel: &K,
    area: K::Area,
    locked: &LockedTable<'_, K::Relax>,
    address: u64,
    clear: impl Clear,
) -> (Done, Option<Slot>) {
    let work = Work { kernel, area, start: address, leaves: Small, clear };
    let (mut done, mut slot) = (Done::at(0), None);
    let entry = locked.view().table().entry(Level::Pte.index(address));
    work.one(entry, &mut slot, &mut done);
    (done, slot)
}

#[inline(always)]
fn bits_of_any(line: &[Entry; LINE]) -> u64 {
    line.iter().fold(0, |any, entry| any | entry.load().bits())
}

/// INVARIANT: made where the lock of the table is shown, and used on its entries alone.
struct Work<'k, K: Platform, L, C> {
    kernel: &'k K,
    area: K::Area,
    /// The address of the first entry.
    start: u64,
    leaves: L,
    clear: C,
}

impl<K: Platform, L: Leaves, C: Clear> Work<'_, K, L, C> {
    #[inline(always)]
    fn leaf_bits(&self) -> u64 {
        L::BITS.bits()
    }

    #[inline(always)]
    fn address(&self, index: usize) -> u64 {
        self.start + ((index as u64) << self.leaves.level().entry_shift())
    }

    /// Goes through entries that follow one another, the first of which is `done.next`; whether to the end.
    #[inline(always)]
    fn run(&self, entries: &[Entry], spare: &mut Spare<'_>, done: &mut Done) -> bool {
        let (mut lines, rest) = entries.as_chunks::<LINE>();
        loop {
            let empty = lines.iter().take_while(|line| bits_of_any(line) == 0).count();
            done.next += empty * LINE;
            lines = &lines[empty..];
            let [line, later @ ..] = lines else { break };
            if self.is_plain(line) {
                let taken = self.plain_lines(lines, spare, done);
                if taken > 0 {
                    lines = &lines[taken..];
                    continue;
                }
            }
            if !self.each(line, spare, done) {
                return false;
            }
            lines = later;
        }
        self.each(rest, spare, done)
    }

    /// Looks at entries one by one; whether at all of them.
    #[inline(always)]
    fn each(&self, entries: &[Entry], slots: &mut impl Slots, done: &mut Done) -> bool {
        for entry in entries {
            if !self.one(entry, slots, done) {
                return false;
            }
            done.next += 1;
        }
        true
    }

    /// Whether all entries of the line are leaves that can be taken with plain stores.
    #[inline(always)]
    fn is_plain(&self, line: &[Entry; LINE]) -> bool {
        let enough = L::BITS.union(C::ENOUGH).bits();
        line.iter().fold(u64::MAX, |all, entry| all & entry.load().bits()) & enough == enough
    }

    /// Clears as many lines from the first on as consist of leaves that can all be taken with plain stores, and fit; returns
    /// how many.
    #[inline(always)]
    fn plain_lines(&self, lines: &[[Entry; LINE]], spare: &mut Spare<'_>, done: &mut Done) -> usize {
        let enough = L::BITS.union(C::ENOUGH).bits();
        let mut lines = lines.iter();
        let mut here = done.next;
        // A line some of whose pages the kernel keeps.
        let mut in_part = None;
        let mut taken = spare.push_lines(|| {
            let line = lines.as_slice().first()?;
            let values = line.each_ref().map(Entry::load);
            if values.iter().fold(u64::MAX, |all, value| all & value.bits()) & enough != enough {
                return None;
            }
            lines.next();
            for entry in line {
                // SAFETY: by the invariant the lock is held since before the values were read. With `C::ENOUGH` they are settled,
                // or no program runs here. The caller notes what was cleared before the lock drops.
                unsafe { entry.clear_settled() };
            }
            let slots: [Option<Slot>; LINE] =
                core::array::from_fn(|offset| self.gone(values[offset], here + offset, done));
            here += LINE;
            match slots {
                [Some(a), Some(b), Some(c), Some(d), Some(e), Some(f), Some(g), Some(h)] => {
                    Some([a, b, c, d, e, f, g, h])
                }
                _ => {
                    in_part = Some(slots);
                    None
                }
            }
        });
        if let Some(slots) = in_part {
            spare.push_some(slots);
            taken += 1;
        }
        if taken > 0 {
            done.note(done.next..done.next + taken * LINE);
            done.next += taken * LINE;
        }
        taken
    }

    /// Looks at one entry; whether the loop can go on to the next.
    #[inline(always)]
    fn one(&self, entry: &Entry, slots: &mut impl Slots, done: &mut Done) -> bool {
        let index = done.next;
        let seen = entry.load();
        if seen.is_empty() {
            return true;
        }
        if seen.bits() & self.leaf_bits() == self.leaf_bits() {
            if slots.is_full() {
                return false;
            }
            // A and D from the exchange wherever hardware may still set them, never from the read before it.
            // SAFETY: by the invariant the lock is held since before `seen` was read. The caller notes what was cleared before the
            // lock drops; who made `clear` knows what others may do.
            let old = unsafe { self.clear.take(entry, seen) };
            if let Some(slot) = self.gone(old, index, done) {
                slots.push(slot);
            }
            done.note(index..index + 1);
            return true;
        }
        let level = self.leaves.level();
        match not_a_leaf(self.kernel, self.area, entry, seen, level, self.address(index)) {
            Met::Cleared => true,
            Met::Kept => {
                done.kept = Kept::Something;
                true
            }
            Met::Table => {
                done.stop = Stop::Table;
                false
            }
        }
    }

    /// Tells the kernel of a leaf that was cleared; the slot in which its page waits, if it is to be freed.
    #[inline(always)]
    fn gone(&self, value: EntryValue, index: usize, done: &mut Done) -> Option<Slot> {
        let level = self.leaves.level();
        let frame = PhysFrame::containing_address(value.leaf_address(level));
        let leaf = UnmappedLeaf { address: self.address(index), level, value, frame };
        match self.kernel.unmap_page(self.area, &leaf) {
            Disposition::Keep => None,
            Disposition::Free => Some(Slot::page(frame)),
            Disposition::FreeAfterRmap => {
                done.rmaps = DelayedRmaps::Some;
                Some(Slot::page(frame).delaying_rmap())
            }
        }
    }
}

/// What became of an entry that is something, but no leaf.
enum Met {
    Cleared,
    Kept,
    Table,
}

#[cold]
#[inline(never)]
fn not_a_leaf<K: Platform>(
    kernel: &K,
    area: K::Area,
    entry: &Entry,
    seen: EntryValue,
    level: Level,
    address: u64,
) -> Met {
    match seen.decode(level) {
        Decoded::NonPresent(meaning) => {
            let fate = kernel.unmap_non_present(area, address, level, meaning);
            if fate == Fate::Keep {
                return Met::Kept;
            }
            // SAFETY: its lock is held. Nothing is cached from an entry that is not present: no range, no flush.
            unsafe { entry.store(EntryValue::EMPTY) };
            Met::Cleared
        }
        Decoded::Table(_) => Met::Table,
        Decoded::Empty | Decoded::Leaf(_) => Met::Kept,
    }
}
