use core::cell::RefCell;
use core::sync::atomic::AtomicU64;

use mmu_tlb::{CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, FlushRequest, OnlineCpus, PcidSupport};
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::PhysFrame;

type Bits = [AtomicU64; 1];

/// A machine of one CPU, which writes down what it would do to its TLB.
#[derive(Default)]
struct Machine {
    cpu: CpuTlb<Bits>,
    did: RefCell<Vec<String>>,
}

// SAFETY: there is one CPU, one thread plays it, and nothing is cached that it would have to drop.
unsafe impl Cpus for Machine {
    type Bits = Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(CpuId::new(0))
    }

    fn cpu_state(&self, _cpu: CpuId) -> &CpuTlb<Bits> {
        &self.cpu
    }

    fn init_root(&self) -> PhysFrame {
        PhysFrame::containing_address(x86_64::PhysAddr::new(0))
    }

    fn flush_others(&self, _: &CpuSet<Bits>, _: &FlushRequest<'_, Bits>, _: impl FnOnce()) {
        unreachable!("there is one CPU");
    }

    fn online_cpus(&self) -> OnlineCpus {
        OnlineCpus::One
    }

    fn pcid_support(&self) -> PcidSupport {
        PcidSupport::On
    }

    // A program of an ordinary process can neither mask interrupts nor write CR3.
    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }

    fn invlpg(&self, address: u64) {
        self.did.borrow_mut().push(format!("INVLPG {address:#x}"));
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        let (root, pcid) = (root.start_address().as_u64(), pcid.value());
        self.did.borrow_mut().push(format!("CR3 {root:#x}, PCID {pcid}: {cached:?}"));
    }
}
