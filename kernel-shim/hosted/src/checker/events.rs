//! What happened last, so that a violation can be told.

use core::fmt;
use std::collections::VecDeque;
use std::sync::Mutex;

use mmu_gather::GatherEvent;
use mmu_gather::pagetable::Level;
use mmu_gather::tlb::{CpuId, CtxId, FreedTables, Slot, TlbEvent};
use x86_64::structures::paging::PhysFrame;

use crate::checker::kind::ViolationKind;
use crate::mmu::watch::{Held, Use};
use crate::options::Telling;
use crate::vocabulary::FrameRole;

/// How many events are kept.
const KEPT: usize = 8192;
/// How many events of one sort are told.
const MOST_OF_A_SORT: usize = 5;

/// One thing that happened, in the order of steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Number of the event; "when" in every report. A detail has the number of the event that
    /// follows it.
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
    Allocated(PhysFrame, FrameRole),
    /// The frame was freed.
    Freed(PhysFrame, FrameRole),
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
    /// A flush of this page, or of all of a context, did nothing, on purpose.
    Skipped(Option<u64>),
    /// A step of the sequence began a call on these addresses.
    Called(Call),
    /// That call has returned.
    Returned(Call),
    /// Something only a timeline wants; never part of the story of a violation.
    Detail(Detail),
}

/// A call of the kernel that changes areas or entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The step of the sequence, by its index.
    pub step: usize,
    /// Its word.
    pub word: &'static str,
    /// The number of the address space in the sequence.
    pub mm: u8,
    /// The first address.
    pub start: u64,
    /// The end.
    pub end: u64,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, word, mm, start, end } = self;
        write!(f, "step {step} of the sequence, {word} m{mm} {start:#x}..{end:#x},")
    }
}

/// What only a timeline wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// A step of the sequence began, by its index; the address space it works on or switches to, if
    /// it names one.
    Began(usize, Option<(PhysFrame, CtxId)>),
    /// A step of the sequence is done.
    Ended(usize),
    /// An MMU filled a cache on its way to this address: with an entry that names this frame.
    Filled(u64, PhysFrame, Held, Fill),
    /// A fault was answered: in the address space of this root the page maps the frame from now on.
    Mapped(PhysFrame, u64, PhysFrame),
    /// A leaf was cleared that mapped the frame.
    Cleared(u64, Level, PhysFrame),
    /// A leaf lost rights.
    Restricted(u64, Level),
    /// The shootdown core did something; what the slot of the loaded address space says after it.
    Tlb(TlbEvent, Slot),
    /// A gather did something.
    Gather(GatherEvent),
    /// The checker found something, at this address and frame.
    Violated(ViolationKind, u64, PhysFrame),
}

/// Why an MMU walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// A program wanted to use the address.
    Access,
    /// It speculated.
    Speculation,
}

/// Whether a CR3 load kept what was cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It did (bit 63).
    Yes,
    /// It did not.
    No,
}

/// The last events, or all.
#[derive(Debug)]
pub(crate) struct EventLog {
    telling: Telling,
    events: Mutex<Events>,
}

#[derive(Debug, Default)]
struct Events {
    next_step: u64,
    kept: VecDeque<Event>,
}

impl EventLog {
    pub(crate) fn new(telling: Telling) -> Self {
        Self { telling, events: Mutex::default() }
    }

    /// Whether details are kept.
    pub(crate) fn keeps_all(&self) -> bool {
        self.telling == Telling::All
    }

    /// Notes a detail, if anybody wants it. It takes no step of its own, so that steps are the same
    /// with details and without.
    pub(crate) fn detail(&self, cpu: CpuId, detail: Detail) {
        if self.keeps_all() {
            let mut events = self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let step = events.next_step;
            events.kept.push_back(Event { step, cpu, what: What::Detail(detail) });
        }
    }

    /// Everything that is kept, oldest first. Calls are there as details.
    pub(crate) fn events(&self) -> Vec<Event> {
        let events = self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let is_call = |event: &&Event| matches!(event.what, What::Called(_) | What::Returned(_));
        events.kept.iter().filter(|event| !is_call(event)).copied().collect()
    }

    /// Notes a call, or its return. It has the number of the event that follows it.
    pub(crate) fn mark(&self, cpu: CpuId, what: What) {
        let mut events = self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let step = events.next_step;
        self.make_room(&mut events);
        events.kept.push_back(Event { step, cpu, what });
    }

    fn make_room(&self, events: &mut Events) {
        if self.telling == Telling::Last && events.kept.len() == KEPT {
            events.kept.pop_front();
        }
    }

    /// Notes an event and returns its step.
    pub(crate) fn add(&self, cpu: CpuId, what: What) -> u64 {
        let mut events = self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let step = events.next_step;
        events.next_step += 1;
        self.make_room(&mut events);
        events.kept.push_back(Event { step, cpu, what });
        step
    }

    /// What is kept of when `frame` was given out and freed, oldest first.
    pub(crate) fn about(&self, frame: PhysFrame) -> Vec<Event> {
        let events = self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let is_about = |event: &&Event| matches!(event.what, What::Allocated(other, _) | What::Freed(other, _) if other == frame);
        let mut about: Vec<Event> =
            events.kept.iter().rev().filter(is_about).take(MOST_OF_A_SORT).copied().collect();
        about.reverse();
        about
    }

    /// The last few events of `cpu`, oldest first.
    pub(crate) fn last_of(&self, cpu: CpuId) -> Vec<Event> {
        let events = self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let is_told = |event: &&Event| event.cpu == cpu && !matches!(event.what, What::Detail(_));
        let mut last: Vec<Event> =
            events.kept.iter().rev().filter(is_told).take(3 * MOST_OF_A_SORT).copied().collect();
        last.reverse();
        last
    }

    /// The last events that explain how `cpu` came to reach `frame` at `address`, oldest first.
    ///
    /// All that happened to the frame and to the address; of what the CPU itself did, the last few
    /// of each sort.
    #[must_use]
    pub(crate) fn explaining(&self, cpu: CpuId, frame: PhysFrame, address: u64) -> Vec<Event> {
        let events = self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut left = [MOST_OF_A_SORT; 5];
        let mut chosen = Vec::new();
        // With all events kept, the same ones are told as without.
        let oldest = events.next_step.saturating_sub(KEPT as u64);
        for event in events.kept.iter().rev().take_while(|event| event.step >= oldest) {
            let here = event.cpu == cpu;
            let sort = match event.what {
                What::Allocated(other, _) | What::Freed(other, _) if other == frame => 0,
                What::Unmapped(start, end) if start <= address && address < end => 0,
                What::Invlpg(page) if here && page >> 12 == address >> 12 => 0,
                What::Accessed(page, _) if here && page >> 12 == address >> 12 => 1,
                What::Sent(to) if to == cpu => 2,
                What::Answered(_) | What::Lost(_) if here => 2,
                What::Skipped(Some(page)) if here && page >> 12 == address >> 12 => 0,
                What::LoadedCr3(..) | What::Skipped(None) if here => 3,
                What::Called(Call { start, end, .. }) | What::Returned(Call { start, end, .. })
                    if start <= address && address < end =>
                {
                    4
                }
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
        write!(f, "event {:>7}  {}  {}", self.step, self.cpu, self.what)
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Allocated(frame, _) => write!(f, "frame {:#x} given out", frame.start_address()),
            Self::Freed(frame, _) => write!(f, "frame {:#x} freed", frame.start_address()),
            Self::Accessed(address, frame) => {
                write!(f, "program reaches {:#x} at {address:#x}", frame.start_address())
            }
            Self::Invlpg(address) => write!(f, "INVLPG {address:#x}"),
            Self::LoadedCr3(root, pcid, kept) => {
                let kept = match kept {
                    Kept::Yes => "keeping",
                    Kept::No => "dropping",
                };
                write!(f, "CR3 = {:#x}, PCID {pcid}, {kept} what is cached under it", root.start_address())
            }
            Self::Sent(to) => write!(f, "flush request sent to {to}"),
            Self::Answered(from) => write!(f, "flush request of {from} carried out"),
            Self::Lost(from) => write!(f, "flush request of {from} lost, and acknowledged (a planted fault)"),
            Self::Unmapped(start, end) => write!(f, "unmapping of {start:#x}..{end:#x} returns"),
            Self::Skipped(Some(address)) => write!(f, "INVLPG {address:#x} does nothing (a planted fault)"),
            Self::Skipped(None) => {
                f.write_str("the flush of the next CR3 load does nothing (a planted fault)")
            }
            Self::Called(call) => write!(f, "{call} begins"),
            Self::Returned(call) => write!(f, "{call} has returned"),
            Self::Detail(detail) => detail.fmt(f),
        }
    }
}

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Began(step, _) => write!(f, "step {step} of the sequence begins"),
            Self::Ended(step) => write!(f, "step {step} of the sequence is done"),
            Self::Filled(address, frame, held, fill) => {
                let why = match fill {
                    Fill::Access => "",
                    Fill::Speculation => ", speculatively",
                };
                let start = frame.start_address();
                match held.as_a {
                    Use::Page(size) => {
                        write!(f, "caches {address:#x} -> {size} page {start:#x} ({}){why}", held.tag)
                    }
                    Use::Table(level) => {
                        write!(f, "caches {address:#x} -> {level} {start:#x} ({}){why}", held.tag)
                    }
                    Use::Root => write!(f, "root {start:#x} in CR3"),
                }
            }
            Self::Mapped(_, address, frame) => {
                write!(f, "entry of {address:#x} maps frame {:#x}", frame.start_address())
            }
            Self::Cleared(address, level, frame) => {
                write!(f, "{level:?} entry of {address:#x} cleared, frame {:#x}", frame.start_address())
            }
            Self::Restricted(address, level) => write!(f, "{level:?} entry of {address:#x} lost rights"),
            Self::Tlb(event, slot) => {
                tlb_words(f, event)?;
                let flushed = matches!(
                    event,
                    TlbEvent::FlushedPages(_)
                        | TlbEvent::FlushedAll
                        | TlbEvent::FlushedAllForPages
                        | TlbEvent::CaughtUp
                );
                match slot.ctx_id {
                    Some(ctx_id) if flushed => {
                        write!(f, "; slot at generation {} of context {}", slot.tlb_gen.get(), ctx_id.get())
                    }
                    _ => Ok(()),
                }
            }
            Self::Gather(event) => gather_words(f, event),
            Self::Violated(kind, address, frame) => {
                write!(f, "VIOLATION: {kind}; address {address:#x}, frame {:#x}", frame.start_address())
            }
        }
    }
}

fn tlb_words(f: &mut fmt::Formatter<'_>, event: TlbEvent) -> fmt::Result {
    match event {
        TlbEvent::Requested { pages: Some(pages), tables } => {
            write!(f, "flush of {pages} pages asked for{}", with_tables(tables))
        }
        TlbEvent::Requested { pages: None, tables } => {
            write!(f, "full flush asked for{}", with_tables(tables))
        }
        TlbEvent::Raised { ctx_id, tlb_gen, span } => {
            write!(f, "generation of context {} raised to {}", ctx_id.get(), tlb_gen.get())?;
            span.map_or(Ok(()), |span| write!(f, " for {span}"))
        }
        TlbEvent::IpisSent(sent) => write!(f, "{sent} CPUs have answered"),
        TlbEvent::IpisSaved { lazy, elsewhere } => {
            write!(f, "not asked: {lazy} lazy CPUs, {elsewhere} that run something else")
        }
        TlbEvent::FlushedPages(pages) => write!(f, "flushed {pages} pages"),
        TlbEvent::FlushedAll => f.write_str("flushed all of the context"),
        TlbEvent::FlushedAllForPages => {
            f.write_str("asked for pages, flushed all of the context: the generation was not the next")
        }
        TlbEvent::CaughtUp => f.write_str("woke, had missed a flush, flushed all of the context"),
        TlbEvent::AlreadyCurrent => f.write_str("asked to flush, had nothing to do"),
        TlbEvent::LeftLazyMm => f.write_str("lazy when asked: left for the kernel's address space"),
        // An event of a later engine, by its own name.
        unknown => write!(f, "{unknown:?}"),
    }
}

const fn with_tables(tables: FreedTables) -> &'static str {
    match tables {
        FreedTables::Yes => ", tables too",
        FreedTables::No => "",
    }
}

fn gather_words(f: &mut fmt::Formatter<'_>, event: GatherEvent) -> fmt::Result {
    match event {
        GatherEvent::BatchTaken => f.write_str("gather takes a batch page"),
        GatherEvent::BatchRefused => f.write_str("gather is refused a batch page"),
        GatherEvent::ForcedFlush => f.write_str("gather is full: forced flush"),
        GatherEvent::DirtyFlush => f.write_str("dirty page: flush under the table lock"),
        GatherEvent::NestedFlush => f.write_str("another gather is open: whole flush"),
        GatherEvent::DeferredFlushSeen => f.write_str("reclaim still owes a flush here"),
        GatherEvent::LockDropped { leaves } => write!(f, "table lock dropped after {leaves} leaves"),
        GatherEvent::TableUnhooked(level) => write!(f, "{level:?} table unhooked"),
        GatherEvent::TableFallback => f.write_str("no batch page for tables: one alone"),
        GatherEvent::Released { slots, tables } => {
            write!(f, "flushed; {slots} slots and {tables} tables are freed now")
        }
        unknown => write!(f, "{unknown:?}"),
    }
}
