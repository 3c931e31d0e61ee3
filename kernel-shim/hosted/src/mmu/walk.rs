//! A page walk, one memory read at a time.
//!
//! Each step reads one entry, sets its accessed (and dirty) flag, caches what may be cached from it
//! and descends. Between two steps other CPUs may store: the walk is not atomic, only each of its
//! reads is.

use x86_64::PhysAddr;
use x86_64::registers::control::Cr4Flags;
use x86_64::structures::idt::PageFaultErrorCode;
use x86_64::structures::paging::PhysFrame;

use crate::mmu::access::{Access, AccessKind, AccessMode, PageFault, Source, Start, access_code};
use crate::mmu::arch::{ACCESSED, DIRTY, LinearAddress, Meaning, PageSize, Rights, TableLevel, decode};
use crate::mmu::features::{Faults, LargePages, SettingDirty};
use crate::mmu::physical::PhysicalMemory;
use crate::mmu::spaces::SpaceIndex;
use crate::mmu::state::Mmu;
use crate::mmu::structure_cache::StructureEntry;
use crate::mmu::tlb_cache::{Clash, TlbEntry};
use crate::mmu::watch::FrameWatch;

/// A walk in progress. Owned by the CPU that began it; dropping it abandons it, and what it cached
/// stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    address: LinearAddress,
    purpose: Purpose,
    start: Start,
    level: TableLevel,
    table: PhysAddr,
    rights: Rights,
    epoch: u64,
}

impl Walk {
    /// The address being translated.
    #[must_use]
    pub fn address(&self) -> LinearAddress {
        self.address
    }

    /// Level of the table the next step reads.
    #[must_use]
    pub fn level(&self) -> TableLevel {
        self.level
    }

    /// The table the next step reads, unless an invalidation comes first.
    #[must_use]
    pub fn table(&self) -> PhysFrame {
        PhysFrame::containing_address(self.table)
    }

    /// Where the walk began.
    #[must_use]
    pub fn start(&self) -> Start {
        self.start
    }

    fn entry_address(&self) -> PhysAddr {
        PhysAddr::new_truncate(self.table.as_u64() + 8 * self.level.index(self.address))
    }

    fn source(&self) -> Source {
        Source::Walk { start: self.start, level: self.level, entry: self.entry_address() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Access(AccessKind, AccessMode),
    Speculation(Depth),
}

/// How far down a speculative walk goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// To the page: fills the TLB of loads and stores, and the structure caches on the way.
    Page,
    /// To the page: fills the TLB of instruction fetches, which may be the same.
    Fetch,
    /// Until an entry of a table at this level is in the structure caches ([`TableLevel::Pd`]: a
    /// PDE), or a page is met.
    Structure(TableLevel),
}

/// What one step of a walk came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// More to read.
    Continue,
    /// An access may go through.
    Translated(Access),
    /// An access may not.
    Fault(PageFault),
    /// A speculative walk is over.
    Speculated(Speculation),
}

/// How a speculative walk ended. Whatever was passed on the way is cached in every case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speculation {
    /// At a page, now in the TLB (perhaps as an older entry that was there before).
    Page,
    /// At the depth asked for.
    Structure,
    /// Before it: at an entry that is not present or malformed, at a page, or because the address
    /// is not canonical.
    Nothing,
}

impl Mmu {
    /// Fills the caches for `address` through the loaded CR3, as a CPU may do at any moment, in any
    /// mode, idle or not.
    ///
    /// No rights are asked and no fault comes of it. Sets accessed flags, never a dirty flag. An
    /// entry already cached for the page number stays, stale or not.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.10.2.3, 4.10.3.1; AMD64 APM vol. 2 5.5.3.
    pub fn speculate<M: PhysicalMemory, W: FrameWatch>(
        &mut self,
        address: LinearAddress,
        depth: Depth,
        memory: &M,
        watch: &mut W,
    ) -> Speculation {
        let Some(mut walk) = self.begin_speculation(address, depth) else { return Speculation::Nothing };
        loop {
            match self.step(&mut walk, memory, watch) {
                Step::Continue => {}
                Step::Speculated(outcome) => return outcome,
                Step::Translated(_) | Step::Fault(_) => {
                    unreachable!("a speculative walk does not end as that of an access")
                }
            }
        }
    }

    /// Begins the walk of [`speculate`](Self::speculate); `None` if the address is not canonical.
    #[must_use]
    pub fn begin_speculation(&self, address: LinearAddress, depth: Depth) -> Option<Walk> {
        address.is_canonical(self.mode).then(|| self.begin_walk(address, Purpose::Speculation(depth)))
    }

    pub(crate) fn begin_access_walk(
        &self,
        address: LinearAddress,
        kind: AccessKind,
        mode: AccessMode,
    ) -> Walk {
        self.begin_walk(address, Purpose::Access(kind, mode))
    }

    fn begin_walk(&self, address: LinearAddress, purpose: Purpose) -> Walk {
        let (start, level, table, rights) = match self.spaces.at(self.current).structures().deepest(address) {
            Some(entry) => {
                (Start::Structure(entry.level()), entry.table_level(), entry.table(), entry.rights())
            }
            None => (Start::Cr3, self.mode.root(), self.root.start_address(), Rights::ALL),
        };
        Walk { address, purpose, start, level, table, rights, epoch: self.epoch }
    }

    /// Reads one entry of `walk`, which must have begun on this CPU, and acts on it.
    ///
    /// If this CPU executed an invalidating instruction or changed CR3 since the last step, the
    /// walk starts again, from what is still cached: those instructions are serializing.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.10.2.2, 4.10.3.1, 4.10.4.3.
    #[inline]
    pub fn step<M: PhysicalMemory, W: FrameWatch>(
        &mut self,
        walk: &mut Walk,
        memory: &M,
        watch: &mut W,
    ) -> Step {
        if walk.epoch != self.epoch {
            *walk = self.begin_walk(walk.address, walk.purpose);
        }
        if let Purpose::Speculation(Depth::Structure(lowest)) = walk.purpose
            && walk.level < lowest
        {
            return Step::Speculated(Speculation::Structure);
        }
        let entry = memory.read(walk.entry_address());
        match decode(entry, walk.level, self.features.physical_bits) {
            Meaning::NotPresent => self.stop(walk, PageFaultErrorCode::empty(), watch),
            Meaning::Reserved => {
                let code = PageFaultErrorCode::PROTECTION_VIOLATION | PageFaultErrorCode::MALFORMED_TABLE;
                self.stop(walk, code, watch)
            }
            Meaning::Table(next) => self.descend(walk, entry, next, memory, watch),
            Meaning::Page(size, start) => self.arrive(walk, entry, size, start, memory, watch),
        }
    }

    /// The entry just read references the table `next`.
    fn descend<M: PhysicalMemory, W: FrameWatch>(
        &mut self,
        walk: &mut Walk,
        entry: u64,
        next: PhysAddr,
        memory: &M,
        watch: &mut W,
    ) -> Step {
        let Some(below) = walk.level.below() else {
            unreachable!("an entry of a page table never references a table")
        };
        if entry & ACCESSED == 0 && memory.fetch_or(walk.entry_address(), ACCESSED, entry).is_err() {
            return Step::Continue;
        }
        let rights = walk.rights.through(entry);
        let cached = StructureEntry::new(walk.level, next, rights);
        self.spaces.insert_structure(self.current, walk.address, cached, watch);
        if walk.purpose == Purpose::Speculation(Depth::Structure(walk.level)) {
            return Step::Speculated(Speculation::Structure);
        }
        (walk.level, walk.table, walk.rights) = (below, next, rights);
        Step::Continue
    }

    /// The entry just read, `leaf`, maps a page of `size` at `start`.
    fn arrive<M: PhysicalMemory, W: FrameWatch>(
        &mut self,
        walk: &mut Walk,
        leaf: u64,
        size: PageSize,
        start: PhysAddr,
        memory: &M,
        watch: &mut W,
    ) -> Step {
        let mut rights = walk.rights.through(leaf);
        if let Some(stale) = self.rights_kept(walk, rights, size, start) {
            rights = stale;
        }
        let (flags, clash) = match walk.purpose {
            Purpose::Access(kind, mode) if !self.permits(rights, kind, mode) => {
                return self.stop(walk, PageFaultErrorCode::PROTECTION_VIOLATION, watch);
            }
            Purpose::Access(AccessKind::Write, _) => (ACCESSED | DIRTY, Clash::TakeNew),
            Purpose::Access(..) => (ACCESSED, Clash::TakeNew),
            Purpose::Speculation(Depth::Page | Depth::Fetch) => (ACCESSED, Clash::KeepOld),
            Purpose::Speculation(Depth::Structure(_)) => return Step::Speculated(Speculation::Nothing),
        };
        if leaf & flags != flags && memory.fetch_or(walk.entry_address(), flags, leaf).is_err() {
            // Somebody changed the entry since it was read: look again, it may not even be present
            // any more.
            return Step::Continue;
        }
        let mut entry = TlbEntry::whole(start, size, rights, leaf | flags);
        if self.features.large_pages == LargePages::InPieces {
            entry = entry.piece(walk.address);
        }
        let is_global = entry.global() && self.cr4.contains(Cr4Flags::PAGE_GLOBAL);
        let space = if is_global { SpaceIndex::GLOBAL } else { self.current };
        let side = self.side_of(match walk.purpose {
            Purpose::Access(kind, _) => kind,
            Purpose::Speculation(Depth::Fetch) => AccessKind::Execute,
            Purpose::Speculation(_) => AccessKind::Read,
        });
        self.spaces.insert_page((space, side), walk.address, entry, clash, watch);
        match walk.purpose {
            Purpose::Access(..) => {
                let address = entry.translate(walk.address);
                Step::Translated(Access { address, entry, source: walk.source() })
            }
            Purpose::Speculation(_) => Step::Speculated(Speculation::Page),
        }
    }

    /// With what rights a store goes through all the same, though the entry just read no longer
    /// lets it: those of the translation that it came with.
    fn rights_kept(&self, walk: &Walk, now: Rights, size: PageSize, start: PhysAddr) -> Option<Rights> {
        let Purpose::Access(AccessKind::Write, mode) = walk.purpose else { return None };
        if self.features.dirty == SettingDirty::Checked || now.writable() {
            return None;
        }
        let (_, stale) = self.lookup(walk.address)?;
        let same_place = stale.translate(walk.address) == start + walk.address.offset_in(size);
        (same_place && self.permits(stale.rights(), AccessKind::Write, mode)).then_some(stale.rights())
    }

    /// The walk cannot go on: a fault for an access, nothing at all for speculation.
    fn stop<W: FrameWatch>(&mut self, walk: &mut Walk, code: PageFaultErrorCode, watch: &mut W) -> Step {
        let Purpose::Access(kind, mode) = walk.purpose else {
            return Step::Speculated(Speculation::Nothing);
        };
        let source = walk.source();
        self.drop_faulting(walk.address, watch);
        if self.features.faults == Faults::AfterRewalk && source.was_cached() {
            *walk = self.begin_walk(walk.address, walk.purpose);
            return Step::Continue;
        }
        Step::Fault(PageFault { address: walk.address, code: code | access_code(kind, mode), source })
    }
}
