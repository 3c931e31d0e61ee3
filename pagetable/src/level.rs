//! The levels of a paging hierarchy: which address bits choose an entry, and how much one entry
//! maps.

/// The level of a table, named as Linux names the entries it holds.
///
/// Walks count levels instead of naming them, so the fifth level of LA57 is one more variant and no
/// more code.
///
/// With four levels the root is a [`Level::P4d`] table: its entries are what Linux calls the
/// (folded) PGD entries and the SDM calls PML4Es.
///
/// # Source
/// Intel SDM vol. 3A 4.5, tables 4-14 to 4-20.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Level {
    /// Last-level table; an entry maps 4 KiB. SDM: page table.
    Pte = 1,
    /// An entry maps 2 MiB or links a PTE table. SDM: page directory.
    Pmd = 2,
    /// An entry maps 1 GiB or links a PMD table. SDM: page-directory-pointer table.
    Pud = 3,
    /// An entry links a PUD table and covers 512 GiB. SDM: PML4 table.
    P4d = 4,
    /// An entry links a P4D table and covers 256 TiB. SDM: PML5 table.
    Pgd = 5,
}

impl Level {
    /// Every level, lowest first.
    pub const ALL: [Self; 5] = [Self::Pte, Self::Pmd, Self::Pud, Self::P4d, Self::Pgd];

    /// Bytes covered by one entry of a table at this level, as a power of two: 12, 21, 30, 39 or
    /// 48.
    #[must_use]
    #[inline]
    pub const fn entry_shift(self) -> u32 {
        12 + 9 * (self as u32 - 1)
    }

    /// Bytes covered by one entry of a table at this level.
    #[must_use]
    #[inline]
    pub const fn entry_span(self) -> u64 {
        1 << self.entry_shift()
    }

    /// Bytes covered by a whole table at this level (512 entries).
    #[must_use]
    #[inline]
    pub const fn table_span(self) -> u64 {
        1 << (self.entry_shift() + 9)
    }

    /// Index of the entry that `address` selects in a table at this level.
    #[must_use]
    #[inline]
    pub const fn index(self, address: u64) -> usize {
        ((address >> self.entry_shift()) & 511) as usize
    }

    /// The level of the tables that entries of this level link; `None` for the last level.
    #[must_use]
    #[inline]
    pub const fn below(self) -> Option<Self> {
        match self {
            Self::Pte => None,
            Self::Pmd => Some(Self::Pte),
            Self::Pud => Some(Self::Pmd),
            Self::P4d => Some(Self::Pud),
            Self::Pgd => Some(Self::P4d),
        }
    }

    /// The level of the tables whose entries link tables of this level; `None` above the fifth.
    #[must_use]
    #[inline]
    pub const fn above(self) -> Option<Self> {
        match self {
            Self::Pte => Some(Self::Pmd),
            Self::Pmd => Some(Self::Pud),
            Self::Pud => Some(Self::P4d),
            Self::P4d => Some(Self::Pgd),
            Self::Pgd => None,
        }
    }

    /// Whether an entry of this level may map a page itself (4 KiB, 2 MiB or 1 GiB).
    #[must_use]
    #[inline]
    pub const fn may_be_leaf(self) -> bool {
        matches!(self, Self::Pte | Self::Pmd | Self::Pud)
    }
}

/// How many levels CR3's tables have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PagingMode {
    /// CR4.LA57 = 0: 48-bit addresses, 128 TiB for user space.
    FourLevel,
    /// CR4.LA57 = 1: 57-bit addresses, 64 PiB for user space.
    FiveLevel,
}

impl PagingMode {
    /// Level of the table that CR3 points to.
    #[must_use]
    #[inline]
    pub const fn root_level(self) -> Level {
        match self {
            Self::FourLevel => Level::P4d,
            Self::FiveLevel => Level::Pgd,
        }
    }

    /// One past the last byte of the lower (user) half. Not a canonical address itself.
    #[must_use]
    #[inline]
    pub const fn user_end(self) -> u64 {
        match self {
            Self::FourLevel => 1 << 47,
            Self::FiveLevel => 1 << 56,
        }
    }
}
