//! Corners that a run has been to: full batches, forced flushes, missed generations, slots used
//! again.
//!
//! A fuzzer that was clean proves little if it never came to the places where such engines break.
//! Most corners are read off the kernel's counters; the others are noted by the machine as it goes.

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

macro_rules! boundaries {
    ($($name:ident, $words:literal, $means:literal;)*) => {
        /// A corner.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Boundary { $(#[doc = $means] $name,)* }

        impl Boundary {
            /// All of them.
            pub const ALL: [Self; [$($words),*].len()] = [$(Self::$name),*];

            /// Its name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $words,)* }
            }

            /// What it means to have been there.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$name => $means,)* }
            }
        }
    };
}

boundaries! {
    BundleFull, "bundle full", "The slots on the stack did not suffice.";
    BatchFull, "batch page full", "One batch page did not suffice.";
    GatherFull, "gather full", "Every batch page a gather may take was full.";
    ForcedFlush, "forced flush", "A gather flushed before it was done.";
    BatchRefused, "batch page refused", "No page for a batch could be had.";
    TableBatchFull, "table batch full", "As many tables waited as may.";
    TableBatchRefused, "table batch refused", "No page for waiting tables could be had: one was flushed for and freed alone.";
    DirtyFlush, "dirty flush", "Dirty pages of a file made a gather flush under a table lock.";
    NestedGather, "nested gather", "A gather found another open on the same address space.";
    DeferredSeen, "deferred flush seen", "Under a table lock, a flush that reclaim still owed was noticed.";
    PteTable, "page table freed", "A table of 4 KiB entries was unhooked.";
    PmdTable, "2 MiB table freed", "A table of 2 MiB entries was unhooked.";
    PudTable, "1 GiB table freed", "A table of 1 GiB entries was unhooked.";
    TableRefused, "page table refused", "No page table could be had.";
    LargeCleared, "large leaf cleared", "A 2 MiB leaf was cleared whole.";
    Split, "large leaf split", "A 2 MiB leaf was split.";
    Ranged, "ranged flush", "Pages were invalidated one by one.";
    CeilingPassed, "ceiling passed", "More pages than the ceiling: a full flush instead of a ranged one.";
    GenerationGap, "generation gap", "A CPU asked for pages dropped everything: it had missed a generation, or another had followed.";
    AlreadyCurrent, "already current", "A CPU was asked and had nothing to do.";
    LazySkipped, "lazy skipped", "A lazy CPU was not interrupted.";
    LazyCaught, "lazy caught with tables", "A lazy CPU was interrupted because tables went, and left the address space.";
    LazyCaughtUp, "lazy caught up", "A lazy CPU came back, and had missed a flush.";
    ElsewhereSkipped, "elsewhere skipped", "A CPU that ran something else was not interrupted.";
    HeldOff, "request held off", "A request came to a CPU that had its interrupts off.";
    Crossing, "crossing shootdowns", "A CPU answered a request while it waited for its own.";
    SlotKept, "PCID slot kept", "A CPU came back to an address space and kept what it had cached of it.";
    SlotStale, "PCID slot stale", "A CPU came back to an address space and had missed a flush.";
    SlotReused, "PCID slot reused", "A CPU gave the PCID of one address space to another.";
    FreedWhileCached, "freed while cached", "A frame was freed that a cache still named, under a tag that was not usable just then.";
    ReusedWhileCached, "reused while cached", "A frame was given out again while a cache still named it.";
    Preempted, "preemption", "Another CPU ran at a preemption point.";
    Copied, "copied on write", "A write replaced a shared page by a copy.";
    SwappedIn, "swapped in", "A program used a page that reclaim had taken.";
    GuardKept, "guard kept", "Pages were dropped around a guard, and it stayed.";
    GuardMet, "guard met", "A program was refused by a guard.";
    ThreadMoved, "thread moved", "A call went on on another CPU than it had begun on.";
    ProtectRetried, "mprotect tried again", "Hardware set a bit of an entry between the look of mprotect and its change.";
    ForkRetried, "fork tried again", "Hardware set a bit of an entry between the look of fork and its change.";
    FrameRefused, "page refused", "No frame for a program's page could be had.";
    ManyCpus, "more than 64 CPUs", "A flush waited for a CPU beyond the 64th.";
    SlotTaken, "PCID slot taken", "A CPU gave the PCID of an address space that had not exited to another.";
    SlotTakenMidFlush, "PCID taken mid-flush", "It did so while another CPU waited for an answer.";
    ExitBesideReclaim, "exit beside reclaim", "An address space exited while reclaim took pages from it.";
    FifthLevel, "512 GiB table freed", "With five levels, a table of 512 GiB entries was unhooked.";
    HighAddress, "address beyond four levels", "A program used an address that only five levels reach.";
    GiantCleared, "1 GiB leaf cleared", "A 1 GiB leaf was cleared whole.";
    GiantSplit, "1 GiB leaf split", "A 1 GiB leaf was split.";
    ZeroBlock, "large page of zeroes", "A read was answered with the large page of zeroes.";
    ZeroBlockReplaced, "zeroes replaced whole", "A write put a large page in the place of the one of zeroes.";
    RunFreed, "run freed", "Pages that had been queued as one record were freed.";
    ManyTables, "many tables unhooked", "One step unhooked more tables than the ceiling.";
    LargeCeiling, "2 MiB pages past ceiling", "More 2 MiB pages than the ceiling were flushed for.";
    GiantCeiling, "1 GiB pages past ceiling", "More 1 GiB pages than the ceiling were flushed for.";
    AskedAgain, "deferred flush after retake", "A flush that reclaim owed was first seen after a table lock was taken again.";
}

/// A set of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Boundaries(u128);

const _: () = assert!(Boundary::ALL.len() <= 128);

impl Boundaries {
    /// The set with `boundary`.
    #[must_use]
    pub const fn with(self, boundary: Boundary) -> Self {
        Self(self.0 | 1 << boundary as u32)
    }

    /// Whether `boundary` is in it.
    #[must_use]
    pub const fn has(self, boundary: Boundary) -> bool {
        self.0 >> boundary as u32 & 1 != 0
    }

    /// Both.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Those in it.
    pub fn iter(self) -> impl Iterator<Item = Boundary> {
        Boundary::ALL.into_iter().filter(move |boundary| self.has(*boundary))
    }
}

impl fmt::Display for Boundary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Those that a machine notes as it goes, by what the CPU does that comes there.
#[derive(Debug, Default)]
pub(crate) struct Reached([[AtomicU64; 2]; Self::KINDS]);

impl Reached {
    /// So many things a CPU may do; the last is nothing in particular.
    pub(crate) const KINDS: usize = 32;

    pub(crate) fn note(&self, boundary: Boundary, doing: u8) {
        let place = usize::from(doing).min(Self::KINDS - 1);
        let number = boundary as usize;
        self.0[place][number / 64].fetch_or(1 << (number % 64), Ordering::Relaxed);
    }

    pub(crate) fn so_far(&self) -> Boundaries {
        self.by_what_is_done().fold(Boundaries::default(), Boundaries::or)
    }

    /// What was reached by each thing that a CPU may do.
    pub(crate) fn by_what_is_done(&self) -> impl Iterator<Item = Boundaries> + '_ {
        self.0.iter().map(|reached| {
            let [low, high] = reached.each_ref().map(|word| u128::from(word.load(Ordering::Relaxed)));
            Boundaries(high << 64 | low)
        })
    }
}

/// Which address space had each PCID of a CPU last, named by its root table. PCID 0 is the
/// kernel's.
#[derive(Debug, Default)]
pub(crate) struct PcidOwners([AtomicU64; 8]);

/// An owner that is gone.
const GONE: u64 = 1;

impl PcidOwners {
    /// CR3 is loaded with this root and PCID; what is cached is kept or not.
    pub(crate) fn loads(&self, root: u64, pcid: u16, keeps: bool) -> Option<Boundary> {
        let owner = self.0.get(usize::from(pcid))?.swap(root, Ordering::Relaxed);
        match owner {
            _ if pcid == 0 => None,
            0 => None,
            same if same == root => Some(if keeps { Boundary::SlotKept } else { Boundary::SlotStale }),
            GONE => Some(Boundary::SlotReused),
            _ => Some(Boundary::SlotTaken),
        }
    }

    /// The root table is freed: another address space may get the frame.
    pub(crate) fn forget(&self, root: u64) {
        for owner in &self.0 {
            let _ = owner.compare_exchange(root, GONE, Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_different_and_the_set_remembers_each() {
        let mut all = Boundaries::default();
        for (number, boundary) in Boundary::ALL.into_iter().enumerate() {
            assert!(!all.has(boundary));
            all = all.with(boundary);
            assert_eq!(all.iter().count(), number + 1);
            assert!(Boundary::ALL[..number].iter().all(|other| other.name() != boundary.name()));
        }
    }

    #[test]
    fn a_pcid_is_reused_only_by_another_address_space() {
        let owners = PcidOwners::default();
        assert_eq!(owners.loads(0x5000, 3, false), None);
        assert_eq!(owners.loads(0x5000, 3, true), Some(Boundary::SlotKept));
        assert_eq!(owners.loads(0x5000, 3, false), Some(Boundary::SlotStale));
        assert_eq!(owners.loads(0x6000, 3, false), Some(Boundary::SlotTaken));
        // The frame of a root that was freed may be the next one's root.
        owners.forget(0x6000);
        assert_eq!(owners.loads(0x6000, 3, false), Some(Boundary::SlotReused));
        assert_eq!(owners.loads(0x1000, 0, false), None);
    }
}
