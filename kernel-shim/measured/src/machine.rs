//! The engine's three traits, as a fast embedder would implement them.
#![expect(unsafe_code, reason = "implements the engine's unsafe traits")]

use core::cell::Cell;
use core::marker::PhantomData;
use core::pin::Pin;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use core::time::Duration;
use std::time::Instant;

use mmu_gather::pagetable::{TableLock, TableMemory, UsedLines};
use mmu_gather::tlb::{
    CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, OnlineCpus, PcidSupport, flush_interrupt, switch_mm,
};
use mmu_gather::{
    BatchArena, BatchPage, Disposition, FreedFrames, FreedPages, GatherEvent, Mm, Pages, UnmappedLeaf,
};
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::memory::{Frame, Memory, pointer};

/// Room for 64 CPUs.
pub type Bits = [AtomicU64; 1];

/// How a kernel counts references and mappings of a frame.
pub trait Counting {
    /// For the row in the table.
    const NAME: &'static str;
    /// An entry was cleared; the table lock is held.
    fn unmapped(frame: &Frame);
    /// The flush has completed; says whether that was the last reference.
    fn released(frame: &Frame) -> bool;
}

/// Both counts dropped together after the flush, without locked instructions: a lock that is held
/// anyway guards them.
#[derive(Debug)]
pub struct Batched;
/// The map count dropped as the entry is cleared, the reference after the flush, without locked
/// instructions.
#[derive(Debug)]
pub struct AtUnmap;
/// One count for both, dropped after the flush, without locked instructions.
#[derive(Debug)]
pub struct Combined;
/// As [`AtUnmap`], with two locked instructions: what Linux does.
#[derive(Debug)]
pub struct Locked;

#[inline]
fn plain_decrement(count: &AtomicU32) -> u32 {
    let left = count.load(Ordering::Relaxed) - 1;
    count.store(left, Ordering::Relaxed);
    left
}

impl Counting for Batched {
    const NAME: &'static str = "both counts after the flush";
    #[inline]
    fn unmapped(_frame: &Frame) {}
    #[inline]
    fn released(frame: &Frame) -> bool {
        plain_decrement(&frame.mapcount);
        plain_decrement(&frame.refcount) == 0
    }
}

impl Counting for AtUnmap {
    const NAME: &'static str = "map count at the entry";
    #[inline]
    fn unmapped(frame: &Frame) {
        plain_decrement(&frame.mapcount);
    }
    #[inline]
    fn released(frame: &Frame) -> bool {
        plain_decrement(&frame.refcount) == 0
    }
}

impl Counting for Combined {
    const NAME: &'static str = "one combined count";
    #[inline]
    fn unmapped(_frame: &Frame) {}
    #[inline]
    fn released(frame: &Frame) -> bool {
        plain_decrement(&frame.refcount) == 0
    }
}

impl Counting for Locked {
    const NAME: &'static str = "two locked counts";
    #[inline]
    fn unmapped(frame: &Frame) {
        frame.mapcount.fetch_sub(1, Ordering::Relaxed);
    }
    #[inline]
    fn released(frame: &Frame) -> bool {
        frame.refcount.fetch_sub(1, Ordering::Release) == 1
    }
}

/// What the hardware was asked to do.
#[derive(Debug, Default)]
pub struct FlushCounts {
    /// Single pages invalidated, by all CPUs together.
    pub invlpgs: Cell<u64>,
    /// CR3 loads that dropped a context, by all CPUs together.
    pub full: Cell<u64>,
    /// Interrupts to other CPUs.
    pub ipis: Cell<u64>,
    /// Batch pages taken.
    pub batch_pages: Cell<u64>,
    /// Flushes forced by a full gather.
    pub forced: Cell<u64>,
}

#[inline]
fn add(counter: &Cell<u64>, more: u64) {
    counter.set(counter.get() + more);
}

/// How many pages ahead of the one that it releases the machine fetches metadata.
const PREFETCH: usize = 16;
/// Frames of a 2 MiB leaf.
const BLOCK: u64 = 512;

/// One CPU that runs the benches, and others that merely have an address space loaded.
#[derive(Debug)]
pub struct Machine<'m, C> {
    memory: &'m Memory,
    cpus: Vec<CpuTlb<Bits>>,
    /// The CPU that the thread plays now.
    here: Cell<CpuId>,
    online: OnlineCpus,
    ipi_cost: Duration,
    batches: BatchArena,
    pcids: PcidSupport,
    /// What was counted so far.
    pub counts: FlushCounts,
    counting: PhantomData<C>,
}

impl<'m, C: Counting> Machine<'m, C> {
    /// A machine that says it has `online` CPUs.
    #[must_use]
    pub fn new(memory: &'m Memory, online: OnlineCpus) -> Self {
        Self {
            memory,
            cpus: vec![CpuTlb::new()],
            here: Cell::new(CpuId::new(0)),
            online,
            ipi_cost: Duration::ZERO,
            batches: BatchArena::new(None),
            pcids: PcidSupport::Off,
            counts: FlushCounts::default(),
            counting: PhantomData,
        }
    }

    /// The same machine with `others` more CPUs, each of which takes `cost` to interrupt.
    #[must_use]
    pub fn with_others(mut self, others: usize, cost: Duration) -> Self {
        self.cpus.extend((0..others).map(|_| CpuTlb::new()));
        self.ipi_cost = cost;
        self
    }

    /// The same machine with PCIDs on.
    #[must_use]
    pub fn with_pcids(mut self) -> Self {
        self.pcids = PcidSupport::On;
        self
    }

    /// The same machine without batch pages: a gather has its eight slots only.
    #[must_use]
    pub fn without_batches(mut self) -> Self {
        self.batches = BatchArena::new(Some(0));
        self
    }

    /// Its memory.
    #[must_use]
    pub const fn memory(&self) -> &'m Memory {
        self.memory
    }

    /// Puts `mm` into CR3 of every CPU.
    ///
    /// # Safety
    /// `mm` stays where it is, and its root a table, until [`leave`](Self::leave).
    pub unsafe fn load(&self, mm: &Mm<Bits>) {
        // SAFETY: passed on to our caller.
        let next = unsafe { Pin::new_unchecked(mm) }.pinned_context();
        // SAFETY: this thread plays the CPU; the rest is passed on to our caller.
        self.on_each(|cpu| unsafe { switch_mm(self, cpu, Some(next)) });
    }

    /// Puts the kernel's own address space into CR3 of every CPU.
    pub fn leave(&self) {
        // SAFETY: as in `load`.
        self.on_each(|cpu| unsafe { switch_mm(self, cpu, None) });
    }

    /// Ends the program of every CPU: they go lazy.
    pub fn go_lazy(&self) {
        // SAFETY: as in `load`; nobody uses user addresses here.
        self.on_each(|cpu| unsafe { mmu_gather::tlb::enter_lazy_tlb(self, cpu) });
    }

    /// Waits as long as one interrupt to `others` CPUs takes, and counts it; for peers that flush
    /// by themselves.
    pub fn pay_for_flush(&self, others: u32) {
        add(&self.counts.ipis, u64::from(others));
        let until = Instant::now() + self.ipi_cost * others;
        while !self.ipi_cost.is_zero() && Instant::now() < until {
            core::hint::spin_loop();
        }
    }

    /// Drops a reference. A page without references is put in front of `chain`. Returns the first
    /// page of the chain.
    #[inline(always)]
    fn release(&self, frame: PhysFrame, chain: u64) -> u64 {
        let physical = frame.start_address().as_u64();
        if C::released(self.memory.frame(physical)) { self.memory.chain(physical, chain) } else { chain }
    }

    #[inline(never)]
    fn free_frames(&self, frames: FreedFrames<'_>) {
        // Metadata of neighbouring 2 MiB leaves lies 16 KiB apart, in one set of the first-level
        // cache: what is fetched ahead is gone before it is used.
        let mut ahead = frames.clone();
        let are_large = ahead.next().zip(ahead.next()).is_some_and(|(one, other)| {
            (other.start_address().as_u64().wrapping_sub(one.start_address().as_u64()) >> 12)
                .is_multiple_of(BLOCK)
        });
        let mut chain = self.memory.chain_start();
        if are_large {
            for frame in frames {
                chain = self.release(frame, chain);
            }
        } else {
            frames.for_each_fetching(
                PREFETCH,
                |later| self.memory.prefetch(later.start_address().as_u64()),
                |frame| chain = self.release(frame, chain),
            );
        }
        self.memory.free_chain(chain);
    }

    fn on_each(&self, work: impl Fn(CpuId)) {
        for cpu in (0u32..).take(self.cpus.len()).map(CpuId::new) {
            self.on(cpu, || work(cpu));
        }
    }

    /// Lets the thread play `cpu`.
    fn on(&self, cpu: CpuId, work: impl FnOnce()) {
        let before = self.here.replace(cpu);
        work();
        self.here.set(before);
    }

    /// Has each of `targets` take its mail, one after the other. They answer as `cpus`: this
    /// machine, or one around it.
    ///
    /// # Safety
    /// `cpus` has its [`cpu_state`](Cpus::cpu_state) and [`pinned`](Cpus::pinned) from this
    /// machine.
    pub unsafe fn interrupt<K: Cpus<Bits = Bits>>(&self, cpus: &K, targets: &CpuSet<Bits>) {
        for cpu in targets.iter() {
            // SAFETY: this thread plays the CPU, and nothing interrupts it; the rest is our
            // caller's word.
            self.on(cpu, || unsafe { flush_interrupt(cpus, cpu) });
        }
    }
}

// SAFETY: `memory::pointer` names the frame's 4096 bytes in a mapping that lives as long as the
// process; they are used through `&Table` or, by peers that run alone, through `PageTable`.
// `allocate_table` takes a frame off the free list and zeroes it. The lock is in the frame's own
// metadata, so locks of different frames are distinct.
unsafe impl<C: Counting> TableMemory for Machine<'_, C> {
    type Lock = TableLock<spin::Spin>;

    #[inline]
    unsafe fn table_lock(&self, frame: PhysFrame) -> &TableLock<spin::Spin> {
        self.memory.frame(frame.start_address().as_u64()).lock()
    }

    #[inline]
    unsafe fn used_lines(&self, frame: PhysFrame) -> Option<&UsedLines> {
        Some(self.memory.frame(frame.start_address().as_u64()).used_lines())
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        self.memory.allocate_table()
    }

    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        for table in tables {
            self.memory.free_table(table.start_address().as_u64());
        }
    }
}

// SAFETY: every frame of the memory is mapped at `pointer`.
unsafe impl<C> PageTableFrameMapping for Machine<'_, C> {
    #[inline]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        pointer(frame.start_address().as_u64())
    }
}

// SAFETY: one thread plays every CPU. `cpu_state` indexes a vector that never changes; `pinned`
// names the one that it plays now, which is CPU 0 wherever a release build asks; there are no
// translations to drop.
unsafe impl<C: Counting> Cpus for Machine<'_, C> {
    type Bits = Bits;

    #[inline]
    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        // Only a debug build asks while the thread plays another CPU than the first, and a release
        // build does not pay for the question.
        f(if cfg!(debug_assertions) { self.here.get() } else { CpuId::new(0) })
    }

    #[inline]
    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        &self.cpus[cpu.index()]
    }

    fn init_root(&self) -> PhysFrame {
        PhysFrame::containing_address(x86_64::PhysAddr::zero())
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Bits>) {
        // SAFETY: this is the machine.
        unsafe { self.interrupt(self, targets) };
        self.pay_for_flush(targets.len());
    }

    #[inline]
    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline]
    fn online_cpus(&self) -> OnlineCpus {
        self.online
    }

    #[inline]
    fn pcid_support(&self) -> PcidSupport {
        self.pcids
    }

    #[inline]
    fn invlpg(&self, _address: u64) {
        add(&self.counts.invlpgs, 1);
    }

    unsafe fn load_cr3(&self, _root: PhysFrame, _pcid: Pcid, cached: CachedTranslations) {
        if cached == CachedTranslations::Flush {
            add(&self.counts.full, 1);
        }
    }
}

impl<C: Counting> Pages for Machine<'_, C> {
    type Area = ();

    #[inline]
    fn unmap_page(&self, _area: (), leaf: &UnmappedLeaf) -> Disposition {
        C::unmapped(self.memory.frame(leaf.frame.start_address().as_u64()));
        Disposition::Free
    }

    #[inline]
    fn free_pages(&self, pages: FreedPages<'_>) {
        match pages.frames() {
            // So few are fetched as fast as they are used.
            Some(frames) if frames.len() <= PREFETCH => {
                let chain = self.memory.chain_start();
                self.memory.free_chain(frames.fold(chain, |chain, frame| self.release(frame, chain)));
            }
            Some(frames) => self.free_frames(frames),
            // Nothing here queues runs.
            None => debug_assert!(false, "{pages:?}"),
        }
    }

    fn allocate_batch(&self) -> Option<BatchPage> {
        // SAFETY: a gather gives its pages back before the machine goes.
        unsafe { self.batches.allocate() }
    }

    fn free_batch(&self, page: BatchPage) {
        self.batches.free(page);
    }

    #[inline]
    fn observe_gather(&self, event: GatherEvent) {
        match event {
            GatherEvent::BatchTaken => add(&self.counts.batch_pages, 1),
            GatherEvent::ForcedFlush => add(&self.counts.forced, 1),
            _ => {}
        }
    }
}
