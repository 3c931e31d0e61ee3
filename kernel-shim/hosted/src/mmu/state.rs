//! The MMU of one virtual CPU: its control registers, and what it can still reach.

use x86_64::instructions::tlb::Pcid;
use x86_64::registers::control::Cr4Flags;
use x86_64::structures::paging::PhysFrame;

use crate::mmu::access::{AccessKind, AccessMode};
use crate::mmu::arch::{LinearAddress, Meaning, PageSize, PagingMode, Rights, decode};
use crate::mmu::broadcast::{Broadcast, Issuer};
use crate::mmu::features::{Coexisting, Features, Tlbs};
use crate::mmu::physical::PhysicalMemory;
use crate::mmu::spaces::{Side, Space, SpaceIndex, Spaces};
use crate::mmu::tlb_cache::TlbEntry;
use crate::mmu::watch::{CachedEntry, FrameWatch, Held, Reach, Tag, Use};
use crate::vocabulary::Moment;

/// The MMU of one virtual CPU, paging enabled.
///
/// Fixed: 64-bit mode, IA32_EFER.NXE = 1, CR0.WP = 1, no protection keys. CR4 says the rest.
#[derive(Debug)]
pub struct Mmu {
    pub(crate) features: Features,
    pub(crate) mode: PagingMode,
    pub(crate) cr4: Cr4Flags,
    pub(crate) root: PhysFrame,
    pub(crate) pcid: Pcid,
    pub(crate) current: SpaceIndex,
    pub(crate) spaces: Spaces,
    /// Counts serializing invalidations: a walk that began before one starts again after it.
    pub(crate) epoch: u64,
    pub(crate) broadcasts: Vec<(Issuer, Broadcast)>,
}

/// PCID 0, the only one while CR4.PCIDE is 0.
pub const PCID_ZERO: Pcid = match Pcid::new(0) {
    Ok(pcid) => pcid,
    Err(_) => panic!("0 is below 4096"),
};

impl Mmu {
    /// A CPU with empty caches that has just loaded `root` into CR3, with PCID 0.
    ///
    /// Of `cr4` the flags `PAGE_GLOBAL`, `PCID`, `L5_PAGING`,
    /// `SUPERVISOR_MODE_EXECUTION_PROTECTION` and `SUPERVISOR_MODE_ACCESS_PREVENTION` count.
    pub fn new<W: FrameWatch>(features: Features, cr4: Cr4Flags, root: PhysFrame, watch: &mut W) -> Self {
        let mut spaces = Spaces::new(features.tlb_capacity, features.structure_capacity);
        let current = spaces.open(PCID_ZERO);
        let mode =
            if cr4.contains(Cr4Flags::L5_PAGING) { PagingMode::FiveLevel } else { PagingMode::FourLevel };
        watch.hold(root, Held { as_a: Use::Root, tag: Tag::Pcid(PCID_ZERO) });
        Self { features, mode, cr4, root, pcid: PCID_ZERO, current, spaces, epoch: 0, broadcasts: Vec::new() }
    }

    /// The TLB entry that a load or a store at `address` would use now.
    #[must_use]
    #[inline]
    pub fn lookup(&self, address: LinearAddress) -> Option<(Tag, TlbEntry)> {
        self.lookup_on(Side::Data, address)
    }

    /// The TLB entry that an access of this kind to `address` would use now.
    #[must_use]
    #[inline]
    pub fn lookup_for(&self, address: LinearAddress, kind: AccessKind) -> Option<(Tag, TlbEntry)> {
        self.lookup_on(self.side_of(kind), address)
    }

    /// Whether an access of any kind to `address` would be served by a TLB now.
    #[must_use]
    pub fn has_page(&self, address: LinearAddress) -> bool {
        self.lookup(address).is_some()
            || self.features.tlbs == Tlbs::Split && self.lookup_on(Side::Fetch, address).is_some()
    }

    /// Where accesses of this kind find their translations.
    #[inline]
    pub(crate) fn side_of(&self, kind: AccessKind) -> Side {
        match (self.features.tlbs, kind) {
            (Tlbs::Split, AccessKind::Execute) => Side::Fetch,
            (Tlbs::Split, AccessKind::Read | AccessKind::Write) | (Tlbs::Unified, _) => Side::Data,
        }
    }

    #[inline]
    fn lookup_on(&self, side: Side, address: LinearAddress) -> Option<(Tag, TlbEntry)> {
        let (own, global) = (self.spaces.at(self.current), self.spaces.at(SpaceIndex::GLOBAL));
        let find = |size, space: &Space| space.tlb(side).get(address, size).map(|entry| (space.tag(), entry));
        match self.features.coexisting {
            Coexisting::SmallestFirst => {
                PageSize::ALL.into_iter().find_map(|size| find(size, own).or_else(|| find(size, global)))
            }
            Coexisting::LargestFirst => PageSize::ALL
                .into_iter()
                .rev()
                .find_map(|size| find(size, global).or_else(|| find(size, own))),
        }
    }

    /// An address that programs of the loaded PCID could use through two page sizes at once: the
    /// larger and the smaller page.
    pub fn mixed(&mut self) -> Option<(LinearAddress, TlbEntry, TlbEntry)> {
        self.spaces.at_mut(self.current).mixed()
    }

    /// The frame and PCID in CR3.
    #[must_use]
    pub fn cr3(&self) -> (PhysFrame, Pcid) {
        (self.root, self.pcid)
    }

    /// Pages that stores may go to under the loaded PCID, and through whose translations none has
    /// gone: of a few translations, from the `place`th on.
    #[must_use]
    pub fn clean_pages(&self, place: u64) -> [Option<LinearAddress>; 8] {
        let mut few = self.spaces.at(self.current).tlb(Side::Data).some_from(place);
        core::array::from_fn(|_| {
            let (address, entry) = few.next()?;
            (entry.rights().writable() && !entry.dirty()).then_some(address)
        })
    }

    /// A table that the next walk could read, and the part of the address that leads to it: picks
    /// one entry that is present on each level, from CR3 down, as `pick` says of how many there
    /// are; down to a page, or to a table that is empty.
    ///
    /// What programs have used plays no part in it.
    pub fn somewhere<M: PhysicalMemory>(
        &self,
        memory: &M,
        mut pick: impl FnMut(u64) -> u64,
    ) -> LinearAddress {
        let (mut table, mut level, mut address) = (self.root.start_address(), self.mode.root(), 0);
        loop {
            // The upper half is the kernel's.
            let entries = if level == self.mode.root() { 256 } else { 512 };
            let meaning = |index: u64| {
                let entry = memory.read(table + 8 * (index % entries));
                decode(entry, level, self.features.physical_bits)
            };
            let leads = |index: &u64| matches!(meaning(*index), Meaning::Table(_) | Meaning::Page(..));
            let first = pick(entries);
            let next = (first..first + entries).find(leads).unwrap_or(first);
            // Entries lie side by side: the first of them is not the only one to be found.
            let beside = next + pick(16);
            let index = if leads(&beside) { beside } else { next };
            let meaning = meaning(index);
            let index = index % entries;
            address |= index << level.entry_shift();
            match (meaning, level.below()) {
                (Meaning::Table(next), Some(below)) => (table, level) = (next, below),
                _ => return LinearAddress::new(address),
            }
        }
    }

    /// CR4, as far as it is modelled.
    #[must_use]
    pub fn cr4(&self) -> Cr4Flags {
        self.cr4
    }

    /// The switches this CPU was made with.
    #[must_use]
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// How many levels a walk has.
    #[must_use]
    pub fn paging_mode(&self) -> PagingMode {
        self.mode
    }

    /// Number of TLB entries, over all PCIDs and globals.
    #[must_use]
    pub fn tlb_len(&self) -> usize {
        self.spaces.tlb_len()
    }

    /// Number of paging-structure-cache entries, over all PCIDs.
    #[must_use]
    pub fn structures_len(&self) -> usize {
        self.spaces.structures_len()
    }

    /// How this CPU can still come to `frame` through what it has cached, or through CR3. Costs a
    /// few hash look-ups.
    ///
    /// A frame that a present entry in memory leads to, but nothing cached names, counts as out of
    /// reach here.
    #[must_use]
    pub fn reach(&self, frame: PhysFrame) -> Reach {
        if self.usable_now(frame) {
            Reach::Now
        } else if self.spaces.iter().any(|space| space.names(frame)) {
            Reach::OtherPcid
        } else {
            Reach::Nowhere
        }
    }

    /// Whether an entry of the loaded PCID, a global one, or CR3 names `frame`.
    #[must_use]
    pub fn usable_now(&self, frame: PhysFrame) -> bool {
        self.root == frame
            || self.spaces.at(self.current).names(frame)
            || self.spaces.at(SpaceIndex::GLOBAL).names(frame)
    }

    /// Everything cached that can be used now, CR3 first.
    pub fn usable_entries(&self) -> impl Iterator<Item = CachedEntry> + '_ {
        core::iter::once(self.root_entry())
            .chain(self.spaces.at(self.current).entries())
            .chain(self.spaces.at(SpaceIndex::GLOBAL).entries())
    }

    /// Everything cached under any PCID, CR3 first.
    pub fn entries(&self) -> impl Iterator<Item = CachedEntry> + '_ {
        core::iter::once(self.root_entry()).chain(self.spaces.iter().flat_map(Space::entries))
    }

    /// Every cached entry, under any PCID, that names `frame`. A scan: for telling a story, not for
    /// asking a question.
    pub fn entries_reaching(&self, frame: PhysFrame) -> impl Iterator<Item = CachedEntry> + '_ {
        self.entries().filter(move |entry| entry.names(frame))
    }

    /// Lets everything cached vanish, as it may at any time. CR3 stays loaded.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.10.2.2, 4.10.3.1.
    pub fn forget_everything<W: FrameWatch>(&mut self, watch: &mut W) {
        for space in self.spaces.iter_mut() {
            space.drop_all(watch);
        }
    }

    /// Lets one cached entry vanish: `pick` is told how many there are and says which.
    pub fn forget_one<W: FrameWatch>(&mut self, pick: impl FnOnce(usize) -> usize, watch: &mut W) {
        let (pages, tables) = (self.tlb_len(), self.structures_len());
        if pages + tables == 0 {
            return;
        }
        let place = pick(pages + tables);
        if place < pages {
            self.spaces.drop_nth_page(place, watch);
        } else {
            self.spaces.drop_nth_structure(place - pages, watch);
        }
    }

    /// Whether `rights` let the access through.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.6.1.
    #[inline]
    pub(crate) fn permits(&self, rights: Rights, kind: AccessKind, mode: AccessMode) -> bool {
        let privilege = match mode {
            AccessMode::User => rights.user(),
            AccessMode::Kernel if !rights.user() => true,
            AccessMode::Kernel => !self.cr4.contains(match kind {
                AccessKind::Execute => Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION,
                AccessKind::Read | AccessKind::Write => Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION,
            }),
        };
        privilege
            && match kind {
                AccessKind::Read => true,
                AccessKind::Write => rights.writable(),
                AccessKind::Execute => !rights.no_execute(),
            }
    }

    fn root_entry(&self) -> CachedEntry {
        CachedEntry {
            held: Held { as_a: Use::Root, tag: Tag::Pcid(self.pcid) },
            address: LinearAddress::new(0),
            span_shift: self.mode.address_bits(),
            frame: self.root,
            rights: Rights::ALL,
            dirty: false,
            at: Moment::START,
        }
    }
}
