//! Physical memory: a reservation of address space that the host backs page by page as it is
//! touched.
#![expect(unsafe_code, reason = "hands out pointers into the reservation")]

use core::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapMut, MmapOptions};
use x86_64::PhysAddr;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::mmu::physical::PhysicalMemory;

/// `nr_frames` frames of 4096 zero bytes. Only page tables and batch pages are ever touched:
/// what is in programs' pages is kept elsewhere (`checker/contents`), so a machine of many
/// gigabytes needs few megabytes.
#[derive(Debug)]
pub struct Memory {
    _reservation: MmapMut,
    base: *mut u8,
    nr_frames: u64,
}

// SAFETY: the reservation is used through raw pointers, by code that synchronises itself (table
// locks, atomics).
unsafe impl Send for Memory {}
// SAFETY: as above; `Memory` itself changes nothing after it was made.
unsafe impl Sync for Memory {}

impl Memory {
    /// Reserves memory.
    ///
    /// # Errors
    /// If the host refuses to map that much address space.
    pub fn reserve(nr_frames: u64) -> std::io::Result<Self> {
        let bytes = usize::try_from(nr_frames << 12).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
        let mut reservation = MmapOptions::new().len(bytes.max(4096)).no_reserve_swap().map_anon()?;
        let base = reservation.as_mut_ptr();
        Ok(Self { _reservation: reservation, base, nr_frames })
    }

    /// How many frames there are.
    #[must_use]
    pub const fn nr_frames(&self) -> u64 {
        self.nr_frames
    }

    /// Where the bytes of `frame` are.
    ///
    /// # Panics
    /// If there is no such frame.
    #[must_use]
    #[inline]
    pub fn pointer(&self, frame: PhysFrame) -> *mut PageTable {
        let address = frame.start_address().as_u64();
        assert!(address >> 12 < self.nr_frames, "{frame:?} is beyond the machine's memory");
        self.base.wrapping_add(index(address)).cast()
    }

    /// The frame at `pointer`, which [`pointer`](Self::pointer) returned.
    #[must_use]
    pub fn frame_at(&self, pointer: *const PageTable) -> PhysFrame {
        let offset = pointer.addr().wrapping_sub(self.base.addr());
        PhysFrame::containing_address(PhysAddr::new_truncate(offset as u64))
    }

    fn entry(&self, address: PhysAddr) -> Option<&AtomicU64> {
        let address = address.as_u64();
        if address >> 12 >= self.nr_frames {
            return None;
        }
        let pointer = self.base.wrapping_add(index(address)).cast::<u64>();
        // SAFETY: inside the reservation, which lives as long as `self`, and 8-byte aligned
        // (entries are); all access to tables goes through atomics.
        Some(unsafe { AtomicU64::from_ptr(pointer) })
    }
}

impl PhysicalMemory for Memory {
    fn read(&self, address: PhysAddr) -> u64 {
        self.entry(address).map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    fn fetch_or(&self, address: PhysAddr, bits: u64, expected: u64) -> Result<(), u64> {
        let Some(entry) = self.entry(address) else { return Err(0) };
        entry.compare_exchange(expected, expected | bits, Ordering::AcqRel, Ordering::Acquire).map(|_| ())
    }
}

/// A frame number or an offset in memory, as an index. Hosts have 64 bits.
#[inline]
pub(crate) fn index(number: u64) -> usize {
    usize::try_from(number).expect("the host's addresses have 64 bits")
}
