//! Unhooking tables: `free_pgtables` removes tables, once `zap` has removed the pages.
#![expect(unsafe_code, reason = "the constructor's promise is passed on")]

use core::mem;

use mmu_pagetable::{Bounds, Level, VirtRange};

use crate::gather::MmuGather;
use crate::open_gather::OwesFlush;
use crate::platform::{Platform, Vma};
use crate::state::PfnMaps;

impl<K: Platform> MmuGather<'_, '_, K> {
    /// Unhooks the tables that only `vmas` used, and queues them; they are freed after the next
    /// flush.
    ///
    /// `vmas` comes in ascending order, and all its leaves are gone. `bounds` are the neighbours
    /// that stay: the end of the area below, and the start of the area above. Areas that lie closer
    /// together than 2 MiB are taken in one walk.
    ///
    /// Areas of device frames are flushed for first, if
    /// [`flush_pfn_maps`](Self::flush_pfn_maps) was not called.
    ///
    /// # Context
    /// No table lock is held; preemption points inside.
    ///
    /// # Safety
    /// Until [`flush`](Self::flush) has returned:
    /// - the areas are detached: nobody faults in them or walks there, and no page is mapped in
    ///   them any more;
    /// - between `bounds`, outside `vmas`, nothing is mapped and nobody faults, and the neighbours
    ///   do not grow into that space.
    ///
    /// Otherwise a table is freed together with what it maps, or while somebody puts an entry into
    /// it.
    ///
    /// # Source
    /// Linux: free_pgtables, mm/memory.c.
    ///
    /// # Examples
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/small_kernel/machine.rs"));
    /// # fn main() -> Result<(), CutLeaf> {
    /// # let kernel = Kernel::new();
    /// # let mm = kernel.new_mm();
    /// # let vma = area(0x1000, 0x5000);
    /// # kernel.map(&mm, vma.range);
    /// # let tables_before = kernel.free_tables.borrow().len();
    /// # // SAFETY: this thread alone unmaps, and `mm` is an address space of `kernel`.
    /// # let mut gather = unsafe { MmuGather::new(&kernel, &mm) };
    /// gather.unmap_vmas([vma], vma.range)?;
    /// // SAFETY: the pages are gone, and there is no other area.
    /// unsafe { gather.free_pgtables([vma], Bounds::between(None, None)) };
    /// gather.flush().free();
    /// assert_eq!(kernel.free_tables.borrow().len(), tables_before + 3, "all but the root");
    /// # Ok(())
    /// # }
    /// ```
    pub unsafe fn free_pgtables(&mut self, vmas: impl IntoIterator<Item = Vma<K::Area>>, bounds: Bounds) {
        self.flush_pfn_maps();
        let mut vmas = vmas.into_iter().map(|vma| vma.range).peekable();
        while let Some(first) = vmas.next() {
            let mut run = first;
            while let Some(next) = vmas.next_if(|next| next.start() <= run.end() + Level::Pmd.entry_span()) {
                run = run.union(next);
            }
            let ceiling = vmas.peek().map_or(u64::MAX, |next| next.start());
            self.free_pgd_range(run, bounds.below(ceiling));
        }
    }

    /// As [`free_pgtables`](Self::free_pgtables), told what stays and not what goes: unhooks the
    /// tables of the parts of `range` that lie between `areas`.
    ///
    /// `areas` are those that stay, in ascending order; all of them, or at least those that overlap
    /// `range`, and the nearest on either side.
    ///
    /// # Context
    /// As for [`free_pgtables`](Self::free_pgtables).
    ///
    /// # Panics
    /// In a debug build, if the areas do not ascend.
    ///
    /// # Safety
    /// Until [`flush`](Self::flush) has returned, nothing is mapped outside `areas` between the
    /// nearest area below `range` and the nearest above, nobody faults or walks there, and no area
    /// grows into a gap.
    ///
    /// # Examples
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/small_kernel/machine.rs"));
    /// # fn main() -> Result<(), CutLeaf> {
    /// # let kernel = Kernel::new();
    /// # let mm = kernel.new_mm();
    /// # let (low, high) = (area(0x1000, 0x5000), area(0x40_0000, 0x40_1000));
    /// # kernel.map(&mm, low.range);
    /// # kernel.map(&mm, high.range);
    /// # let tables_before = kernel.free_tables.borrow().len();
    /// # // SAFETY: this thread alone unmaps, and `mm` is an address space of `kernel`.
    /// # let mut gather = unsafe { MmuGather::new(&kernel, &mm) };
    /// gather.unmap_vmas([high], high.range)?;
    /// // SAFETY: nothing is mapped outside `low`, the one area left.
    /// unsafe { gather.free_pgtables_in_gaps([low.range], high.range) };
    /// gather.flush().free();
    /// assert_eq!(kernel.free_tables.borrow().len(), tables_before + 1, "`low` needs the others");
    /// # Ok(())
    /// # }
    /// ```
    pub unsafe fn free_pgtables_in_gaps(
        &mut self,
        areas: impl IntoIterator<Item = VirtRange>,
        range: VirtRange,
    ) {
        self.flush_pfn_maps();
        let mut floor = 0;
        for area in areas {
            debug_assert!(
                floor <= area.start(),
                "P3: the areas that stay do not ascend: {area} below {floor:#x}"
            );
            self.free_gap(range, floor, area.start());
            floor = floor.max(area.end());
        }
        self.free_gap(range, floor, self.mm.space().user_range().end());
    }

    /// Unhooks the tables of the part of `range` between `floor` and `ceiling`, where no area is.
    fn free_gap(&mut self, range: VirtRange, floor: u64, ceiling: u64) {
        if let Some(part) = VirtRange::new(floor, ceiling).ok().and_then(|gap| gap.intersect(range)) {
            self.free_pgd_range(part, Bounds::between(Some(floor), Some(ceiling)));
        }
    }

    /// Makes every CPU forget the device frames unmapped so far, if there were any; frees nothing.
    ///
    /// It is to be called before the areas can no longer be found. From then on the owner of the
    /// frames, who looks for areas to unmap before it frees, finds none and does not wait for this
    /// gather (CVE-2022-39188). The flush covers entries that another open gather has cleared and
    /// not flushed, too, for this one found them empty.
    ///
    /// # Context
    /// As for [`flush_tlb_only`](Self::flush_tlb_only), no table lock held.
    ///
    /// # Source
    /// Linux: tlb_free_vmas, include/asm-generic/tlb.h.
    #[doc(alias = "tlb_free_vmas")]
    pub fn flush_pfn_maps(&mut self) {
        if self.state.pfn_maps == PfnMaps::Seen {
            self.flush_for_all_gathers();
            self.state.pfn_maps = PfnMaps::NotSeen;
        }
    }

    /// Unhooks the tables of `range` that `bounds` let go, and queues them.
    ///
    /// # Source
    /// Linux: free_pgd_range, mm/memory.c.
    pub(crate) fn free_pgd_range(&mut self, range: VirtRange, bounds: Bounds) {
        // Most often the neighbours need all of the tables, and nothing below is needed.
        if bounds.spans_of(range).is_none() {
            return;
        }
        let (kernel, mm) = (self.kernel, self.mm);
        let sink = |table: mmu_pagetable::UnhookedTable| {
            // An address inside the range, not the start of the table's span: freeing the table of
            // one page must not widen the flush of that page.
            let address = table.span().start().max(range.start());
            self.queue_table(&table, address);
            kernel.cond_resched();
        };
        // If a call of the kernel unwinds in the sink, tables that were unhooked together with this
        // one and are not queued yet leak; the flush for them is left to whoever looks next.
        let owes_flush = OwesFlush(mm.context());
        // SAFETY: the constructor's caller holds the map lock, and by the promise of our caller
        // nobody walks the range. The sink queues; tables leave the queue only through `free_all`,
        // after a flush of what `range` noted.
        unsafe { mm.space().unhook_tables(kernel, range, bounds, sink) };
        mem::forget(owes_flush);
    }
}
