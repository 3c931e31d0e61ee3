//! What the boot protocol hands over: the memory map, the command line, where ACPI begins.
//!
//! Layout: Xen public headers, `arch-x86/hvm/start_info.h` (PVH boot ABI, version 1). Everything is
//! copied out here, before the frame allocator may hand out the memory it lies in.

use core::ops::Range;
use core::str;

use arrayvec::ArrayVec;
use x86_64::PhysAddr;

use crate::arch::phys_map::phys_to_ptr;

/// "xEn3", with the high bit of the E set.
const MAGIC: u32 = 0x336e_c578;
/// Memory map entry type: RAM, as in the E820 map of ACPI.
const TYPE_RAM: u32 = 1;
/// A PC has about ten regions; those beyond this number are ignored.
const MAX_REGIONS: usize = 32;
/// Longest command line kept, in bytes.
const MAX_COMMAND_LINE: usize = 1024;

/// `struct hvm_start_info`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist_paddr: u64,
    cmdline_paddr: u64,
    rsdp_paddr: u64,
    // From version 1 on.
    memmap_paddr: u64,
    memmap_entries: u32,
    reserved: u32,
}

/// `struct hvm_memmap_table_entry`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct MemoryMapEntry {
    addr: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// `struct hvm_modlist_entry`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct ModuleEntry {
    paddr: u64,
    size: u64,
    cmdline_paddr: u64,
    reserved: u64,
}

/// A copy of what the loader said.
#[derive(Debug)]
pub struct BootInfo {
    /// RAM, in bytes, in the order given.
    pub ram: ArrayVec<Range<u64>, MAX_REGIONS>,
    /// The ACPI root pointer, if the loader found one.
    pub rsdp: Option<PhysAddr>,
    /// The file loaded beside the image (QEMU's `-initrd`), in bytes of physical memory; it stays
    /// where it is.
    pub module: Option<Range<u64>>,
    command_line: ArrayVec<u8, MAX_COMMAND_LINE>,
}

impl BootInfo {
    /// Returns the command line, up to the first byte that is not UTF-8.
    #[must_use]
    pub fn command_line(&self) -> &str {
        match str::from_utf8(&self.command_line) {
            Ok(line) => line,
            Err(error) => str::from_utf8(&self.command_line[..error.valid_up_to()]).unwrap_or_default(),
        }
    }

    /// Copies the boot information out of low memory.
    ///
    /// # Panics
    ///
    /// Where the structure is not one of PVH, version 1 or later.
    ///
    /// # Safety
    ///
    /// - `start_info` is what the loader passed at the PVH entry.
    /// - The memory below 4 GiB is mapped at [`crate::arch::phys_map::PHYS_OFFSET`], and nothing
    ///   was written to it yet.
    pub(crate) unsafe fn read(start_info: PhysAddr) -> Self {
        // SAFETY: the loader put a start info there, and it is mapped; the type is plain integers.
        let info = unsafe { phys_to_ptr::<StartInfo>(start_info).read_unaligned() };
        assert!(info.magic == MAGIC, "the start info does not begin with the PVH magic number");
        assert!(info.version >= 1, "the loader gives no memory map: PVH version 0");
        let mut ram = ArrayVec::new();
        let entries = phys_to_ptr::<MemoryMapEntry>(PhysAddr::new(info.memmap_paddr));
        for index in 0..info.memmap_entries as usize {
            // SAFETY: the start info says that so many entries lie there; the type is plain
            // integers.
            let entry = unsafe { entries.wrapping_add(index).read_unaligned() };
            if entry.kind == TYPE_RAM && !ram.is_full() {
                ram.push(entry.addr..entry.addr + entry.size);
            }
        }
        let mut command_line = ArrayVec::new();
        if info.cmdline_paddr != 0 {
            let text = phys_to_ptr::<u8>(PhysAddr::new(info.cmdline_paddr));
            for index in 0..MAX_COMMAND_LINE {
                // SAFETY: the protocol says the line ends with a zero byte; no byte beyond it is
                // read.
                match unsafe { text.wrapping_add(index).read() } {
                    0 => break,
                    byte => command_line.push(byte),
                }
            }
        }
        let module = (info.nr_modules > 0).then(|| {
            // SAFETY: the start info says that at least one entry lies there; the type is plain
            // integers.
            let entry =
                unsafe { phys_to_ptr::<ModuleEntry>(PhysAddr::new(info.modlist_paddr)).read_unaligned() };
            entry.paddr..entry.paddr + entry.size
        });
        let rsdp = (info.rsdp_paddr != 0).then(|| PhysAddr::new(info.rsdp_paddr));
        Self { ram, rsdp, module, command_line }
    }
}
