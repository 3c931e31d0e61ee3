//! Levels (a) and (b): a kernel that flushes by means of its own, has no locks for tables and no
//! notes of used lines, and frees every page that it mapped.

use core::ptr;

use mmu_gather::pagetable::{Bounds, Level, NoLock, TableMemory, UsedLines, VirtRange};
use mmu_gather::tlb::{FreedTables, PageSpan};
use mmu_gather::x86_64::structures::paging::mapper::PageTableFrameMapping;
use mmu_gather::x86_64::structures::paging::{PageTable, PageTableFlags, PhysFrame};
use mmu_gather::{
    BatchPage, CutLeaf, FlushTlb, FreedPages, Limits, MmOf, MmuGather, OwnContext, PageGather, Pages, Room,
    Vma, exit_mmap, unmap_range, unmap_region, zap_page_range,
};

use crate::machine::{Machine, rights, unlink};

unsafe extern "C" {
    fn platform_free_frame(frame: u64);
    fn platform_fetch(frame: u64);
    fn platform_flush_tlb(key: u64, span: *const (), are_tables_freed: bool);
}

fn fetch(frame: PhysFrame) {
    // SAFETY: declared above as this package means it.
    unsafe { platform_fetch(frame.start_address().as_u64()) }
}

fn free(frame: PhysFrame) {
    // SAFETY: declared above as this package means it.
    unsafe { platform_free_frame(frame.start_address().as_u64()) }
}

/// The machine, with another flush.
#[derive(Debug)]
pub struct OwnFlush;

type OwnMm = MmOf<OwnContext<u64>>;
type Queue = PageGather<'static, 'static, OwnFlush>;

// SAFETY: as for `Machine`.
unsafe impl PageTableFrameMapping for OwnFlush {
    #[inline]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        Machine.frame_to_pointer(frame)
    }
}

// SAFETY: as for `Machine`.
unsafe impl TableMemory for OwnFlush {
    type Lock = NoLock;

    #[inline]
    unsafe fn table_lock(&self, _: PhysFrame) -> &NoLock {
        &NoLock
    }

    #[inline]
    unsafe fn used_lines(&self, _: PhysFrame) -> Option<&UsedLines> {
        None
    }

    #[inline]
    fn allocate_table(&self) -> Option<PhysFrame> {
        Machine.allocate_table()
    }

    #[inline]
    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        // SAFETY: passed on to our caller.
        unsafe { Machine.free_tables(tables) }
    }
}

// SAFETY: as for `Machine`.
unsafe impl FlushTlb for OwnFlush {
    type Context = OwnContext<u64>;

    #[inline]
    fn flush_tlb(&self, context: &OwnContext<u64>, span: Option<PageSpan>, tables: FreedTables) {
        // SAFETY: declared above as this package means it.
        unsafe { platform_flush_tlb(**context, ptr::from_ref(&span).cast(), tables == FreedTables::Yes) }
    }
}

impl Pages for OwnFlush {
    type Area = u64;

    #[inline]
    fn free_pages(&self, pages: FreedPages<'_>) {
        match pages.frames() {
            Some(frames) => frames.for_each_fetching(4, fetch, free),
            None => Machine.free_pages(pages),
        }
    }

    #[inline]
    fn allocate_batch(&self) -> Option<BatchPage> {
        Machine.allocate_batch()
    }

    #[inline]
    fn free_batch(&self, page: BatchPage) {
        Machine.free_batch(page);
    }
}

linked! {
    fn own_unmap_region(mm: &OwnMm, limits: &Limits, vmas: &[Vma<u64>], bounds: Bounds) -> Result<(), CutLeaf>
        = unmap_region(&OwnFlush, mm, limits, vmas.iter().copied(), bounds, unlink).map(|flushed| flushed.free());
    fn own_unmap_range(mm: &OwnMm, limits: &Limits, vma: &Vma<u64>, range: VirtRange) -> Result<(), CutLeaf>
        = unmap_range(&OwnFlush, mm, limits, vma, range).map(|flushed| flushed.free());
    fn own_zap_page_range(mm: &OwnMm, limits: &Limits, vma: &Vma<u64>, range: VirtRange) -> Result<(), CutLeaf>
        = zap_page_range(&OwnFlush, mm, limits, vma, range).map(|flushed| flushed.free());
    fn own_exit_mmap(mm: &OwnMm, limits: &Limits, vmas: &[Vma<u64>])
        = exit_mmap(&OwnFlush, mm, limits, vmas.iter().copied(), unlink).free();
    fn own_change_protection(mm: &OwnMm, range: VirtRange) -> Result<(), CutLeaf> = {
        let mut gather = MmuGather::new(&OwnFlush, mm);
        let result = gather.change_protection(range, |address, level, old| {
            PageTableFlags::from_bits_retain(rights(address, level, old))
        });
        gather.flush().free();
        result
    };
    fn own_move_page_tables(mm: &OwnMm, old: VirtRange, new_start: u64) -> bool
        = MmuGather::new(&OwnFlush, mm).move_page_tables(old, new_start).is_ok();
    fn own_remove_tables(mm: &OwnMm, range: VirtRange, bounds: Bounds) = {
        let mut gather = MmuGather::new(&OwnFlush, mm);
        mm.space().unhook_tables(&OwnFlush, range, bounds, |table| gather.remove_table(table, range.start()));
    };
    fn own_split_leaf(mm: &OwnMm, area: u64, address: u64) -> bool
        = MmuGather::new(&OwnFlush, mm).split_leaf(area, address).is_ok();

    fn queue_new(context: &'static OwnContext<u64>, limits: &Limits) -> Queue
        = PageGather::new(&OwnFlush, context).with_limits(limits);
    fn queue_page(queue: &mut Queue, frame: PhysFrame, address: u64, level: Level) -> Room
        = queue.queue_page(frame, address, level);
    fn queue_pages(queue: &mut Queue, frame: PhysFrame, nr_pages: u32, cleared: VirtRange) -> Room
        = queue.queue_pages(frame, nr_pages, cleared);
    fn queue_table(queue: &mut Queue, table: PhysFrame, address: u64, level: Level)
        = queue.queue_table(table, address, level);
    fn queue_changed(queue: &mut Queue, range: VirtRange, level: Level) = queue.changed(range, level);
    fn queue_flush_tlb_only(queue: &mut Queue) = queue.flush_tlb_only();
    fn queue_flush_mmu(queue: &mut Queue) = queue.flush_mmu();
    fn queue_flush(queue: Queue) = queue.flush().free();
    fn queue_drop_unfinished(queue: Queue) = drop(queue);
}
