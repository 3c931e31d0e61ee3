//! What a kernel has below its memory layer, on a hosted machine: frames that are counted, CPUs,
//! and the implementations of the engine's traits.
//!
//! A memory layer that is put on this needs its glue, and an implementation of
//! [`mmu_hosted::Kernel`], to be run by the conformance kit.
#![expect(unsafe_code, reason = "the platform traits are unsafe: the engine believes what they say")]

use core::fmt;
use core::pin::Pin;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::io;
use std::sync::Arc;

use mmu_gather::pagetable::{Mapping, PagingMode, TableLock, TableMemory, VirtRange};
use mmu_gather::tlb::{
    Answers, CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, CtxId, CtxIds, OnlineCpus, PageSpan,
    PcidSupport, enter_lazy_tlb, flush_interrupt, init_cpu, offline_cpu, switch_mm,
};
use mmu_gather::{BatchPage, Disposition, FreedPages, GatherEvent, Mm, Pages, UnmappedLeaf, Vma, VmaKind};
use mmu_hosted::{Bits, FrameRole, GiveWay, HostedMachine, Note, Seam, Supply};
use spin::mutex::SpinMutex;
use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PhysFrame};

/// A lock that lets other CPUs run while it waits.
type Lock<T> = SpinMutex<T, GiveWay>;

/// An address space of this kernel.
pub type HostedMm = Pin<Arc<Mm<Bits>>>;

/// A kernel without a memory layer.
///
/// A page is free when no entry maps it any more: entries are counted, and the engine gives the
/// count of a cleared one up when every CPU has flushed.
pub struct HostedPlatform {
    machine: Arc<HostedMachine>,
    free: Lock<Vec<PhysFrame>>,
    /// One for each frame.
    table_locks: Box<[TableLock<GiveWay>]>,
    /// How many entries map each frame.
    mappings: Box<[AtomicU32]>,
    cpus: Box<[CpuTlb<Bits>]>,
    /// Keeps the address space that a CPU has loaded.
    loaded: Box<[Lock<Option<HostedMm>>]>,
    init_root: PhysFrame,
    ids: CtxIds,
    tables: Requests,
    batches: Requests,
}

// SAFETY: a frame of the machine's memory stays where it is.
unsafe impl PageTableFrameMapping for HostedPlatform {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.machine.frame_to_pointer(frame)
    }
}

// SAFETY: a table is zeroed, and given out once until it is freed; each has a lock of its own.
unsafe impl TableMemory for HostedPlatform {
    type Lock = TableLock<GiveWay>;

    unsafe fn table_lock(&self, table: PhysFrame) -> &TableLock<GiveWay> {
        let lock = &self.table_locks[number(table)];
        // SAFETY: the locks live as long as the kernel.
        unsafe { self.machine.about_to_lock(table, lock) };
        lock
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        self.tables.are_granted().then(|| self.take_zeroed(FrameRole::Table)).flatten()
    }

    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        tables.iter().for_each(|table| self.give(*table, FrameRole::Table));
    }
}

// SAFETY: each CPU has a state of its own; the rest is the machine's.
unsafe impl Cpus for HostedPlatform {
    type Bits = Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        self.machine.pinned(f)
    }

    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        &self.cpus[cpu.index()]
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
        self.machine.pcid_support()
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

    fn invalidate_secondary(&self, ctx_id: CtxId, span: Option<PageSpan>) {
        self.machine.invalidate_secondary(ctx_id, span);
    }
}

impl Pages for HostedPlatform {
    type Area = ();

    fn unmap_page(&self, (): (), leaf: &UnmappedLeaf) -> Disposition {
        let UnmappedLeaf { address, level, frame, .. } = *leaf;
        self.machine.note(Note::Cleared { address, level, frame });
        self.machine.seam(Seam::Cleared);
        Disposition::Free
    }

    fn free_pages(&self, pages: FreedPages<'_>) {
        pages.iter().for_each(|run| self.remove_mapping(run.frame));
    }

    fn allocate_batch(&self) -> Option<BatchPage> {
        let frame = self.batches.are_granted().then(|| self.take_zeroed(FrameRole::Page)).flatten()?;
        let page = NonNull::new(self.machine.frame_to_pointer(frame))?.cast();
        self.machine.lent(page);
        // SAFETY: the frame was free: nobody else uses its 4096 bytes.
        Some(unsafe { BatchPage::new(page) })
    }

    fn free_batch(&self, page: BatchPage) {
        let frame = self.machine.pointer_to_frame(page.into_inner().as_ptr().cast());
        self.give(frame, FrameRole::Page);
    }

    fn cond_resched(&self) {
        self.machine.cond_resched();
    }

    fn observe_gather(&self, event: GatherEvent) {
        self.machine.note(Note::Gather(event));
    }
}

impl HostedPlatform {
    /// The kernel of `machine`.
    ///
    /// # Errors
    /// If the machine has no frame for the kernel's root table.
    pub fn new(machine: &Arc<HostedMachine>) -> io::Result<Arc<Self>> {
        let frame = |number| PhysFrame::containing_address(PhysAddr::new(number << 12));
        let frames = machine.nr_reserved_frames()..machine.nr_frames();
        let mut kernel = Self {
            free: Lock::new(frames.rev().map(frame).collect()),
            table_locks: (0..machine.nr_frames()).map(|_| TableLock::new(())).collect(),
            mappings: (0..machine.nr_frames()).map(|_| AtomicU32::new(0)).collect(),
            cpus: (0..machine.nr_cpus()).map(|_| CpuTlb::new()).collect(),
            loaded: (0..machine.nr_cpus()).map(|_| Lock::new(None)).collect(),
            init_root: frame(0),
            ids: CtxIds::new(),
            tables: Requests::default(),
            batches: Requests::default(),
            machine: Arc::clone(machine),
        };
        kernel.init_root =
            kernel.allocate_table().ok_or_else(|| io::Error::other("no frame for the root"))?;
        Ok(Arc::new(kernel))
    }

    /// The machine.
    #[must_use]
    pub const fn machine(&self) -> &Arc<HostedMachine> {
        &self.machine
    }

    /// Starts this CPU.
    pub fn start_cpu(&self) {
        // SAFETY: this CPU has loaded nothing yet.
        self.without_interrupts(|| unsafe { init_cpu(self, self.machine.current()) });
    }

    /// This CPU goes off.
    pub fn stop_cpu(&self) {
        let cpu = self.machine.current();
        // SAFETY: interrupts are off; nothing runs here until `start_cpu`.
        self.without_interrupts(|| unsafe { offline_cpu(self, cpu) });
        *self.loaded[cpu.index()].lock() = None;
    }

    /// The handler of the flush interrupt.
    pub fn handle_flush_interrupt(&self) {
        // SAFETY: interrupts are off in a handler, and this is the CPU that runs it.
        unsafe { flush_interrupt(self, self.machine.current()) };
    }

    /// A new address space, if there is a frame for its root.
    pub fn new_mm(&self) -> Option<HostedMm> {
        let root = self.allocate_table()?;
        // SAFETY: the root is an empty table that is this address space's alone.
        Some(Arc::pin(unsafe { Mm::new(&self.ids, root, PagingMode::FourLevel) }))
    }

    /// Frees the root of an address space that has exited.
    pub fn free_root(&self, mm: &HostedMm) {
        self.give(mm.space().root(), FrameRole::Table);
    }

    /// This CPU runs programs of `mm` from now on, or of no address space.
    pub fn switch_to(&self, mm: Option<&HostedMm>) {
        let cpu = self.machine.current();
        let next = mm.map(|mm| mm.as_ref().pinned_context());
        // SAFETY: interrupts are off; `loaded` keeps the address space.
        self.without_interrupts(|| unsafe { switch_mm(self, cpu, next) });
        *self.loaded[cpu.index()].lock() = mm.cloned();
    }

    /// This CPU runs kernel threads only.
    pub fn go_lazy(&self) {
        // SAFETY: interrupts are off; kernel threads use no user address.
        self.without_interrupts(|| unsafe { enter_lazy_tlb(self, self.machine.current()) });
    }

    /// Nothing is going on: compares what CPUs have cached with the tables of all address spaces,
    /// and the tables with the frames that are in use.
    pub fn compare_at_rest<'a>(&self, mms: impl Iterator<Item = &'a HostedMm>) {
        let mms: Vec<&Mm<Bits>> = mms.map(|mm| &**mm).collect();
        self.machine.compare_caches_with_slots(self, &mms);
        let roots: Vec<PhysFrame> = mms.iter().map(|mm| mm.space().root()).collect();
        self.machine.compare_tables_with_frames(&roots);
    }

    /// What the tables have for `address`.
    #[must_use]
    pub fn lookup(&self, mm: &HostedMm, address: u64) -> Mapping {
        // SAFETY: the caller holds the map lock: tables stay.
        unsafe { mm.space().lookup(self, address) }
    }

    /// A page of zeroes that no entry maps, if there is a frame for it.
    #[must_use]
    pub fn new_page(&self) -> Option<PhysFrame> {
        self.take_zeroed(FrameRole::Page)
    }

    /// Copies the bytes of a page.
    pub fn copy_page(&self, from: PhysFrame, to: PhysFrame) {
        let [from, to] = [from, to].map(|frame| self.machine.frame_to_pointer(frame));
        // SAFETY: both are frames of the machine's memory, and different ones.
        unsafe { to.copy_from_nonoverlapping(from, 1) };
    }

    /// Reads the first word of a page.
    #[must_use]
    pub fn word(&self, page: PhysFrame) -> u64 {
        // SAFETY: a frame of the machine's memory, which begins with eight aligned bytes.
        unsafe { self.machine.frame_to_pointer(page).cast::<u64>().read() }
    }

    /// Writes the first word of a page.
    pub fn set_word(&self, page: PhysFrame, word: u64) {
        // SAFETY: as in `word`.
        unsafe { self.machine.frame_to_pointer(page).cast::<u64>().write(word) };
    }

    /// Counts one more entry that maps the page.
    pub fn add_mapping(&self, page: PhysFrame) {
        self.mappings[number(page)].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one entry fewer, and frees the page if that was the last.
    pub fn remove_mapping(&self, page: PhysFrame) {
        // One more than there are: the frame is free, and the machine says so when it is freed.
        if self.mappings[number(page)].load(Ordering::Relaxed) <= 1 {
            self.mappings[number(page)].store(0, Ordering::Relaxed);
            self.give(page, FrameRole::Page);
        } else {
            self.mappings[number(page)].fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// How many entries map the page, those among them that are cleared and not yet flushed.
    #[must_use]
    pub fn nr_mappings(&self, page: PhysFrame) -> u32 {
        self.mappings[number(page)].load(Ordering::Relaxed)
    }

    /// How many pages entries map.
    #[must_use]
    pub fn nr_pages(&self) -> usize {
        self.mappings.iter().filter(|count| count.load(Ordering::Relaxed) != 0).count()
    }

    /// Page tables get scarce, or not.
    pub fn supply_tables(&self, supply: Supply) {
        self.tables.set(supply);
    }

    /// Batch pages get scarce, or not.
    pub fn supply_batches(&self, supply: Supply) {
        self.batches.set(supply);
    }

    fn take_zeroed(&self, role: FrameRole) -> Option<PhysFrame> {
        let frame = self.free.lock().pop()?;
        self.machine.allocated(frame, role);
        // SAFETY: the frame was free: nobody else uses it.
        unsafe { self.machine.frame_to_pointer(frame).write_bytes(0, 1) };
        Some(frame)
    }

    fn give(&self, frame: PhysFrame, role: FrameRole) {
        self.machine.freed(frame, role);
        self.free.lock().push(frame);
    }
}

impl fmt::Debug for HostedPlatform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostedPlatform").field("machine", &self.machine).finish_non_exhaustive()
    }
}

/// An area of pages that are counted.
#[must_use]
pub const fn counted(range: VirtRange) -> Vma<()> {
    Vma { range, kind: VmaKind::Normal, area: () }
}

fn number(frame: PhysFrame) -> usize {
    usize::try_from(frame.start_address().as_u64() >> 12).expect("x86_64 has 64-bit numbers")
}

/// Of the requests that are refused, only this one is.
const ONCE: u64 = 1 << 63;

/// Requests for something that may be scarce.
#[derive(Debug, Default)]
struct Requests {
    /// 0: all are granted; n: not each n-th; with `ONCE`, not the n-th.
    every: AtomicU64,
    so_far: AtomicU64,
}

impl Requests {
    fn set(&self, supply: Supply) {
        let every = match supply {
            Supply::Always => 0,
            Supply::Never => 1,
            Supply::ExceptEvery(every) => u64::from(every.max(1)),
            Supply::Nth(number) => {
                self.so_far.store(0, Ordering::Relaxed);
                u64::from(number.max(1)) | ONCE
            }
        };
        self.every.store(every, Ordering::Relaxed);
    }

    /// Whether this one is granted.
    fn are_granted(&self) -> bool {
        let every = self.every.load(Ordering::Relaxed);
        if every == 0 {
            return true;
        }
        let number = self.so_far.fetch_add(1, Ordering::Relaxed) + 1;
        if every & ONCE == 0 { !number.is_multiple_of(every) } else { number != every & !ONCE }
    }
}
