//! What happened, in order, and hooks that make something else happen in between.

use core::cell::RefCell;
use core::fmt;

use mmu_gather::pagetable::{Level, NonPresent};
use mmu_gather::tlb::{CachedTranslations, CpuId, TlbEvent};
use mmu_gather::{GatherEvent, UnmappedLeaf};
use x86_64::structures::paging::PhysFrame;

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

/// Something that a test does in the middle of the engine's work, with the kernel `K`.
type Act<K> = Box<dyn FnOnce(&K)>;

struct Hook<K> {
    at: Box<dyn Fn(&Event) -> bool>,
    act: Act<K>,
}

/// The events of a kernel `K`, and what waits for one.
pub(crate) struct Log<K> {
    events: RefCell<Vec<Noted>>,
    hooks: RefCell<Vec<Hook<K>>>,
}

impl<K> Log<K> {
    pub(crate) const fn new() -> Self {
        Self { events: RefCell::new(Vec::new()), hooks: RefCell::new(Vec::new()) }
    }

    /// Notes an event; returns what is to be done at it, if a hook waits for it.
    pub(crate) fn note(&self, noted: Noted) -> Option<Act<K>> {
        self.events.borrow_mut().push(noted);
        let mut hooks = self.hooks.borrow_mut();
        let due = hooks.iter().position(|hook| (hook.at)(&noted.event))?;
        Some(hooks.remove(due).act)
    }

    pub(crate) fn once(&self, at: impl Fn(&Event) -> bool + 'static, act: impl FnOnce(&K) + 'static) {
        self.hooks.borrow_mut().push(Hook { at: Box::new(at), act: Box::new(act) });
    }

    pub(crate) fn nr_hooks(&self) -> usize {
        self.hooks.borrow().len()
    }

    pub(crate) fn take(&self) -> Vec<Noted> {
        self.events.take()
    }

    pub(crate) fn count(&self, pick: impl Fn(&Event) -> bool) -> usize {
        self.events.borrow().iter().filter(|noted| pick(&noted.event)).count()
    }
}

impl<K> fmt::Debug for Log<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").field("events", &self.events).finish_non_exhaustive()
    }
}
