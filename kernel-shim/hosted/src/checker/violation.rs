//! A violation, with what is needed to tell it.

use core::fmt;

use mmu_gather::tlb::CpuId;
use x86_64::structures::paging::PhysFrame;

use crate::checker::events::Event;
use crate::checker::kind::ViolationKind;
use crate::mmu::watch::CachedEntry;

/// Something that must never happen.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Violation {
    /// What kind.
    pub kind: ViolationKind,
    /// The CPU whose caches are stale.
    pub cpu: CpuId,
    /// The address through which the frame can be reached.
    pub address: u64,
    /// The frame.
    pub frame: PhysFrame,
    /// When it was freed, if it was: the step, and the CPU that freed it.
    pub freed: Option<(u64, CpuId)>,
    /// The cached entry that reaches it, if it is still known.
    pub entry: Option<CachedEntry>,
    /// The last events that matter.
    pub story: Vec<Event>,
}

/// The violations of one machine.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Found {
    /// How many.
    pub count: u64,
    /// The first few.
    pub told: Vec<Violation>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "violation: {}", self.kind)?;
        writeln!(f, "  {} address {:#x} frame {:#x}", self.cpu, self.address, self.frame.start_address())?;
        match self.freed {
            Some((step, cpu)) => writeln!(f, "  freed at step {step} by {cpu}")?,
            None => writeln!(f, "  not freed yet")?,
        }
        if let Some(entry) = &self.entry {
            writeln!(f, "  through its {entry}")?;
        }
        for event in &self.story {
            writeln!(f, "    {event}")?;
        }
        Ok(())
    }
}
