//! Lazy CPUs: they have an address space in CR3 that they merely borrow.

use mmu_gather::Limits;
use mmu_gather::pagetable::{Bounds, Level};
use mmu_gather::tlb::{CachedTranslations, Concern, Laziness, PcidSupport, TlbEvent, TlbGen};
use mmu_tests::{Access, Backing, CPU, Event, Fault, GIB, Options, PaperKernel, area, range};

const PAGE: u64 = 4096;

/// Three pages at 1 GiB; CPU 1 has read them all and then gone lazy, CPU 0 unmaps.
fn kernel_with_a_lazy_cpu(pcid: PcidSupport) -> PaperKernel {
    let kernel = PaperKernel::new(Options { pcid, ..Options::default() });
    let mm = kernel.new_mm();
    kernel.map_range(mm, range(GIB, GIB + 3 * PAGE));
    kernel.run(CPU[0], mm);
    kernel.run(CPU[1], mm);
    for page in 0..3 {
        kernel.touch(CPU[1], GIB + page * PAGE, Access::Write).expect("mapped");
    }
    kernel.go_lazy(CPU[1]);
    kernel.take_events();
    kernel
}

fn zap_first_page(kernel: &PaperKernel) {
    let vma = area(GIB, GIB + 3 * PAGE, Backing::Anonymous);
    kernel.zap(kernel.mm(0), &vma, range(GIB, GIB + PAGE)).free();
}

#[test]
fn a_lazy_cpu_is_not_interrupted_for_pages_and_catches_up_when_it_wakes() {
    for pcid in [PcidSupport::Off, PcidSupport::On] {
        let kernel = kernel_with_a_lazy_cpu(pcid);
        zap_first_page(&kernel);
        assert_eq!(kernel.count(|event| matches!(event, Event::Ipi { .. })), 0);
        let saved = Event::Tlb(TlbEvent::IpisSaved { lazy: 1, elsewhere: 0 });
        assert_eq!(kernel.count(|event| *event == saved), 1);
        assert!(kernel.cached(CPU[1], GIB).is_some(), "nobody told it");

        kernel.take_events();
        kernel.run(CPU[1], kernel.mm(0));
        assert_eq!(
            kernel.count(|event| matches!(
                event,
                Event::Cr3 { cpu, cached: CachedTranslations::Flush, .. } if *cpu == CPU[1]
            )),
            1
        );
        assert_eq!(kernel.touch(CPU[1], GIB, Access::Read), Err(Fault::NotPresent));
    }
}

#[test]
fn a_lazy_cpu_that_missed_nothing_keeps_its_translations() {
    let kernel = kernel_with_a_lazy_cpu(PcidSupport::On);
    kernel.run(CPU[1], kernel.mm(0));
    assert_eq!(kernel.count(|event| matches!(event, Event::Cr3 { .. })), 0);
    assert!(kernel.cached(CPU[1], GIB).is_some());
    assert_eq!(kernel.state(CPU[1]).laziness(), Laziness::Active);
}

#[test]
fn freed_tables_reach_lazy_cpus_and_they_go_to_the_kernels_own_address_space() {
    for pcid in [PcidSupport::Off, PcidSupport::On] {
        let kernel = kernel_with_a_lazy_cpu(pcid);
        let mm = kernel.mm(0);
        let vma = area(GIB, GIB + 3 * PAGE, Backing::Anonymous);
        kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
        assert_eq!(kernel.count(|event| *event == Event::Ipi { to: CPU[1] }), 1);
        assert!(!kernel.state(CPU[1]).has_loaded(mm.context()));
        // Speculation there finds no user page, freed or not.
        kernel.speculate(CPU[1], GIB + PAGE);
        // When the program comes back to this CPU, the slot is behind, and the CPU flushes.
        kernel.run(CPU[1], mm);
        assert_eq!(kernel.touch(CPU[1], GIB, Access::Read), Err(Fault::NotPresent));
    }
}

#[test]
fn a_lazy_cpu_stays_in_the_cpumask_until_a_flush_finds_it_elsewhere() {
    let kernel = kernel_with_a_lazy_cpu(PcidSupport::On);
    let mm = kernel.mm(0);
    assert!(mm.context().cpumask().contains(CPU[1]));
    kernel.leave_mm(CPU[1]);
    assert!(mm.context().cpumask().contains(CPU[1]), "switching away does not clear it");
    assert!(!kernel.state(CPU[1]).has_loaded(mm.context()));
    let vma = area(GIB, GIB + 3 * PAGE, Backing::Anonymous);
    kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
    assert!(!mm.context().cpumask().contains(CPU[1]));
    assert!(mm.context().cpumask().contains(CPU[0]));
}

#[test]
fn only_a_lazy_cpu_leaves_what_it_borrowed() {
    let kernel = kernel_with_a_lazy_cpu(PcidSupport::On);
    let mm = kernel.mm(0);
    kernel.leave_mm(CPU[0]);
    assert!(kernel.state(CPU[0]).has_loaded(mm.context()), "it runs a program");
    kernel.leave_mm(CPU[1]);
    assert!(!kernel.state(CPU[1]).has_loaded(mm.context()));
    assert_eq!(kernel.state(CPU[1]).laziness(), Laziness::Active);
}

#[test]
fn a_cpu_with_the_kernels_own_address_space_cannot_be_lazy() {
    let kernel = PaperKernel::new(Options::default());
    kernel.go_lazy(CPU[2]);
    assert_eq!(kernel.state(CPU[2]).laziness(), Laziness::Active);
}

#[test]
fn a_lazy_cpu_that_runs_another_program_is_lazy_no_more() {
    let kernel = kernel_with_a_lazy_cpu(PcidSupport::On);
    let other = kernel.new_mm();
    kernel.run(CPU[1], other);
    assert_eq!(kernel.state(CPU[1]).concern(Some(other.context())), Concern::MustFlush);
    assert_eq!(kernel.state(CPU[1]).concern(Some(kernel.mm(0).context())), Concern::Elsewhere);
    zap_first_page(&kernel);
    assert_eq!(kernel.count(|event| matches!(event, Event::Ipi { .. })), 0, "elsewhere");
    kernel.run(CPU[1], kernel.mm(0));
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Read), Err(Fault::NotPresent));
}

/// The CPU went lazy while a flush was on its way to it: it leaves the address space instead of
/// flushing, which is safe.
#[test]
fn a_request_that_finds_its_target_lazy_makes_it_leave() {
    let kernel = kernel_with_a_lazy_cpu(PcidSupport::On);
    let mm = kernel.mm(0);
    kernel.run(CPU[1], mm);
    kernel.once(|event| matches!(event, Event::Ipi { .. }), |kernel| kernel.go_lazy(CPU[1]));
    zap_first_page(&kernel);
    assert_eq!(kernel.count(|event| *event == Event::Tlb(TlbEvent::LeftLazyMm)), 1);
    kernel.run(CPU[1], mm);
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Read), Err(Fault::NotPresent));
}

#[test]
fn a_cpu_made_to_leave_is_not_interrupted_again() {
    for pcid in [PcidSupport::Off, PcidSupport::On] {
        let kernel = kernel_with_a_lazy_cpu(pcid);
        let mm = kernel.mm(0);
        for (address, interrupts) in [(GIB, 1), (2 * GIB, 0)] {
            kernel.map(mm, address + 3 * PAGE, Level::Pte);
            let vma = area(address, address + 4 * PAGE, Backing::Anonymous);
            kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
            assert_eq!(kernel.count(|event| matches!(event, Event::Ipi { .. })), interrupts, "{address:#x}");
            kernel.take_events();
        }
        assert!(!mm.context().cpumask().contains(CPU[1]));
        kernel.run(CPU[1], mm);
        assert!(mm.context().cpumask().contains(CPU[1]));
        assert_eq!(kernel.touch(CPU[1], GIB, Access::Read), Err(Fault::NotPresent));
    }
}

/// The CPU that unmaps may be lazy itself: a kernel thread that unmaps memory of the address space
/// it borrows.
#[test]
fn a_lazy_initiator_leaves_too() {
    let kernel = kernel_with_a_lazy_cpu(PcidSupport::On);
    kernel.stop(CPU[0]);
    kernel.on(CPU[1], || zap_first_page(&kernel));
    assert!(!kernel.state(CPU[1]).has_loaded(kernel.mm(0).context()));
    kernel.run(CPU[1], kernel.mm(0));
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Read), Err(Fault::NotPresent));
}

#[test]
fn a_cpu_starts_with_no_laziness_and_no_slots() {
    let kernel = kernel_with_a_lazy_cpu(PcidSupport::On);
    kernel.restart(CPU[1]);
    assert_eq!(kernel.state(CPU[1]).laziness(), Laziness::Active);
    assert!(kernel.state(CPU[1]).slots().all(|(_, slot)| slot.tlb_gen == TlbGen::START));
    zap_first_page(&kernel);
    kernel.run(CPU[1], kernel.mm(0));
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Read), Err(Fault::NotPresent));
    assert!(kernel.touch(CPU[1], GIB + PAGE, Access::Read).is_ok());
    assert_eq!(kernel.lookup(kernel.mm(0), GIB).level, Level::Pte);
}

/// T5: it may keep the leaf, and nobody sees what speculation reads there.
#[test]
fn speculation_through_a_stale_leaf_of_a_lazy_cpu_is_no_use_of_the_freed_page() {
    let kernel = kernel_with_a_lazy_cpu(PcidSupport::On);
    zap_first_page(&kernel);
    assert!(kernel.cached(CPU[1], GIB).is_some(), "nobody told it");
    kernel.speculate(CPU[1], GIB);
    assert_eq!(kernel.take_violations(), []);
}
