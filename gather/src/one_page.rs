//! The short way: one page, in a table that stays. Many calls of munmap and madvise are for no more.
//!
//! The work is a gather's, in a gather's order. But nothing can fill and nothing is to be remembered from one table to the next, so
//! what a gather keeps in memory stays in registers here: that halves the instructions.
#![expect(unsafe_code, reason = "the map lock is taken on trust")]

use mmu_pagetable::{Bounds, Level, StaleWrites, TableView, VirtRange};
use mmu_tlb::{FreedTables, PageSpan, flush_tlb_mm, flush_tlb_mm_range};

use crate::entries::zap_loop::{DelayedRmaps, Locked, zap_one};
use crate::gather::FlushedGather;
use crate::mm::{Mm, OpenGather};
use crate::platform::{GatherEvent, Platform, Vma, VmaKind};
use crate::queue::waiting::Covered;
use crate::queue::word::{FreedPages, Runs, Slot, Which};

/// The page, not looked at yet.
pub(crate) struct OnePage<'a, K: Platform> {
    kernel: &'a K,
    mm: &'a Mm<K::Bits>,
    area: K::Area,
    address: u64,
    table: TableView<'a>,
}

/// The page, cleared and not flushed yet. It counts as an open gather.
///
/// If this is lost, to a call of the kernel that unwinds, the page leaks, and whoever looks next makes up for the flush.
#[must_use]
pub(crate) struct Cleared<'a, K: Platform> {
    kernel: &'a K,
    mm: &'a Mm<K::Bits>,
    open: OpenGather<'a, K::Bits>,
    slot: Option<Slot>,
    flush: Flush,
}

/// What CPUs must forget.
enum Flush {
    Nothing,
    Page(PageSpan),
    /// Already flushed; this is the receipt.
    Done(Covered),
}

impl<'a, K: Platform> OnePage<'a, K> {
    /// The page that `range` of `vma` is, if it is one, with counts, and not part of a large one.
    ///
    /// # Safety
    /// As for [`MmuGather::new`](crate::MmuGather::new).
    #[inline(always)]
    pub(crate) unsafe fn find(
        kernel: &'a K,
        mm: &'a Mm<K::Bits>,
        vma: &Vma<K::Area>,
        range: VirtRange,
    ) -> Option<Self> {
        let space = mm.space();
        if range.nr_pages() > 1 || vma.kind != VmaKind::Normal || !space.user_range().covers(range) {
            return None;
        }
        // SAFETY: passed on to our caller: no table inside an area is freed while we walk.
        let table = unsafe { space.last_level_table(kernel, range) }?;
        Some(Self { kernel, mm, area: vma.area, address: range.start(), table })
    }

    /// Whether `bounds` keep the table; and so all above it.
    #[inline(always)]
    pub(crate) fn table_stays(&self, bounds: Bounds) -> bool {
        !bounds.allow_freeing(VirtRange::of_entry(Level::Pmd, self.address))
    }

    /// Clears the page; `None` if a gather has to do it, and then nothing was done.
    #[inline(always)]
    pub(crate) fn clear(self) -> Option<Cleared<'a, K>> {
        let Self { kernel, mm, address, .. } = self;
        let open = OpenGather::new(mm);
        let locked = self.table.lock(kernel);
        if mm.context().has_deferred_flushes() {
            drop(locked);
            open.close();
            return None;
        }
        // As `MmuGather::stale_writes`.
        let stale = if mm.open_gathers() > 1 { StaleWrites::Possible } else { StaleWrites::Impossible };
        let (done, slot) = zap_one(kernel, self.area, &locked, address, Locked(stale));
        let mut flush = Flush::of_page(address, done.leaves);
        if done.rmaps == DelayedRmaps::Some {
            flush = flush_dirty(kernel, mm, flush, slot);
        }
        drop(locked);
        kernel.observe_gather(GatherEvent::LockDropped { leaves: u32::from(done.leaves > 0) });
        kernel.cond_resched();
        Some(Cleared { kernel, mm, open, slot, flush })
    }
}

impl<'a, K: Platform> Cleared<'a, K> {
    /// Makes every CPU forget the page, and what other gathers that are open cleared and have not flushed.
    #[inline(always)]
    pub(crate) fn flush(self) -> FlushedGather<'a, K> {
        let Self { kernel, mm, open, slot, flush } = self;
        let receipt = if mm.open_gathers() > 1 {
            kernel.observe_gather(GatherEvent::NestedFlush);
            Some(Covered::by(mm.context(), flush_tlb_mm(kernel, mm.context())))
        } else {
            flush.carry_out(kernel, mm)
        };
        open.close();
        FlushedGather::of_page(kernel, slot, receipt)
    }
}

/// The stated exception of G3, as in `MmuGather::visit`. The page keeps its "delay" mark, which nobody looks at again.
#[cold]
#[inline(never)]
fn flush_dirty<K: Platform>(kernel: &K, mm: &Mm<K::Bits>, flush: Flush, slot: Option<Slot>) -> Flush {
    kernel.observe_gather(GatherEvent::DirtyFlush);
    let receipt = if mm.open_gathers() > 1 {
        Some(Covered::by(mm.context(), flush_tlb_mm(kernel, mm.context())))
    } else {
        flush.carry_out(kernel, mm)
    };
    kernel.remove_rmaps(FreedPages::new(slot.as_slice(), Which::DelayedRmap, Runs::None));
    receipt.map_or(Flush::Nothing, Flush::Done)
}

impl Flush {
    /// What is to be flushed for the page at `address`, if one was cleared there.
    #[inline(always)]
    const fn of_page(address: u64, leaves: usize) -> Self {
        const LEVEL: Level = Level::Pte;
        if leaves == 0 {
            return Self::Nothing;
        }
        let end = address + LEVEL.entry_span();
        Self::Page(PageSpan { start: address, end, stride_shift: LEVEL.entry_shift() })
    }

    #[inline(always)]
    fn carry_out<K: Platform>(self, kernel: &K, mm: &Mm<K::Bits>) -> Option<Covered> {
        match self {
            Self::Nothing => None,
            Self::Page(span) => {
                let receipt = flush_tlb_mm_range(kernel, mm.context(), span, FreedTables::No);
                Some(Covered::by(mm.context(), receipt))
            }
            Self::Done(receipt) => Some(receipt),
        }
    }
}
