//! A violation, with what is needed to tell it.

use core::fmt;

use mmu_gather::tlb::CpuId;
use x86_64::structures::paging::PhysFrame;

use crate::checker::events::{Event, What};
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
    /// What is wrong with it, where the kind does not say it all.
    pub because: Option<String>,
    /// The cached entry that reaches it, if it is still known.
    pub entry: Option<CachedEntry>,
    /// The last events that matter.
    pub story: Vec<Event>,
}

impl Violation {
    /// When the frame was last freed, of what the story tells.
    fn last_freed(&self) -> Option<&Event> {
        self.story
            .iter()
            .rev()
            .find(|event| matches!(event.what, What::Freed(frame, _) if frame == self.frame))
    }
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
        if let (true, Some(because)) = (self.kind.is_of_a_call(), &self.because) {
            writeln!(f, "  {}: {because}", self.cpu)?;
            return self.story.iter().try_for_each(|event| writeln!(f, "    {event}"));
        }
        writeln!(f, "  {} address {:#x} frame {:#x}", self.cpu, self.address, self.frame.start_address())?;
        if let Some(because) = &self.because {
            writeln!(f, "  {because}")?;
        }
        match self.freed {
            Some((event, cpu)) => writeln!(f, "  freed at event {event} by {cpu}")?,
            None => match self.last_freed() {
                Some(Event { step, cpu, .. }) => {
                    writeln!(f, "  freed at event {step} by {cpu}, and given out again since")?;
                }
                None if self.kind.is_after_free() => {
                    writeln!(
                        f,
                        "  freed so long ago that it is not remembered when, and given out again since"
                    )?;
                }
                None => writeln!(f, "  the frame has not been freed")?,
            },
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

#[cfg(test)]
mod tests {
    use x86_64::PhysAddr;

    use super::*;
    use crate::vocabulary::FrameRole;

    fn violation(kind: ViolationKind) -> Violation {
        let frame = PhysFrame::containing_address(PhysAddr::new(0x6000));
        Violation {
            kind,
            cpu: CpuId::new(1),
            address: 0,
            frame,
            freed: None,
            because: None,
            entry: None,
            story: Vec::new(),
        }
    }

    #[test]
    fn a_page_that_was_freed_is_never_said_not_to_be_freed_yet() {
        let mut given_out_again = violation(ViolationKind::PageReachableAfterFree);
        assert!(given_out_again.to_string().contains("freed so long ago"), "{given_out_again}");
        let freed = What::Freed(given_out_again.frame, FrameRole::Page);
        given_out_again.story.push(Event { step: 7, cpu: CpuId::new(2), what: freed });
        let told = given_out_again.to_string();
        assert!(told.contains("freed at event 7 by CPU 2, and given out again since"), "{told}");
    }

    #[test]
    fn a_page_that_is_in_use_is_said_to_be() {
        let told = violation(ViolationKind::RightsUsableAfterProtect).to_string();
        assert!(told.contains("the frame has not been freed"), "{told}");
    }
}
