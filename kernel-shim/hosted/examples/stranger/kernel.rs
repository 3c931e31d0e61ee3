//! A kernel as small as one can be: areas in a `BTreeMap`, one lock for each address space, pages
//! that are a program's own. It embeds the engine, and its hardware is a hosted machine.

use core::pin::Pin;
use core::ptr::NonNull;
use std::collections::BTreeMap;
use std::sync::Arc;

use mmu_gather::pagetable::{
    Bounds, EntryValue, Level, MapError, PagingMode, TableLock, TableMemory, VirtRange,
};
use mmu_gather::tlb::{
    Answers, CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, CtxIds, OnlineCpus, PcidSupport,
    enter_lazy_tlb, flush_interrupt, init_cpu, switch_mm,
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

/// What the kernel does wrong, so that the kit can be seen to find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mistake {
    /// Nothing.
    Absent,
    /// mprotect takes rights away, and tells no gather.
    ChangedForgotten,
    /// A page is freed when its entry is cleared.
    FreedWhenUnmapped,
    /// munmap names no neighbours, although there are some.
    NeighboursForgotten,
    /// The handler of the flush interrupt returns at once.
    HandlerDoesNothing,
    /// A switch loads CR3, and tells the engine nothing.
    SwitchOfItsOwn,
    /// All CPUs have one state.
    OneCpuState,
    /// What is unmapped is not freed.
    NeverFreed,
    /// What is unmapped is freed twice.
    FreedTwice,
    /// A table is given out as it was when it was freed.
    DirtyTables,
    /// The map lock is dropped before the flush.
    LockDroppedEarly,
    /// The handler of the flush interrupt names another CPU than its own.
    HandlerNamesAnother,
    /// PCIDs are said to be on, and are off on some machines.
    PcidsSaidOn,
    /// A batch page begins a byte too late.
    BatchPageNotAligned,
    /// A fault maps its page with a table locked.
    MapsUnderTableLock,
    /// The allocator holds a lock of `std` while it tells the machine.
    LockOfStd,
    /// munmap trips over an assertion of its own.
    UnmapPanics,
}

/// A lock that lets other CPUs run while it waits.
type Lock<T> = SpinMutex<T, GiveWay>;

pub(crate) struct Stranger {
    machine: Arc<HostedMachine>,
    mistake: Mistake,
    free: Lock<Vec<PhysFrame>>,
    std_lock: std::sync::Mutex<()>,
    /// One for each frame.
    table_locks: Box<[TableLock<GiveWay>]>,
    cpus: Box<[CpuTlb<Bits>]>,
    /// Keeps the address space that a CPU has loaded.
    loaded: Box<[Lock<Option<Arc<Space>>>]>,
    init_root: PhysFrame,
    ids: CtxIds,
}

/// An address space.
pub(crate) struct Space {
    engine: Pin<Box<Mm<Bits>>>,
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
        self.machine.send_flush_interrupt(targets);
    }

    fn wait_for_answers(&self, answers: Answers<'_, Bits>) {
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
        match self.mistake {
            Mistake::PcidsSaidOn => PcidSupport::On,
            _ => self.machine.pcid_support(),
        }
    }

    fn cr3(&self) -> Option<PhysFrame> {
        self.machine.cr3()
    }

    fn invlpg(&self, address: u64) {
        self.machine.invlpg(address);
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        self.machine.load_cr3(root, pcid, cached);
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
        let page = self.machine.frame_to_pointer(self.take(FrameRole::Page)?);
        let late = usize::from(self.mistake == Mistake::BatchPageNotAligned);
        let page = NonNull::new(page.wrapping_byte_add(late))?;
        // SAFETY: the frame was free: nobody else uses its 4096 bytes.
        Some(unsafe { BatchPage::new(page.cast()) })
    }

    fn free_batch(&self, page: BatchPage) {
        let frame = self.machine.pointer_to_frame(page.into_inner().as_ptr().cast());
        self.give(frame, FrameRole::Page);
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
            cpus: (0..machine.nr_cpus()).map(|_| CpuTlb::new()).collect(),
            loaded: (0..machine.nr_cpus()).map(|_| Lock::new(None)).collect(),
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
        self.free.lock().push(frame);
    }

    pub(crate) fn start(&self) {
        // SAFETY: this CPU has loaded nothing yet.
        self.without_interrupts(|| unsafe { init_cpu(self, self.machine.current()) });
    }

    /// The handler of the flush interrupt.
    pub(crate) fn handle_interrupt(&self) {
        let here = self.machine.current();
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
        Some(Arc::new(Space { engine, areas: Lock::new(BTreeMap::new()) }))
    }

    pub(crate) fn run(&self, space: Option<&Arc<Space>>) {
        let cpu = self.machine.current();
        self.without_interrupts(|| {
            if self.mistake == Mistake::SwitchOfItsOwn {
                let root = space.map_or(self.init_root, |space| space.root());
                let pcid = Pcid::new(0).expect("below 4096");
                self.machine.load_cr3(root, pcid, CachedTranslations::Flush);
            } else {
                let next = space.map(|space| space.engine.as_ref().pinned_context());
                // SAFETY: interrupts are off; `loaded` keeps the address space.
                unsafe { switch_mm(self, cpu, next) };
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
        let table = unsafe { space.engine.space().find_table(self, address, Level::Pte) };
        let locked =
            table.filter(|_| self.mistake == Mistake::MapsUnderTableLock).map(|table| table.lock(self));
        let page = self.take(FrameRole::Page).ok_or(Refused)?;
        let entry = EntryValue::leaf(Level::Pte, page.start_address(), area.flags);
        // SAFETY: the lock keeps the area, and with it the tables; the page is new.
        let mapped = unsafe { space.engine.space().map(self, address & !0xfff, Level::Pte, entry) };
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

    pub(crate) fn munmap(&self, space: &Space, range: VirtRange) -> Result<(), CutLeaf> {
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
        let mut gather = unsafe { MmuGather::new(self, &space.engine) };
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
            let flushed = unsafe { zap_page_range(self, &space.engine, &Limits::DEFAULT, &area, range) }?;
            flushed.free();
        }
        Ok(())
    }

    pub(crate) fn mprotect(&self, space: &Space, range: VirtRange, flags: PageTableFlags) {
        let mut areas = space.areas.lock();
        let parts = take_out(&mut areas, range);
        // SAFETY: the lock of the areas is held until `flush` has returned.
        let mut gather = unsafe { MmuGather::new(self, &space.engine) };
        for part in parts.iter().map(|part| part.range) {
            areas.insert(part.start(), Area { end: part.end(), flags });
            for address in (part.start()..part.end()).step_by(4096) {
                // SAFETY: the lock keeps the area, and with it the tables.
                let table = unsafe { space.engine.space().find_table(self, address, Level::Pte) };
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
        let all = take_out(&mut areas, space.engine.space().user_range());
        // SAFETY: these are all areas, and no program is left.
        let flushed = unsafe { exit_mmap(self, &space.engine, &Limits::DEFAULT, all.iter().copied(), || ()) };
        drop(areas);
        flushed.free();
        // SAFETY: no CPU has the root in CR3 any more, and nothing is mapped below it.
        unsafe { self.free_tables(&[space.root()]) };
    }
}

impl Space {
    pub(crate) fn root(&self) -> PhysFrame {
        self.engine.space().root()
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
