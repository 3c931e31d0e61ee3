//! One CPU and the devices of a PC: instructions, tables, registers.

#[expect(unsafe_code, reason = "RDTSC; ports of the interval timer")]
pub mod clock;
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
#[expect(unsafe_code, reason = "the boot information is found by address")]
pub mod pvh;
#[expect(unsafe_code, reason = "ports of the serial line")]
pub mod serial;

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
