//! Half-open ranges of user virtual addresses.

use core::fmt;

use crate::level::Level;

/// A half-open range of user virtual addresses, `start..end` in bytes, both multiples of 4096,
/// never empty.
///
/// The end is a plain number because one past the last user byte (`1 << 47`) is not canonical, so
/// `x86_64::VirtAddr` cannot hold it. Writing the top as `end = 0` instead has caused real bugs;
/// here no value has a second meaning.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VirtRange {
    start: u64,
    end: u64,
}

/// Why two numbers are not a [`VirtRange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RangeError {
    /// `start >= end`; carries both.
    Empty(u64, u64),
    /// The address is not a multiple of 4096.
    Unaligned(u64),
    /// The address lies above the largest lower half (`1 << 56`).
    AboveUserSpace(u64),
}

impl fmt::Display for RangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Empty(start, end) => write!(f, "empty range {start:#x}..{end:#x}"),
            Self::Unaligned(address) => write!(f, "address {address:#x} is not a multiple of 4096"),
            Self::AboveUserSpace(address) => write!(f, "address {address:#x} lies above user space"),
        }
    }
}

impl core::error::Error for RangeError {}

impl VirtRange {
    /// Makes the range `start..end`.
    ///
    /// # Errors
    /// [`RangeError`] if the range is empty, an end is unaligned, or it leaves the lower half of
    /// five-level paging. [`AddressSpace::user_range`](crate::AddressSpace::user_range) says
    /// whether it also lies in the lower half of a four-level address space.
    pub const fn new(start: u64, end: u64) -> Result<Self, RangeError> {
        if start >= end {
            return Err(RangeError::Empty(start, end));
        }
        if end > 1 << 56 {
            return Err(RangeError::AboveUserSpace(end));
        }
        if !start.is_multiple_of(4096) {
            return Err(RangeError::Unaligned(start));
        }
        if !end.is_multiple_of(4096) {
            return Err(RangeError::Unaligned(end));
        }
        Ok(Self { start, end })
    }

    /// First byte.
    #[must_use]
    #[inline]
    pub const fn start(self) -> u64 {
        self.start
    }

    /// One past the last byte.
    #[must_use]
    #[inline]
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Length in bytes; never zero.
    #[must_use]
    #[inline]
    pub const fn len_bytes(self) -> u64 {
        self.end - self.start
    }

    /// Length in 4 KiB pages; never zero.
    #[must_use]
    #[inline]
    pub const fn nr_pages(self) -> u64 {
        self.len_bytes() >> 12
    }

    /// Whether `address` lies inside.
    #[must_use]
    #[inline]
    pub const fn contains(self, address: u64) -> bool {
        self.start <= address && address < self.end
    }

    /// Whether the whole of `other` lies inside.
    #[must_use]
    #[inline]
    pub const fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The bytes that both ranges have; `None` if they have none in common.
    #[must_use]
    #[inline]
    pub const fn intersect(self, other: Self) -> Option<Self> {
        let start = if self.start > other.start { self.start } else { other.start };
        let end = if self.end < other.end { self.end } else { other.end };
        if start < end { Some(Self { start, end }) } else { None }
    }

    /// The smallest range that covers both.
    #[must_use]
    #[inline]
    pub const fn union(self, other: Self) -> Self {
        let start = if self.start < other.start { self.start } else { other.start };
        let end = if self.end > other.end { self.end } else { other.end };
        Self { start, end }
    }

    /// The bytes covered by the entry of a table at `level` that `address`, a user address,
    /// selects.
    ///
    /// # Panics
    /// In a debug build, if `address` lies above the largest lower half (`1 << 56`).
    #[must_use]
    #[inline]
    pub const fn of_entry(level: Level, address: u64) -> Self {
        debug_assert!(address < 1 << 56, "not a user address");
        let start = address & !(level.entry_span() - 1);
        Self { start, end: start.wrapping_add(level.entry_span()) }
    }

    /// The part of this range that one entry of a table at `level` covers, from `address` to the
    /// end of that entry or of the range, whichever comes first.
    ///
    /// `address` lies inside the range, at the start of a page.
    ///
    /// # Panics
    /// In a debug build, if it does not.
    #[must_use]
    #[inline]
    pub const fn within_entry(self, level: Level, address: u64) -> Self {
        debug_assert!(self.contains(address) && address.is_multiple_of(4096), "not a page of the range");
        let boundary = (address & !(level.entry_span() - 1)).wrapping_add(level.entry_span());
        Self { start: address, end: if boundary < self.end { boundary } else { self.end } }
    }
}

impl fmt::Debug for VirtRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

impl fmt::Display for VirtRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}
