//! What happened, in order, and hooks that make something else happen in between.

use core::cell::RefCell;
use core::fmt;

use mmu_gather::pagetable::{Level, NonPresent};
use mmu_gather::tlb::{CachedTranslations, CpuId, TlbEvent};
use mmu_gather::{GatherEvent, UnmappedLeaf};
use x86_64::structures::paging::PhysFrame;

use crate::kernel::PaperKernel;

/// One thing that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The lock of this table is about to be taken.
    LockAsked(PhysFrame),
    /// A leaf was cleared.
    LeafCleared(UnmappedLeaf),
    /// A zap met an entry that is kept: not present, and not empty.
    NonPresentMet {
        /// The first address it covers.
        address: u64,
        /// Of the table it is in.
        level: Level,
        /// What it means.
        entry: NonPresent,
    },
    /// A large leaf was replaced by a migration entry, on its way to a table.
    LeafSplit(UnmappedLeaf),
    /// A CPU invalidated one page.
    Invlpg {
        /// Which.
        cpu: CpuId,
        /// Where.
        address: u64,
    },
    /// A CPU is about to load CR3.
    Cr3 {
        /// Which.
        cpu: CpuId,
        /// The root.
        root: PhysFrame,
        /// The tag.
        pcid: u16,
        /// Whether what is cached under the tag goes.
        cached: CachedTranslations,
    },
    /// A flush request is about to interrupt this CPU.
    Ipi {
        /// Which.
        to: CpuId,
    },
    /// The CPU that asked flushes itself, while the others flush.
    Meanwhile,
    /// A request has been answered.
    Answered,
    /// Somebody looks at the state of this CPU.
    StateRead(CpuId),
    /// The delayed rmap of a page was removed.
    RmapRemoved(PhysFrame),
    /// A slice of the gather is about to be released.
    FreeChunk {
        /// How many slots.
        slots: usize,
    },
    /// The last reference on a page was given up.
    PageFreed(PhysFrame),
    /// A table was freed.
    TableFreed(PhysFrame),
    /// The engine offered to run something else.
    Resched,
    /// An event of `mmu-tlb`.
    Tlb(TlbEvent),
    /// An event of `mmu-gather`.
    Gather(GatherEvent),
}

/// An event and the circumstances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noted {
    /// What happened.
    pub event: Event,
    /// Which CPU was played.
    pub on: CpuId,
    /// Whether a table lock was held.
    pub under_lock: bool,
}

type Act = Box<dyn FnOnce(&PaperKernel)>;

struct Hook {
    at: Box<dyn Fn(&Event) -> bool>,
    act: Act,
}

pub(crate) struct Log {
    events: RefCell<Vec<Noted>>,
    hooks: RefCell<Vec<Hook>>,
}

impl Log {
    pub(crate) const fn new() -> Self {
        Self { events: RefCell::new(Vec::new()), hooks: RefCell::new(Vec::new()) }
    }

    fn due(&self, event: &Event) -> Option<Act> {
        let mut hooks = self.hooks.borrow_mut();
        let due = hooks.iter().position(|hook| (hook.at)(event))?;
        Some(hooks.remove(due).act)
    }
}

impl PaperKernel {
    /// Logs `event`, and runs the first hook that waits for it.
    pub(crate) fn note(&self, event: Event) {
        let noted = Noted { event, on: self.here(), under_lock: self.is_a_lock_held() };
        self.log.events.borrow_mut().push(noted);
        if let Some(act) = self.log.due(&event) {
            act(self);
        }
    }

    /// Runs `act` once, in the middle of the engine's work, at the next event that `at` picks out.
    pub fn once(&self, at: impl Fn(&Event) -> bool + 'static, act: impl FnOnce(&Self) + 'static) {
        self.log.hooks.borrow_mut().push(Hook { at: Box::new(at), act: Box::new(act) });
    }

    /// Everything noted since the last call.
    pub fn take_events(&self) -> Vec<Noted> {
        self.log.events.take()
    }

    /// How many of the events noted so far `pick` picks out.
    pub fn count(&self, pick: impl Fn(&Event) -> bool) -> usize {
        self.log.events.borrow().iter().filter(|noted| pick(&noted.event)).count()
    }

    /// Hooks that have not run.
    #[must_use]
    pub fn nr_hooks_waiting(&self) -> usize {
        self.log.hooks.borrow().len()
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").field("events", &self.events).finish_non_exhaustive()
    }
}
