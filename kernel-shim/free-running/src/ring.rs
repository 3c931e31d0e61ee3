//! The last events of one CPU, kept at a few stores each.
#![expect(unsafe_code, reason = "reads the time-stamp counter")]

use core::arch::x86_64::_rdtsc;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// How many events of a CPU are kept.
const KEPT: usize = 512;

/// What happened. The numbers beside it are said at each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Happened {
    /// A program begins something: what ([`Doing`](crate::doing::Doing)), where.
    Begins,
    /// It is done: what, where.
    Done,
    /// CR3 was loaded, and all that was cached dropped: root, PCID.
    LoadedAndFlushed,
    /// CR3 was loaded, and what was cached kept: root, PCID.
    LoadedAndKept,
    /// INVLPG: address.
    Invlpg,
    /// This CPU asks others: which (a bit each).
    Asked,
    /// All have answered: how many.
    Answered,
    /// This CPU carries out what others have asked.
    Interrupted,
    /// A frame was freed: its address; 1 for a table.
    Freed,
    /// A frame was given out: its address; 1 for a table.
    Allocated,
}

const ALL: [Happened; 10] = [
    Happened::Begins,
    Happened::Done,
    Happened::LoadedAndFlushed,
    Happened::LoadedAndKept,
    Happened::Invlpg,
    Happened::Asked,
    Happened::Answered,
    Happened::Interrupted,
    Happened::Freed,
    Happened::Allocated,
];

/// One event. Its CPU writes it, and the report reads it when the run is over.
#[derive(Debug, Default)]
struct Slot {
    time: AtomicU64,
    what: AtomicU32,
    numbers: [AtomicU64; 2],
}

#[derive(Debug)]
pub(crate) struct Ring {
    slots: Box<[Slot]>,
    next: AtomicU32,
}

/// An event that was read back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub(crate) time: u64,
    pub(crate) what: Happened,
    pub(crate) numbers: [u64; 2],
}

impl Ring {
    pub(crate) fn new() -> Self {
        Self { slots: (0..KEPT).map(|_| Slot::default()).collect(), next: AtomicU32::new(0) }
    }

    /// Notes an event, unless the rings are `frozen`: after the first violation what led to it is
    /// kept.
    #[inline]
    pub(crate) fn push(&self, frozen: &AtomicBool, what: Happened, numbers: [u64; 2]) {
        if frozen.load(Ordering::Relaxed) {
            return;
        }
        // An interrupt in between may take the same slot: one of the two events is lost then.
        let next = self.next.load(Ordering::Relaxed);
        self.next.store(next.wrapping_add(1), Ordering::Relaxed);
        let slot = &self.slots[next as usize % KEPT];
        slot.time.store(now(), Ordering::Relaxed);
        slot.what.store(what as u32, Ordering::Relaxed);
        slot.numbers[0].store(numbers[0], Ordering::Relaxed);
        slot.numbers[1].store(numbers[1], Ordering::Relaxed);
    }

    /// The events that are kept, in no order.
    pub(crate) fn events(&self) -> Vec<Event> {
        let written = self.slots.iter().filter(|slot| slot.time.load(Ordering::Relaxed) != 0);
        let event = |slot: &Slot| Event {
            time: slot.time.load(Ordering::Relaxed),
            what: ALL.get(slot.what.load(Ordering::Relaxed) as usize).copied().unwrap_or(Happened::Done),
            numbers: [0, 1].map(|which: usize| slot.numbers[which].load(Ordering::Relaxed)),
        };
        written.map(event).collect()
    }
}

/// Now, by a counter that all cores share.
#[inline]
pub(crate) fn now() -> u64 {
    // SAFETY: reads a counter that every x86_64 processor has and Linux lets programs read.
    unsafe { _rdtsc() }
}

impl fmt::Display for Happened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Begins => "begins",
            Self::Done => "has done",
            Self::LoadedAndFlushed => "CR3 loaded, cached entries dropped",
            Self::LoadedAndKept => "CR3 loaded, cached entries kept",
            Self::Invlpg => "INVLPG",
            Self::Asked => "asks CPUs (a bit each)",
            Self::Answered => "was answered by CPUs",
            Self::Interrupted => "takes its mail",
            Self::Freed => "frees",
            Self::Allocated => "gives out",
        })
    }
}
