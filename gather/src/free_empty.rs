//! Tables that go because they are empty, and munmap for kernels whose page-table layer knows no
//! neighbours.
#![expect(unsafe_code, reason = "the map lock is taken on trust")]

use core::mem;

use mmu_pagetable::{UnhookedTable, VirtRange};

use crate::cut_leaf::CutLeaf;
use crate::flushed_gather::FlushedGather;
use crate::gather::MmuGather;
use crate::limits::Limits;
use crate::mm::MmOf;
use crate::open_gather::OwesFlush;
use crate::platform::{Platform, Vma};

impl<K: Platform> MmuGather<'_, '_, K> {
    /// Unhooks the tables on the paths to `range` that are empty, and queues them; they are freed
    /// after the next flush.
    ///
    /// It is for kernels that know no neighbours where they unmap. It looks into each table on
    /// those paths, under its lock and that of its parent; a table in which any entry is left
    /// stays, be it a neighbour's. [`free_pgtables`](Self::free_pgtables) goes by areas instead,
    /// and looks into none.
    ///
    /// # Context
    /// No table lock is held; preemption points inside. The map lock is held for writing.
    ///
    /// # Safety
    /// As for [`unhook_empty_tables`]: the map lock is held for writing, and not for reading alone,
    /// and nobody walks without it, reclaim included; or nobody uses a table that covers an address
    /// of `range` but by its lock, all the way down from the root.
    ///
    /// [`unhook_empty_tables`]: mmu_pagetable::AddressSpace::unhook_empty_tables
    ///
    /// # Examples
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/small_kernel/machine.rs"));
    /// # fn main() -> Result<(), CutLeaf> {
    /// # let kernel = Kernel::new();
    /// # let mm = kernel.new_mm();
    /// # let (low, high) = (area(0x1000, 0x5000), area(0x8000, 0x9000));
    /// # kernel.map(&mm, low.range);
    /// # kernel.map(&mm, high.range);
    /// # let tables_before = kernel.free_tables.borrow().len();
    /// for vma in [high, low] {
    ///     // SAFETY: this thread alone walks and unmaps, and `mm` is an address space of `kernel`.
    ///     let mut gather = unsafe { MmuGather::new(&kernel, &mm) };
    ///     gather.unmap_vmas([vma], vma.range)?;
    ///     // SAFETY: as above.
    ///     unsafe { gather.free_empty_tables(vma.range) };
    ///     gather.flush().free();
    /// }
    /// // The first time `low` was still there; the second time nothing was.
    /// assert_eq!(kernel.free_tables.borrow().len(), tables_before + 3);
    /// # Ok(())
    /// # }
    /// ```
    pub unsafe fn free_empty_tables(&mut self, range: VirtRange) {
        let (kernel, mm) = (self.kernel, self.mm);
        let looked_at = |table: Option<UnhookedTable>| {
            if let Some(table) = table {
                // If entries are empty because reclaim has cleared them, and has not flushed yet,
                // every CPU that this flush reaches has missed that generation, and flushes all.
                let address = table.span().start().max(range.start());
                self.queue_table(&table, address);
            }
            kernel.cond_resched();
        };
        // If a call of the kernel unwinds before a table is queued, it leaks; the flush for it is
        // left to whoever looks next.
        let owes_flush = OwesFlush(mm.context());
        // SAFETY: passed on to our caller. The table is queued, and leaves the queue only through
        // `free_all`, after a flush of what `range` noted.
        unsafe { mm.space().unhook_empty_tables(kernel, range, looked_at) };
        mem::forget(owes_flush);
    }
}

/// Unmaps `range` of one area, and the tables that are empty then: munmap for a kernel whose
/// page-table layer knows no neighbours.
///
/// What comes back has been flushed from every CPU: drop the map lock, then free it. The area is to
/// be found until this returns, so that the owner of device frames does not free them too early.
///
/// [`unmap_region`](crate::unmap_region) does the same by neighbours, and is faster: it looks into
/// no table.
///
/// # Errors
/// [`CutLeaf`] if the range ends in the middle of a large leaf, which is still mapped. Everything
/// else was removed, flushed and freed; no table was.
///
/// # Safety
/// As for [`MmuGather::new`] and [`MmuGather::free_empty_tables`]: the map lock is held for
/// writing, and nobody walks without it, reclaim included.
///
/// # Examples
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/small_kernel/machine.rs"));
/// use mmu_gather::unmap_range;
///
/// # fn main() -> Result<(), CutLeaf> {
/// # let kernel = Kernel::new();
/// # let mm = kernel.new_mm();
/// # let vma = area(0x1000, 0x2000);
/// # kernel.map(&mm, vma.range);
/// # let tables_before = kernel.free_tables.borrow().len();
/// // SAFETY: this thread alone walks and unmaps, and `mm` is an address space of `kernel`.
/// let flushed = unsafe { unmap_range(&kernel, &mm, &Limits::DEFAULT, &vma, vma.range) }?;
/// flushed.free();
/// assert_eq!(kernel.freed_pages.get(), 1);
/// assert_eq!(kernel.free_tables.borrow().len(), tables_before + 3, "it was the only page");
/// # Ok(())
/// # }
/// ```
pub unsafe fn unmap_range<'k, K: Platform>(
    kernel: &'k K,
    mm: &MmOf<K::Context>,
    limits: &Limits,
    vma: &Vma<K::Area>,
    range: VirtRange,
) -> Result<FlushedGather<'k, K>, CutLeaf> {
    // SAFETY: passed on to our caller.
    let gather = unsafe { MmuGather::new(kernel, mm) }.with_limits(limits);
    gather.flush_after(|gather| {
        let Some(range) = range.intersect(vma.range) else { return Ok(()) };
        gather.zap_vma_range(vma, range)?;
        // SAFETY: passed on to our caller.
        unsafe { gather.free_empty_tables(range) };
        Ok(())
    })
}
