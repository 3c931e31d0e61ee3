//! The drivers: whole operations, with their steps in the order that is right.
#![expect(unsafe_code, reason = "the map lock is taken on trust")]

use mmu_pagetable::{Bounds, MapError, VirtRange};

use crate::cut_leaf::CutLeaf;
use crate::flushed_gather::FlushedGather;
use crate::gather::MmuGather;
use crate::limits::Limits;
use crate::mm::MmOf;
use crate::one_table::{OneTable, TableGoes};
use crate::platform::{Platform, Vma};
use crate::queue::batch::NO_WORDS;

/// Unmaps `vmas`, which have been detached, and the tables that only they used: the second half of
/// munmap.
///
/// What comes back has been flushed from every CPU: drop the map lock, then free it. `unlink` runs
/// after the pages are unmapped and before the tables are unhooked. There the embedder takes the
/// areas out of its rmap (Linux: unlink_anon_vmas, unlink_file_vma), so that nobody finds an area
/// whose tables are going. Device frames have been flushed for by then.
///
/// Call [`split_leaf`](MmuGather::split_leaf) for both ends of the range before the areas are
/// detached; then nothing can fail here.
///
/// `vmas` can be cloned because they are gone through twice, for the pages and then for the tables:
/// no table goes before every page of its neighbours has gone. (An iterator over a slice, or over a
/// tree of areas, clones for a few instructions.)
///
/// # Errors
/// [`CutLeaf`] if that was forgotten and an area ends in the middle of a large leaf. The leaf is
/// still mapped, and no table was freed. Everything else was unmapped and flushed, and was freed
/// under the map lock. The kernel must keep the area, for the leaf is mapped in it.
///
/// # Safety
/// As for [`MmuGather::new`] and [`MmuGather::free_pgtables`].
///
/// # Source
/// Linux: unmap_region, mm/vma.c.
///
/// # Examples
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/small_kernel/machine.rs"));
/// use mmu_gather::unmap_region;
///
/// # fn main() -> Result<(), CutLeaf> {
/// # let kernel = Kernel::new();
/// # let mm = kernel.new_mm();
/// # let (low, high) = (area(0x1000, 0x5000), area(0x8000, 0x9000));
/// # kernel.map(&mm, low.range);
/// # kernel.map(&mm, high.range);
/// let neighbours = Bounds::between(Some(low.range.end()), None);
/// let unlink = || { /* take the area out of the kernel's rmap */ };
/// // SAFETY: this thread alone unmaps, and `low` is the one neighbour.
/// let flushed =
///     unsafe { unmap_region(&kernel, &mm, &Limits::DEFAULT, [high], neighbours, unlink) }?;
/// // Here the map lock is dropped.
/// flushed.free();
/// assert_eq!(kernel.freed_pages.get(), 1);
/// # Ok(())
/// # }
/// ```
pub unsafe fn unmap_region<'k, K, I>(
    kernel: &'k K,
    mm: &MmOf<K::Context>,
    limits: &Limits,
    vmas: I,
    bounds: Bounds,
    unlink: impl FnOnce(),
) -> Result<FlushedGather<'k, K>, CutLeaf>
where
    K: Platform,
    I: IntoIterator<Item = Vma<K::Area>> + Clone,
{
    let mut areas = vmas.clone().into_iter();
    let (Some(only), None) = (areas.next(), areas.next()) else {
        // SAFETY: passed on to our caller.
        return unsafe { unmap_by_gather(kernel, mm, limits, vmas, bounds, unlink) };
    };
    let mut few = NO_WORDS;
    if limits.are_few(only.range.nr_pages())
        // SAFETY: passed on to our caller.
        && let Some(pages) = unsafe { OneTable::find(kernel, mm, &only, only.range) }
        && let Some(goes) = pages.fate_of_table(bounds)
        && let Some(cleared) = pages.clear_few(&mut few)
    {
        // SAFETY: passed on to our caller; all leaves are gone.
        return Ok(unsafe { cleared.finish(limits, &few, goes, unlink) });
    }
    // SAFETY: passed on to our caller.
    unsafe { unmap_one_area(kernel, mm, limits, &only, vmas, bounds, unlink) }
}

/// [`unmap_region`] of one area with more pages than few. Kept out of line, as the gather is below,
/// so that for those few everything stays in registers.
///
/// # Safety
/// As for [`unmap_region`]; `only` is what `vmas` has.
#[inline(never)]
unsafe fn unmap_one_area<'k, K, I>(
    kernel: &'k K,
    mm: &MmOf<K::Context>,
    limits: &Limits,
    only: &Vma<K::Area>,
    vmas: I,
    bounds: Bounds,
    unlink: impl FnOnce(),
) -> Result<FlushedGather<'k, K>, CutLeaf>
where
    K: Platform,
    I: IntoIterator<Item = Vma<K::Area>> + Clone,
{
    if limits.fit_into_batch(only.range.nr_pages())
        // SAFETY: passed on to our caller.
        && let Some(pages) = unsafe { OneTable::find(kernel, mm, only, only.range) }
        && let Some(goes) = pages.fate_of_table(bounds)
        && let Some(cleared) = pages.clear_many()
    {
        // SAFETY: passed on to our caller; all leaves are gone.
        return Ok(unsafe { cleared.finish(limits, &NO_WORDS, goes, unlink) });
    }
    // SAFETY: passed on to our caller.
    unsafe { unmap_by_gather(kernel, mm, limits, vmas, bounds, unlink) }
}

/// [`unmap_region`] with a gather.
///
/// # Safety
/// As for [`unmap_region`].
#[inline(never)]
unsafe fn unmap_by_gather<'k, K, I>(
    kernel: &'k K,
    mm: &MmOf<K::Context>,
    limits: &Limits,
    vmas: I,
    bounds: Bounds,
    unlink: impl FnOnce(),
) -> Result<FlushedGather<'k, K>, CutLeaf>
where
    K: Platform,
    I: IntoIterator<Item = Vma<K::Area>> + Clone,
{
    // SAFETY: passed on to our caller.
    let gather = unsafe { MmuGather::new(kernel, mm) }.with_limits(limits);
    gather.flush_after(|gather| {
        gather.unmap_vmas(vmas.clone(), mm.space().user_range())?;
        gather.flush_pfn_maps();
        unlink();
        // SAFETY: passed on to our caller; all leaves are gone.
        unsafe { gather.free_pgtables(vmas, bounds) };
        Ok(())
    })
}

/// Removes the pages of `range` in one area and keeps its tables: madvise(MADV_DONTNEED),
/// truncation.
///
/// # Errors
/// [`CutLeaf`] if the range ends in the middle of a large leaf, which is still mapped. Everything
/// else was removed, flushed and freed.
///
/// # Safety
/// As for [`MmuGather::new`]; the map lock for reading is enough, and several of these may run at
/// once.
///
/// # Source
/// Linux: zap_page_range_single, mm/memory.c.
///
/// # Examples
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/small_kernel/machine.rs"));
/// use mmu_gather::zap_page_range;
///
/// # fn main() -> Result<(), CutLeaf> {
/// # let kernel = Kernel::new();
/// # let mm = kernel.new_mm();
/// # let vma = area(0x1000, 0x5000);
/// # kernel.map(&mm, vma.range);
/// let part = VirtRange::new(0x2000, 0x4000).expect("aligned, and not empty");
/// // SAFETY: this thread alone unmaps, and `mm` is an address space of `kernel`.
/// let flushed = unsafe { zap_page_range(&kernel, &mm, &Limits::DEFAULT, &vma, part) }?;
/// flushed.free();
/// assert_eq!(kernel.freed_pages.get(), 2);
/// // The next use of the area faults, and finds its tables in place.
/// kernel.map(&mm, part);
/// # Ok(())
/// # }
/// ```
#[doc(alias = "zap_page_range_single")]
pub unsafe fn zap_page_range<'k, K: Platform>(
    kernel: &'k K,
    mm: &MmOf<K::Context>,
    limits: &Limits,
    vma: &Vma<K::Area>,
    range: VirtRange,
) -> Result<FlushedGather<'k, K>, CutLeaf> {
    let range = range.intersect(vma.range);
    let mut few = NO_WORDS;
    if let Some(range) = range
        && limits.are_few(range.nr_pages())
        // SAFETY: passed on to our caller.
        && let Some(pages) = unsafe { OneTable::find(kernel, mm, vma, range) }
        && let Some(cleared) = pages.clear_few(&mut few)
    {
        // SAFETY: no table goes.
        return Ok(unsafe { cleared.finish(limits, &few, TableGoes::No, || {}) });
    }
    // SAFETY: passed on to our caller.
    unsafe { zap_more(kernel, mm, limits, vma, range) }
}

/// [`zap_page_range`] of more pages than few; see [`unmap_one_area`].
///
/// # Safety
/// As for [`zap_page_range`].
#[inline(never)]
unsafe fn zap_more<'k, K: Platform>(
    kernel: &'k K,
    mm: &MmOf<K::Context>,
    limits: &Limits,
    vma: &Vma<K::Area>,
    range: Option<VirtRange>,
) -> Result<FlushedGather<'k, K>, CutLeaf> {
    if let Some(range) = range
        && limits.fit_into_batch(range.nr_pages())
        // SAFETY: passed on to our caller.
        && let Some(pages) = unsafe { OneTable::find(kernel, mm, vma, range) }
        && let Some(cleared) = pages.clear_many()
    {
        // SAFETY: no table goes.
        return Ok(unsafe { cleared.finish(limits, &NO_WORDS, TableGoes::No, || {}) });
    }
    // SAFETY: passed on to our caller.
    unsafe { zap_by_gather(kernel, mm, limits, vma, range) }
}

/// [`zap_page_range`] with a gather.
///
/// # Safety
/// As for [`zap_page_range`].
#[inline(never)]
unsafe fn zap_by_gather<'k, K: Platform>(
    kernel: &'k K,
    mm: &MmOf<K::Context>,
    limits: &Limits,
    vma: &Vma<K::Area>,
    range: Option<VirtRange>,
) -> Result<FlushedGather<'k, K>, CutLeaf> {
    // SAFETY: passed on to our caller. If there is no range, nothing is looked at.
    let gather = unsafe { MmuGather::new_within(kernel, mm, range.unwrap_or(vma.range)) };
    gather
        .with_limits(limits)
        .flush_after(|gather| range.map_or(Ok(()), |range| gather.zap_vma_range(vma, range)))
}

/// Unmaps everything, after the last program has left the address space.
///
/// If the CPU that runs this has the address space loaded, lazily or not, it switches to the
/// kernel's own. When this returns no CPU has it loaded, lazy ones included: the root table is the
/// caller's to free, after what comes back was freed. (A kernel with a flush of its own sees to
/// both itself: [`FlushTlb::leave_here`](crate::FlushTlb::leave_here) and
/// [`leave_everywhere`](crate::FlushTlb::leave_everywhere).)
///
/// `vmas` can be cloned because they are gone through twice, as in [`unmap_region`].
///
/// # Panics
/// If another CPU has the address space loaded all the same, and is not lazy: the root would be
/// freed while it is in that CPU's CR3.
///
/// # Safety
/// - As for [`MmuGather::new_fullmm`] and [`MmuGather::free_pgtables`], with `vmas` all the areas
///   there are;
/// - no other CPU has the address space loaded, except lazily, and none switches to it any more.
///
/// # Source
/// Linux: exit_mmap, mm/mmap.c.
///
/// # Examples
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/small_kernel/machine.rs"));
/// # fn main() -> Result<(), CutLeaf> {
/// # let kernel = Kernel::new();
/// # let mm = kernel.new_mm();
/// # let vma = area(0x1000, 0x5000);
/// # kernel.map(&mm, vma.range);
/// kernel.run(CPU[0], Some(&mm));
/// // SAFETY: the thread that calls this is the last of `mm`; there is no other area.
/// let flushed = unsafe { exit_mmap(&kernel, &mm, &Limits::DEFAULT, [vma], || ()) };
/// flushed.free();
/// // SAFETY: no CPU has the root in CR3 any more, and nothing is mapped below it.
/// unsafe { kernel.free_tables(&[mm.space().root()]) };
/// assert_eq!(kernel.free_tables.borrow().len(), 15, "every table has come back");
/// # Ok(())
/// # }
/// ```
pub unsafe fn exit_mmap<'k, K, I>(
    kernel: &'k K,
    mm: &MmOf<K::Context>,
    limits: &Limits,
    vmas: I,
    unlink: impl FnOnce(),
) -> FlushedGather<'k, K>
where
    K: Platform,
    I: IntoIterator<Item = Vma<K::Area>> + Clone,
{
    // SAFETY: passed on to our caller.
    unsafe { exit_mmap_within(kernel, mm, limits, vmas, Bounds::whole(), unlink) }
}

/// As [`exit_mmap`], where part of the lower half stays: `bounds` are what the areas lie between.
///
/// That is for address spaces that share low memory, say, which no area is in. The root is then not
/// empty at the end: what stays is the caller's to take out of it, with the tables that also cover
/// areas.
///
/// # Panics
/// As [`exit_mmap`].
///
/// # Safety
/// As for [`exit_mmap`], with nothing but `vmas` between `bounds`.
pub unsafe fn exit_mmap_within<'k, K, I>(
    kernel: &'k K,
    mm: &MmOf<K::Context>,
    limits: &Limits,
    vmas: I,
    bounds: Bounds,
    unlink: impl FnOnce(),
) -> FlushedGather<'k, K>
where
    K: Platform,
    I: IntoIterator<Item = Vma<K::Area>> + Clone,
{
    // SAFETY: passed on to our caller.
    unsafe { kernel.leave_here(mm.context()) };
    // SAFETY: passed on to our caller.
    let mut gather = unsafe { MmuGather::new_fullmm(kernel, mm) }.with_limits(limits);
    let cut = gather.unmap_vmas(vmas.clone(), mm.space().user_range());
    debug_assert!(cut.is_ok(), "a gather of a dying address space takes leaves as a whole");
    gather.flush_pfn_maps();
    unlink();
    // SAFETY: passed on to our caller; all leaves are gone, and nobody else is there.
    unsafe { gather.free_pgtables(vmas, bounds) };
    let flushed = gather.flush();
    // SAFETY: passed on to our caller.
    unsafe { kernel.leave_everywhere(mm.context()) };
    flushed
}

/// Moves the stack of a new program down by `shift` bytes, to where exec wants it, and frees the
/// tables left behind.
///
/// `old` is where the stack is, and `next_area_start` where the area above it starts, if there is
/// one. The area of the stack already spans both places.
///
/// # Errors
/// [`MapError`] if tables for the new place could not be had, if `shift` leads out of user space,
/// if something is mapped at the new place, or if a large leaf is in the old one. Nothing was moved
/// then.
///
/// # Safety
/// As for [`MmuGather::new`], the map lock being held for writing.
///
/// # Source
/// Linux: shift_arg_pages, fs/exec.c (relocate_vma_down since 6.13).
#[doc(alias = "relocate_vma_down")]
pub unsafe fn shift_arg_pages<'k, K: Platform>(
    kernel: &'k K,
    mm: &MmOf<K::Context>,
    limits: &Limits,
    old: VirtRange,
    shift: u64,
    next_area_start: Option<u64>,
) -> Result<FlushedGather<'k, K>, MapError> {
    let new_start = old.start().checked_sub(shift).ok_or(MapError::NotUserSpace(old.start()))?;
    let new = VirtRange::new(new_start, old.end() - shift).map_err(|_| MapError::NotUserSpace(new_start))?;
    // SAFETY: passed on to our caller.
    let mut gather = unsafe { MmuGather::new(kernel, mm) }.with_limits(limits);
    // SAFETY: passed on to our caller.
    unsafe { gather.move_page_tables(old, new.start()) }?;
    // If the two places overlap, only the part above the new one is given up.
    let given_up = VirtRange::new(old.start().max(new.end()), old.end());
    if let Ok(given_up) = given_up {
        gather.free_pgd_range(given_up, Bounds::between(Some(new.end()), next_area_start));
    }
    Ok(gather.flush())
}
