//! A kernel that is generic over its machine. None of this knows of a test.

use core::pin::Pin;
use std::collections::BTreeMap;
use std::sync::Arc;

use mmu_gather::pagetable::{
    Bounds, EntryValue, Level, MapError, PagingMode, TableLock, TableMemory, VirtRange,
};
use mmu_gather::tlb::{
    Answers, CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, CtxIds, PcidSupport, flush_interrupt, init_cpu,
    switch_mm,
};
use mmu_gather::{CutLeaf, FreedPages, Limits, Mm, MmuGather, Pages, Vma, VmaKind, exit_mmap};
use spin::mutex::SpinMutex;
use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PageTableFlags, PhysFrame};

use crate::hardware::{Bits, Hardware, Role};

type Lock<T, H> = SpinMutex<T, <H as Hardware>::Relax>;
/// The address space that a CPU has loaded: it is kept.
type Loaded<H> = Lock<Option<Arc<Space<H>>>, H>;

/// The kernel.
pub(crate) struct Kernel<H: Hardware> {
    pub(crate) hardware: H,
    free: Lock<Vec<PhysFrame>, H>,
    table_locks: Box<[TableLock<H::Relax>]>,
    cpus: Box<[CpuTlb<Bits>]>,
    loaded: Box<[Loaded<H>]>,
    init_root: PhysFrame,
    ids: CtxIds,
}

/// An address space.
pub(crate) struct Space<H: Hardware> {
    pub(crate) engine: Pin<Box<Mm<Bits>>>,
    /// By start: end and flags.
    areas: Lock<BTreeMap<u64, (u64, PageTableFlags)>, H>,
}

// SAFETY: the machine maps its memory where it says.
unsafe impl<H: Hardware> PageTableFrameMapping for Kernel<H> {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.hardware.frame_to_pointer(frame)
    }
}

// SAFETY: a table is zeroed, and given out once until it is freed; each has a lock of its own.
unsafe impl<H: Hardware> TableMemory for Kernel<H> {
    type Lock = TableLock<H::Relax>;

    unsafe fn table_lock(&self, table: PhysFrame) -> &TableLock<H::Relax> {
        let lock = &self.table_locks[number(table)];
        self.hardware.about_to_lock(table, lock);
        lock
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        let table = self.take(Role::Table)?;
        // SAFETY: the frame was free: nobody else uses it.
        unsafe { self.hardware.frame_to_pointer(table).write(PageTable::new()) };
        Some(table)
    }

    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        tables.iter().for_each(|table| self.give(*table, Role::Table));
    }
}

// SAFETY: each CPU has a state of its own; the rest is the machine's.
unsafe impl<H: Hardware> Cpus for Kernel<H> {
    type Bits = Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(self.hardware.cpu())
    }

    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        &self.cpus[cpu.index()]
    }

    fn init_root(&self) -> PhysFrame {
        self.init_root
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Bits>) {
        self.hardware.send_flush_interrupt(targets);
    }

    fn wait_for_answers(&self, answers: Answers<'_, Bits>) {
        self.hardware.wait_for_answers(answers);
    }

    fn answered(&self, initiator: CpuId) {
        self.hardware.answered(initiator);
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        self.hardware.without_interrupts(f)
    }

    fn pcid_support(&self) -> PcidSupport {
        self.hardware.pcid_support()
    }

    fn cr3(&self) -> Option<PhysFrame> {
        self.hardware.cr3()
    }

    fn invlpg(&self, address: u64) {
        self.hardware.invlpg(address);
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        // SAFETY: the caller's promise.
        unsafe { self.hardware.load_cr3(root, pcid, cached) };
    }
}

impl<H: Hardware> Pages for Kernel<H> {
    type Area = ();

    fn free_pages(&self, pages: FreedPages<'_>) {
        pages.iter().for_each(|run| self.give(run.frame, Role::Page));
    }
}

impl<H: Hardware> Kernel<H> {
    /// Boots on the first CPU.
    pub(crate) fn new(hardware: H) -> Self {
        let frame = |number| PhysFrame::containing_address(PhysAddr::new(number << 12));
        let (frames, nr_cpus) = (hardware.frames(), hardware.nr_cpus());
        let mut kernel = Self {
            free: Lock::<_, H>::new(frames.clone().rev().map(frame).collect()),
            table_locks: (0..frames.end).map(|_| TableLock::new(())).collect(),
            cpus: (0..nr_cpus).map(|_| CpuTlb::new()).collect(),
            loaded: (0..nr_cpus).map(|_| Lock::<_, H>::new(None)).collect(),
            init_root: frame(0),
            ids: CtxIds::new(),
            hardware,
        };
        kernel.init_root = kernel.allocate_table().expect("there is memory to boot");
        kernel
    }

    fn take(&self, role: Role) -> Option<PhysFrame> {
        let frame = self.free.lock().pop()?;
        self.hardware.allocated(frame, role);
        Some(frame)
    }

    fn give(&self, frame: PhysFrame, role: Role) {
        self.hardware.freed(frame, role);
        self.free.lock().push(frame);
    }

    /// This CPU starts.
    pub(crate) fn start(&self) {
        // SAFETY: this CPU has loaded nothing yet.
        self.without_interrupts(|| unsafe { init_cpu(self, self.hardware.cpu()) });
    }

    /// The handler of the flush interrupt.
    pub(crate) fn on_flush_interrupt(&self) {
        // SAFETY: interrupts are off in a handler.
        unsafe { flush_interrupt(self, self.hardware.cpu()) };
    }

    pub(crate) fn new_space(&self) -> Option<Arc<Space<H>>> {
        let root = self.allocate_table()?;
        // SAFETY: the root is an empty table that is this address space's alone.
        let engine = Box::pin(unsafe { Mm::new(&self.ids, root, PagingMode::FourLevel) });
        Some(Arc::new(Space { engine, areas: Lock::<_, H>::new(BTreeMap::new()) }))
    }

    pub(crate) fn run(&self, space: Option<&Arc<Space<H>>>) {
        let cpu = self.hardware.cpu();
        let context = space.map(|space| space.engine.as_ref().pinned_context());
        // SAFETY: interrupts are off; `loaded` keeps the address space.
        self.without_interrupts(|| unsafe { switch_mm(self, cpu, context) });
        *self.loaded[cpu.index()].lock() = space.cloned();
    }

    /// Whether nothing was in the way.
    pub(crate) fn mmap(&self, space: &Space<H>, range: VirtRange, flags: PageTableFlags) -> bool {
        let mut areas = space.areas.lock();
        let is_free = areas.range(..range.end()).next_back().is_none_or(|(_, area)| area.0 <= range.start());
        if is_free {
            areas.insert(range.start(), (range.end(), flags));
        }
        is_free
    }

    /// Whether the program may try again.
    pub(crate) fn page_fault(&self, space: &Space<H>, address: u64, needs: PageTableFlags) -> bool {
        let areas = space.areas.lock();
        let area = areas.range(..=address).next_back().map(|(_, area)| *area);
        let Some((_, flags)) = area.filter(|(end, flags)| *end > address && flags.contains(needs)) else {
            return false;
        };
        let Some(page) = self.take(Role::Page) else { return false };
        let entry = EntryValue::leaf(Level::Pte, page.start_address(), flags);
        // SAFETY: the lock keeps the area, and with it the tables; the page is new.
        let mapped = unsafe { space.engine.space().map(self, address & !0xfff, Level::Pte, entry) };
        if mapped.is_err() {
            self.give(page, Role::Page);
        }
        // Another CPU may have been faster.
        matches!(mapped, Ok(()) | Err(MapError::Occupied(..)))
    }

    pub(crate) fn munmap(&self, space: &Space<H>, range: VirtRange) -> Result<(), CutLeaf> {
        let mut areas = space.areas.lock();
        let detached = take_out(&mut areas, range);
        let below = areas.range(..range.start()).next_back().map(|(_, area)| area.0);
        let above = areas.range(range.end()..).next().map(|(start, _)| *start);
        // SAFETY: the lock of the areas is held until `flush` has returned.
        let mut gather = unsafe { MmuGather::new(self, &space.engine) };
        gather.unmap_vmas(detached.iter().copied(), range)?;
        // SAFETY: the areas are taken out, and `below` and `above` are the neighbours that stay.
        unsafe { gather.free_pgtables(detached, Bounds::between(below, above)) };
        let flushed = gather.flush();
        drop(areas);
        flushed.free();
        Ok(())
    }

    pub(crate) fn exit(&self, space: &Space<H>) {
        let mut areas = space.areas.lock();
        let all = take_out(&mut areas, space.engine.space().user_range());
        // SAFETY: these are all areas, and no program is left.
        let flushed = unsafe { exit_mmap(self, &space.engine, &Limits::DEFAULT, all.iter().copied(), || ()) };
        drop(areas);
        flushed.free();
        // SAFETY: no CPU has the root in CR3 any more, and nothing is mapped below it.
        unsafe { self.free_tables(&[space.engine.space().root()]) };
    }
}

/// Takes what lies in `range` out of the areas, and cuts those at its ends.
fn take_out(areas: &mut BTreeMap<u64, (u64, PageTableFlags)>, range: VirtRange) -> Vec<Vma<()>> {
    for cut in [range.start(), range.end()] {
        if let Some((_, area)) = areas.range_mut(..cut).next_back()
            && area.0 > cut
        {
            let upper = *area;
            area.0 = cut;
            areas.insert(cut, upper);
        }
    }
    let inside = areas.extract_if(range.start()..range.end(), |_, _| true);
    let vma = |(start, (end, _))| {
        let range = VirtRange::new(start, end).expect("an area has pages");
        Vma { range, kind: VmaKind::Normal, area: () }
    };
    inside.map(vma).collect()
}

fn number(frame: PhysFrame) -> usize {
    usize::try_from(frame.start_address().as_u64() >> 12).expect("a number of a frame")
}
