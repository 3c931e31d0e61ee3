//! The words in which a kernel and this machine speak of what happens.

use core::fmt;

use mmu_gather::GatherEvent;
use mmu_gather::pagetable::{Level, VirtRange};
use mmu_gather::tlb::{CpuId, Laziness, Slot, TlbEvent};
use x86_64::structures::paging::PhysFrame;

/// What a program tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserAccess {
    /// Load.
    Read,
    /// Store.
    Write,
    /// Instruction fetch.
    Fetch,
}

/// What a program may do in an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rights {
    /// Nothing.
    Nothing,
    /// Read.
    Read,
    /// Read and write.
    Write,
    /// Read and execute. To a kernel that does not tell it from reading it is `Read`, and so are
    /// its promises.
    Execute,
}

/// What backs a new area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backing {
    /// The program's own memory.
    Anon,
    /// The program's own memory, in 2 MiB pages where it can be.
    Huge,
    /// The program's own memory, in 2 MiB pages where it can be, which it has only read: reclaim
    /// drops them whole.
    Clean,
    /// A private mapping of a file.
    Private,
    /// A shared mapping of a file.
    Shared,
    /// Frames that are not counted.
    Pfn,
    /// A stack.
    Stack,
    /// Frames of a device that are not counted, in 1 GiB pages where it can be.
    Giant,
    /// The program's own memory, which it reads before it writes: reads find large pages of zeroes
    /// where it can be.
    Zeroes,
    /// The program's own memory, in blocks of 16 small pages where it can be, each with one count
    /// for all.
    Folios,
}

/// What becomes of guard pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Guarding {
    /// They are put in place of whatever is there.
    Install,
    /// They are taken out; what else is there stays.
    Remove,
}

/// When something that is asked for is refused, although there is memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Supply {
    /// Never.
    #[default]
    Always,
    /// Every time.
    Never,
    /// Each time the number of requests so far is a multiple of this; 1 is every time.
    ExceptEvery(u32),
    /// Once: the request with this number from now on, the next one being number 1.
    Nth(u32),
}

/// A point in time, by the clock of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub u64);

impl Moment {
    /// Before everything.
    pub const START: Self = Self(0);
}

/// The moments at which other CPUs may run, and any CPU may speculate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Seam {
    /// An entry was looked at, and is about to be changed; its table is locked.
    Entry,
    /// A leaf was cleared; its table is locked.
    Cleared,
    /// A table lock is about to be taken.
    Lock,
    /// Pages or tables are about to be freed.
    Free,
    /// A frame was allocated.
    Allocate,
    /// A table lock was dropped.
    Unlock,
    /// Between two steps of what the engine does without a table lock.
    Step,
}

/// The most that a call does while it holds the map lock of an address space, the least first. Each
/// does what those before it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum UnderMapLock {
    /// It waits for no other CPU, and frees nothing.
    WaitsForNobody,
    /// It waits for other CPUs to flush.
    Flushes,
    /// It frees early, when a gather has no room for more or holds dirty pages of a file; what the
    /// gather clears last is freed after the lock was dropped.
    FreesEarly,
    /// It frees.
    Frees,
}

/// What a frame is given out for, or was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameRole {
    /// A page of a program, or one lent to a gather.
    Page,
    /// The first of 512 frames of one.
    Block,
    /// A page table.
    Table,
}

/// What a kernel knows of the content of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nobody has written to it since it was read or written back.
    Clean,
    /// Somebody has.
    Dirty,
}

/// What a kernel tells the machine. All but the first two are optional: each that is told lets the
/// checker see more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Note {
    /// The frame is in use from now on; its bytes are as they were when it was freed.
    Allocated(PhysFrame, FrameRole),
    /// The frame is free from now on; another use may follow at once.
    Freed(PhysFrame, FrameRole),
    /// Nothing maps this page of a file any more: it is written back if the kernel knows that it
    /// is dirty, and clean from now on.
    MappedByNobody(PhysFrame, Content),
    /// An unmapping is about to return: no program may use these addresses of the address space any
    /// more.
    Unmapped {
        /// The root table.
        root: PhysFrame,
        /// The addresses.
        range: VirtRange,
        /// Whether the CPU that unmaps runs programs, or merely borrows an address space: a lazy
        /// one may keep old translations until it wakes (rule T5).
        caller: Laziness,
    },
    /// Pages were discarded while their areas stay: no program may use what a CPU cached of these
    /// addresses before `since`.
    ///
    /// What was cached later may be of a page that a fault has just put there.
    Discarded {
        /// The root table.
        root: PhysFrame,
        /// The addresses; areas cover all of them.
        range: VirtRange,
        /// When the call began.
        since: Moment,
        /// As for `Unmapped`.
        caller: Laziness,
    },
    /// Programs lost rights, and the map lock is still held for writing: nothing cached of these
    /// addresses may allow more than this.
    Protected {
        /// The root table.
        root: PhysFrame,
        /// The addresses.
        range: VirtRange,
        /// What programs may do from now on.
        most: Rights,
        /// As for `Unmapped`.
        caller: Laziness,
    },
    /// A fault was answered: the entry maps this frame from now on.
    Mapped {
        /// The root table.
        root: PhysFrame,
        /// The page.
        address: u64,
        /// The frame.
        frame: PhysFrame,
    },
    /// A program may write to this page from now on because no other uses it.
    OwnedAlone {
        /// The root table.
        root: PhysFrame,
        /// The page.
        address: u64,
        /// The frame.
        frame: PhysFrame,
    },
    /// This CPU runs programs of the address space in CR3 from now on, or the kernel for them; or
    /// it is lazy, or switches, and uses no user address. Said before it goes lazy or switches, and
    /// after it has switched.
    Runs(Laziness),
    /// A leaf was cleared; its table is locked.
    Cleared {
        /// The first address it mapped.
        address: u64,
        /// Level of the table it was in.
        level: Level,
        /// The (first) frame it mapped.
        frame: PhysFrame,
    },
    /// A leaf lost rights; its table is locked.
    Restricted {
        /// The first address it maps.
        address: u64,
        /// Level of the table it is in.
        level: Level,
        /// The (first) frame it maps.
        frame: PhysFrame,
    },
    /// A large leaf makes way for a table of smaller ones; its table is locked, or the map lock is
    /// held for writing.
    Split {
        /// The first address it maps.
        address: u64,
        /// Level of the table it is in.
        level: Level,
        /// The first frame it maps.
        frame: PhysFrame,
    },
    /// This CPU asks that one to flush, and is going to wait for the answer.
    Asked(CpuId),
    /// The shootdown core did something on this CPU.
    Tlb {
        /// What.
        event: TlbEvent,
        /// What the slot of the loaded address space says after it.
        slot: Slot,
    },
    /// A gather did something on this CPU.
    Gather(GatherEvent),
    /// This CPU holds the map lock of an address space from now on, for reading or for writing, or
    /// has downgraded it.
    MapLocked {
        /// The root table.
        root: PhysFrame,
        /// The most that is done on this CPU until the lock is dropped, or until this is said
        /// again.
        most: UnderMapLock,
    },
    /// The kernel has given a gather a batch page.
    BatchTaken,
    /// The kernel had no batch page to give.
    BatchRefused,
    /// The kernel removes the reverse mapping of a page that was cleared after a flush, before the
    /// lock of its table is dropped.
    RmapDelayed,
    /// The call that this CPU makes works on so many areas.
    Areas(usize),
    /// This CPU is about to drop the map lock.
    MapUnlocked {
        /// The root table.
        root: PhysFrame,
    },
    /// What programs are to read changes. The first of these makes the checker look at what they
    /// read, on machines of up to 4 GiB.
    Contents(Contents),
}

/// How what programs are to read changes, but for what they write.
///
/// Each is said while the map lock is held, so that nobody can see it earlier or later than it is
/// said. Where two are a pair, programs may find the one or the other between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// An area begins here, or a part of one.
    Shown {
        /// The root table.
        root: PhysFrame,
        /// The addresses.
        range: VirtRange,
        /// What is there until a program writes.
        shows: Shows,
    },
    /// Every CPU has forgotten these addresses, and no area is there any more.
    Gone {
        /// The root table.
        root: PhysFrame,
        /// The addresses.
        range: VirtRange,
    },
    /// A call begins that discards: until a program writes again, private pages of this range read
    /// as if they had never been written to.
    Discarding {
        /// The root table.
        root: PhysFrame,
        /// The addresses.
        range: VirtRange,
        /// When: a moment of its own, by which its end is known.
        began: Moment,
    },
    /// It is about to return.
    Discarded {
        /// As above.
        root: PhysFrame,
        /// As above.
        range: VirtRange,
        /// As above.
        began: Moment,
    },
    /// Pages begin to move. Until they have moved, programs may find them at either place.
    Moving {
        /// The root table.
        root: PhysFrame,
        /// Where they are.
        from: VirtRange,
        /// The first address of where they go.
        to: u64,
    },
    /// Every CPU has forgotten that they were at `from`.
    Moved {
        /// As above.
        root: PhysFrame,
        /// As above.
        from: VirtRange,
        /// As above.
        to: u64,
    },
    /// The child has all that the parent has at this moment.
    Forked {
        /// The root table of the parent.
        parent: PhysFrame,
        /// That of the child, which has not run.
        child: PhysFrame,
    },
}

/// What an area shows where no program has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shows {
    /// Zeroes.
    Zeroes,
    /// A file. What is written is the program's own.
    PrivateFile {
        /// Which.
        file: u32,
        /// The page of it that is at the first address.
        first: u64,
    },
    /// A file. What is written, all see who have it mapped.
    SharedFile {
        /// Which.
        file: u32,
        /// The page of it that is at the first address.
        first: u64,
    },
    /// Something else: nobody looks.
    Anything,
}

/// A place on a disk, of the size of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// A page of a file.
    File {
        /// Which file.
        file: u32,
        /// Which page of it.
        page: u64,
    },
    /// A place for swap.
    Swap {
        /// Which.
        slot: u64,
    },
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anon => "anon",
            Self::Huge => "huge",
            Self::Clean => "clean",
            Self::Private => "private",
            Self::Shared => "shared",
            Self::Pfn => "pfn",
            Self::Stack => "stack",
            Self::Giant => "giant",
            Self::Zeroes => "zeroes",
            Self::Folios => "folios",
        })
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "none",
            Self::Read => "read",
            Self::Write => "write",
            Self::Execute => "execute",
        })
    }
}

impl fmt::Display for Guarding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Install => "install",
            Self::Remove => "remove",
        })
    }
}
