//! An access through an MMU: what is tried, and how it ends.

use x86_64::PhysAddr;
use x86_64::structures::idt::PageFaultErrorCode;

use crate::mmu::arch::{LinearAddress, TableLevel};
use crate::mmu::tlb_cache::TlbEntry;
use crate::mmu::watch::Tag;

/// What an instruction does at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// Load.
    Read,
    /// Store, or a locked load and store.
    Write,
    /// Instruction fetch.
    Execute,
}

/// At which privilege.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessMode {
    /// CPL 3.
    User,
    /// CPL below 3, with CR0.WP = 1 and EFLAGS.AC = 0.
    Kernel,
}

/// An access that went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The byte in physical memory.
    pub address: PhysAddr,
    /// The translation used; after a walk, the one just cached.
    pub entry: TlbEntry,
    /// Where the translation came from.
    pub source: Source,
}

/// Where a translation, or the reason for a fault, was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the TLB, under this tag.
    Tlb(Tag),
    /// At the end of a walk.
    Walk {
        /// Where the walk began.
        start: Start,
        /// Level of the table with the last entry read.
        level: TableLevel,
        /// Address of the last entry read.
        entry: PhysAddr,
    },
}

impl Source {
    /// Whether something cached took part, so that memory alone might give another answer.
    #[must_use]
    pub const fn was_cached(self) -> bool {
        !matches!(self, Self::Walk { start: Start::Cr3, .. })
    }
}

/// Where a walk began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At the root.
    Cr3,
    /// Below a cached entry of this level.
    Structure(TableLevel),
}

/// An access that did not go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// #PF.
    Page(PageFault),
    /// #GP (#SS for stack accesses): the address is not canonical.
    NonCanonical(LinearAddress),
}

/// A page fault. What was cached for its address under the current PCID is gone when it is
/// reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// CR2.
    pub address: LinearAddress,
    /// The error code pushed. Intel SDM vol. 3A 4.7.
    pub code: PageFaultErrorCode,
    /// What said no.
    pub source: Source,
}

/// A control-register or invalidation instruction with operands the CPU refuses; nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralProtection;

impl core::fmt::Display for GeneralProtection {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("general protection: the operands are not allowed in this mode")
    }
}

impl core::error::Error for GeneralProtection {}

/// The error-code bits that say what was tried.
pub(crate) fn access_code(kind: AccessKind, mode: AccessMode) -> PageFaultErrorCode {
    let kind = match kind {
        AccessKind::Read => PageFaultErrorCode::empty(),
        AccessKind::Write => PageFaultErrorCode::CAUSED_BY_WRITE,
        AccessKind::Execute => PageFaultErrorCode::INSTRUCTION_FETCH,
    };
    match mode {
        AccessMode::User => kind | PageFaultErrorCode::USER_MODE,
        AccessMode::Kernel => kind,
    }
}
