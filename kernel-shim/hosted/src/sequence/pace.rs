//! How the steps of a sequence follow one another, and what is noted where they do so one at a
//! time.

use std::sync::Mutex;

use mmu_kernel_shim::{Supply, Vma};

use crate::sequence::op::MmId;

/// What programs can see at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// The areas of every address space.
    pub areas: Vec<(MmId, Vma)>,
    /// Pages that hold what a program wrote: in memory or in swap, of its own.
    pub written: Vec<(MmId, u64)>,
    /// Guards: addresses that no program may use, whatever the area allows.
    pub guarded: Vec<(MmId, u64)>,
}

/// How the steps of a sequence follow one another.
#[derive(Debug)]
pub(crate) enum Pace {
    /// A few at a time.
    Overlapping,
    /// One at a time, gathers getting batch pages as told here and not as the sequence says. Notes
    /// what can be seen.
    Serial(Supply, Mutex<Vec<View>>),
}
