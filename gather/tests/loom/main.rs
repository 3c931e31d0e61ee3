//! Two gathers on one address space under loom: what the first to return has promised holds,
//! whichever of the two cleared the entry.
//!
//! ```text
//! RUSTFLAGS="--cfg mmu_loom" cargo test -p mmu-gather --test loom --release
//! tlb/tests/loom/run-corrected --package mmu-gather
//! ```
//!
//! What loom tries, what the corrected loom of the second command adds, and what neither sees:
//! `tlb/tests/loom/README.md`.
//!
//! CPUs 0 and 1 zap the same page; CPU 2 runs the program and has the page in its TLB. The entry is
//! cleared under a lock, which plays the table lock. One gather finds it present. The other finds
//! it empty, has nothing of its own to flush, and must still not return before CPU 2 has forgotten
//! the page (rule G6). The page table is one entry; the gather, its count of open gathers and all
//! of `mmu-tlb` are the engine's own source over loom's atomics.
#![cfg(mmu_loom)]
#![expect(unsafe_code, reason = "plays the platform, which the engine takes on trust")]

use core::pin::Pin;
use std::sync::{Arc, Mutex as Plain};

use loom::model::Builder;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use loom::sync::{Mutex, MutexGuard};
use loom::thread;
use mmu_gather::pagetable::{Level, PagingMode, TableLock, TableMemory, VirtRange};
use mmu_gather::tlb::{
    CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, CtxIds, FlushRequest, PcidSupport, flush_tlb_func,
    switch_mm,
};
use mmu_gather::{BatchPage, Disposition, FreedPages, GatherEvent, Mm, MmuGather, Pages, UnmappedLeaf};
use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PhysFrame};

type Bits = [AtomicU64; 1];

const PAGE: u64 = 4096;
const CPU: [CpuId; 3] = [CpuId::new(0), CpuId::new(1), CpuId::new(2)];

/// The one entry.
#[derive(Default)]
struct Table {
    mapped: bool,
}

#[derive(Default)]
struct Seen {
    freed: usize,
    nested: usize,
}

struct Machine {
    cpus: [CpuTlb<Bits>; 3],
    /// Whoever holds one runs on that CPU, with interrupts off there.
    interrupts: [Mutex<()>; 3],
    /// Whether each CPU has the page in its TLB. Others read it without a lock: whoever relies on
    /// it has been told by a flush.
    cached: [AtomicBool; 3],
    mm: Mm<Bits>,
    table: Mutex<Table>,
    seen: Plain<Seen>,
}

fn range(start: u64, end: u64) -> VirtRange {
    VirtRange::new(start, end).expect("not empty")
}

/// What a gather may look into.
#[derive(Clone, Copy)]
enum Reach {
    Everywhere,
    /// From the page on.
    Within(u64),
}

/// The table of the page.
const ONE_TABLE: Reach = Reach::Within(3 * PAGE);
/// That, and the next: counted in another stripe, too.
const TWO_TABLES: Reach = Reach::Within((2 << 20) + PAGE);

fn frame(number: u64) -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new(number * PAGE))
}

impl Machine {
    /// The program runs on CPU 2 and has used the page.
    fn new() -> Arc<Self> {
        let ids = CtxIds::new();
        let machine = Arc::new(Self {
            cpus: core::array::from_fn(|_| CpuTlb::new()),
            interrupts: core::array::from_fn(|_| Mutex::new(())),
            cached: core::array::from_fn(|_| AtomicBool::new(false)),
            // SAFETY: the table is never walked; no root is ever looked at.
            mm: unsafe { Mm::new(&ids, frame(1), PagingMode::FourLevel) },
            table: Mutex::new(Table { mapped: true }),
            seen: Plain::default(),
        });
        let there = Cpu { machine: &machine, here: CPU[2] };
        let off = there.interrupts_off();
        // SAFETY: the context lives in the machine, which is in its `Arc`.
        let mm = unsafe { Pin::new_unchecked(&machine.mm) }.pinned_context();
        // SAFETY: this thread is CPU 2, with interrupts off.
        unsafe { switch_mm(&there, CPU[2], Some(mm)) };
        machine.cached[2].store(true, Ordering::Relaxed);
        drop(off);
        machine
    }

    fn on(&self, cpu: CpuId) -> Cpu<'_> {
        Cpu { machine: self, here: cpu }
    }
}

#[derive(Clone, Copy)]
struct Cpu<'a> {
    machine: &'a Machine,
    here: CpuId,
}

impl<'a> Cpu<'a> {
    fn interrupts_off(&self) -> MutexGuard<'a, ()> {
        self.machine.interrupts[self.here.index()].lock().expect("no panic before")
    }

    /// MADV_DONTNEED of the page: when it returns, no program may use the page.
    fn zap(&self, reach: Reach) {
        let mm = &self.machine.mm;
        let mut gather = match reach {
            // SAFETY: the promise is that nobody unmaps the area, and nobody does. Two may zap it
            // at once: that is what table locks are for.
            Reach::Everywhere => unsafe { MmuGather::new(self, mm) },
            // SAFETY: as above; the page lies in the range, and nothing else is cleared.
            Reach::Within(end) => unsafe { MmuGather::new_within(self, mm, range(PAGE, end)) },
        };
        let mut table = self.machine.table.lock().expect("no panic before");
        let found = core::mem::take(&mut table.mapped);
        drop(table);
        if found {
            let page = range(PAGE, 2 * PAGE);
            // SAFETY: the entry was found and taken under its lock, once, and its page has no other
            // reference.
            unsafe { gather.remove_page(frame(9), page, Level::Pte) };
        }
        let flushed = gather.flush();
        self.assert_forgotten("after the call");
        flushed.free();
    }

    fn assert_forgotten(&self, when: &str) {
        let cached = self.machine.cached[2].load(Ordering::Relaxed);
        assert!(!cached, "G6: a program can use the page {when} on {}", self.here);
    }

    fn forget(&self) {
        // A serialising instruction.
        fence(Ordering::SeqCst);
        self.machine.cached[self.here.index()].store(false, Ordering::Relaxed);
    }
}

// SAFETY: no table is ever reached: the page table of this machine is one flag.
unsafe impl PageTableFrameMapping for Cpu<'_> {
    fn frame_to_pointer(&self, _: PhysFrame) -> *mut PageTable {
        unreachable!("there are no tables")
    }
}

// SAFETY: as above.
unsafe impl TableMemory for Cpu<'_> {
    type Lock = TableLock<spin::Spin>;

    unsafe fn table_lock(&self, _: PhysFrame) -> &TableLock<spin::Spin> {
        unreachable!("there are no tables")
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        None
    }

    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        assert!(tables.is_empty(), "there are no tables");
    }
}

// SAFETY: a thread is one CPU, and holds the lock of its interrupts where they are to be off. A
// flush runs to its end on its target before `flush_others` returns. The pretended TLB drops what
// is named, and more.
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
            let off = there.interrupts_off();
            // SAFETY: the interrupts of `cpu` are off, and this thread is that CPU meanwhile.
            unsafe { flush_tlb_func(&there, cpu, request) };
            drop(off);
        }
        meanwhile();
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        let off = self.interrupts_off();
        let result = f();
        drop(off);
        result
    }

    fn pcid_support(&self) -> PcidSupport {
        PcidSupport::On
    }

    fn invlpg(&self, _: u64) {
        self.forget();
    }

    unsafe fn load_cr3(&self, _: PhysFrame, _: Pcid, cached: CachedTranslations) {
        if cached == CachedTranslations::Flush {
            self.forget();
        }
    }
}

impl Pages for Cpu<'_> {
    type Area = ();

    fn unmap_page(&self, (): (), _: &UnmappedLeaf) -> Disposition {
        Disposition::Free
    }

    fn free_pages(&self, pages: FreedPages<'_>) {
        self.assert_forgotten("when it is freed");
        self.machine.seen.lock().expect("no panic before").freed += pages.iter().count();
    }

    fn allocate_batch(&self) -> Option<BatchPage> {
        None
    }

    fn free_batch(&self, _: BatchPage) {}

    fn observe_gather(&self, event: GatherEvent) {
        if event == GatherEvent::NestedFlush {
            self.machine.seen.lock().expect("no panic before").nested += 1;
        }
    }
}

/// 26081 executions, 1.3 s; corrected: with at most 6 preemptions 335713, 53 s.
/// Seen to fail with: nested gathers ignored; the count lowered before the flush; the count lowered
/// without release.
#[test]
fn whichever_of_two_gathers_returns_first_nobody_can_use_the_page_any_more() {
    two_gathers([Reach::Everywhere; 2]);
}

/// Two threads that discard in one table: counted in its stripe, both.
/// Seen to fail with: nested gathers ignored; the stripe of another table; counted late.
#[test]
fn whichever_of_two_gathers_in_one_table_returns_first_nobody_can_use_the_page_any_more() {
    two_gathers([ONE_TABLE; 2]);
}

/// Seen to fail with: gathers of everywhere that ask no stripe; gathers of one table that ask their
/// stripe alone.
#[test]
fn a_gather_in_one_table_and_one_that_may_look_anywhere_see_each_other() {
    two_gathers([ONE_TABLE, Reach::Everywhere]);
}

/// Seen to fail with: a gather in two tables that is counted in the stripe of the second alone.
#[test]
fn a_gather_in_one_table_and_one_in_two_see_each_other() {
    two_gathers([ONE_TABLE, TWO_TABLES]);
}

/// CPUs 0 and 1 zap the page at the same time, each with a gather of its reach.
fn two_gathers([here, there]: [Reach; 2]) {
    let (executions, nested) = (Arc::new(Plain::new(0)), Arc::new(Plain::new(0)));
    let (count, count_nested) = (executions.clone(), nested.clone());
    let mut builder = Builder::new();
    builder.max_branches = 10_000;
    builder.check(move || {
        let machine = Machine::new();
        let other = machine.clone();
        let other = thread::spawn(move || other.on(CPU[1]).zap(there));
        machine.on(CPU[0]).zap(here);
        other.join().expect("no panic in a thread");
        assert_eq!(machine.mm.open_gathers(), 0);
        let seen = machine.seen.lock().expect("no panic before");
        assert_eq!(seen.freed, 1, "G5");
        *count.lock().expect("no panic before") += 1;
        *count_nested.lock().expect("no panic before") += usize::from(seen.nested > 0);
    });
    let (executions, nested) =
        (*executions.lock().expect("no panic before"), *nested.lock().expect("no panic before"));
    println!("{executions} executions, {nested} of them with a nested flush");
    assert!(0 < nested && nested < executions, "both kinds of executions");
}
