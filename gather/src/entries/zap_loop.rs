//! The loop over the entries of a locked table.
//!
//! It goes by whole cache lines of eight entries. Lines of empty entries, which most lines of
//! sparse memory are, are passed over; lines of leaves that can all be cleared with plain stores
//! are cleared at once; in any other line each entry is looked at alone. The loop stays a function
//! of its own, so that its few values keep their registers; the embedder's page calls are inlined
//! into it.
#![expect(unsafe_code, reason = "takes entries out, of tables whose lock it is shown")]

use mmu_pagetable::{Decoded, Entry, EntryValue, Level};
use x86_64::structures::paging::PhysFrame;

use crate::entries::clearing::Clear;
use crate::entries::leaf_size::{Leaves, Small};
use crate::entries::part::TablePart;
use crate::entries::progress::{Kept, Progress, Stop};
use crate::platform::{Disposition, Fate, Platform, UnmappedLeaf};
use crate::queue::spare::{LINE, SpareSlots, WordSink};
use crate::queue::word::{BatchWord, DelayedRmaps};

/// Clears the entries of `part` from `first` on, until its end, until `spare` is full, or until an
/// entry points to a table.
///
/// # Context
/// The lock of the table is held.
#[inline(never)]
pub(crate) fn zap_entries<K: Platform>(
    kernel: &K,
    area: K::Area,
    part: &TablePart<'_>,
    first: usize,
    spare: &mut SpareSlots<'_>,
    leaves: impl Leaves,
    clear: impl Clear,
) -> Progress {
    let zap_loop = ZapLoop { kernel, area, start: part.start, leaves, clear };
    let mut done = Progress::at(first);
    while done.next < part.end {
        // INVARIANT: P4, the entries of unused lines, which are passed over, are empty.
        let run = part.used.first_run(&(done.next..part.end));
        done.next = run.start;
        if !zap_loop.zap_consecutive(&part.entries[run], spare, &mut done) {
            break;
        }
    }
    done
}

/// Whether all of `entries` of a last-level table are leaves that plain stores can clear.
#[inline(always)]
pub(crate) fn are_plain(entries: &[Entry], clear: impl Clear) -> bool {
    clear.can_store(entries.iter().map(Entry::load), Small::BITS)
}

/// Clears all of `entries`, the first of which maps `start`, and which [are plain](are_plain);
/// `spare` has a slot for each. It looks at nothing twice.
///
/// # Context
/// The lock of the table is held, since before they were found to be plain; the caller notes them
/// for the flush before it drops.
#[inline(always)]
pub(crate) fn zap_plain<K: Platform>(
    kernel: &K,
    area: K::Area,
    entries: &[Entry],
    start: u64,
    spare: &mut SpareSlots<'_>,
    clear: impl Clear,
) -> DelayedRmaps {
    let zap_loop = ZapLoop { kernel, area, start, leaves: Small, clear };
    let mut done = Progress::at(0);
    spare.push_each(entries.iter().enumerate().map(|(index, entry)| {
        let value = entry.load();
        kernel.between_look_and_change();
        // SAFETY: the lock is held since before the values were read, all of which are settled. The
        // caller notes what was cleared before the lock drops.
        unsafe { entry.clear_settled() };
        zap_loop.tell_of_leaf(value, index, &mut done)
    }));
    done.rmaps
}

#[inline(always)]
fn bits_of_any(line: &[Entry; LINE]) -> u64 {
    line.iter().fold(0, |any, entry| any | entry.load().bits())
}

/// What stays the same from one entry to the next.
///
/// INVARIANT: it is made where the lock of a table is shown, and used on that table's entries
/// alone.
struct ZapLoop<'k, K: Platform, L, C> {
    kernel: &'k K,
    area: K::Area,
    /// The address that the first entry maps.
    start: u64,
    leaves: L,
    clear: C,
}

impl<K: Platform, L: Leaves, C: Clear> ZapLoop<'_, K, L, C> {
    #[inline(always)]
    fn leaf_bits(&self) -> u64 {
        L::BITS.bits()
    }

    #[inline(always)]
    fn address(&self, index: usize) -> u64 {
        self.start + ((index as u64) << self.leaves.level().entry_shift())
    }

    /// Goes through entries that follow one another, the first of which is `done.next`; returns
    /// whether it came to their end.
    #[inline(always)]
    fn zap_consecutive(&self, entries: &[Entry], spare: &mut SpareSlots<'_>, done: &mut Progress) -> bool {
        let (mut lines, rest) = entries.as_chunks::<LINE>();
        loop {
            let empty = lines.iter().take_while(|line| bits_of_any(line) == 0).count();
            done.next += empty * LINE;
            lines = &lines[empty..];
            let [line, later @ ..] = lines else { break };
            if self.has_only_plain_leaves(line) {
                let taken = self.zap_plain_lines(lines, spare, done);
                if taken > 0 {
                    lines = &lines[taken..];
                    continue;
                }
            }
            if !self.zap_one_by_one(line, spare, done) {
                return false;
            }
            lines = later;
        }
        self.zap_one_by_one(rest, spare, done)
    }

    /// Looks at entries one by one; returns whether it looked at all of them.
    #[inline(always)]
    fn zap_one_by_one(&self, entries: &[Entry], words: &mut impl WordSink, done: &mut Progress) -> bool {
        for entry in entries {
            if !self.zap_entry(entry, words, done) {
                return false;
            }
            done.next += 1;
        }
        true
    }

    /// Whether all entries of the line are leaves that plain stores can clear.
    #[inline(always)]
    fn has_only_plain_leaves(&self, line: &[Entry; LINE]) -> bool {
        self.clear.can_store(line.iter().map(Entry::load), L::BITS)
    }

    /// Clears lines from the first on, while their entries are leaves that plain stores can clear,
    /// and their pages fit; returns how many.
    #[inline(always)]
    fn zap_plain_lines(
        &self,
        lines: &[[Entry; LINE]],
        spare: &mut SpareSlots<'_>,
        done: &mut Progress,
    ) -> usize {
        let mut lines = lines.iter();
        let mut here = done.next;
        // The words of a line of which the kernel keeps some pages.
        let mut in_part = None;
        let mut taken = spare.push_lines(|| {
            let line = lines.as_slice().first()?;
            let values = line.each_ref().map(Entry::load);
            if !self.clear.can_store(values.iter().copied(), L::BITS) {
                return None;
            }
            lines.next();
            self.kernel.between_look_and_change();
            for entry in line {
                // SAFETY: by the invariant the lock is held since before the values were read. All
                // are settled, or no program runs here. The
                // caller notes what was cleared before the lock drops.
                unsafe { entry.clear_settled() };
            }
            let words: [Option<BatchWord>; LINE] =
                core::array::from_fn(|offset| self.tell_of_leaf(values[offset], here + offset, done));
            here += LINE;
            match words {
                [Some(a), Some(b), Some(c), Some(d), Some(e), Some(f), Some(g), Some(h)] => {
                    Some([a, b, c, d, e, f, g, h])
                }
                _ => {
                    in_part = Some(words);
                    None
                }
            }
        });
        if let Some(words) = in_part {
            spare.push_some(words);
            taken += 1;
        }
        if taken > 0 {
            done.note(done.next..done.next + taken * LINE);
            done.next += taken * LINE;
        }
        taken
    }

    /// Looks at one entry; returns whether the loop can go on to the next.
    #[inline(always)]
    fn zap_entry(&self, entry: &Entry, words: &mut impl WordSink, done: &mut Progress) -> bool {
        let index = done.next;
        let seen = entry.load();
        if seen.is_empty() {
            return true;
        }
        if seen.bits() & self.leaf_bits() == self.leaf_bits() {
            if words.is_full() {
                return false;
            }
            self.kernel.between_look_and_change();
            // Where hardware may still set A and D they come from the exchange, not from `seen`.
            // SAFETY: by the invariant the lock is held since before `seen` was read. The caller
            // notes what was cleared before the lock drops; whoever made `clear` knows what others
            // may do.
            let old = unsafe { self.clear.take(entry, seen) };
            if let Some(word) = self.tell_of_leaf(old, index, done) {
                words.push(word);
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

    /// Tells the kernel of a leaf that was cleared; returns the word in which its page waits, if it
    /// is to be freed.
    #[inline(always)]
    fn tell_of_leaf(&self, value: EntryValue, index: usize, done: &mut Progress) -> Option<BatchWord> {
        let level = self.leaves.level();
        let frame = PhysFrame::containing_address(value.leaf_address(level));
        let leaf = UnmappedLeaf { address: self.address(index), level, value, frame };
        match self.kernel.unmap_page(self.area, &leaf) {
            Disposition::Keep => None,
            Disposition::Free => Some(BatchWord::page(frame)),
            Disposition::FreeAfterRmap => {
                done.rmaps = DelayedRmaps::Queued;
                Some(BatchWord::page(frame).delaying_rmap())
            }
        }
    }
}

/// What became of an entry that is neither empty nor a leaf.
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
            // SAFETY: the lock of its table is held. No CPU caches an entry that is not present, so
            // there is nothing to note and nothing to flush.
            unsafe { entry.store(EntryValue::EMPTY) };
            Met::Cleared
        }
        Decoded::Table(_) => Met::Table,
        Decoded::Empty | Decoded::Leaf(_) => Met::Kept,
    }
}
