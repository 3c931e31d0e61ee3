//! What the `.s` files and the linker script define, for everything else to use.

use core::ops::Range;

use crate::arch::context::UserContext;

/// Distance between two entry points in `trap.s`, in bytes.
const TRAP_STUB_BYTES: u64 = 16;

unsafe extern "C" {
    // Only their addresses mean anything. The first is an absolute, physical address.
    static image_physical_start: u8;
    static text_start: u8;
    static text_end: u8;
    static rodata_end: u8;
    static image_end: u8;
    static trap_stubs: u8;
    static trampoline_start: u8;
    static trampoline_end: u8;
    static agent_start: u8;
    static agent_read: u8;
    static agent_write: u8;
    static agent_check: u8;
    static agent_watch: u8;
    static agent_count: u8;
    static agent_end: u8;

    /// Enters ring 3 with the registers of `context`; returns at the next trap from ring 3, which
    /// is stored there.
    ///
    /// # Safety
    ///
    /// - `context` is valid for reads and writes, and nothing else touches it until the return.
    /// - Interrupts are off, and GS holds this CPU's `Cpu`.
    /// - The segments and flags in `context` are those of ring 3.
    pub(crate) fn enter_user(context: *mut UserContext);
}

/// Virtual addresses of the parts of the image, each page-aligned and ending where the next one
/// begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ImageLayout {
    /// First physical address of the image, with its low boot code.
    pub(crate) physical_start: u64,
    /// Code: readable and executable.
    pub(crate) text_start: u64,
    /// End of the code, start of constants: readable.
    pub(crate) text_end: u64,
    /// End of the constants, start of data: readable and writable.
    pub(crate) rodata_end: u64,
    /// End of the image.
    pub(crate) image_end: u64,
}

/// Returns where the linker script put the image.
pub(crate) fn image_layout() -> ImageLayout {
    ImageLayout {
        physical_start: (&raw const image_physical_start).addr() as u64,
        text_start: (&raw const text_start).addr() as u64,
        text_end: (&raw const text_end).addr() as u64,
        rodata_end: (&raw const rodata_end).addr() as u64,
        image_end: (&raw const image_end).addr() as u64,
    }
}

/// Returns the address of the entry point of `vector`.
pub(crate) fn trap_stub(vector: u8) -> u64 {
    (&raw const trap_stubs).addr() as u64 + u64::from(vector) * TRAP_STUB_BYTES
}

/// Returns the physical address range of the code that other CPUs run first, before it is copied.
///
/// The code is linked low, so its addresses are physical ones.
pub(crate) fn trampoline() -> Range<u64> {
    (&raw const trampoline_start).addr() as u64..(&raw const trampoline_end).addr() as u64
}

/// Byte offsets of the entry points of the ring-3 agent in [`agent_text`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct AgentEntries {
    pub(crate) read: u64,
    pub(crate) write: u64,
    pub(crate) check: u64,
    pub(crate) watch: u64,
    pub(crate) count: u64,
}

/// Returns the position-independent code of the ring-3 agent.
pub(crate) fn agent_text() -> &'static [u8] {
    let start = &raw const agent_start;
    let length = (&raw const agent_end).addr() - start.addr();
    // SAFETY: both labels delimit one constant section of the image, which is mapped for the whole
    // run and never written.
    unsafe { core::slice::from_raw_parts(start, length) }
}

/// Returns where the programs of the ring-3 agent begin.
pub(crate) fn agent_entries() -> AgentEntries {
    let start = (&raw const agent_start).addr() as u64;
    AgentEntries {
        read: (&raw const agent_read).addr() as u64 - start,
        write: (&raw const agent_write).addr() as u64 - start,
        check: (&raw const agent_check).addr() as u64 - start,
        watch: (&raw const agent_watch).addr() as u64 - start,
        count: (&raw const agent_count).addr() as u64 - start,
    }
}
