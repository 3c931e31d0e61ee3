//! Physical memory as a page walk sees it.

use x86_64::PhysAddr;

/// Physical memory that holds paging structures.
///
/// Addresses come from entries that are present and have no reserved bit set, and are 8-byte
/// aligned; a stale or wrong entry may name any address below the physical-address width. What lies
/// outside of the machine's memory should read as 0.
pub trait PhysicalMemory {
    /// Loads one entry, atomically.
    fn read(&self, address: PhysAddr) -> u64;

    /// Sets `bits` (accessed, dirty) in the entry if it still reads `expected`, in one locked
    /// operation, as a walk does.
    ///
    /// # Errors
    /// The value found instead of `expected`; nothing was stored.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.8, 8.1.2.1.
    fn fetch_or(&self, address: PhysAddr, bits: u64, expected: u64) -> Result<(), u64>;
}

impl<M: PhysicalMemory + ?Sized> PhysicalMemory for &M {
    fn read(&self, address: PhysAddr) -> u64 {
        (**self).read(address)
    }

    fn fetch_or(&self, address: PhysAddr, bits: u64, expected: u64) -> Result<(), u64> {
        (**self).fetch_or(address, bits, expected)
    }
}
