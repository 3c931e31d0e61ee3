//! What happened last, so that a violation can be told.

use core::fmt;
use std::collections::VecDeque;
use std::sync::Mutex;

use mmu_gather::tlb::CpuId;
use x86_64::structures::paging::PhysFrame;

/// How many events are kept.
const KEPT: usize = 8192;
/// How many events of one sort are told.
const MOST_OF_A_SORT: usize = 5;

/// One thing that happened, in the order of steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Number of the event; "when" in every report.
    pub step: u64,
    /// The CPU it happened on.
    pub cpu: CpuId,
    /// What it was.
    pub what: What,
}

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The frame was given out.
    Allocated(PhysFrame),
    /// The frame was freed.
    Freed(PhysFrame),
    /// A program reached the frame at the address.
    Accessed(u64, PhysFrame),
    /// INVLPG.
    Invlpg(u64),
    /// CR3 was loaded with this root under this PCID.
    LoadedCr3(PhysFrame, u16, Kept),
    /// A request was sent to this CPU.
    Sent(CpuId),
    /// A request from this CPU was carried out.
    Answered(CpuId),
    /// A request from this CPU was lost, on purpose.
    Lost(CpuId),
    /// An unmapping of these addresses was about to return.
    Unmapped(u64, u64),
}

/// Whether a CR3 load kept what was cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It did (bit 63).
    Yes,
    /// It did not.
    No,
}

/// The last events.
#[derive(Debug, Default)]
pub(crate) struct Story {
    events: Mutex<Events>,
}

#[derive(Debug, Default)]
struct Events {
    next_step: u64,
    kept: VecDeque<Event>,
}

impl Story {
    /// Notes an event and returns its step.
    pub(crate) fn add(&self, cpu: CpuId, what: What) -> u64 {
        let mut events = self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let step = events.next_step;
        events.next_step += 1;
        if events.kept.len() == KEPT {
            events.kept.pop_front();
        }
        events.kept.push_back(Event { step, cpu, what });
        step
    }

    /// The last events that explain how `cpu` came to reach `frame` at `address`, oldest first.
    ///
    /// All that happened to the frame and to the address; of what the CPU itself did, the last few of each sort.
    #[must_use]
    pub(crate) fn about(&self, cpu: CpuId, frame: PhysFrame, address: u64) -> Vec<Event> {
        let events = self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut left = [MOST_OF_A_SORT; 4];
        let mut chosen = Vec::new();
        for event in events.kept.iter().rev() {
            let here = event.cpu == cpu;
            let sort = match event.what {
                What::Allocated(other) | What::Freed(other) if other == frame => 0,
                What::Unmapped(start, end) if start <= address && address < end => 0,
                What::Invlpg(page) if here && page >> 12 == address >> 12 => 0,
                What::Accessed(page, _) if here && page >> 12 == address >> 12 => 1,
                What::Sent(to) if to == cpu => 2,
                What::Answered(_) | What::Lost(_) if here => 2,
                What::LoadedCr3(..) if here => 3,
                _ => continue,
            };
            if left[sort] > 0 {
                left[sort] -= 1;
                chosen.push(*event);
            }
        }
        chosen.reverse();
        chosen
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {:>8}  {}  ", self.step, self.cpu)?;
        match self.what {
            What::Allocated(frame) => write!(f, "frame {:#x} given out", frame.start_address()),
            What::Freed(frame) => write!(f, "frame {:#x} freed", frame.start_address()),
            What::Accessed(address, frame) => {
                write!(f, "program reaches {:#x} at {address:#x}", frame.start_address())
            }
            What::Invlpg(address) => write!(f, "INVLPG {address:#x}"),
            What::LoadedCr3(root, pcid, kept) => {
                let kept = match kept {
                    Kept::Yes => "keeping",
                    Kept::No => "dropping",
                };
                write!(f, "CR3 = {:#x}, PCID {pcid}, {kept} what is cached under it", root.start_address())
            }
            What::Sent(to) => write!(f, "flush request sent to {to}"),
            What::Answered(from) => write!(f, "flush request of {from} carried out"),
            What::Lost(from) => write!(f, "flush request of {from} lost, and acknowledged (a planted fault)"),
            What::Unmapped(start, end) => write!(f, "unmapping of {start:#x}..{end:#x} returns"),
        }
    }
}
