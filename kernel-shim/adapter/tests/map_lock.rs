//! What each call of the small kernel does under the map lock is what it says when it takes the
//! lock.

use std::sync::Arc;

use mmu_adapter::boot;
use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CpuId;
use mmu_hosted::{HostedMachine, Options};
use mmu_kernel_shim::{Area, Config, PageContent, Protection, Vma};

const PAGE: u64 = 0x7000_0000_0000;

#[test]
fn every_call_of_the_small_kernel_keeps_to_its_row() {
    const NR_PAGES: u64 = 64;
    let machine = Arc::new(HostedMachine::new(Options::new(2, 8192, 1)).expect("a small machine"));
    let kernel = boot(&machine, Config::default()).expect("it has frames");
    let mm = kernel.new_mm().expect("frames");
    for cpu in 0..2 {
        machine.on_cpu(CpuId::new(cpu), || kernel.switch_to(Some(&mm)));
    }
    let range = VirtRange::new(PAGE, PAGE + NR_PAGES * 4096).expect("a good range");
    let lower = VirtRange::new(PAGE - (4 << 20), PAGE - (4 << 20) + NR_PAGES * 4096).expect("a good range");
    let filled = |range| {
        kernel.mmap(&mm, Vma { range, area: Area::anon() }).expect("nothing is there");
        kernel.populate(&mm, range, PageContent::Anon).expect("frames");
    };
    filled(range);
    kernel.mprotect(&mm, range, Protection::Read).expect("no split");
    kernel.madvise_dontneed(&mm, range).expect("no split");
    kernel.munmap(&mm, range).expect("no split");
    filled(range);
    kernel.mremap(&mm, range, lower).expect("it fits");
    kernel.guard_install(&mm, lower).expect("it is private");
    kernel.guard_remove(&mm, lower).expect("it is private");
    kernel.populate(&mm, lower, PageContent::Anon).expect("frames");
    assert_eq!(kernel.reclaim([(&*mm, lower)]), NR_PAGES);
    kernel.move_stack(&mm, lower, 16 * 4096).expect("nothing is in the way");
    let child = kernel.fork(&mm, []).expect("frames");
    kernel.exit(&child).expect("nobody runs there");
    for cpu in 0..2 {
        machine.on_cpu(CpuId::new(cpu), || kernel.switch_to(None));
    }
    kernel.exit(&mm).expect("everybody has left");
    let found = machine.violations();
    assert_eq!(found.count, 0, "{}", found.told[0]);
}
