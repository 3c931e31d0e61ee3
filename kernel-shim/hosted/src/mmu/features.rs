//! What differs between processors, and what one processor may choose: the switches of the software
//! MMU.
//!
//! Each switch names the least that software is promised; a machine under test runs with several
//! combinations.

/// The behaviour of one virtual CPU's MMU. Every combination is one that a real processor could
/// have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// What INVLPG does to paging-structure caches.
    pub invlpg_uppers: InvlpgUppers,
    /// Whether INVLPG reaches global entries while PCIDs are enabled.
    pub invlpg_globals: InvlpgGlobals,
    /// What a CPU looks at before it sets a dirty flag.
    pub dirty: SettingDirty,
    /// Whether a fault found through a cached entry is reported at once.
    pub faults: Faults,
    /// How a 2-MiB or 1-GiB page is cached.
    pub large_pages: LargePages,
    /// Which of several entries for one address is used.
    pub coexisting: Coexisting,
    /// Whether instruction fetches have translations of their own.
    pub tlbs: Tlbs,
    /// Most TLB entries held, over all PCIDs and globals.
    pub tlb_capacity: Capacity,
    /// Most paging-structure-cache entries held, over all PCIDs and levels.
    pub structure_capacity: Capacity,
    /// Physical-address width in bits (MAXPHYADDR), 32 to 52; bits above are reserved in every
    /// entry.
    pub physical_bits: u32,
    /// Most pages one INVLPGB may name after the first (CPUID 8000_0008h EDX, bits 15:0).
    pub invlpgb_count_max: u16,
}

impl Features {
    /// An Intel-like CPU that keeps everything it may keep.
    pub const INTEL: Self = Self {
        invlpg_uppers: InvlpgUppers::All,
        invlpg_globals: InvlpgGlobals::Dropped,
        dirty: SettingDirty::Checked,
        faults: Faults::FromCache,
        large_pages: LargePages::Whole,
        coexisting: Coexisting::SmallestFirst,
        tlbs: Tlbs::Unified,
        tlb_capacity: Capacity::Unlimited,
        structure_capacity: Capacity::Unlimited,
        physical_bits: 46,
        invlpgb_count_max: 0,
    };

    /// An AMD-like CPU with EFER.TCE set and INVLPGB that keeps everything it may keep.
    pub const AMD: Self = Self {
        invlpg_uppers: InvlpgUppers::LeadingToAddress,
        faults: Faults::AfterRewalk,
        physical_bits: 48,
        invlpgb_count_max: 7,
        ..Self::INTEL
    };

    /// The same with the caches of a small core, which hold fewer entries than a program of a few
    /// pages uses; where they hold less already, they stay.
    #[must_use]
    pub fn with_small_caches(self) -> Self {
        Self {
            tlb_capacity: self.tlb_capacity.or_less(12),
            structure_capacity: self.structure_capacity.or_less(4),
            ..self
        }
    }
}

/// What INVLPG drops from the paging-structure caches of the current PCID.
///
/// # Source
/// Intel SDM vol. 3A 4.10.4.1; AMD64 APM vol. 2 3.1.7 (EFER.TCE), 5.5.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvlpgUppers {
    /// All of them, whatever addresses they are for: Intel, and AMD with EFER.TCE = 0.
    All,
    /// Only those on the path to the operand: AMD with EFER.TCE = 1.
    LeadingToAddress,
}

/// Whether INVLPG drops a global entry of its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvlpgGlobals {
    /// It does, as documented. Intel SDM vol. 3A 4.10.4.1.
    Dropped,
    /// It may not while CR4.PCIDE = 1: the erratum of Intel's Alder Lake and Raptor Lake, outside
    /// virtual machines.
    MissedWithPcid,
}

/// What a CPU looks at when a store goes through a cached translation that is writable and not
/// dirty, before it sets D in memory.
///
/// It always looks whether the entry is present, in the same locked operation.
///
/// # Source
/// Intel SDM vol. 3A 4.8: no D with R/W = 0 where there are shadow stacks; Linux: pte_mksaveddirty,
/// arch/x86/include/asm/pgtable.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SettingDirty {
    /// The rights, too: a store meets what the entry allows now. Processors with shadow stacks.
    Checked,
    /// Nothing else: an entry that has lost R/W since it was cached gets D = 1, and the store goes
    /// through.
    Unchecked,
}

/// When a page fault that a cached entry led to is reported.
///
/// Both drop what was cached for the address, so the fault never repeats without a cause in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    /// At once: a stale entry may cause one spurious fault. Intel SDM vol. 3A 4.10.4.1, 4.10.4.3.
    FromCache,
    /// After a second walk from CR3 also faults: no spurious faults. AMD64 APM vol. 2 5.5.3.
    AfterRewalk,
}

/// How a translation larger than 4 KiB is kept.
///
/// # Source
/// Intel SDM vol. 3A 4.10.2.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LargePages {
    /// As one entry.
    Whole,
    /// As 4-KiB entries, made one at a time as addresses are used, all of which one INVLPG drops.
    InPieces,
}

/// Which entry serves when several are cached for one address (page sizes mixed, or a global beside
/// a non-global).
///
/// The architecture promises neither. Intel SDM vol. 3A 4.10.2.3, 4.10.4.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coexisting {
    /// The smallest page, then the current PCID before global.
    SmallestFirst,
    /// The largest page, then global before the current PCID.
    LargestFirst,
}

/// Whether loads and stores find their translations where instruction fetches do.
///
/// What drops a translation drops it on both sides; what fills one side leaves the other as it is.
/// So one address may have two translations on one CPU, an old one and a new one.
///
/// # Source
/// Intel SDM vol. 3A 4.10.2 (a processor may have several TLBs, for data and for instructions),
/// 4.10.4.4 (until it is invalidated, each access may use the old translation or the new one).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tlbs {
    /// They do.
    Unified,
    /// Each side has its own.
    Split,
}

/// How many entries one cache holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capacity {
    /// No bound: nothing is ever displaced by something else.
    Unlimited,
    /// At most so many; 0 means that nothing is cached.
    AtMost(usize),
}

impl Capacity {
    /// The same, and no more than `most`.
    fn or_less(self, most: usize) -> Self {
        match self {
            Self::Unlimited => Self::AtMost(most),
            Self::AtMost(count) => Self::AtMost(count.min(most)),
        }
    }
}
