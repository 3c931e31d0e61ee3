//! How a sequence is run, and what it came to.

use core::fmt;

use x86_64::structures::paging::PhysFrame;

use crate::checker::events::Event;
use crate::checker::violation::Found;
use crate::options::{MachineFault, MostWork, Telling};
use crate::sequence::calls::Calls;
use crate::vocabulary::FrameRole;

/// What a sequence came to.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Outcome {
    /// Violations.
    pub found: Found,
    /// Pages nobody uses and nobody freed.
    pub leaked_frames: u64,
    /// Tables nobody uses and nobody freed.
    pub leaked_tables: u64,
    /// The first of both.
    pub lost: Vec<Lost>,
    /// Frames freed twice, or while mapped.
    pub double_frees: u64,
    /// What came of the steps.
    pub calls: Calls,
}

/// A frame that nobody uses and nobody freed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lost {
    /// The frame.
    pub frame: PhysFrame,
    /// What it was given out for.
    pub role: FrameRole,
    /// Whether the kernel has told that it is lent to a gather.
    pub is_lent: bool,
    /// When it was given out and freed, lately.
    pub story: Vec<Event>,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.role == FrameRole::Table { "a table" } else { "a page" };
        write!(f, "lost: {what} in frame {:#x} was never freed", self.frame.start_address())?;
        if self.is_lent {
            f.write_str(
                ": allocate_batch has lent it, and free_batch has not given it back to the allocator",
            )?;
        }
        writeln!(f)?;
        self.story.iter().try_for_each(|event| writeln!(f, "    {event}"))
    }
}

impl Outcome {
    /// Whether nothing was wrong.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.found.count == 0 && self.leaked_frames == 0 && self.leaked_tables == 0 && self.double_frees == 0
    }
}

/// How a sequence is run, besides what it says itself.
#[derive(Clone, Copy, Debug)]
pub struct Trial {
    /// What the machine does wrong, on purpose.
    pub fault: MachineFault,
    /// How much of what happens is remembered.
    pub telling: Telling,
    /// The most that the kernel promises to do between two preemption points.
    pub most_work: MostWork,
    /// How the steps follow one another.
    pub pace: Pace,
}

impl Default for Trial {
    /// Nothing is wrong, little is remembered, and nothing is promised.
    fn default() -> Self {
        Self {
            fault: MachineFault::Absent,
            telling: Telling::Last,
            most_work: MostWork::UNBOUNDED,
            pace: Pace::Overlapping,
        }
    }
}

/// How the steps of a sequence follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// A few at a time.
    Overlapping,
    /// One at a time, so that nothing but the steps decides what programs can see: there is no
    /// device, and no program writes but where a step says so.
    OneAtATime,
}
