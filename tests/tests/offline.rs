//! CPUs that are switched off: nobody waits for them, and they come back with nothing cached.

use mmu_gather::Limits;
use mmu_gather::pagetable::{Bounds, Level};
use mmu_gather::tlb::{PcidSupport, UnmapBatch, flush_tlb_mm};
use mmu_tests::{Access, Backing, CPU, Event, Fault, GIB, Options, PaperKernel, area};

const PAGE: u64 = 4096;

/// One page, in use on CPUs 0 to 2; then CPU 2 is switched off, from whatever it was doing.
fn kernel_with_a_cpu_off(pcid: PcidSupport, lazy: bool) -> PaperKernel {
    let kernel = PaperKernel::new(Options { pcid, ..Options::default() });
    let mm = kernel.new_mm();
    kernel.map(mm, GIB, Level::Pte);
    for cpu in &CPU[..3] {
        kernel.run(*cpu, mm);
        kernel.touch(*cpu, GIB, Access::Write).expect("mapped");
    }
    if lazy {
        kernel.go_lazy(CPU[2]);
    }
    kernel.take_offline(CPU[2]);
    kernel.take_events();
    kernel
}

fn asked(kernel: &PaperKernel) -> Vec<Event> {
    let is_ipi = |event: &Event| matches!(event, Event::Ipi { .. });
    kernel.take_events().into_iter().map(|noted| noted.event).filter(is_ipi).collect()
}

#[test]
fn a_cpu_that_is_off_is_asked_for_nothing_not_even_for_freed_tables() {
    for pcid in [PcidSupport::Off, PcidSupport::On] {
        for lazy in [false, true] {
            let kernel = kernel_with_a_cpu_off(pcid, lazy);
            let mm = kernel.mm(0);
            assert!(kernel.state(CPU[2]).is_offline() && mm.context().cpumask().contains(CPU[2]));
            let _receipt = flush_tlb_mm(&kernel, mm.context());
            assert_eq!(asked(&kernel), [Event::Ipi { to: CPU[1] }], "{pcid:?}");
            // When the table is freed, the checker looks at every TLB, also that of the CPU that is
            // off.
            let vma = area(GIB, GIB + PAGE, Backing::Anonymous);
            kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
            assert_eq!(asked(&kernel), [Event::Ipi { to: CPU[1] }]);
            kernel.stop(CPU[0]);
            kernel.stop(CPU[1]);
            kernel.exit(mm, &Limits::DEFAULT, &[]);
            assert_eq!(asked(&kernel), [], "an exit does not wait for it either");
        }
    }
}

#[test]
fn a_reclaim_batch_passes_a_cpu_that_is_off_by() {
    let kernel = kernel_with_a_cpu_off(PcidSupport::On, false);
    let mut batch = UnmapBatch::new();
    let frame = kernel.reclaim(&mut batch, kernel.mm(0), GIB);
    let _receipt = batch.flush(&kernel);
    assert_eq!(asked(&kernel), [Event::Ipi { to: CPU[1] }]);
    kernel.release(frame, 1);
}

#[test]
fn a_cpu_that_comes_back_has_forgotten_what_went_while_it_was_off() {
    for pcid in [PcidSupport::Off, PcidSupport::On] {
        let kernel = kernel_with_a_cpu_off(pcid, false);
        let mm = kernel.mm(0);
        let vma = area(GIB, GIB + PAGE, Backing::Anonymous);
        kernel.zap(mm, &vma, vma.range).free();
        let new = kernel.map(mm, GIB, Level::Pte);
        kernel.restart(CPU[2]);
        assert!(!kernel.state(CPU[2]).is_offline());
        kernel.run(CPU[2], mm);
        assert_eq!(kernel.touch(CPU[2], GIB, Access::Write), Ok(new));
        kernel.zap(mm, &vma, vma.range).free();
        assert_eq!(kernel.touch(CPU[2], GIB, Access::Write), Err(Fault::NotPresent), "it is asked again");
    }
}
