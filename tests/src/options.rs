//! What machine the kernel runs on, how it answers, and how much memory it has.

use core::sync::atomic::AtomicU64;

use mmu_gather::pagetable::PagingMode;
use mmu_gather::tlb::{OnlineCpus, PcidSupport, SINGLE_PAGE_FLUSH_CEILING};

/// A set of up to 64 CPUs.
pub type Bits = [AtomicU64; 1];

/// Whether the kernel keeps a note of the lines that its tables use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineNotes {
    /// Yes.
    Kept,
    /// No: the engine looks at every line.
    NotKept,
}

/// Where the locks of tables are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locks {
    /// Each table has one beside it.
    PerTable,
    /// All tables share two, whichever comes out of the hash.
    Two,
    /// All tables share one.
    One,
}

/// How the kernel answers the requests of the engine to flush. All but the first are wrong, for
/// tests of what is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answers {
    /// Every target flushes, then the kernel answers.
    Honest,
    /// The kernel answers at once; nobody flushes.
    AtOnce,
    /// The targets run the handler, which names the CPU that asked.
    ForAnother,
    /// The targets flush; the part of the CPU that asked is left out.
    WithoutMeanwhile,
}

/// What machine the kernel runs on.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many CPUs there are, 64 at most.
    pub cpus: u32,
    /// How many the kernel says are online.
    pub online: OnlineCpus,
    /// Whether translations are tagged.
    pub pcid: PcidSupport,
    /// Four levels of tables, or five.
    pub mode: PagingMode,
    /// More pages than this become a full flush.
    pub flush_ceiling: u64,
    /// Whether used lines are noted.
    pub line_notes: LineNotes,
    /// Where table locks are.
    pub locks: Locks,
    /// How requests to flush are answered.
    pub answers: Answers,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cpus: 4,
            online: OnlineCpus::Many,
            pcid: PcidSupport::On,
            mode: PagingMode::FourLevel,
            flush_ceiling: SINGLE_PAGE_FLUSH_CEILING,
            line_notes: LineNotes::Kept,
            locks: Locks::PerTable,
            answers: Answers::Honest,
        }
    }
}

/// How much memory of one kind can still be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Supply {
    /// Always.
    Unlimited,
    /// This many more times.
    Left(u32),
    /// The lowest bit tells whether the next attempt succeeds; the bits rotate.
    Pattern(u64),
}

impl Supply {
    /// One attempt: whether it succeeds.
    pub(crate) const fn take(&mut self) -> bool {
        match self {
            Self::Unlimited => true,
            Self::Left(0) => false,
            Self::Left(left) => {
                *left -= 1;
                true
            }
            Self::Pattern(bits) => {
                let granted = *bits & 1 == 1;
                *bits = bits.rotate_right(1);
                granted
            }
        }
    }
}
