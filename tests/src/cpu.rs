//! One CPU's TLB: simple, and it drops only what the architecture demands.
//!
//! Real CPUs drop entries when they like. This one keeps each entry until an instruction must drop
//! it, which is the worst case for a kernel. INVLPG drops only the structure-cache entries that
//! lead to its address, as on CPUs with precise invalidation.

use core::cell::RefCell;
use std::collections::BTreeMap;

use mmu_gather::pagetable::Level;
use mmu_gather::tlb::{CachedTranslations, CpuTlb};
use x86_64::structures::paging::PhysFrame;

use crate::options::Bits;

/// What a program does with an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Loads from it.
    Read,
    /// Stores to it.
    Write,
}

/// Why an access faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing present on the path to the address.
    NotPresent,
    /// The leaf is read-only.
    ReadOnly,
}

/// A leaf as a CPU has cached it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The first frame.
    pub frame: PhysFrame,
    /// Bytes mapped.
    pub len_bytes: u64,
    /// The first address.
    pub address: u64,
    /// Whether the entry allowed writing.
    pub writable: bool,
    /// Whether the entry was dirty when it was cached: writes then leave no trace in the tables.
    pub dirty: bool,
}

/// Tag, level of the table the entry was in, first address it covers.
type Key = (u16, Level, u64);

/// What a CPU has cached of the tables.
#[derive(Debug)]
pub(crate) struct PaperTlb {
    root: PhysFrame,
    pcid: u16,
    leaves: BTreeMap<Key, Translation>,
    links: BTreeMap<Key, PhysFrame>,
}

pub(crate) struct PaperCpu {
    pub(crate) state: CpuTlb<Bits>,
    pub(crate) tlb: RefCell<PaperTlb>,
}

impl PaperCpu {
    pub(crate) fn new(root: PhysFrame) -> Self {
        let tlb = PaperTlb { root, pcid: 0, leaves: BTreeMap::new(), links: BTreeMap::new() };
        Self { state: CpuTlb::new(), tlb: RefCell::new(tlb) }
    }
}

const fn first_address(level: Level, address: u64) -> u64 {
    address & !(level.entry_span() - 1)
}

impl PaperTlb {
    pub(crate) const fn root(&self) -> PhysFrame {
        self.root
    }

    const fn key(&self, level: Level, address: u64) -> Key {
        (self.pcid, level, first_address(level, address))
    }

    pub(crate) fn leaf(&self, address: u64) -> Option<Translation> {
        Level::ALL.iter().find_map(|level| self.leaves.get(&self.key(*level, address)).copied())
    }

    /// The lowest table on the path to `address` that is cached, and its level.
    pub(crate) fn table(&self, address: u64) -> Option<(PhysFrame, Level)> {
        Level::ALL.iter().find_map(|level| {
            let below = level.below()?;
            Some((*self.links.get(&self.key(*level, address))?, below))
        })
    }

    pub(crate) fn remember_leaf(&mut self, level: Level, translation: Translation) {
        self.leaves.insert(self.key(level, translation.address), translation);
    }

    pub(crate) fn remember_link(&mut self, level: Level, address: u64, table: PhysFrame) {
        self.links.insert(self.key(level, address), table);
    }

    /// Before a store through an entry that was cached as clean, hardware walks again: the entry is
    /// dropped.
    pub(crate) fn forget_leaf(&mut self, address: u64) {
        for level in Level::ALL {
            let key = self.key(level, address);
            self.leaves.remove(&key);
        }
    }

    pub(crate) fn invlpg(&mut self, address: u64) {
        self.forget_leaf(address);
        for level in Level::ALL {
            let key = self.key(level, address);
            self.links.remove(&key);
        }
    }

    pub(crate) fn load_cr3(&mut self, root: PhysFrame, pcid: u16, cached: CachedTranslations) {
        self.root = root;
        self.pcid = pcid;
        if cached == CachedTranslations::Flush {
            self.leaves.retain(|key, _| key.0 != pcid);
            self.links.retain(|key, _| key.0 != pcid);
        }
    }

    /// The leaves the CPU can use now.
    pub(crate) fn usable_leaves(&self) -> impl Iterator<Item = Translation> {
        self.leaves_under(self.pcid)
    }

    pub(crate) fn leaves_under(&self, pcid: u16) -> impl Iterator<Item = Translation> {
        self.leaves.iter().filter(move |(key, _)| key.0 == pcid).map(|(_, translation)| *translation)
    }

    /// The tables the CPU can go on walking from now.
    pub(crate) fn usable_tables(&self) -> impl Iterator<Item = (u64, PhysFrame)> {
        self.links.iter().filter(|(key, _)| key.0 == self.pcid).map(|(key, table)| (key.2, *table))
    }
}
