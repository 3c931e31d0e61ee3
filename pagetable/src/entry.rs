//! The 64 bits of a paging-structure entry.
//!
//! An entry is *empty* (all bits zero), *present* (P = 1: a link to a table, or a leaf that maps a
//! page), or *kept* (P = 0 and not all bits zero: software left a meaning there, a [`NonPresent`]).
#![expect(unsafe_code, reason = "an entry alone does not show that the lock of its table is held")]

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use static_assertions::{assert_eq_align, assert_eq_size, assert_not_impl_any};
use x86_64::structures::paging::{PageTableFlags, PhysFrame};
use x86_64::{PhysAddr, structures::paging::Size4KiB};

use crate::level::Level;

/// Bits 12 to 51: the physical address in an entry that links a table or maps a 4 KiB page.
const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

/// One entry in memory, shared with the page walkers of every CPU.
///
/// All access is atomic (rule P1): the walker of any CPU that has the table loaded may set the
/// accessed bit at any time, and the dirty bit while a user program runs. Anybody may read an
/// entry. Changing one is `unsafe` here, because an `Entry` alone does not show that the lock of
/// its table is held; [`LockedEntry`](crate::LockedEntry) does.
#[derive(Debug)]
#[repr(transparent)]
pub struct Entry(AtomicU64);

assert_eq_size!(Entry, u64);
assert_eq_align!(Entry, u64);
assert_not_impl_any!(Entry: Clone, Copy);

impl Entry {
    /// Reads the entry once.
    #[must_use]
    #[inline]
    pub fn load(&self) -> EntryValue {
        // ORDERING: acquire, pairs with `store`: whoever follows a new link reads the zeroes of the
        // new table. Free on x86.
        EntryValue(self.0.load(Ordering::Acquire))
    }

    /// Writes the entry; A/D bits that hardware set since the last read are lost.
    ///
    /// Only for entries that are empty or kept: nothing is cached from those (SDM 4.10.2.3), so no
    /// walker sets bits in them.
    ///
    /// # Safety
    /// As for [`LockedEntry::store`](crate::LockedEntry::store). Also:
    /// - the caller holds the lock of the table, or nobody else can reach the table;
    /// - if `value` is not empty and the kernel keeps used lines (rule P4), the caller has noted
    ///   the line of this entry.
    #[inline]
    pub unsafe fn store(&self, value: EntryValue) {
        // ORDERING: release, pairs with `load`: a walker that follows a new link finds the zeroed
        // table.
        self.0.store(value.0, Ordering::Release);
    }

    /// Takes the value out and leaves the entry empty, in one step: A/D bits set until that instant
    /// are in the result.
    ///
    /// The cost is one locked exchange (about 8 cycles, against 0.75 for a load and a store).
    ///
    /// # Safety
    /// As for [`store`](Self::store) of the empty entry.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.8; Linux: ptep_get_and_clear.
    #[doc(alias = "ptep_get_and_clear")]
    #[must_use]
    #[inline]
    pub unsafe fn get_and_clear(&self) -> EntryValue {
        // ORDERING: acquire and release: the clear is visible before the generation is raised. The
        // full fence there (rule T1) is stronger.
        EntryValue(self.0.swap(0, Ordering::AcqRel))
    }

    /// Takes the value out with a plain load and a plain store: an A/D bit set between the two is
    /// lost.
    ///
    /// # Safety
    /// As for [`get_and_clear`](Self::get_and_clear). Also, no program can use the table, because
    /// the whole address space is dying. A single CPU is not enough: a program may preempt the
    /// caller between the two accesses.
    ///
    /// # Source
    /// Linux: ptep_get_and_clear_full.
    #[doc(alias = "ptep_get_and_clear_full")]
    #[must_use]
    #[inline]
    pub unsafe fn get_and_clear_exclusive(&self) -> EntryValue {
        let old = EntryValue(self.0.load(Ordering::Relaxed));
        self.0.store(0, Ordering::Release);
        old
    }

    /// Unhooks the table that this entry links: takes the link out with a plain load and a plain
    /// store.
    ///
    /// INVARIANT: P2, this comes before the table is handed on.
    ///
    /// The argument for two plain accesses is not the one of
    /// [`get_and_clear_exclusive`](Self::get_and_clear_exclusive), that nobody else is there. Other
    /// CPUs may walk through this entry, and hardware may set its accessed bit between the two
    /// accesses. The lost bit tells nobody anything, because the entry maps no page; and hardware
    /// sets no dirty bit in a link.
    ///
    /// # Safety
    /// The lock of the table that holds this entry is held, and the table below may go.
    #[must_use]
    #[inline]
    pub(crate) unsafe fn unhook(&self) -> EntryValue {
        let old = EntryValue(self.0.load(Ordering::Relaxed));
        self.0.store(0, Ordering::Release);
        old
    }

    /// Takes the value out and leaves the entry empty, as [`get_and_clear`](Self::get_and_clear)
    /// does, but with a plain store if hardware has nothing left to set in `seen`, which is what
    /// the entry held when it was read just now, under the lock.
    ///
    /// A plain load and store cost 0.75 cycles, a locked exchange about 8.
    ///
    /// # Safety
    /// As for [`get_and_clear`](Self::get_and_clear). Also, the lock of the table has been held
    /// since before `seen` was read, so that no other software changes the entry.
    #[must_use]
    #[inline]
    pub unsafe fn get_and_clear_seen(&self, seen: EntryValue, stale: StaleWrites) -> EntryValue {
        if seen.is_settled(stale) {
            // SAFETY: passed on to our caller.
            unsafe { self.clear_settled() };
            seen
        } else {
            // SAFETY: passed on to our caller.
            unsafe { self.get_and_clear() }
        }
    }

    /// Empties the entry with a plain store, where a settled value was seen under the lock, or
    /// where nobody else can write.
    ///
    /// The store may wait in this CPU's store buffer, where another CPU's walk does not see it yet.
    /// That walk uses the old translation, as a walk a moment earlier would have. The buffer is
    /// drained by the locked instruction that raises the generation, before anybody is told and
    /// long before the page is freed.
    ///
    /// # Safety
    /// As for [`get_and_clear_seen`](Self::get_and_clear_seen), where the value seen was settled;
    /// or as for [`get_and_clear_exclusive`](Self::get_and_clear_exclusive).
    #[inline]
    pub unsafe fn clear_settled(&self) {
        self.0.store(0, Ordering::Release);
    }

    /// Replaces `current` by `new` if the entry still holds exactly `current`.
    ///
    /// # Errors
    /// The value found, when it was another one.
    ///
    /// # Safety
    /// As for [`store`](Self::store).
    pub unsafe fn compare_exchange(&self, current: EntryValue, new: EntryValue) -> Result<(), EntryValue> {
        match self.0.compare_exchange(current.0, new.0, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(()),
            Err(found) => Err(EntryValue(found)),
        }
    }

    /// Replaces the value by `new`, in one step, and returns the old one, A/D bits included.
    ///
    /// # Safety
    /// As for [`store`](Self::store).
    #[must_use]
    pub unsafe fn exchange(&self, new: EntryValue) -> EntryValue {
        EntryValue(self.0.swap(new.0, Ordering::AcqRel))
    }
}

/// A copy of the 64 bits of an entry, as read once.
///
/// ```
/// use mmu_pagetable::{Decoded, EntryValue, Level, Marker, NonPresent};
/// use x86_64::{PhysAddr, structures::paging::PageTableFlags};
///
/// let page = PhysAddr::new(2 << 20);
/// let leaf = EntryValue::leaf(Level::Pmd, page, PageTableFlags::WRITABLE);
/// assert_eq!(leaf.decode(Level::Pmd), Decoded::Leaf(page));
///
/// // What software leaves behind is neither empty nor present.
/// let guard = NonPresent::Marker(Marker::Guard).encode();
/// assert!(!guard.is_empty() && !guard.is_present());
/// assert_eq!(guard.decode(Level::Pte), Decoded::NonPresent(NonPresent::Marker(Marker::Guard)));
///
/// assert_eq!(EntryValue::EMPTY.decode(Level::Pte), Decoded::Empty);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct EntryValue(u64);

/// Whether a CPU may still hold a writable translation of an entry that is no longer writable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StaleWrites {
    /// No: whoever took the right to write away has flushed since.
    Impossible,
    /// Perhaps: somebody has taken rights away and has not flushed yet.
    Possible,
}

/// What an entry of a given level means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// All 64 bits are zero.
    Empty,
    /// Links a table of the level below.
    Table(PhysFrame),
    /// Maps a page of the size that one entry of this level covers; carries the physical address of
    /// its first byte.
    Leaf(PhysAddr),
    /// Kept: not present and not empty, because software left a meaning here.
    NonPresent(NonPresent),
}

impl EntryValue {
    /// The empty entry: no translation and no meaning.
    pub const EMPTY: Self = Self(0);

    /// The value with exactly these bits.
    #[must_use]
    #[inline]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The bits.
    #[must_use]
    #[inline]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// An entry that links `table` and leaves all restrictions to the entries below.
    #[must_use]
    pub fn table(table: PhysFrame) -> Self {
        let flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE | PageTableFlags::USER_ACCESSIBLE;
        Self(table.start_address().as_u64() | flags.bits())
    }

    /// A present leaf of `level` that maps the page at `address`.
    ///
    /// # Panics
    /// If `address` is not aligned to the page size, or `level` has no leaves.
    #[must_use]
    pub fn leaf(level: Level, address: PhysAddr, flags: PageTableFlags) -> Self {
        assert!(level.may_be_leaf(), "{level:?} entries map no pages");
        assert!(
            address.as_u64().is_multiple_of(level.entry_span()),
            "{address:?} is not aligned for {level:?}"
        );
        let mut flags = flags | PageTableFlags::PRESENT;
        if level > Level::Pte {
            flags |= PageTableFlags::HUGE_PAGE;
        }
        Self(address.as_u64() | flags.bits())
    }

    /// Whether all 64 bits are zero.
    #[must_use]
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether hardware may use this entry (P = 1).
    #[must_use]
    #[inline]
    pub const fn is_present(self) -> bool {
        self.0 & PageTableFlags::PRESENT.bits() != 0
    }

    /// Whether a program wrote through this leaf (D = 1).
    #[must_use]
    #[inline]
    pub const fn is_dirty(self) -> bool {
        self.0 & PageTableFlags::DIRTY.bits() != 0
    }

    /// Whether a walker used this entry (A = 1).
    #[must_use]
    #[inline]
    pub const fn is_accessed(self) -> bool {
        self.0 & PageTableFlags::ACCESSED.bits() != 0
    }

    /// Whether a program may write through this entry (R/W = 1).
    #[must_use]
    #[inline]
    pub const fn is_writable(self) -> bool {
        self.0 & PageTableFlags::WRITABLE.bits() != 0
    }

    /// Whether hardware has nothing left to set in this present leaf, so that it cannot change
    /// while the table is locked.
    ///
    /// Hardware changes an entry in two ways only: it sets A when a walk uses the entry (A = 0),
    /// and it sets D when a program writes through it (D = 0, and the entry, or the CPU's cached
    /// copy of it, is writable). Where both are set, or A is set and nothing can be written, a
    /// locked exchange finds what a load found:
    ///
    /// - software changes entries under the table lock only, which the caller holds;
    /// - a CPU whose cached copy has D = 0 walks again before it sets D in memory, and checks P in
    ///   the same step: either it comes before our load, and we see D, or it finds P = 0 and
    ///   faults;
    /// - a CPU whose cached copy has D = 1 writes without touching memory, whatever instruction
    ///   clears the entry;
    /// - an entry that lost its right to be written, and whose old translations have not been
    ///   flushed, may still get D set on processors without shadow stacks: `stale` says whether
    ///   that is possible.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.8 (A and D are set by locked accesses; D with R/W = 0) and 4.10.4.3.
    #[must_use]
    #[inline]
    pub const fn is_settled(self, stale: StaleWrites) -> bool {
        const USED: u64 = PageTableFlags::PRESENT.bits() | PageTableFlags::ACCESSED.bits();
        let written = self.0 & Self::SETTLED.bits() == Self::SETTLED.bits();
        let never = self.0 & USED == USED && !self.is_writable() && matches!(stale, StaleWrites::Impossible);
        written || never
    }

    /// Whether all of `values`, which are present and accessed leaves, are
    /// [settled](Self::is_settled): none of them can be written without being dirty.
    ///
    /// Where writes may be stale the answer is no: there a leaf is settled by its dirty bit alone
    /// ([`SETTLED`](Self::SETTLED)). Three instructions a value, without a branch.
    #[must_use]
    #[inline(always)]
    pub fn are_settled_if_accessed(values: impl Iterator<Item = Self>, stale: StaleWrites) -> bool {
        const UP: u32 =
            PageTableFlags::DIRTY.bits().trailing_zeros() - PageTableFlags::WRITABLE.bits().trailing_zeros();
        // Moved up by so much, the bit of the right to write lies where the dirty bit does.
        let may_become_dirty = |value: Self| value.0 << UP & !value.0;
        let any = values.fold(0, |any, value| any | may_become_dirty(value));
        any & PageTableFlags::DIRTY.bits() == 0 && matches!(stale, StaleWrites::Impossible)
    }

    /// A present leaf with all of these bits is [settled](Self::is_settled), whatever other bits it
    /// has.
    pub const SETTLED: PageTableFlags =
        PageTableFlags::PRESENT.union(PageTableFlags::ACCESSED).union(PageTableFlags::DIRTY);

    /// The flag bits. Meaningful for present entries only; in a 4 KiB leaf bit 7 is PAT, not
    /// "huge".
    #[must_use]
    pub const fn flags(self) -> PageTableFlags {
        PageTableFlags::from_bits_truncate(self.0 & !ADDRESS_MASK)
    }

    /// The table that this entry of a `level` table links, if it links one.
    #[must_use]
    #[inline]
    pub fn as_table(self, level: Level) -> Option<PhysFrame> {
        const KIND: u64 = PageTableFlags::PRESENT.bits() | PageTableFlags::HUGE_PAGE.bits();
        // Bit 7 is reserved (0) in entries of levels that have no leaves.
        if level > Level::Pte && self.0 & KIND == PageTableFlags::PRESENT.bits() {
            Some(PhysFrame::containing_address(PhysAddr::new(self.0 & ADDRESS_MASK)))
        } else {
            None
        }
    }

    /// The physical address of the page that this leaf of `level` maps. The entry must be a present
    /// leaf.
    #[must_use]
    #[inline]
    pub const fn leaf_address(self, level: Level) -> PhysAddr {
        // Above 4 KiB the bits between 12 and the page size are PAT (bit 12) or reserved, not
        // address.
        PhysAddr::new_truncate(self.0 & ADDRESS_MASK & !(level.entry_span() - 1))
    }

    /// Tells what this entry of a `level` table means.
    #[must_use]
    #[inline]
    pub fn decode(self, level: Level) -> Decoded {
        if self.is_empty() {
            Decoded::Empty
        } else if !self.is_present() {
            Decoded::NonPresent(NonPresent::decode(self))
        } else if let Some(table) = self.as_table(level) {
            Decoded::Table(table)
        } else {
            Decoded::Leaf(self.leaf_address(level))
        }
    }
}

impl fmt::Debug for EntryValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EntryValue({:#x})", self.0)
    }
}

/// The meaning of a kept entry: what software may leave in an entry that hardware ignores (P = 0).
///
/// Layout of the bits: 0 = 0; 1 to 4 the kind; 5 to 11 a small number; 12 to 51 the *inverted*
/// payload, so that a CPU which speculates past P = 0 (L1 terminal fault) sees an address above all
/// memory; 52 to 63 zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NonPresent {
    /// The content is at `slot` of swap device `device` (below 128).
    Swap {
        /// Which swap device; only the low 7 bits are kept.
        device: u8,
        /// Which slot of it, in pages; only the low 40 bits are kept.
        slot: u64,
    },
    /// The page is on its way elsewhere; whoever faults waits. It still has a frame, and a
    /// reference on it.
    Migration {
        /// The frame it still occupies (its first, for a huge leaf).
        frame: PhysFrame,
        /// What the entry allowed, to be put back.
        access: MigrationAccess,
    },
    /// No page, but a meaning.
    Marker(Marker),
    /// Bits this crate does not know: an embedder's own encoding (kind 0 or above 3).
    Other(u64),
}

/// The right that a migration entry must restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrationAccess {
    /// The page was mapped read-only.
    ReadOnly,
    /// The page was mapped writable.
    Writable,
}

/// Meanings that need no page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Marker {
    /// Access is a memory error (Linux: PTE_MARKER_POISONED).
    Poison = 1,
    /// Access is a fault although the area is mapped (Linux: PTE_MARKER_GUARD).
    Guard = 2,
}

const KIND_SHIFT: u32 = 1;
const MINOR_SHIFT: u32 = 5;
const KIND_MASK: u64 = 0xf << KIND_SHIFT;
const MINOR_MASK: u64 = 0x7f << MINOR_SHIFT;
const KIND_SWAP: u64 = 1;
const KIND_MIGRATION: u64 = 2;
const KIND_MARKER: u64 = 3;

impl NonPresent {
    /// The entry that carries this meaning.
    #[must_use]
    pub fn encode(self) -> EntryValue {
        let (kind, minor, payload) = match self {
            Self::Swap { device, slot } => (KIND_SWAP, u64::from(device), slot),
            Self::Migration { frame, access } => {
                let writable = match access {
                    MigrationAccess::ReadOnly => 0,
                    MigrationAccess::Writable => 1,
                };
                (KIND_MIGRATION, writable, frame.start_address().as_u64() >> 12)
            }
            Self::Marker(marker) => (KIND_MARKER, marker as u64, 0),
            Self::Other(bits) => return EntryValue(bits & !PageTableFlags::PRESENT.bits()),
        };
        EntryValue(kind << KIND_SHIFT | (minor << MINOR_SHIFT) & MINOR_MASK | !(payload << 12) & ADDRESS_MASK)
    }

    fn decode(value: EntryValue) -> Self {
        let bits = value.0;
        let minor = (bits & MINOR_MASK) >> MINOR_SHIFT;
        let payload = (!bits & ADDRESS_MASK) >> 12;
        match (bits & KIND_MASK) >> KIND_SHIFT {
            // 7 bits fit a u8.
            KIND_SWAP => Self::Swap { device: minor.to_le_bytes()[0], slot: payload },
            KIND_MIGRATION => Self::Migration {
                frame: PhysFrame::<Size4KiB>::containing_address(PhysAddr::new(payload << 12)),
                access: if minor & 1 == 0 { MigrationAccess::ReadOnly } else { MigrationAccess::Writable },
            },
            KIND_MARKER if minor == Marker::Poison as u64 => Self::Marker(Marker::Poison),
            KIND_MARKER if minor == Marker::Guard as u64 => Self::Marker(Marker::Guard),
            _ => Self::Other(bits),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_non_present_meaning_survives_the_entry_and_is_not_present() {
        let frame = PhysFrame::containing_address(PhysAddr::new(0x1234_5000));
        let meanings = [
            NonPresent::Swap { device: 127, slot: (1 << 40) - 1 },
            NonPresent::Swap { device: 0, slot: 0 },
            NonPresent::Migration { frame, access: MigrationAccess::Writable },
            NonPresent::Migration { frame, access: MigrationAccess::ReadOnly },
            NonPresent::Marker(Marker::Poison),
            NonPresent::Marker(Marker::Guard),
            NonPresent::Other(0x1f << 1),
        ];
        for meaning in meanings {
            let value = meaning.encode();
            assert!(!value.is_empty() && !value.is_present(), "{meaning:?}");
            assert_eq!(value.decode(Level::Pte), Decoded::NonPresent(meaning));
            assert_eq!(value.decode(Level::Pmd), Decoded::NonPresent(meaning));
        }
    }

    #[test]
    fn a_migration_entry_shows_speculation_no_real_address() {
        let frame = PhysFrame::containing_address(PhysAddr::new(0x1234_5000));
        let value = NonPresent::Migration { frame, access: MigrationAccess::Writable }.encode();
        assert!(value.bits() & ADDRESS_MASK > 1 << 50);
    }

    #[test]
    fn a_huge_leaf_is_no_table_and_its_pat_bit_is_no_address() {
        let leaf = EntryValue::leaf(Level::Pmd, PhysAddr::new(4 << 20), PageTableFlags::WRITABLE);
        assert_eq!(leaf.decode(Level::Pmd), Decoded::Leaf(PhysAddr::new(4 << 20)));
        let with_pat = EntryValue::from_bits(leaf.bits() | 1 << 12);
        assert_eq!(with_pat.leaf_address(Level::Pmd), PhysAddr::new(4 << 20));
    }

    #[test]
    fn bit_seven_of_a_last_level_entry_is_pat_not_size() {
        let leaf = EntryValue::leaf(Level::Pte, PhysAddr::new(0x5000), PageTableFlags::HUGE_PAGE);
        assert_eq!(leaf.decode(Level::Pte), Decoded::Leaf(PhysAddr::new(0x5000)));
    }

    #[test]
    fn clearing_returns_the_bits_hardware_set() {
        let leaf = EntryValue::leaf(Level::Pte, PhysAddr::new(0x5000), PageTableFlags::WRITABLE);
        for clear in [Entry::get_and_clear, Entry::get_and_clear_exclusive] {
            let entry = Entry(AtomicU64::new(leaf.bits()));
            entry.0.fetch_or(PageTableFlags::DIRTY.bits(), Ordering::Relaxed);
            // SAFETY: the entry is in no table.
            let old = unsafe { clear(&entry) };
            assert!(old.is_dirty() && !old.is_accessed());
            assert!(entry.load().is_empty());
        }
    }
}
