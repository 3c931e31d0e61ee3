//! One word of a batch: a page that waits, or one half of a run of pages.

use static_assertions::const_assert_eq;
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

/// What one slot of a batch holds: a frame with flags in its low bits, or the length of the run
/// whose frame is in the slot before.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct BatchWord(u64);

const_assert_eq!(size_of::<BatchWord>(), 8);

/// The rmap of this page is removed after the flush, while the table lock is still held.
const DELAY_RMAP: u64 = 1 << 0;
/// The next slot holds the length of the run.
const LENGTH_FOLLOWS: u64 = 1 << 1;

impl BatchWord {
    #[inline]
    pub(crate) fn page(frame: PhysFrame) -> Self {
        Self(frame.start_address().as_u64())
    }

    #[inline]
    pub(crate) const fn delaying_rmap(self) -> Self {
        Self(self.0 | DELAY_RMAP)
    }

    pub(crate) fn run(frame: PhysFrame, nr_pages: u32) -> [Self; 2] {
        [Self(Self::page(frame).0 | LENGTH_FOLLOWS), Self(u64::from(nr_pages))]
    }

    #[inline]
    pub(crate) const fn length_follows(self) -> bool {
        self.0 & LENGTH_FOLLOWS != 0
    }

    /// Whether the page was queued by [`delaying_rmap`](Self::delaying_rmap).
    #[inline]
    pub(crate) const fn delays_rmap(self) -> bool {
        self.0 & DELAY_RMAP != 0
    }

    /// The length of the run that the slot before begins.
    pub(crate) const fn length(self) -> u32 {
        // A run's length is a u32 when it is stored.
        (self.0 & 0xffff_ffff) as u32
    }

    #[inline]
    pub(crate) fn frame(self) -> PhysFrame {
        PhysFrame::containing_address(PhysAddr::new_truncate(self.0 & !0xfff))
    }
}

/// Whether runs of pages were queued; if not, every word is a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runs {
    Absent,
    Queued,
}

/// Whether pages were queued whose rmaps are removed after a flush, under the table lock that is
/// still held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DelayedRmaps {
    Absent,
    Queued,
}
