//! An address-space lock that keeps interrupts off: whoever spins for it answers, and no flush
//! under it waits for ever.
#![expect(unsafe_code, reason = "threads play CPUs")]

use core::cell::Cell;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use core::time::Duration;
use std::sync::OnceLock;
use std::sync::mpsc;
use std::thread;

use mmu_gather::tlb::{
    CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, CtxIds, FreedTables, MmContext, PageSpan,
    flush_interrupt, flush_tlb_mm_range, init_cpu, switch_mm,
};
use spin::mutex::SpinMutex;
use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::PhysFrame;

type Bits = [AtomicU64; 1];

/// Two CPUs, each a thread that takes no interrupt.
struct Kernel {
    cpus: [CpuTlb<Bits>; 2],
    /// Pages that each has invalidated.
    invalidated: [AtomicU32; 2],
    interrupts: AtomicU32,
}

static KERNEL: OnceLock<Kernel> = OnceLock::new();

thread_local! {
    static HERE: Cell<CpuId> = const { Cell::new(CpuId::new(0)) };
}

// SAFETY: a thread stays the CPU that it plays, and nothing interrupts it.
unsafe impl Cpus for Kernel {
    type Bits = Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(HERE.get())
    }

    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        &self.cpus[cpu.index()]
    }

    fn init_root(&self) -> PhysFrame {
        PhysFrame::containing_address(PhysAddr::new(0))
    }

    fn send_flush_interrupt(&self, _: &CpuSet<Bits>) {
        // It stays pending: no CPU ever has interrupts on.
        self.interrupts.fetch_add(1, Ordering::Relaxed);
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }

    fn invlpg(&self, _: u64) {
        self.invalidated[HERE.get().index()].fetch_add(1, Ordering::Relaxed);
    }

    unsafe fn load_cr3(&self, _: PhysFrame, _: Pcid, _: CachedTranslations) {}
}

/// What a CPU does while it waits for a lock.
struct Answer;

impl spin::RelaxStrategy for Answer {
    fn relax() {
        if let Some(kernel) = KERNEL.get() {
            // SAFETY: pinned, interrupts off.
            kernel.pinned(|here| kernel.without_interrupts(|| unsafe { flush_interrupt(kernel, here) }));
        }
        thread::yield_now();
    }
}

#[test]
fn a_cpu_that_spins_for_the_map_lock_with_interrupts_off_answers_who_flushes_under_it() {
    let ids = CtxIds::new();
    let root = PhysFrame::containing_address(PhysAddr::new(0x1000));
    // SAFETY: one source of names, one root. Leaked, so that CPUs may know it for ever.
    let mm = Box::leak(Box::new(unsafe { MmContext::new(&ids, root) }));
    let mm = core::pin::Pin::static_ref(mm);
    let kernel = KERNEL.get_or_init(|| Kernel {
        cpus: [CpuTlb::new(), CpuTlb::new()],
        invalidated: [AtomicU32::new(0), AtomicU32::new(0)],
        interrupts: AtomicU32::new(0),
    });
    let map_lock: &SpinMutex<(), Answer> = Box::leak(Box::new(SpinMutex::new(())));
    let runs: &AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
    let (done, finished) = mpsc::channel();

    let guard = map_lock.lock();
    thread::spawn(move || {
        HERE.set(CpuId::new(1));
        // SAFETY: this thread is CPU 1, and nothing interrupts it.
        unsafe { init_cpu(kernel, CpuId::new(1)) };
        // SAFETY: as above, and the context is never dropped.
        unsafe { switch_mm(kernel, CpuId::new(1), Some(mm)) };
        runs.store(true, Ordering::Release);
        drop(map_lock.lock());
    });
    while !runs.load(Ordering::Acquire) {
        thread::yield_now();
    }
    // The flush, on a thread of its own so that this one can tell that it does not end.
    thread::spawn(move || {
        // SAFETY: this thread is CPU 0, and nothing interrupts it.
        unsafe { init_cpu(kernel, CpuId::new(0)) };
        let span = PageSpan { start: 0x4000, end: 0x6000, stride_shift: 12 };
        let _flushed = flush_tlb_mm_range(kernel, mm.get_ref(), span, FreedTables::No);
        done.send(()).expect("the test waits");
    });
    finished.recv_timeout(Duration::from_secs(20)).expect("the CPU that waits for the lock answers");
    drop(guard);
    assert_eq!(kernel.invalidated[1].load(Ordering::Relaxed), 2);
    assert_eq!(kernel.interrupts.load(Ordering::Relaxed), 1);
}
