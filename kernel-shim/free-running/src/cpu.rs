//! One CPU: what it has loaded and cached, whether interrupts are on, and what it has counted.

use core::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering, compiler_fence};

use crate::ring::Ring;
use crate::tlb::Tlb;
use crate::violation::Found;

/// PCID 0 of the kernel, and those of the six slots of the engine.
const PCIDS: usize = 7;

/// What one CPU has counted.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) accesses: AtomicU64,
    pub(crate) fills: AtomicU64,
    pub(crate) speculative_fills: AtomicU64,
    pub(crate) unmappings: AtomicU64,
    pub(crate) calls: AtomicU64,
    pub(crate) interrupts: AtomicU64,
    pub(crate) signals: AtomicU64,
    pub(crate) shootdowns: AtomicU64,
    /// Shootdowns that were answered before the initiator had given its core away.
    pub(crate) met: AtomicU64,
    pub(crate) invlpgs: AtomicU64,
    pub(crate) flushes: AtomicU64,
    pub(crate) kept_loads: AtomicU64,
    pub(crate) freed_pages: AtomicU64,
    pub(crate) freed_tables: AtomicU64,
    /// How often the planted fault has happened.
    pub(crate) faults: AtomicU64,
}

/// Adds one to a count that one thread writes.
#[inline]
pub(crate) fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

/// One CPU. But for `inbox` its own thread writes all of it; others read.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Cpu {
    pub(crate) inbox: Inbox,
    /// How deep it is in stretches without interrupts.
    depth: AtomicU32,
    /// CR3: the root, and the PCID.
    pub(crate) root: AtomicU64,
    pcid: AtomicU32,
    tlbs: [Tlb; PCIDS],
    /// It carries out what others have asked.
    pub(crate) told: AtomicBool,
    /// The requests that it has carried out, for the fault that loses one in four.
    pub(crate) nr_told: AtomicU32,
    /// Turns of the wait for answers, or of a lock, that goes on now.
    pub(crate) turns: AtomicU32,
    pub(crate) since_speculation: AtomicU32,
    /// When the next pause comes, and how long it is.
    pauses: AtomicU32,
    pub(crate) status: Status,
    pub(crate) counts: Counts,
    pub(crate) ring: Ring,
    pub(crate) found: Found,
}

/// What others write.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Inbox {
    /// An interrupt is on its way.
    pending: AtomicBool,
    /// The thread to signal; 0 while there is none.
    pub(crate) thread: AtomicI32,
}

/// What the CPU is at, for whoever looks why a run is stuck.
#[derive(Debug, Default)]
pub(crate) struct Status {
    /// Rises with every call and every round of its program.
    pub(crate) progress: AtomicU64,
    pub(crate) doing: AtomicU64,
    /// Of whom it waits for answers: a bit each.
    pub(crate) waits_for: AtomicU64,
    /// It spins for a lock.
    pub(crate) spins: AtomicBool,
    /// The table whose lock it took last, or wants.
    pub(crate) table: AtomicU64,
    /// The root of the address space whose map lock it holds; 0 for none.
    pub(crate) map_lock: AtomicU64,
}

impl Cpu {
    pub(crate) fn new() -> Self {
        Self {
            inbox: Inbox { pending: AtomicBool::new(false), thread: AtomicI32::new(0) },
            depth: AtomicU32::new(0),
            root: AtomicU64::new(u64::MAX),
            pcid: AtomicU32::new(0),
            tlbs: core::array::from_fn(|_| Tlb::new()),
            told: AtomicBool::new(false),
            nr_told: AtomicU32::new(0),
            turns: AtomicU32::new(0),
            since_speculation: AtomicU32::new(0),
            pauses: AtomicU32::new(1),
            status: Status::default(),
            counts: Counts::default(),
            ring: Ring::new(),
            found: Found::new(),
        }
    }

    /// What it has cached under the PCID that is loaded.
    #[inline]
    pub(crate) fn tlb(&self) -> &Tlb {
        &self.tlbs[self.pcid.load(Ordering::Relaxed) as usize % PCIDS]
    }

    /// CR3, and what is cached under the PCID that is loaded now.
    pub(crate) fn load_root(&self, root: u64, pcid: u16) -> &Tlb {
        self.root.store(root, Ordering::Relaxed);
        self.pcid.store(u32::from(pcid), Ordering::Relaxed);
        self.tlb()
    }

    /// It spins no more, or is about to begin.
    #[inline]
    pub(crate) fn has_the_lock(&self) {
        self.turns.store(0, Ordering::Relaxed);
        self.status.spins.store(false, Ordering::Relaxed);
    }

    /// Once in 64 calls the CPU does nothing for a while, as if its hypervisor ran something else:
    /// what comes next is late.
    #[inline]
    pub(crate) fn pause_now_and_then(&self) {
        // Numbers that look random enough (a linear congruential generator); the high bits are
        // best.
        let next = self.pauses.load(Ordering::Relaxed).wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.pauses.store(next, Ordering::Relaxed);
        if next >> 26 == 0 {
            (0..next >> 18 & 127).for_each(|_| core::hint::spin_loop());
        }
    }

    #[inline]
    pub(crate) fn interrupts_are_on(&self) -> bool {
        self.depth.load(Ordering::Relaxed) == 0
    }

    /// Interrupts off, once more. A signal in between leaves the depth as it finds it.
    #[inline]
    pub(crate) fn interrupts_off(&self) {
        self.depth.store(self.depth.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        // What follows must not begin before a handler of this thread would see the depth.
        compiler_fence(Ordering::SeqCst);
    }

    /// As they were before the last [`interrupts_off`](Self::interrupts_off).
    #[inline]
    pub(crate) fn interrupts_back(&self) {
        compiler_fence(Ordering::SeqCst);
        self.depth.store(self.depth.load(Ordering::Relaxed) - 1, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
    }

    /// An interrupt is sent to this CPU.
    pub(crate) fn interrupt(&self) {
        // ORDERING: release, pairs with `take_interrupt`: the mail is found there.
        self.inbox.pending.store(true, Ordering::Release);
    }

    #[inline]
    pub(crate) fn has_interrupt(&self) -> bool {
        self.inbox.pending.load(Ordering::Relaxed)
    }

    /// Takes the interrupt, if there is one.
    #[inline]
    pub(crate) fn take_interrupt(&self) -> bool {
        // ORDERING: acquire, pairs with `interrupt`.
        self.has_interrupt() && self.inbox.pending.swap(false, Ordering::Acquire)
    }
}
