//! The end of a test of the small kernel: everything is taken down, and nothing may be left.

use mmu_adapter::{HostedKernel, HostedMm};
use mmu_gather::tlb::CpuId;

/// Every CPU leaves, the address spaces exit, and the kernel is held to its account.
pub(crate) fn end(kernel: &HostedKernel, mms: &[&HostedMm]) {
    let machine = kernel.machine();
    for number in 0..machine.nr_cpus() {
        machine.on_cpu(CpuId::new(number), || kernel.switch_to(None));
    }
    for mm in mms {
        kernel.exit(mm).expect("nobody runs it");
    }
    kernel.drop_caches();
    assert_eq!(kernel.lost(), (0, 0));
    assert_eq!(kernel.counters().snapshot().double_frees, 0);
    assert_eq!((kernel.swap_slots(), kernel.guards()), (0, 0));
    let found = machine.violations();
    assert_eq!(found.count, 0, "{:?}", found.told);
}
