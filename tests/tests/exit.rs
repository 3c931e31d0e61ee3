//! The end of an address space.

use mmu_gather::pagetable::Level;
use mmu_gather::tlb::PcidSupport;
use mmu_gather::{GatherEvent, Limits, exit_mmap};
use mmu_tests::{Access, Backing, CPU, Event, GIB, MIB, Options, PaperKernel, Supply, area, range};

const PAGE: u64 = 4096;

#[test]
fn everything_goes_and_the_root_is_the_callers_to_free() {
    for pcid in [PcidSupport::Off, PcidSupport::On] {
        for supply in [Supply::Unlimited, Supply::Left(0), Supply::Pattern(0b0110)] {
            let kernel = PaperKernel::new(Options { pcid, ..Options::default() });
            let mm = kernel.new_mm();
            let vmas = [
                area(GIB, GIB + 20 * PAGE, Backing::Anonymous),
                area(2 * GIB, 2 * GIB + 3 * PAGE, Backing::File),
                area(1 << 46, (1 << 46) + 4 * MIB, Backing::Anonymous),
            ];
            kernel.map_range(mm, vmas[0].range);
            kernel.map_range(mm, vmas[1].range);
            kernel.map(mm, 1 << 46, Level::Pmd);
            kernel.map(mm, (1 << 46) + 2 * MIB, Level::Pte);
            for cpu in kernel.cpu_ids() {
                kernel.run(cpu, mm);
                kernel.touch(cpu, GIB, Access::Write).expect("mapped");
                kernel.touch(cpu, 2 * GIB, Access::Write).expect("mapped");
            }
            // The last program leaves; two CPUs keep the address space loaded, lazily.
            kernel.stop(CPU[2]);
            kernel.stop(CPU[3]);
            kernel.go_lazy(CPU[0]);
            kernel.go_lazy(CPU[1]);
            kernel.supply_batches(supply);
            kernel.exit(mm, &Limits::DEFAULT, &vmas);
            assert_eq!(kernel.nr_tables(mm), [0; 4], "{supply:?}");
            assert_eq!(kernel.ledger().nr_held(), 0, "{supply:?}");
            assert!(!mm.context().is_loaded_somewhere(&kernel));
            // The checker reports a root that a CPU still has in CR3.
            kernel.free_one_table(mm.space().root());
        }
    }
}

#[test]
fn a_lazy_cpu_leaves_even_an_address_space_in_which_nothing_was_mapped() {
    for pcid in [PcidSupport::Off, PcidSupport::On] {
        let kernel = PaperKernel::new(Options { pcid, ..Options::default() });
        let mm = kernel.new_mm();
        kernel.run(CPU[1], mm);
        kernel.go_lazy(CPU[1]);
        kernel.exit(mm, &Limits::DEFAULT, &[]);
        assert!(!mm.context().is_loaded_somewhere(&kernel));
        kernel.free_one_table(mm.space().root());
    }
}

#[test]
fn the_cpu_that_runs_the_exit_leaves_what_it_borrows_itself() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map(mm, GIB, Level::Pte);
    kernel.run(CPU[0], mm);
    kernel.touch(CPU[0], GIB, Access::Write).expect("mapped");
    kernel.go_lazy(CPU[0]);
    kernel.exit(mm, &Limits::DEFAULT, &[area(GIB, GIB + PAGE, Backing::Anonymous)]);
    assert!(!kernel.state(CPU[0]).has_loaded(mm.context()));
    kernel.free_one_table(mm.space().root());
}

#[test]
fn an_address_space_that_no_cpu_ever_loaded_interrupts_nobody() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map_range(mm, range(GIB, GIB + 50 * PAGE));
    kernel.exit(mm, &Limits::DEFAULT, &[area(GIB, GIB + 50 * PAGE, Backing::Anonymous)]);
    assert_eq!(kernel.count(|event| matches!(event, Event::Ipi { .. })), 0);
    assert_eq!(kernel.ledger().nr_held(), 0);
}

/// Batch by batch: the pages each flush released.
fn released(kernel: &PaperKernel) -> Vec<u64> {
    let slots = |event: &Event| match event {
        Event::Gather(GatherEvent::Released { slots, .. }) => Some(*slots),
        _ => None,
    };
    kernel.take_events().iter().filter_map(|noted| slots(&noted.event)).collect()
}

#[test]
fn a_lazy_cpu_is_interrupted_once_however_many_flushes_an_exit_takes() {
    const PAGES: u64 = 2000;
    for pcid in [PcidSupport::Off, PcidSupport::On] {
        let kernel = PaperKernel::new(Options { pcid, ..Options::default() });
        let mm = kernel.new_mm();
        kernel.map_range(mm, range(GIB, GIB + PAGES * PAGE));
        for cpu in &CPU[..3] {
            kernel.run(*cpu, mm);
            kernel.touch(*cpu, GIB, Access::Write).expect("mapped");
            kernel.go_lazy(*cpu);
        }
        kernel.take_events();
        kernel.exit(mm, &Limits::DEFAULT, &[area(GIB, GIB + PAGES * PAGE, Backing::Anonymous)]);
        assert!(mm.context().cpumask().is_empty());
        // CPU 0 runs the exit.
        assert_eq!(kernel.count(|event| matches!(event, Event::Ipi { .. })), 2);
        let released = released(&kernel);
        assert_eq!(released.iter().sum::<u64>(), PAGES);
        assert!(released.len() > 3 && released.iter().all(|slots| *slots <= 516), "{released:?}");
    }
}

#[test]
fn an_exit_frees_large_leaves_64_at_a_time() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let end = GIB + 150 * 2 * MIB;
    for leaf in (GIB..end).step_by(2 << 20) {
        kernel.map(mm, leaf, Level::Pmd);
    }
    kernel.exit(mm, &Limits::DEFAULT, &[area(GIB, end, Backing::Anonymous)]);
    assert_eq!(released(&kernel), [64, 64, 22]);
}

#[test]
#[expect(unsafe_code, reason = "one thread stands in for the map lock")]
fn areas_are_unlinked_after_their_pages_and_before_their_tables() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map(mm, GIB, Level::Pte);
    let vmas = [area(GIB, GIB + PAGE, Backing::Anonymous)];
    let unlink = || {
        assert!(kernel.lookup(mm, GIB).value.is_empty());
        assert_eq!(kernel.nr_tables(mm), [1, 1, 1, 0]);
    };
    // SAFETY: one thread, and no CPU runs a program of it.
    unsafe { exit_mmap(&kernel, mm, &Limits::DEFAULT, vmas, unlink) }.free();
    assert_eq!(kernel.nr_tables(mm), [0; 4]);
}

#[test]
fn one_address_spaces_end_leaves_the_others_alone() {
    let kernel = PaperKernel::new(Options::default());
    let (dying, living) = (kernel.new_mm(), kernel.new_mm());
    kernel.map(dying, GIB, Level::Pte);
    let frame = kernel.map(living, GIB, Level::Pte);
    kernel.run(CPU[1], dying);
    kernel.touch(CPU[1], GIB, Access::Write).expect("mapped");
    kernel.run(CPU[1], living);
    kernel.touch(CPU[1], GIB, Access::Write).expect("mapped");
    kernel.exit(dying, &Limits::DEFAULT, &[area(GIB, GIB + PAGE, Backing::Anonymous)]);
    assert!(kernel.state(CPU[1]).has_loaded(living.context()));
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Write), Ok(frame));
}

/// If the root were freed while it is in CR3, the next walk would go through whatever the page
/// holds by then.
#[test]
fn the_cpu_that_runs_the_exit_leaves_an_address_space_that_it_has_not_left_before() {
    for nr_pages in [0, 3] {
        let kernel = PaperKernel::new(Options::default());
        let mm = kernel.new_mm();
        let mut vmas = Vec::new();
        if nr_pages > 0 {
            kernel.map_range(mm, range(GIB, GIB + nr_pages * PAGE));
            vmas.push(area(GIB, GIB + nr_pages * PAGE, Backing::Anonymous));
        }
        kernel.run(CPU[0], mm);
        kernel.run(CPU[1], mm);
        kernel.go_lazy(CPU[1]);
        kernel.exit(mm, &Limits::DEFAULT, &vmas);
        for cpu in &CPU[..2] {
            assert!(!kernel.state(*cpu).has_loaded(mm.context()), "{cpu}");
        }
        assert!(!mm.context().may_be_loaded_somewhere(&kernel));
    }
}

#[test]
#[should_panic(expected = "torn down while a CPU runs programs in it")]
fn an_exit_while_another_cpu_runs_programs_there_is_refused_in_every_build() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.run(CPU[1], mm);
    kernel.exit(mm, &Limits::DEFAULT, &[]);
}
