//! What must not happen, and the record of it: plain words in memory, because it may be found in a
//! signal handler, which neither allocates nor prints.

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::memory::{is_poison, poisoned_frame};
use crate::stamp::Stamp;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident: $words:literal,)*) => {
        /// What was found.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u64)]
        pub enum ViolationKind { $($(#[$doc])* $name,)* }

        const ALL: &[ViolationKind] = &[$(ViolationKind::$name,)*];

        impl fmt::Display for ViolationKind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$name => $words,)* })
            }
        }
    };
}

kinds! {
    /// Poison was read by a program.
    FreedPageRead: "a program has read a page that is free",
    /// A walk read poison.
    FreedTableWalked: "a walk has read a page table that is free",
    /// A walk followed an entry to where no memory is: what it took for a table is none any more.
    WalkedAstray: "a walk has followed an entry to where no memory is",
    /// The stamp of another owner, or of another page.
    ForeignPage: "a program has read a page of another owner, or another page",
    /// A stamp that was dead before the load began.
    DeadPage: "a program has read what was unmapped or discarded before",
    /// A page of the program's own holds something else than it wrote.
    OwnPageChanged: "a page that only one program writes holds something else",
    /// An address can be used although its unmapping has returned.
    UsedAfterUnmap: "an address can be used although its unmapping has returned",
    /// A page changed while nobody had the right to write to it.
    WrittenThoughReadOnly: "a page was written although nobody may write to it",
    /// The page of zeroes holds something else.
    ZeroPageWritten: "the page of zeroes was written",
    /// A root table was freed that a CPU has in CR3.
    RootFreedInUse: "a root table was freed that a CPU has in CR3",
    /// A call answered early: debug builds of the engine notice.
    AnsweredEarly: "a CPU was answered for that has not flushed",
    /// A kernel call failed that cannot fail.
    CallFailed: "a call of the kernel failed that should not",
    /// Frames are not free at the end, or were freed twice.
    BadAccounts: "frames were lost, or freed more than once",
    /// A CPU's program panicked.
    Panicked: "a program, the kernel or the engine panicked",
    /// Nobody gets any further.
    Stuck: "no CPU gets any further",
}

/// One violation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What.
    pub kind: ViolationKind,
    /// On which CPU; `None` if it is of none.
    pub cpu: Option<usize>,
    /// Where: an address, or a frame, or 0.
    pub address: u64,
    /// What was read there, or a count.
    pub value: u64,
    /// What it was compared with.
    pub against: u64,
    pub(crate) time: u64,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(cpu) = self.cpu {
            write!(f, "CPU {cpu}: ")?;
        }
        write!(f, "{}", self.kind)?;
        let Self { address, value, against, .. } = *self;
        match self.kind {
            ViolationKind::FreedPageRead | ViolationKind::FreedTableWalked => {
                write!(f, " (at {address:#x}: frame {:#x})", poisoned_frame(value))
            }
            ViolationKind::WalkedAstray => write!(f, " (at {address:#x}: entry {value:#x})"),
            ViolationKind::ForeignPage
            | ViolationKind::OwnPageChanged
            | ViolationKind::WrittenThoughReadOnly => {
                write!(f, " (at {address:#x}: {}, and not {})", Word(value), Word(against))
            }
            ViolationKind::DeadPage => {
                write!(f, " (at {address:#x}: {}; dead were all up to {against})", Word(value))
            }
            ViolationKind::UsedAfterUnmap => write!(f, " (at {address:#x}: {})", Word(value)),
            ViolationKind::RootFreedInUse => write!(f, " (frame {address:#x}, CPU {value})"),
            ViolationKind::BadAccounts => {
                write!(f, " ({value} pages and {against} tables lost, {address} freed more than once)")
            }
            ViolationKind::ZeroPageWritten
            | ViolationKind::AnsweredEarly
            | ViolationKind::CallFailed
            | ViolationKind::Panicked
            | ViolationKind::Stuck => Ok(()),
        }
    }
}

/// A word of a page, in words.
struct Word(u64);

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("nothing yet"),
            poison if is_poison(poison) => write!(f, "poison of frame {:#x}", poisoned_frame(poison)),
            stamp => write!(f, "{}", Stamp::from_word(stamp)),
        }
    }
}

/// How many violations of one CPU are kept.
const KEPT: usize = 4;

/// The violations that one CPU has found. That CPU writes.
#[derive(Debug)]
pub(crate) struct Found {
    count: AtomicU64,
    kept: [[AtomicU64; 5]; KEPT],
}

impl Found {
    pub(crate) const fn new() -> Self {
        Self { count: AtomicU64::new(0), kept: [const { [const { AtomicU64::new(0) }; 5] }; KEPT] }
    }

    /// Notes one, `[address, value, against]`. Allocates nothing.
    pub(crate) fn note(&self, kind: ViolationKind, numbers: [u64; 3], time: u64) {
        let count = self.count.load(Ordering::Relaxed);
        if let Some(slot) = usize::try_from(count).ok().and_then(|count| self.kept.get(count)) {
            let [address, value, against] = numbers;
            for (word, number) in slot.iter().zip([kind as u64, address, value, against, time]) {
                word.store(number, Ordering::Relaxed);
            }
        }
        // ORDERING: release, pairs with `violations`: whoever reads the count finds what it counts.
        self.count.store(count + 1, Ordering::Release);
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// Those that are kept, the first ones.
    pub(crate) fn violations(&self, cpu: usize) -> Vec<Violation> {
        let count = usize::try_from(self.count()).unwrap_or(KEPT).min(KEPT);
        let violation = |slot: &[AtomicU64; 5]| {
            let [kind, address, value, against, time] =
                slot.each_ref().map(|word| word.load(Ordering::Relaxed));
            let kind = usize::try_from(kind).ok().and_then(|kind| ALL.get(kind).copied());
            let kind = kind.unwrap_or(ViolationKind::Panicked);
            Violation { kind, cpu: Some(cpu), address, value, against, time }
        };
        self.kept.iter().take(count).map(violation).collect()
    }
}
