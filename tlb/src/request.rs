//! A flush request: whose translations, up to which generation, and at which addresses.
#![expect(unsafe_code, reason = "a CPU believes what a request says")]

use core::fmt;

use crate::cpuset::{CpuBits, CpuId};
use crate::generation::{MmContext, TlbGen};

/// A run of pages of one size: `start..end` in bytes. Its stride is `1 << stride_shift` bytes: one
/// page to invalidate at each step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageSpan {
    /// First byte, aligned to the stride.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// 12, 21 or 30: the smallest page size whose entry was changed. One INVLPG drops a page
    /// whatever its size. (The shift is taken modulo 64, as the processor takes it.)
    pub stride_shift: u32,
}

impl PageSpan {
    /// How many INVLPGs the span takes. A span that ends before it begins has `u64::MAX`, which is
    /// more than any ceiling allows.
    #[must_use]
    #[inline]
    pub const fn nr_pages(self) -> u64 {
        match self.end.checked_sub(self.start) {
            // User addresses are far too small to saturate this sum.
            Some(length) => length.saturating_add((1 << self.shift()) - 1) >> self.shift(),
            None => u64::MAX,
        }
    }

    /// The stride, as the processor shifts by it.
    #[inline]
    const fn shift(self) -> u32 {
        self.stride_shift & (u64::BITS - 1)
    }

    /// The addresses to invalidate. A span that ends before it begins has none.
    #[inline]
    pub fn pages(self) -> impl Iterator<Item = u64> {
        let nr_pages = match self.nr_pages() {
            u64::MAX => 0,
            nr_pages => nr_pages,
        };
        (0..nr_pages).map(move |page| self.start.wrapping_add(page << self.shift()))
    }
}

/// Whether page tables were freed along with the entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreedTables {
    /// Only leaves were changed: lazy CPUs may wait until they wake.
    No,
    /// Tables go: every CPU in the cpumask must drop its paging-structure caches, lazy ones too
    /// (rule T5).
    Yes,
}

/// The three kinds of flush. Linux encodes them in the mm, end and new_tlb_gen of flush_tlb_info.
#[derive(Debug)]
pub enum FlushKind<'a, B: CpuBits> {
    /// Part of one address space: all that changed between generation `tlb_gen` - 1 and `tlb_gen`
    /// lies in `span`.
    Range {
        /// The address space.
        mm: &'a MmContext<B>,
        /// The generation that the CPU is to reach.
        tlb_gen: TlbGen,
        /// The pages that were changed.
        span: PageSpan,
    },
    /// All of one address space, up to `tlb_gen`.
    Mm {
        /// The address space.
        mm: &'a MmContext<B>,
        /// The generation that the CPU is to reach.
        tlb_gen: TlbGen,
    },
    /// Whatever the CPU has loaded, up to the generation that this address space has reached: the
    /// flush of a reclaim batch.
    AllUpdated,
}

/// A request as it travels to other CPUs. Linux: struct flush_tlb_info.
///
/// A CPU believes what a request says. So only the flush functions make one, or a caller that
/// answers for its contents ([`new`](Self::new)).
#[doc(alias = "flush_tlb_info")]
#[derive(Debug)]
pub struct FlushRequest<'a, B: CpuBits> {
    kind: FlushKind<'a, B>,
    tables: FreedTables,
    initiator: CpuId,
}

impl<'a, B: CpuBits> FlushRequest<'a, B> {
    /// Builds a request by hand, for a kernel that sends requests as messages and rebuilds them on
    /// arrival.
    ///
    /// # Safety
    /// It is passed to a [`flush_others`](crate::Cpus::flush_others) that is not overridden only by
    /// the flush that made it, which keeps it until all have answered.
    ///
    /// `kind` says no more than is true: its address space has reached the generation it names, and
    /// all that changed between the generation before and that one lies in its span. A CPU that
    /// carries the request out counts itself up to date.
    #[must_use]
    pub const unsafe fn new(kind: FlushKind<'a, B>, tables: FreedTables, initiator: CpuId) -> Self {
        Self { kind, tables, initiator }
    }

    /// The request of a flush function, which has raised the generation that `kind` names.
    #[inline(always)]
    pub(crate) const fn from_flush(kind: FlushKind<'a, B>, tables: FreedTables, initiator: CpuId) -> Self {
        Self { kind, tables, initiator }
    }

    /// What to forget.
    #[must_use]
    #[inline]
    pub const fn kind(&self) -> &FlushKind<'a, B> {
        &self.kind
    }

    /// Whether tables go too.
    #[must_use]
    #[inline]
    pub const fn tables(&self) -> FreedTables {
        self.tables
    }

    /// The CPU that asks and waits.
    #[must_use]
    #[inline]
    pub const fn initiator(&self) -> CpuId {
        self.initiator
    }

    /// The part of the request that the decision depends on.
    #[must_use]
    #[inline]
    pub const fn wanted(&self) -> Wanted {
        match self.kind {
            FlushKind::Range { tlb_gen, .. } => Wanted::Range(tlb_gen),
            FlushKind::Mm { tlb_gen, .. } => Wanted::Mm(tlb_gen),
            FlushKind::AllUpdated => Wanted::AllUpdated,
        }
    }
}

/// What a request wants, without the address space: the input of [`plan`](crate::plan).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A range, to reach this generation.
    Range(TlbGen),
    /// Everything of one address space, to reach this generation.
    Mm(TlbGen),
    /// Everything of the loaded address space, whichever it is.
    AllUpdated,
}

impl fmt::Display for PageSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x} by {} KiB", self.start, self.end, (1u64 << self.shift()) >> 10)
    }
}
