//! How many CPUs there are: the local APICs that the firmware lists in the MADT.
//!
//! ACPI specification 6.5, 5.2.5 (root pointer), 5.2.7 and 5.2.8 (root tables), 5.2.12 (MADT). Two
//! tables read once do not justify an ACPI library.

use arrayvec::ArrayVec;
use x86_64::PhysAddr;

use crate::arch::phys_map::phys_to_ptr;

const HEADER_BYTES: u64 = 36;
/// MADT entry: processor local APIC.
const LOCAL_APIC: u8 = 0;
/// MADT entry: processor local x2APIC.
const LOCAL_X2APIC: u8 = 9;
/// In the flags of both: the processor is usable.
const ENABLED: u32 = 1;

/// Returns the APIC ids of the first `N` usable CPUs; none if the tables are absent or damaged.
///
/// # Safety
///
/// `rsdp` is the root pointer that the loader found, and memory below 4 GiB is mapped at the
/// physical offset.
pub(crate) unsafe fn apic_ids<const N: usize>(rsdp: PhysAddr) -> ArrayVec<u32, N> {
    // SAFETY: the caller vouches for the root pointer.
    let tables = unsafe { Tables::find(rsdp) };
    tables.and_then(|tables| tables.madt()).map_or_else(ArrayVec::new, local_apics)
}

/// The root table: a list of addresses of other tables.
#[derive(Debug)]
struct Tables {
    root: &'static [u8],
    address_bytes: usize,
}

impl Tables {
    /// # Safety
    ///
    /// As for [`apic_ids`].
    unsafe fn find(rsdp: PhysAddr) -> Option<Self> {
        // SAFETY: the root pointer has at least 20 bytes.
        let pointer = unsafe { bytes_at(rsdp, 20) };
        if !pointer.starts_with(b"RSD PTR ") || !sums_to_zero(pointer) {
            return None;
        }
        let (address, address_bytes) = if pointer[15] >= 2 {
            // SAFETY: from revision 2 on it has 36 bytes.
            let extended = unsafe { bytes_at(rsdp, 36) };
            (read_number(extended, 24, 8)?, 8)
        } else {
            (read_number(pointer, 16, 4)?, 4)
        };
        // SAFETY: a root pointer with a right sum points to the root table.
        let root = unsafe { table_at(PhysAddr::try_new(address).ok()?) }?;
        Some(Self { root, address_bytes })
    }

    /// Returns the table with the signature `APIC`.
    fn madt(&self) -> Option<&'static [u8]> {
        let entries = self.root.get(36..)?.chunks_exact(self.address_bytes);
        entries
            .filter_map(|entry| PhysAddr::try_new(read_number(entry, 0, self.address_bytes)?).ok())
            // SAFETY: a root table with a right sum points to tables.
            .filter_map(|address| unsafe { table_at(address) })
            .find(|table| table.starts_with(b"APIC"))
    }
}

/// Returns the ids of the first `N` usable CPUs that `madt` lists.
fn local_apics<const N: usize>(madt: &[u8]) -> ArrayVec<u32, N> {
    let mut ids = ArrayVec::new();
    // The header, the address of the APIC, flags; then entries of (kind, length, ...).
    let mut rest = madt.get(44..).unwrap_or_default();
    while let [kind, length, ..] = *rest {
        let Some((entry, behind)) = rest.split_at_checked(usize::from(length).max(2)) else { break };
        rest = behind;
        let (id, flags) = match kind {
            LOCAL_APIC => (read_number(entry, 3, 1), read_number(entry, 4, 4)),
            LOCAL_X2APIC => (read_number(entry, 4, 4), read_number(entry, 8, 4)),
            _ => continue,
        };
        let (Some(id), Some(flags)) = (id.and_then(to_u32), flags.and_then(to_u32)) else { continue };
        if flags & ENABLED != 0 && !ids.is_full() && !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids
}

/// Returns the table at `address` if its sum is right.
///
/// # Safety
///
/// A table lies there, below 4 GiB.
unsafe fn table_at(address: PhysAddr) -> Option<&'static [u8]> {
    // SAFETY: every table begins with a header.
    let header = unsafe { bytes_at(address, HEADER_BYTES) };
    let length = read_number(header, 4, 4)?;
    // SAFETY: the header gives the length of the table.
    let table = unsafe { bytes_at(address, length.max(HEADER_BYTES)) };
    sums_to_zero(table).then_some(table)
}

/// # Safety
///
/// So many bytes are mapped at the physical offset of `address`, and nobody writes to them.
unsafe fn bytes_at(address: PhysAddr, length: u64) -> &'static [u8] {
    let length = usize::try_from(length).unwrap_or(0);
    // SAFETY: the caller vouches for it.
    unsafe { core::slice::from_raw_parts(phys_to_ptr::<u8>(address), length) }
}

fn sums_to_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)) == 0
}

/// Reads a little-endian number of `length` bytes.
fn read_number(bytes: &[u8], offset: usize, length: usize) -> Option<u64> {
    let field = bytes.get(offset..offset + length)?;
    Some(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

fn to_u32(value: u64) -> Option<u32> {
    u32::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec;
    use std::vec::Vec;

    use super::local_apics;

    fn madt(entries: &[&[u8]]) -> Vec<u8> {
        let mut table = vec![0; 44];
        entries.iter().for_each(|entry| table.extend_from_slice(entry));
        table
    }

    #[test]
    fn only_usable_cpus_are_listed() {
        let table = madt(&[
            &[0, 8, 0, 7, 1, 0, 0, 0],
            &[1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[0, 8, 1, 9, 0, 0, 0, 0],
            &[9, 16, 0, 0, 0x34, 0x12, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0],
        ]);
        assert_eq!(local_apics::<64>(&table).as_slice(), [7, 0x1234]);
    }

    #[test]
    fn a_damaged_list_ends_where_it_is_damaged() {
        assert_eq!(local_apics::<64>(&madt(&[&[0, 8, 0, 7, 1, 0, 0, 0], &[0, 200, 1]])).as_slice(), [7]);
        assert!(local_apics::<64>(&madt(&[&[0, 0, 0, 0]])).is_empty());
        assert!(local_apics::<64>(&[]).is_empty());
    }
}
