//! The kernel as the engine meets it: what is in `embed.rs`, with all that this project adds around
//! it.
//!
//! A checker hears of what happens, other CPUs get their turn at seams, events are counted, memory
//! is short when a test wants it to be, and a bug can be planted. A kernel that copies `embed.rs`
//! needs none of this.
#![expect(unsafe_code, reason = "passes on what the engine believes the implementor about")]

use core::ops::Deref;

use mmu_gather::pagetable::{Level, Marker, NonPresent, TableMemory, UsedLines, VirtRange};
use mmu_gather::tlb::{
    Answers, CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, CtxId, EarlyAnswer, FlushRequest, OnlineCpus,
    PageSpan, PcidSupport, TlbEvent,
};
use mmu_gather::{BatchPage, Disposition, Fate, FreedPages, GatherEvent, Pages, UnmappedLeaf};
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::embed::{Embedder, EngineArea};
use crate::frame::FrameKind;
use crate::kernel::{Kernel, Misbehaviour};
use crate::locks::seam_lock::SeamLock;
use crate::machine::{Content, Contents, Machine, Note, Seam, Shows};
use crate::mm::Mm;
use crate::supply::Site;
use crate::vma::{AreaKind, Vma};

/// What the kernel keeps for the engine, without what is added here: the traits of `embed.rs` as
/// they are.
impl<M: Machine> Deref for Kernel<M> {
    type Target = Embedder<M>;

    #[inline]
    fn deref(&self) -> &Embedder<M> {
        &self.embedder
    }
}

// SAFETY: passed on.
unsafe impl<M: Machine> PageTableFrameMapping for Kernel<M> {
    #[inline]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.embedder.frame_to_pointer(frame)
    }
}

// SAFETY: passed on.
unsafe impl<M: Machine> TableMemory for Kernel<M> {
    type Lock = SeamLock<M>;

    #[inline]
    unsafe fn table_lock(&self, frame: PhysFrame) -> &SeamLock<M> {
        // SAFETY: passed on to our caller.
        let lock = unsafe { self.embedder.table_lock(frame) };
        self.machine.about_to_lock(frame, lock);
        SeamLock::around(lock)
    }

    #[inline]
    unsafe fn used_lines(&self, frame: PhysFrame) -> Option<&UsedLines> {
        if !self.machine.notes_used_lines() {
            return None;
        }
        // SAFETY: passed on to our caller.
        unsafe { self.embedder.used_lines(frame) }
    }

    #[inline]
    fn between_look_and_change(&self) {
        self.machine.seam(Seam::Entry);
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        self.take_table(Site::Table)
    }

    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        self.machine.seam(Seam::Free);
        // SAFETY: passed on to our caller.
        unsafe { self.embedder.free_tables(tables) };
    }
}

// SAFETY: passed on: `flush_others` posts the very request, once, into the mailboxes of the same
// CPUs.
unsafe impl<M: Machine> Cpus for Kernel<M> {
    type Bits = M::Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        self.embedder.pinned(f)
    }

    #[inline]
    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<M::Bits> {
        self.embedder.cpu_state(cpu)
    }

    fn init_root(&self) -> PhysFrame {
        self.embedder.init_root()
    }

    fn flush_others(
        &self,
        targets: &CpuSet<M::Bits>,
        request: &FlushRequest<'_, M::Bits>,
        meanwhile: impl FnOnce(),
    ) {
        for target in targets.iter() {
            self.machine.note(Note::Asked(target));
        }
        self.embedder.flush_others(targets, request, meanwhile);
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<M::Bits>) {
        self.embedder.send_flush_interrupt(targets);
    }

    fn wait_for_answers(&self, answers: Answers<'_, M::Bits>) {
        self.embedder.wait_for_answers(answers);
    }

    fn answered(&self, initiator: CpuId) {
        self.embedder.answered(initiator);
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        self.embedder.without_interrupts(f)
    }

    fn online_cpus(&self) -> OnlineCpus {
        self.embedder.online_cpus()
    }

    fn pcid_support(&self) -> PcidSupport {
        self.embedder.pcid_support()
    }

    fn single_page_flush_ceiling(&self) -> u64 {
        self.embedder.single_page_flush_ceiling()
    }

    fn invlpg(&self, address: u64) {
        self.embedder.invlpg(address);
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        // SAFETY: passed on to our caller.
        unsafe { self.embedder.load_cr3(root, pcid, cached) };
    }

    fn cr3(&self) -> Option<PhysFrame> {
        self.machine.cr3().or_else(|| self.embedder.cr3())
    }

    fn answered_early(&self, early: &EarlyAnswer) {
        self.machine.answered_early(early);
    }

    fn invalidate_secondary(&self, ctx_id: CtxId, span: Option<PageSpan>) {
        self.embedder.invalidate_secondary(ctx_id, span);
    }

    #[inline]
    fn between_flush_steps(&self) {
        self.machine.seam(Seam::Step);
    }

    fn observe(&self, event: TlbEvent) {
        let slot = self.machine.pinned(|cpu| {
            self.counters.of_cpu(cpu).tlb(event, self.flush_ceiling);
            let tlb = self.embedder.cpu_state(cpu);
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
        if self.config.misbehaviour == Misbehaviour::FreeBeforeFlush {
            return self.free_before_flush(area, leaf);
        }
        let disposition = self.embedder.unmap_page(area, leaf);
        match disposition {
            Disposition::Free => self.note_unmapping(leaf),
            Disposition::FreeAfterRmap => self.machine.note(Note::RmapDelayed),
            Disposition::Keep => {}
        }
        disposition
    }

    fn free_pages(&self, pages: FreedPages<'_>) {
        self.machine.seam(Seam::Free);
        if pages.frames().is_none() {
            self.count().run_released();
        }
        self.embedder.free_pages(pages);
    }

    fn allocate_batch(&self) -> Option<BatchPage> {
        let page = if self.batch_supply.grants(Site::Batch) { self.embedder.allocate_batch() } else { None };
        self.machine.note(if page.is_some() { Note::BatchTaken } else { Note::BatchRefused });
        page
    }

    fn free_batch(&self, page: BatchPage) {
        self.embedder.free_batch(page);
    }

    fn remove_rmaps(&self, pages: FreedPages<'_>) {
        self.embedder.remove_rmaps(pages);
        for run in pages.iter() {
            self.note_if_mapped_by_nobody(run.frame);
        }
    }

    fn unmap_non_present(&self, area: EngineArea, address: u64, level: Level, entry: NonPresent) -> Fate {
        let fate = self.embedder.unmap_non_present(area, address, level, entry);
        if fate == Fate::Keep && entry == NonPresent::Marker(Marker::Guard) {
            self.count().guard_kept();
        }
        fate
    }

    fn leaf_was_split(&self, area: EngineArea, leaf: &UnmappedLeaf) {
        self.count().split();
        self.machine.note(Note::Split { address: leaf.address, level: leaf.level, frame: leaf.frame });
        self.embedder.leaf_was_split(area, leaf);
    }

    fn cond_resched(&self) {
        self.embedder.cond_resched();
    }

    #[inline]
    fn between_gather_steps(&self) {
        self.machine.seam(Seam::Step);
    }

    fn observe_gather(&self, event: GatherEvent) {
        self.count().gather(event);
        self.machine.note(Note::Gather(event));
    }
}

/// What programs are to read.
impl<M: Machine> Kernel<M> {
    /// Says what programs are to read in an area that is new, or has grown by this. The map lock is
    /// held for writing.
    pub(crate) fn note_shown(&self, mm: &Mm<M>, vma: Vma) {
        let first = vma.area.file_page(vma.range.start());
        let shows = match vma.area.kind {
            AreaKind::Anon => Shows::Zeroes,
            AreaKind::FilePrivate(file) => Shows::PrivateFile { file, first },
            AreaKind::FileShared(file) => Shows::SharedFile { file, first },
            AreaKind::Pfn => Shows::Anything,
        };
        self.note_contents(Contents::Shown { root: mm.root(), range: vma.range, shows });
    }

    /// Says that pages have moved, or are back after a move that failed, and that every CPU knows.
    pub(crate) fn note_moved(&self, mm: &Mm<M>, from: VirtRange, to: u64) {
        self.note_contents(Contents::Moving { root: mm.root(), from, to });
        self.note_contents(Contents::Moved { root: mm.root(), from, to });
    }

    pub(crate) fn note_contents(&self, contents: Contents) {
        self.machine.note(Note::Contents(contents));
    }
}

impl<M: Machine> Kernel<M> {
    /// A table, unless there is to be none.
    pub(crate) fn take_table(&self, site: Site) -> Option<PhysFrame> {
        if !self.table_supply.grants(site) {
            self.count().table_refused();
            return None;
        }
        let frame = self.embedder.allocate_table()?;
        self.machine.seam(Seam::Allocate);
        Some(frame)
    }

    /// Whether a frame for a program's page is to be had.
    pub(crate) fn may_have_frame(&self, site: Site) -> bool {
        let may = self.frame_supply.grants(site);
        if !may {
            self.count().frame_refused();
        }
        may
    }

    /// An entry maps its page no more, and was counted.
    fn note_unmapping(&self, leaf: &UnmappedLeaf) {
        let meta = self.frames.meta(leaf.frame);
        if leaf.value.is_dirty() && meta.maps() != 0 {
            // Of a page that fork has shared: the other entry may be from before the write.
            meta.mark_dirty();
        }
        self.note_if_mapped_by_nobody(leaf.frame);
    }

    /// A page of a file that nothing maps any more is written back, in the model: what it is to be
    /// written back for must be known by now.
    fn note_if_mapped_by_nobody(&self, frame: PhysFrame) {
        let meta = self.frames.meta(frame);
        if meta.is_of_a_file() && meta.maps() == 0 {
            let content = if meta.take_dirty() { Content::Dirty } else { Content::Clean };
            self.machine.note(Note::MappedByNobody(frame, content));
        }
    }

    /// The planted bug: a page is freed when its entry is cleared.
    #[cold]
    fn free_before_flush(&self, area: EngineArea, leaf: &UnmappedLeaf) -> Disposition {
        let kind = if area.is_counted() { self.frames.meta(leaf.frame).kind() } else { FrameKind::Reserved };
        match kind {
            FrameKind::Page | FrameKind::Block => {
                self.remove_mapping(leaf.frame);
                self.drop_references([leaf.frame]);
            }
            _ => {}
        }
        Disposition::Keep
    }
}
