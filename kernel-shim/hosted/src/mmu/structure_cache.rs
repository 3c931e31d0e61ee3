//! Paging-structure caches of one PCID: where a walk may start instead of at CR3.

use x86_64::PhysAddr;

use crate::mmu::arch::{ADDRESS_MASK, LinearAddress, Rights, TableLevel};
use crate::mmu::tlb_cache::{EntryMap, drain};

/// One cached PML5E, PML4E, PDPTE or PDE that references a table, in the form of a paging entry: 64
/// bits.
///
/// Holds the address of the next table and the rights of the path down to it; it says nothing of
/// what that table contains, which may all be non-present. The G flag does not touch it.
///
/// # Source
/// Intel SDM vol. 3A 4.10.3.1, 4.10.2.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StructureEntry(u64);

/// Bits 11:9: the level of the entry.
const LEVEL_SHIFT: u32 = 9;

impl StructureEntry {
    /// An entry of a table at `level` which references `next`.
    #[must_use]
    #[inline]
    pub const fn new(level: TableLevel, next: PhysAddr, rights: Rights) -> Self {
        Self(next.as_u64() | rights.bits() | ((level as u64) << LEVEL_SHIFT))
    }

    /// TableLevel of the entry: [`TableLevel::Pd`] for a PDE, up to [`TableLevel::Pml5`].
    #[must_use]
    #[inline]
    pub const fn level(self) -> TableLevel {
        match (self.0 >> LEVEL_SHIFT) & 7 {
            5 => TableLevel::Pml5,
            4 => TableLevel::Pml4,
            3 => TableLevel::Pdpt,
            _ => TableLevel::Pd,
        }
    }

    /// Level of the table it references.
    #[must_use]
    #[inline]
    pub const fn table_level(self) -> TableLevel {
        match self.level() {
            TableLevel::Pml5 => TableLevel::Pml4,
            TableLevel::Pml4 => TableLevel::Pdpt,
            TableLevel::Pdpt => TableLevel::Pd,
            TableLevel::Pd | TableLevel::Pt => TableLevel::Pt,
        }
    }

    /// The table it references.
    #[must_use]
    #[inline]
    pub const fn table(self) -> PhysAddr {
        PhysAddr::new_truncate(self.0 & ADDRESS_MASK)
    }

    /// Rights of the path, this entry included.
    #[must_use]
    #[inline]
    pub const fn rights(self) -> Rights {
        Rights::of_bits(self.0)
    }
}

/// Levels whose entries are cached, deepest first.
const CACHED: [TableLevel; 4] = [TableLevel::Pd, TableLevel::Pdpt, TableLevel::Pml4, TableLevel::Pml5];

/// Paging-structure-cache entries of one PCID.
#[derive(Debug, Default)]
pub struct StructureCache {
    by_level: [EntryMap<StructureEntry>; 4],
}

impl StructureCache {
    /// The deepest entry on the path to `address`: a walk may start there and read nothing above.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.10.3.2.
    #[must_use]
    #[inline]
    pub fn deepest(&self, address: LinearAddress) -> Option<StructureEntry> {
        CACHED.iter().find_map(|&level| {
            let entries = self.at(level);
            if entries.is_empty() { None } else { entries.get(&key(address, level)).copied() }
        })
    }

    /// The entry of `level` on the path to `address`.
    #[must_use]
    pub fn get(&self, address: LinearAddress, level: TableLevel) -> Option<StructureEntry> {
        if level == TableLevel::Pt { None } else { self.at(level).get(&key(address, level)).copied() }
    }

    /// Caches `entry` on the path to `address`, unless one is there; says whether it did.
    #[inline]
    pub fn insert(&mut self, address: LinearAddress, entry: StructureEntry) -> bool {
        let level = entry.level();
        match self.at_mut(level).entry(key(address, level)) {
            indexmap::map::Entry::Vacant(vacant) => {
                vacant.insert(entry);
                true
            }
            indexmap::map::Entry::Occupied(_) => false,
        }
    }

    /// Drops the entries on the path to `address` only.
    #[inline]
    pub fn drop_path(&mut self, address: LinearAddress, mut dropped: impl FnMut(StructureEntry)) {
        for level in CACHED {
            let entries = self.at_mut(level);
            if entries.is_empty() {
                continue;
            }
            if let Some(entry) = entries.swap_remove(&key(address, level)) {
                dropped(entry);
            }
        }
    }

    /// Drops everything.
    pub fn drop_all(&mut self, mut dropped: impl FnMut(StructureEntry)) {
        for entries in &mut self.by_level {
            drain(entries, &mut dropped);
        }
    }

    /// Drops the entry at `place`, counted from 0 in no particular order; `None` past the last.
    pub fn drop_nth(&mut self, mut place: usize) -> Option<StructureEntry> {
        for entries in &mut self.by_level {
            if let Some((_, entry)) = entries.swap_remove_index(place) {
                return Some(entry);
            }
            place -= entries.len();
        }
        None
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_level.iter().map(EntryMap::len).sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_level.iter().all(EntryMap::is_empty)
    }

    /// Every entry with the first address it serves.
    pub fn iter(&self) -> impl Iterator<Item = (LinearAddress, StructureEntry)> + '_ {
        self.by_level.iter().flatten().map(|(number, entry)| {
            let address = LinearAddress::new(number << entry.level().entry_shift());
            (address, *entry)
        })
    }

    #[inline]
    fn at(&self, level: TableLevel) -> &EntryMap<StructureEntry> {
        &self.by_level[level as usize - TableLevel::Pd as usize]
    }

    #[inline]
    fn at_mut(&mut self, level: TableLevel) -> &mut EntryMap<StructureEntry> {
        &mut self.by_level[level as usize - TableLevel::Pd as usize]
    }
}

/// The address bits that select the entry and everything above it: 47:21 for a PDE (56:21 with
/// LA57), and so on.
const fn key(address: LinearAddress, level: TableLevel) -> u64 {
    address.as_u64() >> level.entry_shift()
}
