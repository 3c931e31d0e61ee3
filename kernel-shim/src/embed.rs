//! The engine's three traits, implemented for this kernel: the part to copy from.
//!
//! Most methods are a line or two, and many pass a question on to the machine. What the checker of
//! this project wants to hear is not here: `observed.rs` wraps around it, and nothing in this file
//! knows that.
#![expect(unsafe_code, reason = "the engine believes the implementor about memory and CPUs")]

use alloc::boxed::Box;
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicI64, Ordering};

use crossbeam_utils::CachePadded;
use mmu_gather::pagetable::{Level, Marker, NonPresent, TableLock, TableMemory, UsedLines};
use mmu_gather::tlb::{
    Answers, CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, CtxId, OnlineCpus, PageSpan, PcidSupport,
};
use mmu_gather::{BatchPage, Disposition, Fate, FreedPages, Pages, UnmappedLeaf, Vma, VmaKind};
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::counters::Counters;
use crate::frame::{FrameKind, Frames};
use crate::machine::Machine;
use crate::swap::Swap;
use crate::vma::{self, Area, AreaKind};

/// What this kernel keeps that the engine asks for.
///
/// What every flush reads shares no cache line with what calls write.
pub struct Embedder<M: Machine> {
    pub(crate) machine: M,
    pub(crate) frames: Frames<M::Relax>,
    /// The engine's state of each CPU.
    pub(crate) cpus: Box<[CpuTlb<M::Bits>]>,
    /// The root of the kernel's own address space.
    pub(crate) init_root: PhysFrame,
    /// More pages than this are not invalidated one by one.
    pub(crate) flush_ceiling: u64,
    pub(crate) counters: Counters,
    pub(crate) swap: CachePadded<Swap<M::Relax>>,
    /// Entries that are guards.
    pub(crate) guards: CachePadded<AtomicI64>,
}

impl<M: Machine> fmt::Debug for Embedder<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Embedder").field("cpus", &self.cpus).finish_non_exhaustive()
    }
}

/// What the engine hands back with every page: the area, and why it is being unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineArea {
    /// The area.
    pub area: Area,
    /// What becomes of markers: an unmapped area loses them, a discarded one keeps them (Linux:
    /// ZAP_FLAG_DROP_MARKER).
    pub markers: Fate,
}

impl EngineArea {
    /// Whether the kernel counts the frames that are mapped there.
    pub(crate) fn is_counted(&self) -> bool {
        self.area.kind != AreaKind::Pfn
    }
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

// SAFETY: the machine's contract: the pointer is to the frame's bytes, valid as long as the
// machine.
unsafe impl<M: Machine> PageTableFrameMapping for Embedder<M> {
    #[inline]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.machine.frame_to_pointer(frame)
    }
}

// SAFETY: a frame allocated as `Table` belongs to no other user and is zeroed here; every frame has
// a lock of its own, in its metadata.
unsafe impl<M: Machine> TableMemory for Embedder<M> {
    type Lock = TableLock<M::Relax>;

    #[inline]
    unsafe fn table_lock(&self, frame: PhysFrame) -> &TableLock<M::Relax> {
        self.frames.meta(frame).table_lock()
    }

    #[inline]
    unsafe fn used_lines(&self, frame: PhysFrame) -> Option<&UsedLines> {
        Some(self.frames.meta(frame).used_lines())
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        let frame = self.take_frame(FrameKind::Table)?;
        // SAFETY: the machine's contract makes the 4096 bytes writable, and the frame is ours alone
        // until we return it.
        unsafe { self.machine.frame_to_pointer(frame).write_bytes(0, 1) };
        Some(frame)
    }

    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        self.give_back_tables(tables);
    }
}

// SAFETY: every CPU has a state of its own; pinning, interrupts and invalidation are the machine's,
// whose contract says what this one does.
unsafe impl<M: Machine> Cpus for Embedder<M> {
    type Bits = M::Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        self.machine.pinned(f)
    }

    #[inline]
    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<M::Bits> {
        &self.cpus[cpu.index()]
    }

    fn init_root(&self) -> PhysFrame {
        self.init_root
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<M::Bits>) {
        self.machine.send_flush_interrupt(targets);
    }

    fn wait_for_answers(&self, answers: Answers<'_, M::Bits>) {
        self.machine.wait_for_answers(answers);
    }

    fn answered(&self, initiator: CpuId) {
        self.machine.answered(initiator);
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
        self.flush_ceiling
    }

    fn invlpg(&self, address: u64) {
        self.machine.invlpg(address);
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        // SAFETY: passed on to our caller.
        unsafe { self.machine.load_cr3(root, pcid, cached) };
    }

    fn invalidate_secondary(&self, ctx_id: CtxId, span: Option<PageSpan>) {
        self.machine.invalidate_secondary(ctx_id, span);
    }
}

impl<M: Machine> Pages for Embedder<M> {
    type Area = EngineArea;

    #[inline]
    fn unmap_page(&self, area: EngineArea, leaf: &UnmappedLeaf) -> Disposition {
        if !area.is_counted() {
            return Disposition::Keep;
        }
        let meta = self.frames.meta(leaf.frame);
        match meta.kind() {
            FrameKind::Page | FrameKind::Block => {}
            // The zero page.
            _ => return Disposition::Keep,
        }
        if leaf.value.is_dirty() && meta.owner() != 0 {
            meta.mark_dirty();
            if matches!(area.area.kind, AreaKind::FileShared(_)) {
                return Disposition::FreeAfterRmap;
            }
        }
        self.remove_mapping(leaf.frame);
        Disposition::Free
    }

    fn free_pages(&self, pages: FreedPages<'_>) {
        // A run is one reference on each of its frames.
        let frames =
            pages.iter().flat_map(|run| (0..u64::from(run.nr_pages)).map(move |page| run.frame + page));
        self.drop_references(frames);
    }

    fn allocate_batch(&self) -> Option<BatchPage> {
        let frame = self.take_frame(FrameKind::Batch)?;
        let page = NonNull::new(self.machine.frame_to_pointer(frame).cast::<[u8; 4096]>())?;
        // SAFETY: the frame's 4096 bytes are page-aligned and ours alone until `free_batch`.
        Some(unsafe { BatchPage::new(page) })
    }

    fn free_batch(&self, page: BatchPage) {
        let frame = self.machine.pointer_to_frame(page.into_inner().as_ptr().cast());
        self.give_back(frame, FrameKind::Batch);
    }

    fn remove_rmaps(&self, pages: FreedPages<'_>) {
        for run in pages.iter() {
            self.remove_mapping(run.frame);
        }
    }

    fn unmap_non_present(&self, area: EngineArea, _address: u64, _level: Level, entry: NonPresent) -> Fate {
        match entry {
            NonPresent::Swap { slot, .. } => {
                self.swap.drop_entry(slot);
                Fate::Clear
            }
            NonPresent::Marker(Marker::Poison) => area.markers,
            NonPresent::Marker(Marker::Guard) => {
                if area.markers == Fate::Clear {
                    self.guards.fetch_sub(1, Ordering::Relaxed);
                }
                area.markers
            }
            // A fault copies the page that was there: it finds its mark gone, and begins anew.
            NonPresent::Other(_) => Fate::Clear,
            // This call is splitting a leaf. No other does, under the same map lock.
            NonPresent::Migration { .. } => Fate::Keep,
        }
    }

    fn leaf_was_split(&self, _area: EngineArea, leaf: &UnmappedLeaf) {
        let is_block = |frame| self.frames.get(frame).is_some_and(|meta| meta.kind() == FrameKind::Block);
        if leaf.level == Level::Pmd && is_block(leaf.frame) {
            self.frames.split_block(leaf.frame);
        }
    }

    fn cond_resched(&self) {
        self.machine.cond_resched();
    }
}
