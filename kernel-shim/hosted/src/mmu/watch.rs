//! Who holds a frame: what the caches of a CPU tell a checker.

use core::fmt;

use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::PhysFrame;

use crate::mmu::arch::{LinearAddress, PageSize, Rights, TableLevel};
use crate::vocabulary::Moment;

/// Told of each thing that names a frame when it enters or leaves the caches of a CPU.
///
/// Called on every fill and every removal: an implementation should do no more than change a count.
/// `()` ignores all.
pub trait FrameWatch {
    /// Something that names `first` entered a cache. A [`Use::Page`] of 2 MiB or 1 GiB names every
    /// frame of that page.
    fn hold(&mut self, first: PhysFrame, held: Held);

    /// Something that [`hold`](Self::hold) was called for, with the same arguments, is gone.
    fn release(&mut self, first: PhysFrame, held: Held);

    /// Now, by the watcher's clock. Kept with every translation that enters a TLB.
    fn now(&self) -> Moment {
        Moment::START
    }
}

impl FrameWatch for () {
    fn hold(&mut self, _: PhysFrame, _: Held) {}
    fn release(&mut self, _: PhysFrame, _: Held) {}
}

impl<W: FrameWatch + ?Sized> FrameWatch for &mut W {
    fn hold(&mut self, first: PhysFrame, held: Held) {
        (**self).hold(first, held);
    }

    fn release(&mut self, first: PhysFrame, held: Held) {
        (**self).release(first, held);
    }

    fn now(&self) -> Moment {
        (**self).now()
    }
}

/// What is cached, and under which tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Held {
    /// Whether the frame is reached as a page or walked as a table.
    pub as_a: Use,
    /// When the holder can be used.
    pub tag: Tag,
}

/// What a CPU takes a frame for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Use {
    /// A TLB entry translates to the frame, and to the rest of a page of this size.
    Page(PageSize),
    /// A paging-structure-cache entry leads walks to the frame, as a table of this level.
    Table(TableLevel),
    /// CR3 points to the frame.
    Root,
}

/// Under which PCIDs a cached entry is used.
///
/// # Source
/// Intel SDM vol. 3A 4.10.1, 4.10.2.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tag {
    /// Under this one only.
    Pcid(Pcid),
    /// Under any.
    Global,
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pcid(pcid) => write!(f, "PCID {}", pcid.value()),
            Self::Global => f.write_str("global"),
        }
    }
}

/// One cached thing, as the story of a violation needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedEntry {
    /// What it takes the frame for, and under which tag.
    pub held: Held,
    /// First linear address it serves.
    pub address: LinearAddress,
    /// Linear bytes it serves, as a power of two: the page, or what one entry of the structure
    /// covers.
    pub span_shift: u32,
    /// First frame it names.
    pub frame: PhysFrame,
    /// Rights it grants, or leaves to the lower levels.
    pub rights: Rights,
    /// Whether a store through it sets no dirty flag any more. Always false for tables.
    pub dirty: bool,
    /// When a translation was cached; the start for all else.
    pub at: Moment,
}

impl fmt::Display for CachedEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (tag, start) = (self.held.tag, self.frame.start_address().as_u64());
        match self.held.as_a {
            Use::Page(size) => {
                let access = if self.rights.writable() { "writable" } else { "read-only" };
                let dirty = if self.dirty { ", dirty" } else { "" };
                write!(f, "TLB entry ({tag}) {} -> {size} page at {start:#x}, {access}{dirty}", self.address)
            }
            Use::Table(level) => {
                write!(f, "structure-cache entry ({tag}) {} -> {level} at {start:#x}", self.address)
            }
            Use::Root => write!(f, "CR3 ({tag}) -> root at {start:#x}"),
        }
    }
}

/// How a CPU can still come to a frame without reading an entry that names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// Not at all: nothing it caches names the frame.
    Nowhere,
    /// Through entries of PCIDs that are not loaded: only after a MOV to CR3 that keeps them.
    OtherPcid,
    /// At any moment: through entries of the loaded PCID, global entries or CR3 itself.
    Now,
}

impl CachedEntry {
    /// Whether it names `frame`, alone or as part of a large page.
    #[must_use]
    pub fn names(&self, frame: PhysFrame) -> bool {
        let shift = match self.held.as_a {
            Use::Page(size) => size.shift(),
            Use::Table(_) | Use::Root => PageSize::Size4KiB.shift(),
        };
        self.frame.start_address().as_u64() >> shift == frame.start_address().as_u64() >> shift
    }
}
