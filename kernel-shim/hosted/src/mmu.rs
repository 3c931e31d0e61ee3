//! The MMU of one virtual CPU: its control registers, an access through it, and what it can still reach.
//!
//! It caches whatever the architecture lets it cache and drops only what the architecture promises to drop, so that a flush
//! which software owes and forgets shows. Walks are in `walk`, invalidation is in `invalidate`.

use mmu_kernel_shim::Moment;
use rand::Rng;
use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::registers::control::Cr4Flags;
use x86_64::structures::idt::PageFaultErrorCode;
use x86_64::structures::paging::PhysFrame;

use crate::arch::{Level, LinearAddress, PageSize, PagingMode, Rights};
use crate::broadcast::{Broadcast, Issuer};
use crate::features::{Coexisting, Faults, Features};
use crate::physical::PhysicalMemory;
use crate::spaces::{Space, SpaceIndex, Spaces};
use crate::tlb_cache::TlbEntry;
use crate::walk::{Step, Walk};
use crate::watch::{CachedEntry, FrameWatch, Held, Reach, Tag, Use};

/// What an instruction does at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// Load.
    Read,
    /// Store, or a locked load and store.
    Write,
    /// Instruction fetch.
    Execute,
}

/// At which privilege.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessMode {
    /// CPL 3.
    User,
    /// CPL below 3, with CR0.WP = 1 and EFLAGS.AC = 0.
    Kernel,
}

/// An access that went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The byte in physical memory.
    pub address: PhysAddr,
    /// The translation used; after a walk, the one just cached.
    pub entry: TlbEntry,
    /// Where the translation came from.
    pub source: Source,
}

/// Where a translation, or the reason for a fault, was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the TLB, under this tag.
    Tlb(Tag),
    /// At the end of a walk.
    Walk {
        /// Where the walk began.
        start: Start,
        /// Level of the table with the last entry read.
        level: Level,
        /// Address of the last entry read.
        entry: PhysAddr,
    },
}

impl Source {
    /// Whether something cached took part, so that memory alone might give another answer.
    #[must_use]
    pub const fn was_cached(self) -> bool {
        !matches!(self, Self::Walk { start: Start::Cr3, .. })
    }
}

/// Where a walk began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At the root.
    Cr3,
    /// Below a cached entry of this level.
    Structure(Level),
}

/// An access that did not go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// #PF.
    Page(PageFault),
    /// #GP (#SS for stack accesses): the address is not canonical.
    NonCanonical(LinearAddress),
}

/// A page fault. What was cached for its address under the current PCID is gone when it is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// CR2.
    pub address: LinearAddress,
    /// The error code pushed. Intel SDM vol. 3A 4.7.
    pub code: PageFaultErrorCode,
    /// What said no.
    pub source: Source,
}

/// A control-register or invalidation instruction with operands the CPU refuses; nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralProtection;

impl core::fmt::Display for GeneralProtection {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("general protection: the operands are not allowed in this mode")
    }
}

impl core::error::Error for GeneralProtection {}

/// How an access begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// The TLB served it: done, no memory was read.
    Hit(Access),
    /// It needs a walk, to be driven by [`Mmu::step`].
    Walk(Walk),
}

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
    /// Of `cr4` the flags `PAGE_GLOBAL`, `PCID`, `L5_PAGING`, `SUPERVISOR_MODE_EXECUTION_PROTECTION` and
    /// `SUPERVISOR_MODE_ACCESS_PREVENTION` count.
    pub fn new<W: FrameWatch>(features: Features, cr4: Cr4Flags, root: PhysFrame, watch: &mut W) -> Self {
        let mut spaces = Spaces::new(features.tlb_capacity, features.structure_capacity);
        let current = spaces.open(PCID_ZERO);
        let mode =
            if cr4.contains(Cr4Flags::L5_PAGING) { PagingMode::FiveLevel } else { PagingMode::FourLevel };
        watch.hold(root, Held { as_a: Use::Root, tag: Tag::Pcid(PCID_ZERO) });
        Self { features, mode, cr4, root, pcid: PCID_ZERO, current, spaces, epoch: 0, broadcasts: Vec::new() }
    }

    /// Translates one access and does to memory what hardware does: the accessed flags, and the dirty flag for a store.
    ///
    /// A TLB entry serves without a look at memory, except a store whose entry is not dirty yet: that one walks again, and so
    /// sees an entry that has meanwhile gone, and, as the [features](crate::features::SettingDirty) say, one that may no longer be written. Otherwise the walk starts below the deepest cached structure entry.
    ///
    /// # Errors
    /// [`Fault::Page`] if the translation is missing, malformed or does not allow the access. [`Fault::NonCanonical`] before
    /// any look at the caches.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.6, 4.7, 4.8, 4.10.2.2, 4.10.3.2.
    #[inline]
    pub fn access<M: PhysicalMemory, W: FrameWatch>(
        &mut self,
        address: LinearAddress,
        kind: AccessKind,
        mode: AccessMode,
        memory: &M,
        watch: &mut W,
    ) -> Result<Access, Fault> {
        let mut walk = match self.begin_access(address, kind, mode, watch)? {
            Begun::Hit(access) => return Ok(access),
            Begun::Walk(walk) => walk,
        };
        loop {
            match self.step(&mut walk, memory, watch) {
                Step::Continue => {}
                Step::Translated(access) => return Ok(access),
                Step::Fault(fault) => return Err(Fault::Page(fault)),
                Step::Speculated(_) => {
                    unreachable!("the walk of an access does not end as a speculative one")
                }
            }
        }
    }

    /// The first half of [`access`](Self::access): the look into the TLB. Between the steps of the walk it may return, other
    /// CPUs may store.
    ///
    /// # Errors
    /// As [`access`](Self::access), if the TLB or the form of the address decides.
    #[inline]
    pub fn begin_access<W: FrameWatch>(
        &mut self,
        address: LinearAddress,
        kind: AccessKind,
        mode: AccessMode,
        watch: &mut W,
    ) -> Result<Begun, Fault> {
        if !address.is_canonical(self.mode) {
            return Err(Fault::NonCanonical(address));
        }
        if let Some((tag, entry)) = self.lookup(address) {
            if !self.permits(entry.rights(), kind, mode) {
                let code = PageFaultErrorCode::PROTECTION_VIOLATION | access_code(kind, mode);
                self.drop_faulting(address, watch);
                if self.features.faults == Faults::FromCache {
                    return Err(Fault::Page(PageFault { address, code, source: Source::Tlb(tag) }));
                }
            } else if kind != AccessKind::Write || entry.dirty() {
                let address = entry.translate(address);
                return Ok(Begun::Hit(Access { address, entry, source: Source::Tlb(tag) }));
            }
        }
        Ok(Begun::Walk(self.begin_access_walk(address, kind, mode)))
    }

    /// The TLB entry that an access to `address` would use now.
    #[must_use]
    #[inline]
    pub fn lookup(&self, address: LinearAddress) -> Option<(Tag, TlbEntry)> {
        let (own, global) = (self.spaces.at(self.current), self.spaces.at(SpaceIndex::GLOBAL));
        let find = |size, space: &Space| space.tlb().get(address, size).map(|entry| (space.tag(), entry));
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

    /// An address that programs of the loaded PCID could use through two page sizes at once: the larger and the smaller page.
    pub fn mixed(&mut self) -> Option<(LinearAddress, TlbEntry, TlbEntry)> {
        self.spaces.at_mut(self.current).mixed()
    }

    /// The frame and PCID in CR3.
    #[must_use]
    pub fn cr3(&self) -> (PhysFrame, Pcid) {
        (self.root, self.pcid)
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

    /// How this CPU can still come to `frame` through what it has cached, or through CR3. Costs a few hash look-ups.
    ///
    /// A frame that a present entry in memory leads to, but nothing cached names, counts as out of reach here.
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

    /// Every cached entry, under any PCID, that names `frame`. A scan: for telling a story, not for asking a question.
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

    /// Lets one cached entry vanish, any one with the same chance; none if there is none.
    pub fn forget_random<R: Rng + ?Sized, W: FrameWatch>(&mut self, rng: &mut R, watch: &mut W) {
        let (pages, tables) = (self.tlb_len(), self.structures_len());
        if pages + tables == 0 {
            return;
        }
        let place = rng.random_range(0..pages + tables);
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

/// The error-code bits that say what was tried.
pub(crate) fn access_code(kind: AccessKind, mode: AccessMode) -> PageFaultErrorCode {
    let kind = match kind {
        AccessKind::Read => PageFaultErrorCode::empty(),
        AccessKind::Write => PageFaultErrorCode::CAUSED_BY_WRITE,
        AccessKind::Execute => PageFaultErrorCode::INSTRUCTION_FETCH,
    };
    match mode {
        AccessMode::User => kind | PageFaultErrorCode::USER_MODE,
        AccessMode::Kernel => kind,
    }
}
