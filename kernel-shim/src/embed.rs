//! The engine's three traits, implemented for this kernel: the part to copy from.
//!
//! Twenty-six methods, most of them a line or two; nine pass a question on to the machine. Nothing else in this crate is known
//! to the engine.
#![expect(unsafe_code, reason = "the engine believes the implementor about memory and CPUs")]

use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use mmu_gather::pagetable::{Level, Marker, NonPresent, TableLock, TableMemory, UsedLines};
use mmu_gather::tlb::{
    CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, CtxId, EarlyAnswer, FlushRequest, OnlineCpus, PageSpan,
    PcidSupport, TlbEvent, flush_tlb_func,
};
use mmu_gather::{BatchPage, Disposition, Fate, FreedPages, GatherEvent, Pages, UnmappedLeaf, Vma, VmaKind};
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::frame::{FrameKind, Last};
use crate::kernel::{Kernel, Misbehaviour};
use crate::machine::{FrameRole, Machine, Note, Seam};
use crate::vma::{self, Area, AreaKind};

/// What the engine hands back with every page: the area, and why it is being unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineArea {
    /// The area.
    pub area: Area,
    /// What becomes of markers: an unmapped area loses them, a discarded one keeps them (Linux: ZAP_FLAG_DROP_MARKER).
    pub markers: Fate,
}

impl vma::Vma {
    /// This area as the engine wants it named, when it is unmapped.
    pub(crate) const fn going_away(&self) -> Vma<EngineArea> {
        self.for_engine(Fate::Clear)
    }

    /// This area as the engine wants it named, when it stays and only its pages go.
    pub(crate) const fn staying(&self) -> Vma<EngineArea> {
        self.for_engine(Fate::Keep)
    }

    const fn for_engine(&self, markers: Fate) -> Vma<EngineArea> {
        let kind = match self.area.kind {
            AreaKind::Pfn => VmaKind::PfnMap,
            AreaKind::Anon | AreaKind::FilePrivate(_) | AreaKind::FileShared(_) => VmaKind::Normal,
        };
        Vma { range: self.range, kind, area: EngineArea { area: self.area, markers } }
    }
}

// SAFETY: the machine's contract: the pointer is to the frame's bytes, valid as long as the machine.
unsafe impl<M: Machine> PageTableFrameMapping for Kernel<M> {
    #[inline]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.machine.frame_to_pointer(frame)
    }
}

// SAFETY: a frame allocated as `Table` is in nobody else's hands and zeroed here; every frame has a lock of its own, in its
// metadata, so locks on one path are distinct.
unsafe impl<M: Machine> TableMemory for Kernel<M> {
    type Relax = M::Relax;

    #[inline]
    unsafe fn table_lock(&self, frame: PhysFrame) -> &TableLock<M::Relax> {
        let lock = self.frames.meta(frame).table_lock();
        self.machine.about_to_lock(frame, lock);
        lock
    }

    #[inline]
    unsafe fn used_lines(&self, frame: PhysFrame) -> Option<&UsedLines> {
        Some(self.frames.meta(frame).used_lines())
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        if !self.table_supply.grants() {
            self.count().table_refused();
            return None;
        }
        let frame = self.frames.allocate(FrameKind::Table)?;
        let pointer = self.machine.frame_to_pointer(frame);
        self.machine.note(Note::Allocated(frame, FrameRole::Table));
        // SAFETY: the machine's contract makes the 4096 bytes writable, and the frame is ours alone until we return it.
        unsafe { pointer.write_bytes(0, 1) };
        self.machine.seam(Seam::Allocate);
        Some(frame)
    }

    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        self.machine.seam(Seam::Free);
        for table in tables {
            if self.frames.meta(*table).kind() != FrameKind::Table {
                self.count().double_free();
            }
            self.machine.note(Note::Freed(*table, FrameRole::Table));
        }
        self.frames.free(tables.iter().copied());
    }
}

// SAFETY: every CPU has a state of its own; pinning, interrupts, invalidation and `run_on` are the machine's, whose contract
// says what this one does; `run_on` runs `flush_tlb_func` on every target before it returns.
unsafe impl<M: Machine> Cpus for Kernel<M> {
    type Bits = M::Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        self.machine.pinned(f)
    }

    #[inline]
    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<M::Bits> {
        &self.cpus[cpu.index()].tlb
    }

    fn init_root(&self) -> PhysFrame {
        self.init_root
    }

    fn flush_others(
        &self,
        targets: &CpuSet<M::Bits>,
        request: &FlushRequest<'_, M::Bits>,
        meanwhile: impl FnOnce(),
    ) {
        // SAFETY: the machine calls this on each target, with interrupts off.
        let work = |cpu: CpuId| unsafe { flush_tlb_func(self, cpu, request) };
        self.machine.run_on(targets, &work, meanwhile);
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        self.machine.without_interrupts(f)
    }

    fn online_cpus(&self) -> OnlineCpus {
        self.machine.online_cpus()
    }

    fn pcid_support(&self) -> PcidSupport {
        self.machine.pcid_support()
    }

    fn single_page_flush_ceiling(&self) -> u64 {
        self.config.flush_ceiling
    }

    fn invlpg(&self, address: u64) {
        self.machine.invlpg(address);
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        // SAFETY: passed on to our caller.
        unsafe { self.machine.load_cr3(root, pcid, cached) };
    }

    fn answered_early(&self, early: &EarlyAnswer) {
        self.machine.answered_early(early);
    }

    fn invalidate_secondary(&self, ctx_id: CtxId, span: Option<PageSpan>) {
        self.machine.invalidate_secondary(ctx_id, span);
    }

    fn observe(&self, event: TlbEvent) {
        let slot = self.machine.pinned(|cpu| {
            self.counters.of(cpu).tlb(event, self.config.flush_ceiling);
            let tlb = &self.cpus[cpu.index()].tlb;
            tlb.slot(tlb.loaded_asid())
        });
        self.machine.note(Note::Tlb { event, slot });
    }
}

impl<M: Machine> Pages for Kernel<M> {
    type Area = EngineArea;

    #[inline]
    fn unmap_page(&self, area: EngineArea, leaf: &UnmappedLeaf) -> Disposition {
        self.machine.note(Note::Cleared { address: leaf.address, level: leaf.level, frame: leaf.frame });
        self.machine.seam(Seam::Cleared);
        if area.area.kind == AreaKind::Pfn {
            return Disposition::Keep;
        }
        let meta = self.frames.meta(leaf.frame);
        match meta.kind() {
            FrameKind::Page | FrameKind::Block => {}
            // The zero page.
            _ => return Disposition::Keep,
        }
        if self.config.misbehaviour == Misbehaviour::FreeBeforeFlush {
            self.unmap_counted(leaf.frame);
            self.drop_reference(leaf.frame);
            return Disposition::Keep;
        }
        if leaf.value.is_dirty() && meta.owner() != 0 {
            meta.mark_dirty();
            if matches!(area.area.kind, AreaKind::FileShared(_)) {
                return Disposition::FreeAfterRmap;
            }
        }
        self.unmap_counted(leaf.frame);
        Disposition::Free
    }

    fn free_pages(&self, pages: FreedPages<'_>) {
        self.machine.seam(Seam::Free);
        // Single pages go back as one list: the allocator's lock is taken once a chunk.
        let last_references = pages.iter().filter_map(|run| self.release_page(run.frame));
        self.frames.free(last_references);
    }

    fn allocate_batch(&self) -> Option<BatchPage> {
        if !self.batch_supply.grants() {
            return None;
        }
        let frame = self.frames.allocate(FrameKind::Batch)?;
        self.machine.note(Note::Allocated(frame, FrameRole::Page));
        let page = NonNull::new(self.machine.frame_to_pointer(frame).cast::<[u8; 4096]>())?;
        // SAFETY: the frame's 4096 bytes are page-aligned and ours alone until `free_batch`.
        Some(unsafe { BatchPage::new(page) })
    }

    fn free_batch(&self, page: BatchPage) {
        let frame = self.machine.pointer_to_frame(page.into_inner().as_ptr().cast());
        self.machine.note(Note::Freed(frame, FrameRole::Page));
        self.frames.free([frame]);
    }

    fn remove_rmaps(&self, pages: FreedPages<'_>) {
        for run in pages.iter() {
            self.unmap_counted(run.frame);
            if self.frames.meta(run.frame).maps() == 0 {
                self.machine.note(Note::MappedByNobody(run.frame));
            }
        }
    }

    fn unmap_non_present(&self, area: EngineArea, _address: u64, _level: Level, entry: NonPresent) -> Fate {
        match entry {
            NonPresent::Swap { .. } => {
                self.swap_slots.fetch_sub(1, Ordering::Relaxed);
                Fate::Clear
            }
            NonPresent::Marker(Marker::Poison) => area.markers,
            NonPresent::Marker(Marker::Guard) => {
                match area.markers {
                    Fate::Clear => drop(self.guards.fetch_sub(1, Ordering::Relaxed)),
                    Fate::Keep => self.count().guard_kept(),
                }
                area.markers
            }
            // A leaf is being split, under the map lock: not by somebody else.
            NonPresent::Migration { .. } | NonPresent::Other(_) => Fate::Keep,
        }
    }

    fn leaf_was_split(&self, _area: EngineArea, leaf: &UnmappedLeaf) {
        self.count().split();
        self.machine.note(Note::Split { address: leaf.address, level: leaf.level, frame: leaf.frame });
        if leaf.level == Level::Pmd && self.frames.meta(leaf.frame).kind() == FrameKind::Block {
            self.frames.split_block(leaf.frame);
        }
    }

    fn cond_resched(&self) {
        self.machine.cond_resched();
    }

    fn observe_gather(&self, event: GatherEvent) {
        self.count().gather(event);
        self.machine.note(Note::Gather(event));
    }
}

impl<M: Machine> Kernel<M> {
    pub(crate) fn unmap_counted(&self, frame: PhysFrame) {
        if self.frames.meta(frame).remove_mapping().is_err() {
            self.count().double_free();
        }
    }

    /// Drops one reference; a single page whose last one it was is handed back for the free list.
    #[inline]
    fn release_page(&self, frame: PhysFrame) -> Option<PhysFrame> {
        let meta = self.frames.meta(frame);
        match meta.drop_ref() {
            Ok(Last::No) => None,
            Ok(Last::Yes) if meta.kind() == FrameKind::Block => {
                self.machine.note(Note::Freed(frame, FrameRole::Block));
                self.frames.free_block(frame);
                None
            }
            Ok(Last::Yes) => {
                if meta.maps() != 0 {
                    self.count().double_free();
                }
                self.machine.note(Note::Freed(frame, FrameRole::Page));
                Some(frame)
            }
            Err(_) => {
                self.count().double_free();
                None
            }
        }
    }

    /// Drops one reference on each page, a chunk at a time.
    pub(crate) fn drop_references(&self, frames: impl IntoIterator<Item = PhysFrame>) {
        let chunk = usize::from(self.config.limits.free_chunk.max(1));
        for (number, frame) in (1..).zip(frames) {
            self.drop_reference(frame);
            if usize::is_multiple_of(number, chunk) {
                self.machine.cond_resched();
            }
        }
    }

    /// Drops one reference on a page, freeing it if that was the last.
    pub(crate) fn drop_reference(&self, frame: PhysFrame) {
        self.frames.free(self.release_page(frame));
    }
}
