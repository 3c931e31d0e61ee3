//! The least kernel that the engine's flush needs, for the self-test: address spaces are switched
//! to and flushed, and nothing is ever freed.

use alloc::boxed::Box;
use core::pin::Pin;
use core::sync::atomic::{AtomicU64, Ordering};

use mmu_gather::tlb::{
    Answers, CpuId, CpuSet, CpuTlb, Cpus, CtxIds, FreedTables, MmContext, PageSpan, PcidSupport, TlbEvent,
    flush_interrupt, flush_tlb_mm_range, init_cpu, switch_mm,
};
use spin::Once;
use x86_64::VirtAddr;
use x86_64::instructions::interrupts::without_interrupts;
use x86_64::structures::paging::PhysFrame;

use crate::arch::mmu;
use crate::arch::paging::kernel_root;
use crate::arch::phys_map::FRAME_BYTES;
use crate::cpu::index::{CpuIndex, MAX_CPUS};
use crate::cpu::ipi;
use crate::cpu::percpu::this_index;
use crate::cpu::smp::on_every_cpu;

type Bits = [AtomicU64; 1];

/// The engine's part of an address space.
pub(crate) type Context = MmContext<Bits>;

static KERNEL: Once<TestKernel> = Once::new();

/// The one source of names in this run, which has no other kernel.
static IDS: CtxIds = CtxIds::new();

#[derive(Debug)]
struct TestKernel {
    cpus: Box<[CpuTlb<Bits>]>,
    /// Requests that CPUs have carried out for others.
    nr_answers: AtomicU64,
}

/// Starts it on every CPU.
pub(crate) fn start() {
    KERNEL.call_once(|| TestKernel {
        cpus: (0..MAX_CPUS).map(|_| CpuTlb::new()).collect(),
        nr_answers: AtomicU64::new(0),
    });
    ipi::handle_mail_with(Box::leak(Box::new(|| {
        // So that the interrupted code would notice if its registers were not kept.
        core::hint::black_box(float_sum(8));
        // SAFETY: the handler runs on this CPU, with interrupts off.
        unsafe { flush_interrupt(kernel(), this_index().id()) };
    })));
    // SAFETY: this runs on `cpu`, which has loaded no address space of this kernel.
    on_every_cpu(&|cpu| without_interrupts(|| unsafe { init_cpu(kernel(), cpu.id()) }));
}

fn kernel() -> &'static TestKernel {
    KERNEL.get().expect("the self-test starts it first")
}

/// Sums the reciprocals of 1, 2, 3, ...
pub(crate) fn float_sum(nr_terms: u32) -> f64 {
    (1..=nr_terms).map(|n| core::hint::black_box(f64::from(n)).recip()).sum()
}

/// The engine's part of a new address space.
///
/// # Safety
/// `root` has the kernel half, stays a table to the end of the run, and is the root of no other
/// space.
pub(crate) unsafe fn new_context(root: PhysFrame) -> Context {
    // SAFETY: one source of names; the caller answers for the root.
    unsafe { MmContext::new(&IDS, root) }
}

/// Makes `next` the address space of the CPU that runs this; `None`: the kernel's own.
pub(crate) fn switch_to(next: Option<&'static Context>) {
    // SAFETY: this CPU, interrupts off; `next` is never moved or freed, nor is its root.
    without_interrupts(|| unsafe { switch_mm(kernel(), this_index().id(), next.map(Pin::static_ref)) });
}

/// Makes every CPU that has `context` loaded forget the page at `address`.
pub(crate) fn flush_page(context: &'static Context, address: VirtAddr) {
    let span = PageSpan { start: address.as_u64(), end: address.as_u64() + FRAME_BYTES, stride_shift: 12 };
    // Nothing is freed with the receipt.
    let _flushed = flush_tlb_mm_range(kernel(), context, span, FreedTables::No);
}

/// Requests that CPUs have carried out for others so far.
pub(crate) fn nr_answers() -> u64 {
    kernel().nr_answers.load(Ordering::Relaxed)
}

// SAFETY: each CPU has a state of its own. Code is never moved to another CPU here. The flush
// interrupt reaches every CPU that is online, and `start` has registered its handler. INVLPG and
// MOV CR3 are the instructions.
unsafe impl Cpus for TestKernel {
    type Bits = Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(this_index().id())
    }

    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        &self.cpus[cpu.index()]
    }

    fn init_root(&self) -> PhysFrame {
        kernel_root()
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Bits>) {
        ipi::send_flush_interrupt(targets.iter().collect());
    }

    fn wait_for_answers(&self, answers: Answers<'_, Bits>) {
        ipi::wait_for_answers(|| answers.missing().collect());
    }

    fn answered(&self, initiator: CpuId) {
        self.nr_answers.fetch_add(1, Ordering::Relaxed);
        ipi::answered(CpuIndex::new(initiator.number()));
    }

    fn pcid_support(&self) -> PcidSupport {
        if mmu::features().pcid { PcidSupport::On } else { PcidSupport::Off }
    }

    fn observe(&self, event: TlbEvent) {
        match event {
            TlbEvent::Raised { .. } => ipi::begin_wait(),
            TlbEvent::IpisSent(_) => {
                ipi::end_wait();
            }
            _ => {}
        }
    }
}
