//! What a timeline consists of: a row for each event, and the violation that it explains.

use mmu_hosted::{Violation, ViolationKind, What};
use x86_64::structures::paging::PhysFrame;

/// A run as somebody looks at it.
#[derive(Debug)]
pub(crate) struct Timeline {
    /// CPUs of the machine.
    pub nr_cpus: usize,
    /// What happened, oldest first.
    pub rows: Vec<Row>,
    /// The violation it explains, if there is one.
    pub focus: Option<Focus>,
}

/// One thing that happened.
#[derive(Debug)]
pub(crate) struct Row {
    /// Its number; "step" in every report.
    pub at: u64,
    /// The CPU.
    pub cpu: usize,
    /// What sort it is.
    pub mark: Mark,
    /// In few words.
    pub short: String,
    /// In more.
    pub long: String,
    /// The step of the sequence that the CPU was working on, by its index.
    pub call: Option<usize>,
    /// Whether it helps to explain what this is about; without a focus, whether it belongs to the
    /// outline.
    pub matters: bool,
    /// Of a request, the row in which it is answered or lost; and back.
    pub partner: Option<usize>,
    /// The event.
    pub what: What,
    /// The address space it concerns, by its root.
    pub root: Option<PhysFrame>,
    /// Its name.
    pub mm: Option<String>,
}

/// What sort of thing happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// A step of the sequence begins or ends.
    Call,
    /// An entry was changed.
    Entry,
    /// A generation was raised, or a gather decided something.
    Generation,
    /// A request was sent, answered or lost.
    Interrupt,
    /// Something was invalidated, or a slot said to be new enough.
    Flush,
    /// CR3 was loaded.
    Switch,
    /// Something entered a cache, or a program used it.
    Fill,
    /// A frame was given out.
    Allocated,
    /// A frame was freed.
    Freed,
    /// Something is wrong.
    Violation,
}

/// The violation that a timeline explains.
#[derive(Debug)]
pub(crate) struct Focus {
    /// The violation.
    pub violation: Violation,
    /// The row in which it was found.
    pub row: usize,
    /// The address space, by its root, if it is known.
    pub root: Option<PhysFrame>,
    /// Its name.
    pub mm: String,
}

/// Whether a violation is about an address; one about a lost write, or about what is counted, names
/// a frame only.
pub(crate) const fn has_address(kind: ViolationKind) -> bool {
    !matches!(
        kind,
        ViolationKind::WriteLost
            | ViolationKind::MeaningsDisagree
            | ViolationKind::TablesMiscounted
            | ViolationKind::ReferencesDisagree
            | ViolationKind::FrameUnaccounted
    )
}

/// Whether a violation is about what an entry says, whoever has cached it or not.
pub(crate) const fn is_of_an_entry(kind: ViolationKind) -> bool {
    matches!(
        kind,
        ViolationKind::EntryOutsideAreas
            | ViolationKind::MoreThanAreaAllows
            | ViolationKind::SharedPageWritable
            | ViolationKind::WrongPageMapped
            | ViolationKind::NoPageMapped
            | ViolationKind::StrayBits
            | ViolationKind::BitsLost
            | ViolationKind::AccessForgotten
            | ViolationKind::ContentOfAnother
            | ViolationKind::ContentLeft
            | ViolationKind::ContentLost
            | ViolationKind::ContentOfElsewhere
            | ViolationKind::PageLeftByDiscard
    )
}
