//! The machine of a sweep: that of `mmu_measured`, with a ceiling, lazy CPUs, refused batch pages,
//! and a watcher that counts.
#![expect(unsafe_code, reason = "implements the engine's unsafe traits")]

use core::cell::{Cell, RefCell};
use core::pin::Pin;
use core::ptr::NonNull;
use core::time::Duration;

use mmu_gather::pagetable::{Bounds, TableLock, TableMemory, UsedLines, VirtRange};
use mmu_gather::tlb::{
    CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, OnlineCpus, TlbEvent, enter_lazy_tlb, switch_mm,
};
use mmu_gather::{
    BatchPage, Disposition, FreedPages, GatherEvent, Limits, Mm, MmuGather, Pages, UnmappedLeaf, Vma,
    VmaKind, unmap_region,
};
use mmu_measured::machine::{Batched, Bits, Machine};
use mmu_measured::memory::Memory;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::sweep::axes::{Conditions, CpuMix};

/// What one [`MmuGather`] takes on the stack.
pub(crate) const GATHER_BYTES: usize = size_of::<MmuGather<'_, '_, SweepMachine<'_, Unwatched>>>();
/// What the engine keeps for one CPU.
pub(crate) const CPU_BYTES: usize = size_of::<CpuTlb<Bits>>();
/// What the engine keeps for one address space.
pub(crate) const MM_BYTES: usize = size_of::<Mm<Bits>>();
/// What the machine keeps for one frame.
pub(crate) const FRAME_BYTES: usize = size_of::<mmu_measured::memory::Frame>();
/// What the engine needs of that where the frame is a table: its lock, and the note of its used
/// lines.
pub(crate) const TABLE_BYTES: usize = size_of::<TableLock<spin::Spin>>() + size_of::<UsedLines>();

/// Is told what happens. Two of these functions are called for each page.
pub(crate) trait Watcher {
    fn gather(&self, _event: GatherEvent) {}
    fn page_cleared(&self, _frame: PhysFrame) {}
    fn tlb(&self, _event: TlbEvent) {}
    fn invlpg(&self) {}
    fn context_dropped(&self) {}
    fn batch_taken(&self) {}
    fn batch_returned(&self) {}
    fn pages_freed(&self, _pages: FreedPages<'_>) {}
    fn tables_freed(&self, _tables: &[PhysFrame]) {}
    fn preemption_point(&self) {}
}

/// Watches nothing: for measuring time.
#[derive(Debug)]
pub(crate) struct Unwatched;

impl Watcher for Unwatched {}

/// Batch pages, kept for the next gather, so that no sample pays for the host's memory.
#[derive(Debug, Default)]
pub(crate) struct BatchPool {
    spare: RefCell<Vec<BatchPage>>,
}

#[repr(C, align(4096))]
struct Page([u8; 4096]);

impl BatchPool {
    fn take(&self) -> BatchPage {
        self.spare.borrow_mut().pop().unwrap_or_else(|| {
            let page = Box::leak(Box::new(Page([0; 4096])));
            // SAFETY: 4096 bytes, aligned to as many, that live for ever and that nobody else
            // knows.
            unsafe { BatchPage::new(NonNull::from(&mut page.0)) }
        })
    }

    fn give_back(&self, page: BatchPage) {
        self.spare.borrow_mut().push(page);
    }
}

/// The machine of `mmu_measured`, one thread of which plays all CPUs: its page tables, frames and
/// CPUs, with a watcher.
#[derive(Debug)]
pub(crate) struct SweepMachine<'m, W> {
    base: Machine<'m, Batched>,
    pool: &'m BatchPool,
    conditions: Conditions,
    asked: Cell<u64>,
    watch: W,
}

impl<'m, W: Watcher> SweepMachine<'m, W> {
    pub(crate) fn new(memory: &'m Memory, pool: &'m BatchPool, conditions: Conditions, watch: W) -> Self {
        let total = conditions.cpus.total;
        let online = if total == 1 { OnlineCpus::One } else { OnlineCpus::Many };
        let base = Machine::new(memory, online).with_others(total as usize - 1, Duration::ZERO);
        Self { base, pool, conditions, asked: Cell::new(0), watch }
    }

    /// The machine that nobody watches.
    pub(crate) const fn base(&self) -> &Machine<'m, Batched> {
        &self.base
    }

    pub(crate) const fn watch(&self) -> &W {
        &self.watch
    }

    /// Has every CPU load `mm`, the last ones lazily, then does `work`, then has them leave it.
    pub(crate) fn with_loaded<R>(&self, mm: &Mm<Bits>, work: impl FnOnce() -> R) -> R {
        let CpuMix { total, lazy } = self.conditions.cpus;
        for number in 0..total {
            let cpu = CpuId::new(number);
            // SAFETY: `mm` is borrowed until every CPU has left it below.
            let next = unsafe { Pin::new_unchecked(mm) }.pinned_context();
            // SAFETY: this thread is each CPU, one after the other, and nothing interrupts it;
            // nothing frees the root of `mm`.
            unsafe { switch_mm(self, cpu, Some(next)) };
            if number >= total - lazy {
                // SAFETY: as above; nobody uses user addresses here.
                unsafe { enter_lazy_tlb(self, cpu) };
            }
        }
        self.asked.set(0);
        let result = work();
        for number in 0..total {
            // SAFETY: as above.
            unsafe { switch_mm(self, CpuId::new(number), None) };
        }
        result
    }

    /// One munmap over all `areas`, and the freeing after it.
    #[inline(never)]
    pub(crate) fn munmap(&self, mm: &Mm<Bits>, limits: &Limits, areas: &[VirtRange]) {
        let vmas = areas.iter().map(|range| Vma { range: *range, kind: VmaKind::Normal, area: () });
        // SAFETY: this thread alone knows the space, and nothing is mapped in it but the areas.
        unsafe { unmap_region(self, mm, limits, vmas, Bounds::whole(), || {}) }
            .expect("no area ends in the middle of a large leaf")
            .free();
    }
}

// SAFETY: the frames, their locks and the free list are those of `base`, which answers for them.
unsafe impl<W: Watcher> TableMemory for SweepMachine<'_, W> {
    type Lock = TableLock<spin::Spin>;

    #[inline]
    unsafe fn table_lock(&self, frame: PhysFrame) -> &TableLock<spin::Spin> {
        // SAFETY: passed on to our caller, here and below.
        unsafe { self.base.table_lock(frame) }
    }

    #[inline]
    unsafe fn used_lines(&self, frame: PhysFrame) -> Option<&UsedLines> {
        // SAFETY: as above.
        unsafe { self.base.used_lines(frame) }
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        self.base.allocate_table()
    }

    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        // SAFETY: as above.
        unsafe { self.base.free_tables(tables) };
        self.watch.tables_freed(tables);
    }
}

// SAFETY: as `base` does it.
unsafe impl<W: Watcher> PageTableFrameMapping for SweepMachine<'_, W> {
    #[inline]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.base.frame_to_pointer(frame)
    }
}

// SAFETY: the CPUs are those of `base`, which answers for them. Only what is watched, and what must
// name this machine for it to be watched, is done here; there are no translations to drop.
unsafe impl<W: Watcher> Cpus for SweepMachine<'_, W> {
    type Bits = Bits;

    #[inline]
    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        self.base.pinned(f)
    }

    #[inline]
    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        self.base.cpu_state(cpu)
    }

    fn init_root(&self) -> PhysFrame {
        self.base.init_root()
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Bits>) {
        // SAFETY: the CPUs are those of `base`.
        unsafe { self.base.interrupt(self, targets) };
    }

    #[inline]
    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        self.base.without_interrupts(f)
    }

    #[inline]
    fn online_cpus(&self) -> OnlineCpus {
        self.base.online_cpus()
    }

    #[inline]
    fn single_page_flush_ceiling(&self) -> u64 {
        self.conditions.ceiling.pages()
    }

    #[inline]
    fn invlpg(&self, _address: u64) {
        self.watch.invlpg();
    }

    unsafe fn load_cr3(&self, _root: PhysFrame, _pcid: Pcid, cached: CachedTranslations) {
        if cached == CachedTranslations::Flush {
            self.watch.context_dropped();
        }
    }

    #[inline]
    fn observe(&self, event: TlbEvent) {
        self.watch.tlb(event);
    }
}

impl<W: Watcher> Pages for SweepMachine<'_, W> {
    type Area = ();

    #[inline]
    fn unmap_page(&self, area: (), leaf: &UnmappedLeaf) -> Disposition {
        self.watch.page_cleared(leaf.frame);
        self.base.unmap_page(area, leaf)
    }

    fn free_pages(&self, pages: FreedPages<'_>) {
        self.base.free_pages(pages);
        self.watch.pages_freed(pages);
    }

    fn allocate_batch(&self) -> Option<BatchPage> {
        let number = self.asked.get() + 1;
        self.asked.set(number);
        if self.conditions.refuse.refuses(number) {
            return None;
        }
        self.watch.batch_taken();
        Some(self.pool.take())
    }

    fn free_batch(&self, page: BatchPage) {
        self.watch.batch_returned();
        self.pool.give_back(page);
    }

    #[inline]
    fn cond_resched(&self) {
        self.watch.preemption_point();
    }

    #[inline]
    fn observe_gather(&self, event: GatherEvent) {
        self.watch.gather(event);
    }
}
