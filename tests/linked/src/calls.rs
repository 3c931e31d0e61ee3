//! Level (c), what a kernel calls: every driver, every call of a gather, the switches, the handler,
//! reclaim, and what it asks of ranges and entries.
//!
//! Each is a function with a name that the linker keeps; nobody here calls it. None has a name of
//! the engine's, so that whoever reads symbols takes none for another.

use core::pin::Pin;

use mmu_gather::pagetable::{
    AddressSpace, Bounds, Decoded, Entry, EntryValue, HashedLocks, Level, MapError, Mapping, NonPresent,
    PagingMode, RangeError, TableLock, TableMemory, TableView, VirtRange,
};
use mmu_gather::spin::Spin;
use mmu_gather::tlb::{
    CpuId, CtxIds, FreedTables, PageSpan, enter_lazy_tlb, flush_interrupt, flush_tlb_batched_pending,
    flush_tlb_mm, flush_tlb_mm_range, init_cpu, leave_mm, offline_cpu, switch_mm,
};
use mmu_gather::x86_64::PhysAddr;
use mmu_gather::x86_64::structures::paging::{PageTableFlags, PhysFrame};
use mmu_gather::{
    CutLeaf, Limits, Mm, MmuGather, SplitError, Vma, exit_mmap, exit_mmap_within, shift_arg_pages,
    unmap_range, unmap_region, zap_page_range,
};

use crate::machine::{Bits, Machine, rights, unlink};

type Gather = MmuGather<'static, 'static, Machine>;
type UnmapBatch = mmu_gather::tlb::UnmapBatch<Machine>;

linked! {
    fn linked_new(ids: &CtxIds, root: PhysFrame, mode: PagingMode) -> Mm<Bits> = Mm::new(ids, root, mode);
    fn linked_adopt(ids: &CtxIds, root: PhysFrame, mode: PagingMode) -> Mm<Bits>
        = Mm::adopt(&Machine, ids, root, mode);

    fn linked_unmap_region(mm: &Mm<Bits>, limits: &Limits, vmas: &[Vma<u64>], bounds: Bounds) -> Result<(), CutLeaf>
        = unmap_region(&Machine, mm, limits, vmas.iter().copied(), bounds, unlink).map(|flushed| flushed.free());
    fn linked_unmap_range(mm: &Mm<Bits>, limits: &Limits, vma: &Vma<u64>, range: VirtRange) -> Result<(), CutLeaf>
        = unmap_range(&Machine, mm, limits, vma, range).map(|flushed| flushed.free());
    fn linked_zap_page_range(mm: &Mm<Bits>, limits: &Limits, vma: &Vma<u64>, range: VirtRange) -> Result<(), CutLeaf>
        = zap_page_range(&Machine, mm, limits, vma, range).map(|flushed| flushed.free());
    fn linked_exit_mmap(mm: &Mm<Bits>, limits: &Limits, vmas: &[Vma<u64>])
        = exit_mmap(&Machine, mm, limits, vmas.iter().copied(), unlink).free();
    fn linked_exit_mmap_within(mm: &Mm<Bits>, limits: &Limits, vmas: &[Vma<u64>], bounds: Bounds)
        = exit_mmap_within(&Machine, mm, limits, vmas.iter().copied(), bounds, unlink).free();
    fn linked_shift_arg_pages(
        mm: &Mm<Bits>, limits: &Limits, old: VirtRange, shift: u64, next_area_start: Option<u64>
    ) -> Result<(), MapError>
        = shift_arg_pages(&Machine, mm, limits, old, shift, next_area_start).map(|flushed| flushed.free());

    fn linked_gather(mm: &'static Mm<Bits>, limits: &Limits) -> Gather
        = MmuGather::new(&Machine, mm).with_limits(limits);
    fn linked_gather_fullmm(mm: &'static Mm<Bits>, limits: &Limits) -> Gather
        = MmuGather::new_fullmm(&Machine, mm).with_limits(limits);
    fn linked_unmap_vmas(gather: &mut Gather, vmas: &[Vma<u64>], range: VirtRange) -> Result<(), CutLeaf>
        = gather.unmap_vmas(vmas.iter().copied(), range);
    fn linked_zap_vma_range(gather: &mut Gather, vma: &Vma<u64>, range: VirtRange) -> Result<(), CutLeaf>
        = gather.zap_vma_range(vma, range);
    fn linked_free_pgtables(gather: &mut Gather, vmas: &[Vma<u64>], bounds: Bounds)
        = gather.free_pgtables(vmas.iter().copied(), bounds);
    fn linked_free_pgtables_in_gaps(gather: &mut Gather, areas: &[VirtRange], range: VirtRange)
        = gather.free_pgtables_in_gaps(areas.iter().copied(), range);
    fn linked_free_empty_tables(gather: &mut Gather, range: VirtRange) = gather.free_empty_tables(range);
    fn linked_change_protection(gather: &mut Gather, range: VirtRange) -> Result<(), CutLeaf>
        = gather.change_protection(range, |address, level, old| {
            PageTableFlags::from_bits_retain(rights(address, level, old))
        });
    fn linked_move_page_tables(gather: &mut Gather, old: VirtRange, new_start: u64) -> Result<(), MapError>
        = gather.move_page_tables(old, new_start);
    fn linked_find_large_leaf(gather: &Gather, range: VirtRange) -> Option<u64> = gather.find_large_leaf(range);
    fn linked_split_leaf(gather: &mut Gather, area: u64, address: u64) -> Result<(), SplitError>
        = gather.split_leaf(area, address);
    fn linked_remove_page(gather: &mut Gather, frame: PhysFrame, cleared: VirtRange, level: Level)
        = gather.remove_page(frame, cleared, level);
    fn linked_remove_pages(gather: &mut Gather, frame: PhysFrame, nr_pages: u32, cleared: VirtRange)
        = gather.remove_pages(frame, nr_pages, cleared);
    fn linked_changed(gather: &mut Gather, range: VirtRange, level: Level) = gather.changed(range, level);
    fn linked_note_deferred_flushes(gather: &mut Gather) = gather.note_deferred_flushes();
    fn linked_flush_pfn_maps(gather: &mut Gather) = gather.flush_pfn_maps();
    fn linked_flush_tlb_only(gather: &mut Gather) = gather.flush_tlb_only();
    fn linked_flush_mmu(gather: &mut Gather) = gather.flush_mmu();
    fn linked_flush(gather: Gather) = gather.flush().free();
    fn linked_drop_unfinished(gather: Gather) = drop(gather);
    fn linked_drop_flushed(gather: Gather) = drop(gather.flush());

    fn linked_map(mm: &Mm<Bits>, address: u64, level: Level, value: EntryValue) -> Result<(), MapError>
        = mm.space().map(&Machine, address, level, value);
    fn linked_ensure_table(space: &AddressSpace, address: u64, level: Level) -> Result<(), MapError>
        = space.ensure_table(&Machine, address, level).map(drop);
    // What is asked with addresses and lengths as programs pass them.
    fn linked_range(start: u64, end: u64) -> Result<VirtRange, RangeError> = VirtRange::new(start, end);
    fn linked_limits(nr_pages: u64) -> Limits = Limits::for_pages(nr_pages);
    fn linked_bounds(areas: &[VirtRange], range: VirtRange) -> Bounds = Bounds::around(areas.iter().copied(), range);
    fn linked_spans(bounds: Bounds, range: VirtRange) -> Option<VirtRange> = bounds.spans_of(range);
    fn linked_translate(mapping: &Mapping, address: u64) -> Option<PhysAddr> = mapping.translate(address);
    fn linked_leaf(level: Level, address: PhysAddr, flags: PageTableFlags) -> EntryValue
        = EntryValue::leaf(level, address, flags);
    fn linked_decode(value: EntryValue, level: Level) -> Decoded = value.decode(level);
    fn linked_encode(meaning: NonPresent) -> EntryValue = meaning.encode();
    fn linked_entries(table: TableView<'static>, range: VirtRange) -> &'static [Entry] = table.entries(range);

    fn linked_lookup(space: &AddressSpace, address: u64) -> Mapping = space.lookup(&Machine, address);
    // What a fault and reclaim do: find the table, lock it, look again, and change the entry.
    fn linked_fault(space: &AddressSpace, address: u64, value: EntryValue) -> Option<EntryValue>
        = space.find_table(&Machine, address, Level::Pte).and_then(|table| {
            let locked = table.lock(&Machine);
            let entry = locked.entry(address);
            let old = entry.load();
            entry.compare_exchange(old, value).is_ok().then_some(old)
        });
    fn linked_reclaim(batch: &mut UnmapBatch, mm: &Mm<Bits>, address: u64) -> Option<EntryValue>
        = mm.space().find_table(&Machine, address, Level::Pte).map(|table| {
            let locked = table.lock(&Machine);
            let old = locked.entry(address).get_and_clear();
            batch.add_mm(&Machine, mm.context());
            old
        });
    fn linked_lock_both(from: TableView<'static>, to: TableView<'static>, address: u64) -> EntryValue = {
        let pair = from.lock_both(&Machine, to);
        pair.second().entry(address).exchange(pair.first().entry(address).get_and_clear())
    };
    fn linked_try_lock(table: TableView<'static>, address: u64) -> Option<EntryValue>
        = table.try_lock(&Machine).map(|locked| locked.entry(address).load());
    fn linked_lock_of(locks: &'static HashedLocks<64>, frame: PhysFrame) -> &'static TableLock<Spin>
        = locks.lock_of(frame);
    fn linked_note_linked(space: &AddressSpace, level: Level, tables: u64) = space.note_linked(level, tables);
    fn linked_note_deferred_flushes_of(gather: &mut Gather, table: TableView<'static>)
        = gather.note_deferred_flushes_of(table);
    fn linked_is_loaded(mm: &Mm<Bits>) -> bool = mm.context().is_loaded_somewhere(&Machine);
    fn linked_flush_span(mm: &Mm<Bits>, span: PageSpan, tables: FreedTables)
        = drop(flush_tlb_mm_range(&Machine, mm.context(), span, tables));
    fn linked_batch() -> UnmapBatch = UnmapBatch::new();
    fn linked_batch_flush(batch: &mut UnmapBatch) -> bool = batch.flush(&Machine).is_some();
    fn linked_batched_pending(mm: &Mm<Bits>) = flush_tlb_batched_pending(&Machine, mm.context());
    fn linked_flush_all(mm: &Mm<Bits>) = drop(flush_tlb_mm(&Machine, mm.context()));
    fn linked_free_root(mm: &Mm<Bits>) = Machine.free_tables(&[mm.space().root()]);

    fn linked_init_cpu(cpu: CpuId) = init_cpu(&Machine, cpu);
    fn linked_offline_cpu(cpu: CpuId) = offline_cpu(&Machine, cpu);
    fn linked_switch_mm(cpu: CpuId, next: Option<Pin<&Mm<Bits>>>)
        = switch_mm(&Machine, cpu, next.map(Mm::pinned_context));
    fn linked_enter_lazy_tlb(cpu: CpuId) = enter_lazy_tlb(&Machine, cpu);
    fn linked_leave_mm(cpu: CpuId) = leave_mm(&Machine, cpu);
    fn linked_flush_interrupt(cpu: CpuId) = flush_interrupt(&Machine, cpu);
}
