//! Where physical memory is in the kernel's address space: all of it, at one offset.

use x86_64::structures::paging::{PageSize, Size4KiB};
use x86_64::{PhysAddr, VirtAddr};

/// Bytes of the smallest page.
pub const FRAME_BYTES: u64 = Size4KiB::SIZE;
/// Where physical address 0 is mapped: the start of the upper half with four levels.
pub const PHYS_OFFSET: VirtAddr = VirtAddr::new(0xffff_8000_0000_0000);

/// Words of the smallest page, which are also the entries of a page table.
pub const FRAME_WORDS: usize = 512;
/// The bits of a page-table entry that hold an address.
pub(crate) const ADDRESS_BITS: u64 = 0x000f_ffff_ffff_f000;

/// Returns where `address` is mapped for the kernel, on every CPU and in every root.
///
/// Only RAM and the local APIC are mapped there (B3); the pointer says nothing about who may use
/// the memory.
#[must_use]
pub fn phys_to_ptr<T>(address: PhysAddr) -> *mut T {
    (PHYS_OFFSET + address.as_u64()).as_mut_ptr()
}
