//! Two or three CPUs, of which loom tries every interleaving and every value that a read may
//! return, as far as it can.
//!
//! The page table is two entries and the link to their table, all loom atomics, because CPUs read
//! them behind each other's backs. A CPU's TLB is its own, like its program order: plain data, used
//! only while the CPU's interrupts are off. Interrupts are a lock: whoever holds it runs on that
//! CPU. So a flush interrupt is the initiator taking the lock and running the handler there. That
//! orders the handler against everything else on that CPU, and orders the answer before the
//! initiator goes on: exactly what a real interrupt and its acknowledgement do, and no more.
#![expect(unsafe_code, reason = "plays the CPUs, which the crate's entry points take on trust")]

use core::pin::Pin;
use std::sync::{Arc, Mutex as Plain};

use loom::cell::UnsafeCell;
use loom::sync::Mutex;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use mmu_tlb::{
    CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, CtxIds, FlushRequest, FreedTables, MmContext, PageSpan,
    PcidSupport, UnmapBatch, enter_lazy_tlb, flush_tlb_batched_pending, flush_tlb_func, flush_tlb_mm,
    flush_tlb_mm_range, init_cpu, leave_mm, offline_cpu, switch_mm,
};
use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::PhysFrame;

pub(crate) type Bits = [AtomicU64; 1];

pub(crate) const CPU: [CpuId; 3] = [CpuId::new(0), CpuId::new(1), CpuId::new(2)];
const PAGE: u64 = 4096;

/// What one CPU has cached, by tag: pages 0 and 1 of the program, and the link to their table.
#[derive(Default)]
struct Hardware {
    root: u64,
    pcid: usize,
    pages: [[bool; 2]; 7],
    link: [bool; 7],
}

pub(crate) struct Machine {
    pcid: PcidSupport,
    cpus: [CpuTlb<Bits>; 3],
    interrupts: [Mutex<()>; 3],
    hardware: [Plain<Hardware>; 3],
    /// The program's address space, and another one.
    pub(crate) mm: MmContext<Bits>,
    pub(crate) other: MmContext<Bits>,
    entries: [AtomicBool; 2],
    link: AtomicBool,
    freed_pages: [AtomicBool; 2],
    /// What the pages hold, used by programs and by the next owner. loom objects if neither comes
    /// first.
    contents: [UnsafeCell<()>; 2],
    freed_table: AtomicBool,
    /// The root table: read by every walk, written when it is used for something else. loom objects
    /// if neither comes first.
    root_table: UnsafeCell<()>,
}

fn frame(number: u64) -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new(number * PAGE))
}

impl Machine {
    /// Both pages are mapped; no CPU has anything loaded.
    #[expect(clippy::arc_with_non_send_sync, reason = "loom runs all threads of a story on one")]
    pub(crate) fn new(pcid: PcidSupport) -> Arc<Self> {
        let ids = CtxIds::new();
        Arc::new(Self {
            pcid,
            cpus: core::array::from_fn(|_| CpuTlb::new()),
            interrupts: core::array::from_fn(|_| Mutex::new(())),
            hardware: core::array::from_fn(|_| Plain::default()),
            // SAFETY: one source of names, and a root each; here and below.
            mm: unsafe { MmContext::new(&ids, frame(1)) },
            // SAFETY: as above.
            other: unsafe { MmContext::new(&ids, frame(2)) },
            entries: core::array::from_fn(|_| AtomicBool::new(true)),
            link: AtomicBool::new(true),
            freed_pages: core::array::from_fn(|_| AtomicBool::new(false)),
            contents: core::array::from_fn(|_| UnsafeCell::new(())),
            freed_table: AtomicBool::new(false),
            root_table: UnsafeCell::new(()),
        })
    }

    /// This thread is `cpu` from now on.
    pub(crate) const fn on(&self, cpu: CpuId) -> Cpu<'_> {
        Cpu { machine: self, here: cpu }
    }

    /// When every thread has ended: no CPU that is up to date by its own account has cached what is
    /// gone.
    pub(crate) fn check_at_rest(&self) {
        for cpu in CPU {
            let hardware = self.hardware[cpu.index()].lock().expect("no panic before");
            for (asid, slot) in self.cpus[cpu.index()].slots() {
                if slot.ctx_id != Some(self.mm.ctx_id()) {
                    continue;
                }
                assert!(slot.tlb_gen <= self.mm.tlb_gen(), "T2: {cpu} is ahead of its mm");
                if slot.tlb_gen < self.mm.tlb_gen() {
                    continue;
                }
                let tag = usize::from(asid.pcid(self.pcid).value());
                for page in 0..2 {
                    let stale = hardware.pages[tag][page] && !self.entries[page].load(Ordering::Relaxed);
                    assert!(!stale, "T2: {cpu} is up to date, and has page {page} still");
                }
                let stale = hardware.link[tag] && !self.link.load(Ordering::Relaxed);
                assert!(!stale, "T2: {cpu} is up to date, and has the table still");
            }
        }
    }
}

/// One thread's view of the machine.
#[derive(Clone, Copy)]
pub(crate) struct Cpu<'a> {
    machine: &'a Machine,
    here: CpuId,
}

/// The bytes of `page`.
pub(crate) fn span_of(page: usize) -> PageSpan {
    let start = page as u64 * PAGE;
    PageSpan { start, end: start + PAGE, stride_shift: 12 }
}

/// What happens on this CPU.
impl<'a> Cpu<'a> {
    /// The program's address space.
    pub(crate) fn mm(&self) -> &'a MmContext<Bits> {
        &self.machine.mm
    }

    /// Another one.
    pub(crate) fn other(&self) -> &'a MmContext<Bits> {
        &self.machine.other
    }

    pub(crate) fn with_interrupts_off<R>(&self, f: impl FnOnce() -> R) -> R {
        let off = self.machine.interrupts[self.here.index()].lock().expect("no panic before");
        let result = f();
        drop(off);
        result
    }

    pub(crate) fn run(&self, mm: &'a MmContext<Bits>) {
        // SAFETY: the contexts live in the machine, which is in its `Arc`.
        let mm = unsafe { Pin::new_unchecked(mm) };
        // SAFETY: interrupts are off.
        self.with_interrupts_off(|| unsafe { switch_mm(self, self.here, Some(mm)) });
    }

    pub(crate) fn stop(&self) {
        // SAFETY: interrupts are off.
        self.with_interrupts_off(|| unsafe { switch_mm(self, self.here, None) });
    }

    pub(crate) fn go_lazy(&self) {
        // SAFETY: as in `run`.
        self.with_interrupts_off(|| unsafe { enter_lazy_tlb(self, self.here) });
    }

    pub(crate) fn go_offline(&self) {
        // SAFETY: interrupts are off, and nothing runs here before `start`.
        self.with_interrupts_off(|| unsafe { offline_cpu(self, self.here) });
    }

    pub(crate) fn start(&self) {
        // SAFETY: interrupts are off, and nothing is loaded here.
        self.with_interrupts_off(|| unsafe { init_cpu(self, self.here) });
    }

    pub(crate) fn leave(&self) {
        // SAFETY: as in `run`.
        self.with_interrupts_off(|| unsafe { leave_mm(self, self.here) });
    }

    /// The program uses `page`, if this CPU runs it. This is one instruction; interrupts may come
    /// between two of them.
    pub(crate) fn use_page(&self, page: usize) {
        self.with_interrupts_off(|| self.reach(page, "a program"));
    }

    /// Speculation, on a lazy CPU too: what it uses of the leaves may be stale, what it uses of the
    /// tables may not.
    pub(crate) fn speculate(&self) {
        self.with_interrupts_off(|| self.refill(&mut self.hardware()));
    }

    /// Speculation caches whatever the tables say now.
    fn refill(&self, hardware: &mut Hardware) {
        if hardware.root == 1 && self.walk_to_table(hardware, "speculation") {
            let tag = hardware.pcid;
            for page in 0..2 {
                hardware.pages[tag][page] |= self.machine.entries[page].load(Ordering::Relaxed);
            }
        }
    }

    fn reach(&self, page: usize, who: &str) {
        let mut hardware = self.hardware();
        if hardware.root != 1 {
            return;
        }
        let tag = hardware.pcid;
        if !hardware.pages[tag][page] {
            if !self.walk_to_table(&mut hardware, who) || !self.machine.entries[page].load(Ordering::Relaxed)
            {
                return;
            }
            hardware.pages[tag][page] = true;
        }
        let freed = self.machine.freed_pages[page].load(Ordering::Relaxed);
        assert!(!freed, "{who} on {} reaches page {page}, which is free", self.here);
        self.machine.contents[page].with(|_| ());
    }

    /// Whether the table can be reached; caches the link.
    fn walk_to_table(&self, hardware: &mut Hardware, who: &str) -> bool {
        self.machine.root_table.with(|_| ());
        let tag = hardware.pcid;
        hardware.link[tag] |= self.machine.link.load(Ordering::Relaxed);
        if hardware.link[tag] {
            let freed = self.machine.freed_table.load(Ordering::Relaxed);
            assert!(!freed, "{who} on {} walks through a table that is free", self.here);
        }
        hardware.link[tag]
    }

    fn hardware(&self) -> std::sync::MutexGuard<'a, Hardware> {
        self.machine.hardware[self.here.index()].lock().expect("no panic before")
    }
}

/// What an unmapping does, in the order of the gather.
impl Cpu<'_> {
    pub(crate) fn clear(&self, page: usize) {
        self.machine.entries[page].swap(false, Ordering::AcqRel);
    }

    pub(crate) fn free(&self, page: usize) {
        self.machine.freed_pages[page].store(true, Ordering::Relaxed);
        self.machine.contents[page].with_mut(|_| ());
    }

    /// Clears the entry of `page`, flushes, frees.
    pub(crate) fn unmap(&self, page: usize) {
        self.clear(page);
        let _flushed = flush_tlb_mm_range(self, &self.machine.mm, span_of(page), FreedTables::No);
        self.free(page);
    }

    /// Unhooks the table, flushes, frees it.
    pub(crate) fn free_table(&self) {
        self.machine.link.swap(false, Ordering::AcqRel);
        let span = PageSpan { start: 0, end: 2 << 20, stride_shift: 21 };
        let _flushed = flush_tlb_mm_range(self, &self.machine.mm, span, FreedTables::Yes);
        self.machine.freed_table.store(true, Ordering::Relaxed);
    }

    /// A full flush.
    pub(crate) fn flush_all(&self) {
        let _flushed = flush_tlb_mm(self, &self.machine.mm);
    }

    /// Ends the address space, in which nothing is mapped any more, in the order of `exit_mmap`;
    /// then its root is used for something else.
    pub(crate) fn exit(&self) {
        if self.machine.mm.may_be_loaded_somewhere(self) {
            let _left = flush_tlb_mm(self, &self.machine.mm);
        }
        self.machine.root_table.with_mut(|_| ());
    }

    /// Clears the entry of `page`, notes it in a batch, flushes the batch, frees.
    pub(crate) fn reclaim(&self, page: usize) {
        let mut batch = self.reclaim_without_flush(page);
        let _flushed = batch.flush(self);
        self.free(page);
    }

    /// Clears the entry of `page` and notes it in a batch.
    pub(crate) fn reclaim_without_flush(&self, page: usize) -> UnmapBatch<Self> {
        let mut batch = UnmapBatch::new();
        self.clear(page);
        batch.add_mm(self, &self.machine.mm);
        batch
    }

    /// Makes up for reclaim's flushes, if some are seen to be outstanding.
    pub(crate) fn make_up_for_reclaim(&self) {
        flush_tlb_batched_pending(self, &self.machine.mm);
    }

    /// Whether this CPU could still use `page` without a walk.
    pub(crate) fn remembers(&self, page: usize) -> bool {
        self.with_interrupts_off(|| {
            let hardware = self.hardware();
            hardware.root == 1 && hardware.pages[hardware.pcid][page]
        })
    }
}

// SAFETY: a thread is one CPU; the lock of its interrupts is held where the crate asks for them to
// be off. A flush interrupt runs to its end on its target before `flush_others` returns. The
// pretend TLB drops what is named.
unsafe impl Cpus for Cpu<'_> {
    type Bits = Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(self.here)
    }

    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        &self.machine.cpus[cpu.index()]
    }

    fn init_root(&self) -> PhysFrame {
        frame(0)
    }

    fn flush_others(
        &self,
        targets: &CpuSet<Bits>,
        request: &FlushRequest<'_, Bits>,
        meanwhile: impl FnOnce(),
    ) {
        for cpu in targets.iter() {
            let there = self.machine.on(cpu);
            // SAFETY: the interrupts of `cpu` are off, and this thread is that CPU meanwhile.
            there.with_interrupts_off(|| unsafe { flush_tlb_func(&there, cpu, request) });
        }
        meanwhile();
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        self.with_interrupts_off(f)
    }

    fn pcid_support(&self) -> PcidSupport {
        self.machine.pcid
    }

    fn invlpg(&self, address: u64) {
        // A serialising instruction.
        fence(Ordering::SeqCst);
        let mut hardware = self.hardware();
        let tag = hardware.pcid;
        if address < 2 * PAGE {
            hardware.pages[tag][usize::from(address == PAGE)] = false;
        }
        hardware.link[tag] = false;
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        // A serialising instruction.
        fence(Ordering::SeqCst);
        let mut hardware = self.hardware();
        // Up to this instruction speculation walks the old tables.
        self.refill(&mut hardware);
        hardware.root = root.start_address().as_u64() / PAGE;
        hardware.pcid = usize::from(pcid.value());
        if cached == CachedTranslations::Flush {
            let tag = hardware.pcid;
            hardware.pages[tag] = [false; 2];
            hardware.link[tag] = false;
            // Speculation does not wait for the end of a handler.
            self.refill(&mut hardware);
        }
    }
}
