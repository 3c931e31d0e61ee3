//! One x86_64 CPU and the devices of a PC: its instructions, its tables, its registers. Nothing
//! here knows of a second CPU, and nothing here decides when to flush.
//!
//! ```text
//!   comes in                    file                    goes out
//!   --------                    ----                    --------
//!   what the loader says        pvh, acpi               memory map, command line, ids of the CPUs
//!   RAM                         frames, heap            frames; memory behind `alloc`
//!   physical addresses          phys_map, paging        pointers; the kernel half; stacks
//!   an address, a root          mmu                     INVLPG, CR3
//!   the numbers of traps        vectors, descriptors    gates, each with its stack
//!   registers                   context                 as the assembly stores them
//!   an APIC id                  apic                    an interrupt there
//!   a line of text, a verdict   serial, exit            the serial port; the exit status of QEMU
//!   nothing                     clock                   cycles
//! ```
//!
//! `asm` holds the inline assembly, `symbols` what the `.s` files and the linker script define.
//! Every other room may use this one, and it uses none of them.

#[expect(unsafe_code, reason = "RDTSC; ports of the interval timer")]
pub mod clock;
pub mod context;
#[expect(unsafe_code, reason = "the port of the exit device")]
pub mod exit;
#[expect(
    unsafe_code,
    reason = "the free list lives in the frames; whoever frees a frame proves that it is unreachable"
)]
pub mod frames;
#[expect(unsafe_code, reason = "CR3 and CR4")]
pub mod mmu;
#[expect(unsafe_code, reason = "makes the mappings on which every pointer rests")]
pub mod paging;
pub mod phys_map;
#[expect(unsafe_code, reason = "the boot information is found by address")]
pub mod pvh;
#[expect(unsafe_code, reason = "ports of the serial line")]
pub mod serial;
pub mod vectors;

#[expect(unsafe_code, reason = "tables are found by address")]
pub(crate) mod acpi;
#[expect(unsafe_code, reason = "device registers")]
pub(crate) mod apic;
#[expect(unsafe_code, reason = "assembly")]
pub(crate) mod asm;
#[expect(unsafe_code, reason = "descriptor tables, segment registers, gates")]
pub(crate) mod descriptors;
#[expect(unsafe_code, reason = "gives the heap its memory")]
pub(crate) mod heap;
#[expect(unsafe_code, reason = "symbols of the assembly and of the linker script")]
pub(crate) mod symbols;
