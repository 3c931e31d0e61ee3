//! A kernel as small as one can be: areas in a `BTreeMap`, one lock for each address space, pages
//! that are a program's own. It embeds the engine, and its hardware is a hosted machine.

use core::pin::Pin;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicU64, Ordering};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use mmu_gather::pagetable::{
    Bounds, EntryValue, Level, MapError, PagingMode, TableLock, TableMemory, UsedLines, VirtRange,
};
use mmu_gather::tlb::{
    Answers, CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, CtxIds, FlushRequest, MmContext, OnlineCpus,
    PcidSupport, enter_lazy_tlb, flush_interrupt, flush_tlb_func, init_cpu, offline_cpu, switch_mm,
};
use mmu_gather::{
    BatchPage, CutLeaf, Disposition, FreedPages, Limits, Mm, MmuGather, Pages, UnmappedLeaf, Vma, VmaKind,
    exit_mmap, zap_page_range,
};
use mmu_hosted::{Bits, FrameRole, GiveWay, HostedMachine, Seam};
use spin::mutex::SpinMutex;
use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PageTableFlags, PhysFrame};

use crate::ipis::OwnIpis;
use crate::mistake::Mistake;

/// A lock that lets other CPUs run while it waits.
type Lock<T> = SpinMutex<T, GiveWay>;

pub(crate) struct Stranger {
    machine: Arc<HostedMachine>,
    mistake: Mistake,
    free: Lock<Vec<PhysFrame>>,
    std_lock: std::sync::Mutex<()>,
    /// One for each frame.
    table_locks: Box<[TableLock<GiveWay>]>,
    /// One for each frame, if the kernel keeps them.
    used_lines: Option<Box<[UsedLines]>>,
    cpus: Box<[CpuTlb<Bits>]>,
    /// Keeps the address space that a CPU has loaded.
    loaded: Box<[Lock<Option<Arc<Space>>>]>,
    /// Its own calls to other CPUs, if it has any.
    ipis: Option<OwnIpis>,
    /// Pages that are lent and given to programs as well.
    lent: Lock<Vec<PhysFrame>>,
    /// Address spaces that are never dropped.
    kept: Lock<Vec<Arc<Space>>>,
    init_root: PhysFrame,
    ids: CtxIds,
}

/// An address space.
pub(crate) struct Space {
    engine: Pin<Box<Mm<Bits>>>,
    /// Where it is since it was moved.
    moved: OnceLock<Pin<Box<Mm<Bits>>>>,
    /// By start.
    areas: Lock<BTreeMap<u64, Area>>,
}

#[derive(Clone, Copy)]
pub(crate) struct Area {
    end: u64,
    flags: PageTableFlags,
}

/// The call was refused.
#[derive(Debug)]
pub(crate) struct Refused;

// SAFETY: a frame of the machine's memory stays where it is.
unsafe impl PageTableFrameMapping for Stranger {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.machine.frame_to_pointer(frame)
    }
}

// SAFETY: a table is zeroed, and given out once until it is freed; each has a lock of its own.
unsafe impl TableMemory for Stranger {
    type Lock = TableLock<GiveWay>;

    unsafe fn table_lock(&self, table: PhysFrame) -> &TableLock<GiveWay> {
        let lock = &self.table_locks[number(table)];
        // SAFETY: the locks live as long as the kernel.
        unsafe { self.machine.about_to_lock(table, lock) };
        lock
    }

    fn between_look_and_change(&self) {
        self.machine.seam(Seam::Entry);
    }

    unsafe fn used_lines(&self, table: PhysFrame) -> Option<&UsedLines> {
        self.used_lines.as_ref().map(|used| &used[number(table)])
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        let table = self.take(FrameRole::Table)?;
        if self.mistake != Mistake::DirtyTables {
            // SAFETY: the frame was free: nobody else uses it.
            unsafe { self.machine.frame_to_pointer(table).write(PageTable::new()) };
        }
        Some(table)
    }

    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        tables.iter().for_each(|table| self.give(*table, FrameRole::Table));
    }
}

// SAFETY: each CPU has a state of its own; the rest is the machine's.
unsafe impl Cpus for Stranger {
    type Bits = Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        self.machine.pinned(f)
    }

    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        &self.cpus[if self.mistake == Mistake::OneCpuState { 0 } else { cpu.index() }]
    }

    fn init_root(&self) -> PhysFrame {
        self.init_root
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Bits>) {
        if self.mistake != Mistake::InterruptsNotSent {
            self.machine.send_flush_interrupt(targets);
        }
    }

    fn flush_others(
        &self,
        targets: &CpuSet<Bits>,
        request: &FlushRequest<'_, Bits>,
        meanwhile: impl FnOnce(),
    ) {
        match &self.ipis {
            None => ByMail(self).flush_others(targets, request, meanwhile),
            Some(ipis) => ipis.flush_others(&self.machine, targets, request, meanwhile),
        }
    }

    fn wait_for_answers(&self, answers: Answers<'_, Bits>) {
        match self.mistake {
            Mistake::WaitLeftOut => ByMail(self).wait_for_answers(answers),
            _ => self.machine.wait_for_answers(answers),
        }
    }

    fn answered(&self, initiator: CpuId) {
        self.machine.answered(initiator);
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        match self.mistake {
            Mistake::InterruptsLeftOut => ByMail(self).without_interrupts(f),
            _ => self.machine.without_interrupts(f),
        }
    }

    fn online_cpus(&self) -> OnlineCpus {
        self.machine.online_cpus()
    }

    fn pcid_support(&self) -> PcidSupport {
        match self.mistake {
            Mistake::PcidsSaidOn => PcidSupport::On,
            _ => self.machine.pcid_support(),
        }
    }

    fn cr3(&self) -> Option<PhysFrame> {
        self.machine.cr3()
    }

    fn invlpg(&self, address: u64) {
        match self.mistake {
            Mistake::InvlpgLeftOut => ByMail(self).invlpg(address),
            _ => self.machine.invlpg(address),
        }
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        match self.mistake {
            // SAFETY: the caller's promise. It is the instruction, which ends the process.
            Mistake::LoadCr3LeftOut => unsafe { ByMail(self).load_cr3(root, pcid, cached) },
            _ => self.machine.load_cr3(root, pcid, cached),
        }
    }
}

/// The engine's defaults: the mailbox, which a kernel without calls of its own has by leaving
/// `flush_others` out, and instructions of ring 0.
struct ByMail<'a>(&'a Stranger);

// SAFETY: the states are the kernel's, and the flush that the kernel is called by waits.
unsafe impl Cpus for ByMail<'_> {
    type Bits = Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        self.0.pinned(f)
    }

    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        self.0.cpu_state(cpu)
    }

    fn init_root(&self) -> PhysFrame {
        self.0.init_root
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Bits>) {
        self.0.send_flush_interrupt(targets);
    }
}

impl Pages for Stranger {
    type Area = ();

    fn unmap_page(&self, (): (), leaf: &UnmappedLeaf) -> Disposition {
        self.machine.seam(Seam::Cleared);
        match self.mistake {
            Mistake::FreedWhenUnmapped => {
                self.give(leaf.frame, FrameRole::Page);
                Disposition::Keep
            }
            Mistake::NeverFreed => Disposition::Keep,
            _ => Disposition::Free,
        }
    }

    fn free_pages(&self, pages: FreedPages<'_>) {
        for run in pages.iter() {
            self.give(run.frame, FrameRole::Page);
            if self.mistake == Mistake::FreedTwice {
                self.give(run.frame, FrameRole::Page);
            }
        }
    }

    fn allocate_batch(&self) -> Option<BatchPage> {
        let frame = self.take(FrameRole::Page)?;
        let late = match self.mistake {
            Mistake::BatchPageNotAligned => 1,
            Mistake::BatchPageShort => 2048,
            _ => 0,
        };
        let page = NonNull::new(self.machine.frame_to_pointer(frame).wrapping_byte_add(late))?.cast();
        // SAFETY: the frame was free: nobody else uses its 4096 bytes.
        let lent = unsafe { BatchPage::new(page) };
        self.machine.lent(page);
        if self.mistake == Mistake::LentPageMapped {
            self.lent.lock().push(frame);
        }
        Some(lent)
    }

    fn free_batch(&self, page: BatchPage) {
        let frame = self.machine.pointer_to_frame(page.into_inner().as_ptr().cast());
        if self.mistake != Mistake::FreeBatchForgotten {
            self.give(frame, FrameRole::Page);
        }
    }

    fn cond_resched(&self) {
        self.machine.cond_resched();
    }
}

impl Stranger {
    pub(crate) fn with(machine: &Arc<HostedMachine>, mistake: Mistake) -> Self {
        let frames = machine.nr_reserved_frames()..machine.nr_frames();
        let frame = |number| PhysFrame::containing_address(PhysAddr::new(number << 12));
        let mut kernel = Self {
            mistake,
            std_lock: std::sync::Mutex::new(()),
            free: Lock::new(frames.rev().map(frame).collect()),
            table_locks: (0..machine.nr_frames()).map(|_| TableLock::new(())).collect(),
            used_lines: mistake
                .keeps_used_lines()
                .then(|| (0..machine.nr_frames()).map(|_| UsedLines::new()).collect()),
            cpus: (0..machine.nr_cpus()).map(|_| CpuTlb::new()).collect(),
            loaded: (0..machine.nr_cpus()).map(|_| Lock::new(None)).collect(),
            ipis: mistake.has_own_ipis().then(|| OwnIpis::new(machine.nr_cpus(), mistake)),
            lent: Lock::new(Vec::new()),
            kept: Lock::new(Vec::new()),
            init_root: frame(0),
            ids: CtxIds::new(),
            machine: Arc::clone(machine),
        };
        kernel.init_root = kernel.allocate_table().expect("the machine has memory");
        kernel
    }

    fn take(&self, role: FrameRole) -> Option<PhysFrame> {
        let frame = self.free.lock().pop()?;
        let _held = (self.mistake == Mistake::LockOfStd).then(|| self.std_lock.lock());
        self.machine.allocated(frame, role);
        Some(frame)
    }

    fn give(&self, frame: PhysFrame, role: FrameRole) {
        self.machine.freed(frame, role);
        // What two use must not become a table.
        if !self.lent.lock().contains(&frame) {
            self.free.lock().push(frame);
        }
    }

    pub(crate) fn start(&self) {
        // SAFETY: this CPU has loaded nothing yet.
        self.without_interrupts(|| unsafe { init_cpu(self, self.machine.current()) });
    }

    /// This CPU goes off.
    pub(crate) fn stop(&self) {
        let cpu = self.machine.current();
        if self.mistake != Mistake::OffInTheMask {
            // SAFETY: interrupts are off; nothing runs here until `start`.
            self.without_interrupts(|| unsafe { offline_cpu(self, cpu) });
            *self.loaded[cpu.index()].lock() = None;
        }
    }

    /// The handler of the flush interrupt.
    pub(crate) fn handle_interrupt(&self) {
        let here = self.machine.current();
        if let Some(ipis) = &self.ipis {
            // SAFETY: interrupts are off in a handler.
            ipis.answer(&self.machine, |request| unsafe { flush_tlb_func(self, here, request) });
            return;
        }
        let cpu = match self.mistake {
            Mistake::HandlerDoesNothing => return,
            Mistake::HandlerNamesAnother => CpuId::new((here.number() + 1) % self.machine.nr_cpus()),
            _ => here,
        };
        // SAFETY: interrupts are off in a handler.
        unsafe { flush_interrupt(self, cpu) };
    }

    pub(crate) fn new_space(&self) -> Option<Arc<Space>> {
        let root = self.allocate_table()?;
        // SAFETY: the root is an empty table that is this address space's alone.
        let engine = Box::pin(unsafe { Mm::new(&self.ids, root, PagingMode::FourLevel) });
        let space = Arc::new(Space { engine, moved: OnceLock::new(), areas: Lock::new(BTreeMap::new()) });
        if self.mistake.uses_requests_late() {
            self.kept.lock().push(Arc::clone(&space));
        }
        Some(space)
    }

    pub(crate) fn run(&self, space: Option<&Arc<Space>>) {
        let cpu = self.machine.current();
        self.without_interrupts(|| {
            if self.mistake == Mistake::SwitchOfItsOwn {
                let root = space.map_or(self.init_root, |space| space.root());
                let pcid = Pcid::new(0).expect("below 4096");
                self.machine.load_cr3(root, pcid, CachedTranslations::Flush);
            } else {
                // SAFETY: interrupts are off; `loaded` keeps the address space.
                unsafe { switch_mm(self, cpu, space.map(|space| space.context())) };
                if self.mistake == Mistake::MmMoves
                    && let Some(space) = space
                {
                    space.move_engine();
                }
            }
        });
        *self.loaded[cpu.index()].lock() = space.cloned();
    }

    pub(crate) fn idle(&self) {
        // SAFETY: interrupts are off; kernel threads use no user address.
        self.without_interrupts(|| unsafe { enter_lazy_tlb(self, self.machine.current()) });
    }

    pub(crate) fn mmap(&self, space: &Space, range: VirtRange, flags: PageTableFlags) -> Result<(), Refused> {
        let mut areas = space.areas.lock();
        let is_taken =
            areas.range(..range.end()).next_back().is_some_and(|(_, area)| area.end > range.start());
        if is_taken {
            return Err(Refused);
        }
        areas.insert(range.start(), Area { end: range.end(), flags });
        Ok(())
    }

    pub(crate) fn page_fault(
        &self,
        space: &Space,
        address: u64,
        needs: PageTableFlags,
    ) -> Result<(), Refused> {
        let areas = space.areas.lock();
        let (_, area) = areas.range(..=address).next_back().ok_or(Refused)?;
        if area.end <= address || !area.flags.contains(needs) {
            return Err(Refused);
        }
        // SAFETY: the lock keeps the area, and with it the tables.
        let table = unsafe { space.engine().space().find_table(self, address, Level::Pte) };
        let locked =
            table.filter(|_| self.mistake == Mistake::MapsUnderTableLock).map(|table| table.lock(self));
        let page = self.take_for_program().ok_or(Refused)?;
        let entry = EntryValue::leaf(Level::Pte, page.start_address(), area.flags);
        if self.mistake == Mistake::EntriesPastUsedLines
            && let Some(table) = table
        {
            let written = self.write_by_hand(table.frame(), Level::Pte.index(address), entry);
            if !written {
                self.give(page, FrameRole::Page);
            }
            return Ok(());
        }
        // SAFETY: the lock keeps the area, and with it the tables; the page is new.
        let mapped = unsafe { space.engine().space().map(self, address & !0xfff, Level::Pte, entry) };
        drop(locked);
        if mapped.is_err() {
            self.give(page, FrameRole::Page);
        }
        match mapped {
            // Another CPU was faster.
            Ok(()) | Err(MapError::Occupied(..)) => Ok(()),
            Err(_) => Err(Refused),
        }
    }

    /// A page for a program, which may be one that is lent.
    fn take_for_program(&self) -> Option<PhysFrame> {
        let lent = self.lent.lock().last().copied().filter(|page| self.machine.is_lent(*page));
        let Some(page) = lent else {
            return match self.mistake {
                Mistake::AllocationsNotTold => self.free.lock().pop(),
                _ => self.take(FrameRole::Page),
            };
        };
        self.machine.allocated(page, FrameRole::Page);
        Some(page)
    }

    /// The kernel's own mapper writes an entry of a table, if there is none; whether it did.
    fn write_by_hand(&self, table: PhysFrame, index: usize, entry: EntryValue) -> bool {
        let first: *mut AtomicU64 = self.machine.frame_to_pointer(table).cast();
        // SAFETY: one of the 512 entries of the table, which are only used as atomics.
        let place = unsafe { &*first.wrapping_add(index) };
        place.compare_exchange(0, entry.bits(), Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    pub(crate) fn munmap(&self, space: &Space, range: VirtRange) -> Result<(), CutLeaf> {
        if self.mistake == Mistake::InterruptsOff {
            return self.machine.without_interrupts(|| self.take_down(space, range));
        }
        self.take_down(space, range)
    }

    fn take_down(&self, space: &Space, range: VirtRange) -> Result<(), CutLeaf> {
        let mut areas = space.areas.lock();
        let detached = take_out(&mut areas, range);
        assert!(self.mistake != Mistake::UnmapPanics || detached.len() < 2, "more areas than expected");
        let below = areas.range(..range.start()).next_back().map(|(_, area)| area.end);
        let above = areas.range(range.end()..).next().map(|(start, _)| *start);
        let bounds = match self.mistake {
            Mistake::NeighboursForgotten => Bounds::whole(),
            _ => Bounds::between(below, above),
        };
        // SAFETY: the lock of the areas is held until `flush` has returned.
        let mut gather = unsafe { MmuGather::new(self, space.engine()) };
        gather.unmap_vmas(detached.iter().copied(), range)?;
        // SAFETY: the areas are taken out, and `bounds` are the neighbours that stay.
        unsafe { gather.free_pgtables(detached, bounds) };
        if self.mistake == Mistake::LockDroppedEarly {
            drop(areas);
            self.machine.seam(Seam::Lock);
            gather.flush().free();
            return Ok(());
        }
        let flushed = gather.flush();
        drop(areas);
        flushed.free();
        Ok(())
    }

    /// MADV_DONTNEED.
    pub(crate) fn drop_pages(&self, space: &Space, range: VirtRange) -> Result<(), CutLeaf> {
        let areas = space.areas.lock();
        for area in areas.iter().map(|(start, area)| vma(*start, area.end)) {
            // SAFETY: the lock of the areas is held until the pages are flushed.
            let flushed = unsafe { zap_page_range(self, space.engine(), &Limits::DEFAULT, &area, range) }?;
            flushed.free();
        }
        Ok(())
    }

    pub(crate) fn mprotect(&self, space: &Space, range: VirtRange, flags: PageTableFlags) {
        let mut areas = space.areas.lock();
        let parts = take_out(&mut areas, range);
        // SAFETY: the lock of the areas is held until `flush` has returned.
        let mut gather = unsafe { MmuGather::new(self, space.engine()) };
        for part in parts.iter().map(|part| part.range) {
            areas.insert(part.start(), Area { end: part.end(), flags });
            for address in (part.start()..part.end()).step_by(4096) {
                // SAFETY: the lock keeps the area, and with it the tables.
                let table = unsafe { space.engine().space().find_table(self, address, Level::Pte) };
                let Some(locked) = table.map(|table| table.lock(self)) else { continue };
                let entry = locked.entry(address);
                let mut old = entry.load();
                // Hardware may set A or D meanwhile.
                while old.is_present() {
                    let kept = old.flags() & (PageTableFlags::ACCESSED | PageTableFlags::DIRTY);
                    let new = EntryValue::leaf(Level::Pte, old.leaf_address(Level::Pte), kept | flags);
                    // SAFETY: the same page with the rights of its area.
                    match unsafe { entry.compare_exchange(old, new) } {
                        Err(found) => old = found,
                        Ok(()) if self.mistake == Mistake::ChangedForgotten => break,
                        Ok(()) => {
                            gather.changed(VirtRange::of_entry(Level::Pte, address), Level::Pte);
                            break;
                        }
                    }
                }
            }
        }
        gather.flush().free();
    }

    pub(crate) fn exit(&self, space: &Space) {
        let mut areas = space.areas.lock();
        let all = take_out(&mut areas, space.engine().space().user_range());
        // SAFETY: these are all areas, and no program is left.
        let flushed =
            unsafe { exit_mmap(self, space.engine(), &Limits::DEFAULT, all.iter().copied(), || ()) };
        drop(areas);
        flushed.free();
        // SAFETY: no CPU has the root in CR3 any more, and nothing is mapped below it.
        unsafe { self.free_tables(&[space.root()]) };
    }
}

impl Space {
    pub(crate) fn root(&self) -> PhysFrame {
        self.engine().space().root()
    }

    fn engine(&self) -> &Mm<Bits> {
        self.moved.get().unwrap_or(&self.engine)
    }

    fn context(&self) -> Pin<&MmContext<Bits>> {
        self.moved.get().unwrap_or(&self.engine).as_ref().pinned_context()
    }

    /// As when a structure grows that the `Mm` is a field of.
    fn move_engine(&self) {
        // SAFETY: numbers, of which the old ones stay where CPUs look for them.
        self.moved.get_or_init(|| Box::pin(unsafe { ptr::read(&*self.engine) }));
    }
}

/// Takes what lies in `range` out of the areas, and cuts those at its ends.
fn take_out(areas: &mut BTreeMap<u64, Area>, range: VirtRange) -> Vec<Vma<()>> {
    for cut in [range.start(), range.end()] {
        if let Some((_, area)) = areas.range_mut(..cut).next_back()
            && area.end > cut
        {
            let upper = Area { ..*area };
            area.end = cut;
            areas.insert(cut, upper);
        }
    }
    areas
        .extract_if(range.start()..range.end(), |_, _| true)
        .map(|(start, area)| vma(start, area.end))
        .collect()
}

fn vma(start: u64, end: u64) -> Vma<()> {
    let range = VirtRange::new(start, end).expect("an area has pages");
    Vma { range, kind: VmaKind::Normal, area: () }
}

fn number(frame: PhysFrame) -> usize {
    usize::try_from(frame.start_address().as_u64() >> 12).expect("a number of a frame")
}
