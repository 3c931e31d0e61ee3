//! The words in which a kernel tells what its programs are to read.

use mmu_gather::pagetable::VirtRange;
use x86_64::structures::paging::PhysFrame;

/// A point in time, for a checker that has a clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub u64);

impl Moment {
    /// Before everything.
    pub const START: Self = Self(0);
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
