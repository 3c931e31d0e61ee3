//! The words of x86 paging: addresses, levels, page sizes, rights, and what the 64 bits of an entry
//! say.
//!
//! The software MMU decodes entries by itself and shares no code with the engine under test: a
//! mistake the two had in common would be invisible.

use core::fmt;

use x86_64::structures::paging::PageTableFlags;
use x86_64::{PhysAddr, VirtAddr};

const PRESENT: u64 = PageTableFlags::PRESENT.bits();
const WRITABLE: u64 = PageTableFlags::WRITABLE.bits();
const USER: u64 = PageTableFlags::USER_ACCESSIBLE.bits();
const NO_EXECUTE: u64 = PageTableFlags::NO_EXECUTE.bits();
const PAGE_SIZE_BIT: u64 = PageTableFlags::HUGE_PAGE.bits();

/// The accessed flag of an entry (bit 5). Intel SDM vol. 3A 4.8.
pub const ACCESSED: u64 = PageTableFlags::ACCESSED.bits();
/// The dirty flag of an entry that maps a page (bit 6). Intel SDM vol. 3A 4.8.
pub const DIRTY: u64 = PageTableFlags::DIRTY.bits();
/// The global flag of an entry that maps a page (bit 8). Intel SDM vol. 3A 4.10.2.4.
pub const GLOBAL: u64 = PageTableFlags::GLOBAL.bits();
/// Bits 51:12 of an entry, where the physical address lies.
pub const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

/// A linear (virtual) address as an instruction forms it: 64 bits, perhaps not canonical.
///
/// [`VirtAddr`] knows 48-bit addresses only; with LA57 a CPU also forms 57-bit ones, and INVLPG
/// accepts any.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinearAddress(u64);

impl LinearAddress {
    /// Any 64 bits.
    #[must_use]
    pub const fn new(address: u64) -> Self {
        Self(address)
    }

    /// The 64 bits.
    #[must_use]
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// Number of the page of `size` that holds the address: the address without its offset.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.10.2.1.
    #[must_use]
    #[inline]
    pub const fn page_number(self, size: PageSize) -> u64 {
        self.0 >> size.shift()
    }

    /// Bytes from the start of the page of `size` that holds the address.
    #[must_use]
    #[inline]
    pub const fn offset_in(self, size: PageSize) -> u64 {
        self.0 & (size.bytes() - 1)
    }

    /// Whether the bits above the highest translated one all repeat it.
    ///
    /// # Source
    /// Intel SDM vol. 1 3.3.7.1; vol. 3A 4.5.1.
    #[must_use]
    #[inline]
    pub const fn is_canonical(self, mode: PagingMode) -> bool {
        let spare = 64 - mode.address_bits();
        ((self.0 << spare).cast_signed() >> spare).cast_unsigned() == self.0
    }
}

impl From<VirtAddr> for LinearAddress {
    fn from(address: VirtAddr) -> Self {
        Self(address.as_u64())
    }
}

impl fmt::Debug for LinearAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LinearAddress({:#x})", self.0)
    }
}

impl fmt::Display for LinearAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// How many levels the tables below CR3 have (CR4.LA57).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PagingMode {
    /// 48-bit linear addresses, CR3 points to a PML4 table.
    FourLevel,
    /// 57-bit linear addresses, CR3 points to a PML5 table.
    FiveLevel,
}

impl PagingMode {
    /// Level of the table that CR3 points to.
    #[must_use]
    pub const fn root(self) -> TableLevel {
        match self {
            Self::FourLevel => TableLevel::Pml4,
            Self::FiveLevel => TableLevel::Pml5,
        }
    }

    /// Translated bits of a linear address: 48 or 57.
    #[must_use]
    pub const fn address_bits(self) -> u32 {
        self.root().entry_shift() + 9
    }
}

/// The level of a paging structure, by the SDM's names.
///
/// # Source
/// Intel SDM vol. 3A 4.5, tables 4-14 to 4-20.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum TableLevel {
    /// Page table: a PTE maps 4 KiB.
    Pt = 1,
    /// Page directory: a PDE maps 2 MiB or references a page table.
    Pd = 2,
    /// Page-directory-pointer table: a PDPTE maps 1 GiB or references a page directory.
    Pdpt = 3,
    /// PML4 table: a PML4E references a page-directory-pointer table.
    Pml4 = 4,
    /// PML5 table (LA57 only): a PML5E references a PML4 table.
    Pml5 = 5,
}

impl TableLevel {
    /// Power of two of the bytes one entry of a table at this level covers: 12, 21, 30, 39 or 48.
    #[must_use]
    #[inline]
    pub const fn entry_shift(self) -> u32 {
        12 + 9 * (self as u32 - 1)
    }

    /// Index of the entry that translates `address` in a table at this level.
    #[must_use]
    #[inline]
    pub const fn index(self, address: LinearAddress) -> u64 {
        (address.0 >> self.entry_shift()) & 511
    }

    /// Level of the tables that entries of this level reference; `None` for a page table.
    #[must_use]
    #[inline]
    pub const fn below(self) -> Option<Self> {
        match self {
            Self::Pt => None,
            Self::Pd => Some(Self::Pt),
            Self::Pdpt => Some(Self::Pd),
            Self::Pml4 => Some(Self::Pdpt),
            Self::Pml5 => Some(Self::Pml4),
        }
    }
}

impl fmt::Display for TableLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pt => "page table",
            Self::Pd => "page directory",
            Self::Pdpt => "page-directory-pointer table",
            Self::Pml4 => "PML4 table",
            Self::Pml5 => "PML5 table",
        })
    }
}

/// Bytes that one translation covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum PageSize {
    /// 4 KiB, mapped by a PTE.
    Size4KiB = 0,
    /// 2 MiB, mapped by a PDE with PS set.
    Size2MiB = 1,
    /// 1 GiB, mapped by a PDPTE with PS set.
    Size1GiB = 2,
}

impl PageSize {
    /// Every size, smallest first.
    pub const ALL: [Self; 3] = [Self::Size4KiB, Self::Size2MiB, Self::Size1GiB];

    /// The size as a power of two: 12, 21 or 30.
    #[must_use]
    #[inline]
    pub const fn shift(self) -> u32 {
        12 + 9 * self as u32
    }

    /// The size in bytes.
    #[must_use]
    #[inline]
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Size4KiB => "4 KiB",
            Self::Size2MiB => "2 MiB",
            Self::Size1GiB => "1 GiB",
        })
    }
}

/// What the entries used so far on a path allow: writing and user access if all of them do,
/// execution unless one forbids it.
///
/// Both the TLBs and the paging-structure caches keep this combination, not the bits of one entry.
///
/// # Source
/// Intel SDM vol. 3A 4.6, 4.10.2.2, 4.10.3.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights(u64);

impl Rights {
    /// The rights before the first entry: everything.
    pub const ALL: Self = Self(WRITABLE | USER);

    /// The rights left after one more entry of the path.
    #[must_use]
    #[inline]
    pub const fn through(self, entry: u64) -> Self {
        Self((self.0 & entry & (WRITABLE | USER)) | ((self.0 | entry) & NO_EXECUTE))
    }

    /// The rights bits of `entry` alone.
    #[must_use]
    #[inline]
    pub(crate) const fn of_bits(entry: u64) -> Self {
        Self(entry & (WRITABLE | USER | NO_EXECUTE))
    }

    /// The rights as R/W (bit 1), U/S (bit 2) and XD (bit 63).
    #[must_use]
    #[inline]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether every R/W bit of the path was set.
    #[must_use]
    #[inline]
    pub const fn writable(self) -> bool {
        self.0 & WRITABLE != 0
    }

    /// Whether every U/S bit of the path was set.
    #[must_use]
    #[inline]
    pub const fn user(self) -> bool {
        self.0 & USER != 0
    }

    /// Whether an XD bit of the path was set.
    #[must_use]
    #[inline]
    pub const fn no_execute(self) -> bool {
        self.0 & NO_EXECUTE != 0
    }
}

/// What the 64 bits of one entry mean at one level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// P = 0: nothing may be cached from it.
    NotPresent,
    /// P = 1 with a reserved bit set: nothing may be cached from it, its use faults with RSVD.
    Reserved,
    /// References the next table.
    Table(PhysAddr),
    /// Maps a page that starts there.
    Page(PageSize, PhysAddr),
}

/// Reads the 64 bits of `entry`, found in a table at `level`, as a CPU with `physical_bits` of
/// physical address does.
///
/// IA32_EFER.NXE is 1 and 1-GiB pages are supported.
///
/// # Source
/// Intel SDM vol. 3A tables 4-15 to 4-20; AMD64 APM vol. 2 5.3.
#[must_use]
#[inline]
pub fn decode(entry: u64, level: TableLevel, physical_bits: u32) -> Meaning {
    if entry & PRESENT == 0 {
        return Meaning::NotPresent;
    }
    if entry & (ADDRESS_MASK & (u64::MAX << physical_bits)) != 0 {
        return Meaning::Reserved;
    }
    let size = match level {
        TableLevel::Pt => PageSize::Size4KiB,
        _ if entry & PAGE_SIZE_BIT == 0 => {
            return Meaning::Table(PhysAddr::new_truncate(entry & ADDRESS_MASK));
        }
        TableLevel::Pd => PageSize::Size2MiB,
        TableLevel::Pdpt => PageSize::Size1GiB,
        TableLevel::Pml4 | TableLevel::Pml5 => return Meaning::Reserved,
    };
    // Bit 12 of a large page is the PAT bit; those between it and the page size are reserved.
    let below_page = ADDRESS_MASK & (size.bytes() - 1) & !(1 << 12);
    if entry & below_page != 0 {
        return Meaning::Reserved;
    }
    Meaning::Page(size, PhysAddr::new_truncate(entry & ADDRESS_MASK & !(size.bytes() - 1)))
}
