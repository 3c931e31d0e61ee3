//! The part to copy from works as it stands, without what this project wraps around it.

use std::sync::Arc;

use mmu_adapter::{HostedKernel, Touched, boot, touch};
use mmu_gather::pagetable::{Bounds, VirtRange};
use mmu_gather::tlb::CpuId;
use mmu_gather::{Fate, Limits, Vma as EngineVma, VmaKind, unmap_region, zap_page_range};
use mmu_hosted::{HostedMachine, Options};
use mmu_kernel_shim::{Area, Config, Embedder, EngineArea, UserAccess, Vma};

const START: u64 = 0x7000_0000_0000;
const NR_PAGES: u64 = 40;

fn kernel() -> Arc<HostedKernel> {
    let machine = HostedMachine::new(Options::new(2, 4096, 1)).expect("a small machine");
    boot(&Arc::new(machine), Config::default()).expect("it has frames")
}

#[test]
fn the_part_to_copy_takes_pages_and_tables_down_on_every_cpu() {
    let kernel = kernel();
    let plain: &Embedder<_> = &kernel;
    let machine = kernel.machine();
    let mm = kernel.new_mm().expect("frames");
    let range = VirtRange::new(START, START + NR_PAGES * 4096).expect("a good range");
    kernel.mmap(&mm, Vma { range, area: Area::anon() }).expect("nothing is there");
    let free_before = kernel.frames().nr_free();
    for cpu in [1, 0] {
        machine.on_cpu(CpuId::new(cpu), || {
            kernel.switch_to(Some(&mm));
            for address in (range.start()..range.end()).step_by(4096) {
                assert_eq!(touch(&kernel, &mm, address, UserAccess::Write), Touched::Reached);
            }
        });
    }
    let counted = kernel.counters().snapshot();
    let area = |markers| EngineVma {
        range,
        kind: VmaKind::Normal,
        area: EngineArea { area: Area::anon(), markers },
    };

    #[expect(unsafe_code, reason = "the engine takes the map lock on trust")]
    // SAFETY: nothing else runs.
    let flushed = unsafe { zap_page_range(plain, mm.engine(), &Limits::DEFAULT, &area(Fate::Keep), range) };
    flushed.expect("no leaf is large").free();
    let used = free_before - kernel.frames().nr_free();
    assert_eq!(used, 3, "three tables are left");
    for cpu in 0..2 {
        machine.on_cpu(CpuId::new(cpu), || {
            let fault = machine.user_access(START, UserAccess::Read);
            assert!(fault.is_err(), "CPU {cpu} still reaches {fault:?}");
        });
    }

    #[expect(unsafe_code, reason = "the engine takes the map lock on trust")]
    // SAFETY: nothing else runs, and the address space has this one area.
    let flushed = unsafe {
        let going = [area(Fate::Clear)];
        unmap_region(plain, mm.engine(), &Limits::DEFAULT, going, Bounds::between(None, None), || {})
    };
    flushed.expect("no leaf is large").free();
    assert_eq!(kernel.frames().nr_free(), free_before, "the tables are free, too");
    assert_eq!(mm.nr_tables(), [0; 3]);
    let since = kernel.counters().snapshot().since(&counted);
    assert_eq!((since.leaves, since.ipis_sent), (0, 0), "nobody counts here");
    assert_eq!(kernel.counters().snapshot().double_frees, 0);
}
