//! The instructions that change what this CPU's MMU knows, and the features they depend on.
//!
//! Nothing here decides when to flush.

use core::arch::x86_64::{__cpuid, __cpuid_count};

use spin::Once;
use x86_64::VirtAddr;
use x86_64::instructions::tlb;
pub use x86_64::instructions::tlb::Pcid;
use x86_64::registers::control::{Cr0, Cr0Flags, Cr3, Cr3Flags, Cr4, Cr4Flags};
use x86_64::structures::paging::PhysFrame;

static FEATURES: Once<Features> = Once::new();

/// The features of this machine's CPUs that the image uses; all CPUs are taken to be alike.
#[derive(Debug, Clone, Copy)]
pub struct Features {
    /// Translations are tagged with a process-context identifier (CR4.PCIDE).
    pub pcid: bool,
    /// INVPCID exists.
    pub invpcid: bool,
    /// The local APIC is reached through MSRs.
    pub x2apic: bool,
    /// Pages of 1 GiB exist.
    pub gib_pages: bool,
    smep: bool,
    smap: bool,
    umip: bool,
}

/// What happens to the translations that were cached under the PCID being loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cached {
    /// They are dropped.
    Flush,
    /// They stay (CR3 bit 63) if the CPU has PCIDs; otherwise they are dropped.
    Keep,
}

/// Returns the features of this machine.
pub fn features() -> &'static Features {
    FEATURES.call_once(detect)
}

/// Switches on, for the running CPU, what [`features`] lists.
pub(crate) fn enable_features() {
    let flags = wanted_cr4();
    // FSGSBASE stays off: ring 3 must not be able to set the GS base.
    // SAFETY: CPUID says that the CPU knows each bit. CR3 carries PCID 0, which setting PCIDE
    // requires; global pages exist in the kernel half only, which never changes (B3); ring 0
    // executes no user page, and reads and writes memory through the kernel half only.
    unsafe { Cr4::update(|cr4| *cr4 |= flags) };
}

fn wanted_cr4() -> Cr4Flags {
    let features = features();
    let mut flags = Cr4Flags::PAGE_GLOBAL;
    flags.set(Cr4Flags::PCID, features.pcid);
    flags.set(Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION, features.smep);
    flags.set(Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION, features.smap);
    flags.set(Cr4Flags::USER_MODE_INSTRUCTION_PREVENTION, features.umip);
    flags
}

/// What is wrong with the control registers of the running CPU, if anything is.
pub(crate) fn wrong_control() -> Option<&'static str> {
    if Cr0::read().intersects(Cr0Flags::CACHE_DISABLE | Cr0Flags::NOT_WRITE_THROUGH) {
        return Some("its caches are off (CR0.CD, CR0.NW)");
    }
    (!Cr4::read().contains(wanted_cr4())).then_some("a feature is off that it has (CR4)")
}

/// Drops this CPU's translations of the page at `address`: of the current PCID, and global ones.
#[inline]
pub fn invalidate_page(address: VirtAddr) {
    tlb::flush(address);
}

/// Switches this CPU to another address space.
///
/// Without PCIDs (see [`Features::pcid`]) `pcid` and `cached` mean nothing: every translation that
/// is not global is dropped.
///
/// # Safety
///
/// - `root` has the kernel half ([`crate::arch::paging::share_kernel_half`]), and stays a valid
///   hierarchy as long as it is loaded.
/// - With [`Cached::Keep`]: what is cached under `pcid` on this CPU still agrees with `root`, or
///   may be used as it is.
#[inline]
pub unsafe fn load_root(root: PhysFrame, pcid: Pcid, cached: Cached) {
    match (features().pcid, cached) {
        // SAFETY: the caller vouches for the root.
        (false, _) => unsafe { load_root_flush(root) },
        // SAFETY: the caller vouches for the root; CR4.PCIDE is on (`enable_features`).
        (true, Cached::Flush) => unsafe { Cr3::write_pcid(root, pcid) },
        // SAFETY: as above, and for what is cached.
        (true, Cached::Keep) => unsafe { Cr3::write_pcid_no_flush(root, pcid) },
    }
}

/// Switches this CPU to another address space under PCID 0, and drops what was cached under it.
///
/// # Safety
///
/// `root` maps the kernel half, and stays a valid hierarchy as long as it is loaded.
#[inline]
pub unsafe fn load_root_flush(root: PhysFrame) {
    // SAFETY: the caller vouches for the root.
    unsafe { Cr3::write(root, Cr3Flags::empty()) };
}

/// Drops what this CPU has cached under the current PCID, by loading CR3 with what it holds.
pub fn reload_root() {
    // Read raw: `Cr3::read`, and so `tlb::flush_all`, leave the PCID out, and would load this root
    // under PCID 0.
    let (root, pcid_or_flags) = Cr3::read_raw();
    // SAFETY: the root and the PCID that are loaded already, with bit 63 clear: what is cached
    // under it is dropped.
    unsafe { Cr3::write_raw(root, pcid_or_flags) };
}

/// Returns the root that this CPU uses now.
#[must_use]
pub fn current_root() -> PhysFrame {
    Cr3::read_raw().0
}

/// Returns the APIC id that this CPU was reset with: of the x2APIC, where that is used, all 32
/// bits.
pub(crate) fn initial_apic_id() -> u32 {
    // Intel SDM vol. 2A, CPUID leaf 0x0b: the leaf is there if EBX is not 0; EDX is the id of the
    // x2APIC.
    if features().x2apic && __cpuid(0).eax >= 0x0b {
        let topology = __cpuid_count(0x0b, 0);
        if topology.ebx != 0 {
            return topology.edx;
        }
    }
    __cpuid(1).ebx >> 24
}

fn detect() -> Features {
    // Intel SDM vol. 2A, CPUID: leaves 1, 7 and 0x8000_0001.
    let has_leaf_7 = __cpuid(0).eax >= 7;
    let basic = __cpuid(1);
    let extended = __cpuid(0x8000_0001);
    let structured = |register: fn(core::arch::x86_64::CpuidResult) -> u32, bit: u32| {
        has_leaf_7 && register(__cpuid_count(7, 0)) >> bit & 1 == 1
    };
    Features {
        pcid: basic.ecx >> 17 & 1 == 1,
        x2apic: basic.ecx >> 21 & 1 == 1,
        gib_pages: extended.edx >> 26 & 1 == 1,
        smep: structured(|leaf| leaf.ebx, 7),
        smap: structured(|leaf| leaf.ebx, 20),
        invpcid: structured(|leaf| leaf.ebx, 10),
        umip: structured(|leaf| leaf.ecx, 2),
    }
}
