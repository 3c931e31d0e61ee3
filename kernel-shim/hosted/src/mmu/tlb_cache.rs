//! TLB entries of one PCID, or the global ones: page numbers and what they translate to.

use indexmap::IndexMap;
use rustc_hash::FxBuildHasher;
use x86_64::PhysAddr;

use crate::mmu::arch::{ADDRESS_MASK, DIRTY, GLOBAL, LinearAddress, PageSize, Rights};
use crate::vocabulary::Moment;

/// Entries by page number or by the address bits a structure entry covers. Dense, so that a flush
/// of few is cheap and any one can be picked to vanish.
pub(crate) type EntryMap<V> = IndexMap<u64, V, FxBuildHasher>;

/// One cached translation, in the form of a paging entry: 64 bits.
///
/// # Source
/// Intel SDM vol. 3A 4.10.2.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlbEntry(u64);

/// Bits 10:9: the page size this entry serves. Bits 53:52: the size of the page in memory that it
/// is (a piece of).
const SIZE_SHIFT: u32 = 9;
const ORIGIN_SHIFT: u32 = 52;

impl TlbEntry {
    /// A page of `size` at `start`, with the rights of its path and the dirty and global bits of
    /// its `leaf` entry.
    #[must_use]
    #[inline]
    pub const fn whole(start: PhysAddr, size: PageSize, rights: Rights, leaf: u64) -> Self {
        let sizes = ((size as u64) << SIZE_SHIFT) | ((size as u64) << ORIGIN_SHIFT);
        Self(start.as_u64() | rights.bits() | (leaf & (DIRTY | GLOBAL)) | sizes)
    }

    /// The 4-KiB part of this translation that serves `address`; the entry itself if it is no
    /// larger.
    #[must_use]
    #[inline]
    pub const fn piece(self, address: LinearAddress) -> Self {
        let page = self.origin();
        let inside = address.offset_in(page) & ADDRESS_MASK;
        Self((self.0 & !(3 << SIZE_SHIFT)) | inside)
    }

    /// First byte of the page.
    #[must_use]
    #[inline]
    pub const fn start(self) -> PhysAddr {
        PhysAddr::new_truncate(self.0 & ADDRESS_MASK)
    }

    /// The page size this entry serves.
    #[must_use]
    #[inline]
    pub const fn size(self) -> PageSize {
        size_from(self.0 >> SIZE_SHIFT)
    }

    /// The page size in the paging structures; larger than [`size`](Self::size) for a piece.
    #[must_use]
    #[inline]
    pub const fn origin(self) -> PageSize {
        size_from(self.0 >> ORIGIN_SHIFT)
    }

    /// Rights of the whole path.
    #[must_use]
    #[inline]
    pub const fn rights(self) -> Rights {
        Rights::of_bits(self.0)
    }

    /// Whether D was set: stores go through without a look at memory.
    #[must_use]
    #[inline]
    pub const fn dirty(self) -> bool {
        self.0 & DIRTY != 0
    }

    /// Whether G was set in the entry that maps the page; counts only while CR4.PGE is 1.
    #[must_use]
    #[inline]
    pub const fn global(self) -> bool {
        self.0 & GLOBAL != 0
    }

    /// Physical address that `address`, which this entry serves, translates to.
    #[must_use]
    #[inline]
    pub const fn translate(self, address: LinearAddress) -> PhysAddr {
        PhysAddr::new_truncate((self.0 & ADDRESS_MASK) | address.offset_in(self.size()))
    }
}

const fn size_from(bits: u64) -> PageSize {
    match bits & 3 {
        0 => PageSize::Size4KiB,
        1 => PageSize::Size2MiB,
        _ => PageSize::Size1GiB,
    }
}

/// Which of two entries for one page number stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clash {
    /// The one already cached, perhaps stale: a speculative fill.
    KeepOld,
    /// The one just walked: the access could not use the old one.
    TakeNew,
}

/// What became of an insertion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// The entry is new.
    Added,
    /// The entry displaced this one.
    Replaced(TlbEntry),
    /// An entry was there and stays.
    Kept,
}

/// A translation, and when it was cached.
#[derive(Clone, Copy, Debug)]
struct Cached {
    entry: TlbEntry,
    at: Moment,
}

/// TLB entries of one tag.
#[derive(Debug, Default)]
pub struct TlbCache {
    by_size: [EntryMap<Cached>; 3],
    /// How many 4-KiB pieces of 2-MiB and of 1-GiB pages are among them.
    pieces: [usize; 2],
}

impl TlbCache {
    /// The entry of `size` that serves `address`.
    #[must_use]
    #[inline]
    pub fn get(&self, address: LinearAddress, size: PageSize) -> Option<TlbEntry> {
        let entries = &self.by_size[size as usize];
        if entries.is_empty() {
            return None;
        }
        entries.get(&address.page_number(size)).map(|cached| cached.entry)
    }

    /// Caches `entry` for `address`, `at` this moment.
    #[inline]
    pub fn insert(&mut self, address: LinearAddress, entry: TlbEntry, clash: Clash, at: Moment) -> Inserted {
        let size = entry.size();
        let key = address.page_number(size);
        let new = Cached { entry, at };
        let outcome = match self.by_size[size as usize].entry(key) {
            indexmap::map::Entry::Vacant(vacant) => {
                vacant.insert(new);
                Inserted::Added
            }
            indexmap::map::Entry::Occupied(_) if clash == Clash::KeepOld => return Inserted::Kept,
            indexmap::map::Entry::Occupied(mut occupied) => Inserted::Replaced(occupied.insert(new).entry),
        };
        if let Inserted::Replaced(old) = outcome {
            self.uncount(old);
        }
        if let Some(pieces) = self.pieces_of(entry) {
            *pieces += 1;
        }
        outcome
    }

    /// Drops whatever serves the page number of `address` at any size, with every other piece of
    /// the same large page.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.10.4.1 (pieces too).
    #[inline]
    pub fn drop_page(&mut self, address: LinearAddress, mut dropped: impl FnMut(TlbEntry)) {
        for size in PageSize::ALL {
            if self.by_size[size as usize].is_empty() {
                continue;
            }
            if let Some(cached) = self.by_size[size as usize].swap_remove(&address.page_number(size)) {
                let entry = cached.entry;
                self.uncount(entry);
                dropped(entry);
            }
        }
        if self.pieces != [0, 0] {
            self.drop_pieces(address, PageSize::Size2MiB, &mut dropped);
            self.drop_pieces(address, PageSize::Size1GiB, &mut dropped);
        }
    }

    /// Drops everything.
    pub fn drop_all(&mut self, mut dropped: impl FnMut(TlbEntry)) {
        for entries in &mut self.by_size {
            drain(entries, |cached| dropped(cached.entry));
        }
        self.pieces = [0, 0];
    }

    /// Drops the entry at `place`, counted from 0 in no particular order; `None` past the last.
    pub fn drop_nth(&mut self, mut place: usize) -> Option<TlbEntry> {
        for entries in &mut self.by_size {
            if let Some((_, Cached { entry, .. })) = entries.swap_remove_index(place) {
                self.uncount(entry);
                return Some(entry);
            }
            place -= entries.len();
        }
        None
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_size.iter().map(EntryMap::len).sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_size.iter().all(EntryMap::is_empty)
    }

    /// Every entry with the first address it serves, and when it was cached.
    pub fn iter(&self) -> impl Iterator<Item = (LinearAddress, TlbEntry, Moment)> + '_ {
        self.by_size
            .iter()
            .flatten()
            .map(|(number, Cached { entry, at })| (address_of(*number, entry.size()), *entry, *at))
    }

    /// Every entry of one page size, in turn from the `place`th on, with the first address it
    /// serves.
    pub fn some_from(&self, place: u64) -> impl Iterator<Item = (LinearAddress, TlbEntry)> + '_ {
        let entries = self.by_size.iter().find(|entries| !entries.is_empty());
        entries.into_iter().flat_map(move |entries| {
            let len = entries.len();
            let first = usize::try_from(place % len as u64).unwrap_or(0);
            (0..len).filter_map(move |offset| {
                let (number, cached) = entries.get_index((first + offset) % len)?;
                Some((address_of(*number, cached.entry.size()), cached.entry))
            })
        })
    }

    /// Whether `address` is served by more than one page size: how large, and how small.
    ///
    /// Software must not let that happen: which of the two is used, one access at a time, is the
    /// CPU's choice, and some CPUs stop altogether.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.10.2.3, 4.10.4.2; AMD family 10h erratum 383.
    #[must_use]
    #[inline]
    pub fn mixed_at(&self, address: LinearAddress) -> Option<(TlbEntry, TlbEntry)> {
        // A piece of a large page is the large page.
        let mut found = PageSize::ALL.iter().filter_map(|size| self.get(address, *size));
        let (small, large) = (found.next()?, found.next_back()?);
        (small.origin() != large.origin()).then_some((large, small))
    }

    /// The first address that a 2-MiB or 1-GiB entry just cached at `address` has in common with a
    /// smaller one.
    #[must_use]
    pub fn mixed_in(&self, address: LinearAddress, size: PageSize) -> Option<LinearAddress> {
        let page = address.page_number(size);
        let smaller = self.by_size.iter().take(size as usize).flatten();
        let mut inside = smaller
            .map(|(number, cached)| (address_of(*number, cached.entry.size()), cached.entry))
            .filter(|(start, entry)| start.page_number(size) == page && entry.origin() != size);
        inside.next().map(|(start, _)| start)
    }

    fn drop_pieces(&mut self, address: LinearAddress, origin: PageSize, dropped: &mut impl FnMut(TlbEntry)) {
        if self.pieces[origin as usize - 1] == 0 {
            return;
        }
        let region = address.page_number(origin);
        let mut place = self.by_size[0].len();
        while place > 0 {
            place -= 1;
            let Some((number, Cached { entry, .. })) = self.by_size[0].get_index(place) else { continue };
            if entry.origin() == origin
                && address_of(*number, PageSize::Size4KiB).page_number(origin) == region
            {
                let entry = *entry;
                self.by_size[0].swap_remove_index(place);
                self.uncount(entry);
                dropped(entry);
            }
        }
    }

    #[inline]
    fn uncount(&mut self, entry: TlbEntry) {
        if let Some(pieces) = self.pieces_of(entry) {
            *pieces -= 1;
        }
    }

    #[inline]
    fn pieces_of(&mut self, entry: TlbEntry) -> Option<&mut usize> {
        let origin = entry.origin();
        if origin == entry.size() { None } else { self.pieces.get_mut(origin as usize - 1) }
    }
}

/// Empties `entries`; gives memory back if they have become few for it, because clearing costs by
/// capacity.
pub(crate) fn drain<V: Copy>(entries: &mut EntryMap<V>, mut dropped: impl FnMut(V)) {
    let count = entries.len();
    if count == 0 {
        return;
    }
    for entry in entries.values() {
        dropped(*entry);
    }
    entries.clear();
    if entries.capacity() > 16 * count + 256 {
        entries.shrink_to(4 * count);
    }
}

const fn address_of(number: u64, size: PageSize) -> LinearAddress {
    LinearAddress::new(number << size.shift())
}
