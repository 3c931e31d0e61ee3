//! The six address spaces a CPU keeps apart, and what happens when a slot is used again.

use mmu_gather::pagetable::Level;
use mmu_gather::tlb::{CachedTranslations, CpuId, NR_DYN_ASIDS, PcidSupport, flush_tlb_mm};
use mmu_tests::{Access, CPU, Event, GIB, Options, PaperKernel};

/// A kernel with `nr_mms` address spaces, one page in each.
fn kernel_with(nr_mms: usize, pcid: PcidSupport) -> PaperKernel {
    let kernel = PaperKernel::new(Options { pcid, ..Options::default() });
    for _ in 0..nr_mms {
        let mm = kernel.new_mm();
        kernel.map(mm, GIB, Level::Pte);
    }
    kernel
}

/// Runs `mm` number `index` and reads its page; returns the tag, and whether the CR3 load dropped
/// what was cached under it.
fn visit(kernel: &PaperKernel, cpu: CpuId, index: usize) -> (u16, CachedTranslations) {
    kernel.take_events();
    kernel.run(cpu, kernel.mm(index));
    let load = kernel.take_events().into_iter().find_map(|noted| match noted.event {
        Event::Cr3 { pcid, cached, .. } => Some((pcid, cached)),
        _ => None,
    });
    let frame = kernel.touch(cpu, GIB, Access::Read).expect("mapped");
    let own = kernel.lookup(kernel.mm(index), GIB).translate(GIB).map(|address| address.as_u64());
    assert_eq!(own, Some(frame.start_address().as_u64()), "not another address space's page");
    load.expect("a CR3 load")
}

use CachedTranslations::{Flush, Keep};

#[test]
fn six_address_spaces_keep_their_translations_side_by_side() {
    let kernel = kernel_with(6, PcidSupport::On);
    for (index, pcid) in (1u16..=6).enumerate() {
        assert_eq!(visit(&kernel, CPU[0], index), (pcid, Flush), "first visit");
    }
    for (index, pcid) in (1u16..=6).enumerate() {
        assert_eq!(visit(&kernel, CPU[0], index), (pcid, Keep), "second visit");
    }
}

#[test]
fn a_seventh_address_space_takes_the_slots_in_turn_and_flushes_each_first() {
    let kernel = kernel_with(9, PcidSupport::On);
    for index in 0..6 {
        visit(&kernel, CPU[0], index);
    }
    assert_eq!(visit(&kernel, CPU[0], 6), (1, Flush));
    assert_eq!(visit(&kernel, CPU[0], 7), (2, Flush));
    assert_eq!(visit(&kernel, CPU[0], 2), (3, Keep), "not its turn yet");
    assert_eq!(visit(&kernel, CPU[0], 0), (3, Flush), "lost its slot, and comes back in another");
    assert_eq!(visit(&kernel, CPU[0], 6), (1, Keep));
    assert_eq!(NR_DYN_ASIDS, 6);
}

#[test]
fn coming_back_to_an_address_space_that_moved_on_flushes_its_slot_only() {
    let kernel = kernel_with(2, PcidSupport::On);
    visit(&kernel, CPU[0], 0);
    visit(&kernel, CPU[0], 1);
    kernel.on(CPU[1], || flush_tlb_mm(&kernel, kernel.mm(0).context()).scope());
    assert_eq!(visit(&kernel, CPU[0], 0), (1, Flush));
    assert_eq!(visit(&kernel, CPU[0], 1), (2, Keep));
    assert_eq!(visit(&kernel, CPU[0], 0), (1, Keep), "caught up");
}

#[test]
fn each_cpu_has_slots_of_its_own() {
    let kernel = kernel_with(3, PcidSupport::On);
    assert_eq!(visit(&kernel, CPU[0], 0), (1, Flush));
    assert_eq!(visit(&kernel, CPU[1], 2), (1, Flush));
    assert_eq!(visit(&kernel, CPU[1], 0), (2, Flush));
    assert_eq!(visit(&kernel, CPU[0], 2), (2, Flush));
}

#[test]
fn the_kernels_own_tag_is_never_a_programs_and_is_kept() {
    let kernel = kernel_with(6, PcidSupport::On);
    for index in 0..6 {
        assert_ne!(visit(&kernel, CPU[0], index).0, 0);
    }
    kernel.take_events();
    kernel.stop(CPU[0]);
    assert_eq!(kernel.count(|event| matches!(event, Event::Cr3 { pcid: 0, cached: Keep, .. })), 1);
    assert_eq!(visit(&kernel, CPU[0], 5), (6, Keep));
}

#[test]
fn without_pcids_every_switch_flushes() {
    let kernel = kernel_with(2, PcidSupport::Off);
    for index in [0, 1, 0, 1] {
        assert_eq!(visit(&kernel, CPU[0], index), (0, Flush));
    }
    kernel.take_events();
    kernel.stop(CPU[0]);
    assert_eq!(kernel.count(|event| matches!(event, Event::Cr3 { pcid: 0, cached: Flush, .. })), 1);
}

#[test]
fn running_the_same_program_again_loads_nothing() {
    for pcid in [PcidSupport::Off, PcidSupport::On] {
        let kernel = kernel_with(1, pcid);
        visit(&kernel, CPU[0], 0);
        kernel.take_events();
        kernel.run(CPU[0], kernel.mm(0));
        assert_eq!(kernel.count(|event| matches!(event, Event::Cr3 { .. })), 0);
    }
}

/// A tag that is used again still has the translations of the dead program, unless the CR3 load
/// drops them.
#[test]
fn a_new_address_space_never_sees_translations_of_a_dead_one_with_the_same_tag() {
    let kernel = kernel_with(8, PcidSupport::On);
    for index in 0..8 {
        // `visit` reads the page, and checks that it is the page of this address space.
        visit(&kernel, CPU[0], index);
        kernel
            .zap(
                kernel.mm(index),
                &mmu_tests::area(GIB, GIB + 4096, mmu_tests::Backing::Anonymous),
                mmu_tests::range(GIB, GIB + 4096),
            )
            .free();
        kernel.map(kernel.mm(index), GIB, Level::Pte);
    }
}

#[test]
fn a_cpu_that_starts_again_believes_no_slot() {
    let kernel = kernel_with(2, PcidSupport::On);
    visit(&kernel, CPU[0], 0);
    visit(&kernel, CPU[0], 1);
    kernel.restart(CPU[0]);
    assert!(kernel.state(CPU[0]).slots().all(|(_, slot)| slot.ctx_id.is_none()));
    assert_eq!(visit(&kernel, CPU[0], 1), (1, Flush), "from the first slot on");
    assert_eq!(visit(&kernel, CPU[0], 0), (2, Flush));
}

#[test]
fn no_context_is_ever_named_as_another_was() {
    let kernel = kernel_with(16, PcidSupport::On);
    let mut names: Vec<u64> = (0..16).map(|index| kernel.mm(index).context().ctx_id().get()).collect();
    assert!(names.iter().all(|name| *name >= 2), "1 is the kernel's own");
    names.dedup();
    assert_eq!(names.len(), 16);
}
