//! What a log of `strace -f` holds: the memory calls that succeeded, in the order in which they can
//! be made again.

use core::ops::Range;
use std::collections::BTreeMap;

use crate::input::layout::snapshot::{Prot, Sharing};
use crate::output::escape::excerpt;

/// What a log holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Trace {
    /// The calls that succeeded, in the order in which they can be made again.
    ///
    /// The first is by the thread that starts the program; each other thread is the child of a
    /// [`MemoryCall::Clone`] above its first event, or [`MemoryCall::Appears`] is its first.
    pub events: Vec<TraceEvent>,
    /// Memory calls that failed, and so changed nothing.
    pub nr_failed: u64,
    /// Memory calls of which the log does not hold the return: it ends first, or the thread was
    /// killed.
    pub nr_unfinished: u64,
    /// Events left out because nothing tells which process their thread is of.
    pub nr_orphaned: u64,
    /// Threads that those are of.
    pub nr_orphaned_threads: u64,
    /// Calls that change an address space and that `teardown trace` does not make, by name.
    pub dropped: BTreeMap<String, u64>,
    /// Other calls.
    pub nr_other: u64,
    /// Lines that are not strace's, such as output of the program.
    pub output: Remarked,
    /// Returns of memory calls whose start the log does not hold, so that what they did is not
    /// known.
    pub lost_starts: Remarked,
    /// Memory calls whose line has lost its end, or has output of the program within it.
    pub broken: Remarked,
    /// What was assumed about threads and processes that the log does not start.
    pub assumed: Assumed,
}

/// How often something was found in a log, and where first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Remarked {
    /// How often.
    pub count: u64,
    /// The first line of it, from 1; 0 where there is none.
    pub first_line: usize,
}

/// What was assumed so that calls of threads that the log does not start can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Assumed {
    /// Threads that were taken for threads of the one process that they can be of.
    pub threads: u64,
    /// Threads that were taken for the children that a call has started under other numbers.
    pub renamed: u64,
    /// Processes that were there, or were started, without a call of the log.
    pub processes: u64,
    /// Programs that were executed without a call of the log.
    pub programs: u64,
}

impl Assumed {
    /// Events that were made up.
    #[must_use]
    pub const fn events(&self) -> u64 {
        self.threads + self.processes + self.programs
    }
}

impl Remarked {
    pub(super) fn note(&mut self, line: usize) {
        self.count += 1;
        if self.first_line == 0 || line < self.first_line {
            self.first_line = line;
        }
    }
}

/// One memory call of one thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceEvent {
    /// Line of the log, counted from 1.
    pub line: usize,
    /// The thread that called; 0 in a log without numbers.
    pub thread: u32,
    /// What it did.
    pub call: MemoryCall,
}

/// A call that succeeded. Ranges are in bytes, on page boundaries, rounded up as the kernel does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemoryCall {
    /// `mmap`.
    Mmap {
        /// The range that was mapped.
        range: Range<u64>,
        /// What the program may do with it.
        prot: Prot,
        /// Whether writes reach what backs it.
        sharing: Sharing,
        /// What backs it.
        backing: Backing,
        /// Whether it replaced what was there.
        placement: Placement,
        /// Further `MAP_` words, as they stand in the log, such as `MAP_POPULATE`.
        other_flags: Vec<String>,
    },
    /// `munmap`.
    Munmap {
        /// The range that was unmapped.
        range: Range<u64>,
    },
    /// `mremap`.
    Mremap {
        /// The old range; empty where a shared mapping was mapped a second time.
        from: Range<u64>,
        /// The new range: the same start where it only grew or shrank.
        to: Range<u64>,
        /// Whether the old range stays mapped.
        old_range: OldRange,
    },
    /// `brk`.
    Brk {
        /// The break after the call, not rounded; the first one of a program says where its heap
        /// starts.
        end: u64,
    },
    /// `madvise`.
    Madvise {
        /// The range it is about.
        range: Range<u64>,
        /// What was advised.
        advice: Advice,
    },
    /// `mprotect`.
    Mprotect {
        /// The range.
        range: Range<u64>,
        /// What the program may do with it from now on.
        prot: Prot,
    },
    /// `clone`, `clone3`, `fork` or `vfork`.
    Clone {
        /// The new thread or process.
        child: u32,
        /// Which address space it runs in.
        memory: ChildMemory,
    },
    /// The thread is there, in an address space of its own of which the log does not hold the
    /// start.
    Appears,
    /// `execve`: the process leaves its address space for an empty one with a new program.
    Exec,
    /// The thread ended, by `exit` or from outside. Each thread ends once.
    Exit,
    /// The thread ended by `exit_group`; those that share its process end too, each with an
    /// [`MemoryCall::Exit`] of its own.
    ExitGroup,
}

/// What backs a new mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// `MAP_ANONYMOUS`.
    Anonymous,
    /// A file.
    File {
        /// Offset of the first byte.
        offset: u64,
    },
}

/// How the address of a new mapping was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// The kernel found a free range.
    Free,
    /// `MAP_FIXED`: whatever was there was unmapped first.
    Replace,
}

/// What `mremap` leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OldRange {
    /// Nothing.
    Unmapped,
    /// `MREMAP_DONTUNMAP`: the area, without its pages.
    KeptEmpty,
}

/// The advice of `madvise`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Advice {
    /// `MADV_DONTNEED` or `MADV_DONTNEED_LOCKED`: the pages are zapped at once.
    DontNeed,
    /// `MADV_FREE`: the pages may be taken until they are written again.
    Free,
    /// `MADV_REMOVE`: a hole is punched in what backs them.
    Remove,
    /// `MADV_PAGEOUT`: the pages are reclaimed.
    PageOut,
    /// `MADV_POPULATE_READ`: the pages are made present.
    PopulateRead,
    /// `MADV_POPULATE_WRITE`: the pages are made present and writable.
    PopulateWrite,
    /// `MADV_HUGEPAGE`.
    HugePage,
    /// `MADV_NOHUGEPAGE`.
    NoHugePage,
    /// `MADV_DONTFORK`.
    DontFork,
    /// `MADV_DOFORK`.
    DoFork,
    /// `MADV_GUARD_INSTALL`: nobody may use the addresses from now on; what was there is dropped.
    GuardInstall,
    /// `MADV_GUARD_REMOVE`: that is over.
    GuardRemove,
    /// Anything else, as it stands in the log.
    Other(String),
}

/// The address space of a new thread or process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChildMemory {
    /// `CLONE_VM`: its parent's.
    Shared,
    /// `vfork`, `CLONE_VM | CLONE_VFORK`: its parent's, until it executes a program or ends; the
    /// parent waits.
    Borrowed,
    /// `fork`: a copy, whose private pages are shared until written.
    Copied,
}

/// Why a text is not a log, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{source_name}:{line}: {problem}")]
pub struct TraceError {
    /// The file, or whatever the caller called it.
    pub source_name: String,
    /// Line, counted from 1.
    pub line: usize,
    /// What is wrong there.
    pub problem: TraceProblem,
}

/// What is wrong with one line of a log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TraceProblem {
    /// Something else stands where a part of a line belongs.
    #[error("expected {expected}, found {}", excerpt(found))]
    Expected {
        /// What belongs there.
        expected: &'static str,
        /// What stands there.
        found: String,
    },
    /// An address that no program on x86_64 can have.
    #[error(
        "expected an address in the user half of x86_64, found {}: this log is of another architecture ({which})",
        excerpt(found)
    )]
    OtherArchitecture {
        /// The address.
        found: String,
        /// Which one it may be.
        which: &'static str,
    },
    /// The file cannot be read on, or has no end.
    #[error("{0}")]
    Input(String),
    /// More calls than the memory of the machine is meant for.
    #[error("expected at most {most} memory calls; cut the log with `head -n`")]
    TooMany {
        /// How many may be in a log.
        most: usize,
    },
    /// The log ends without one memory call.
    #[error("expected memory calls in the log, found none")]
    Nothing,
}

impl TraceProblem {
    pub(super) fn expected(expected: &'static str, found: &str) -> Self {
        Self::Expected { expected, found: found.to_owned() }
    }
}
