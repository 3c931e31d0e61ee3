//! `libkernel`, the memory of moss-kernel's processes as published, on the engine: random calls,
//! fork with copy-on-write among them, against a model that knows a word for each page and nothing
//! else.

mod glue;
mod world;
mod wrong;

use std::rc::Rc;

use libkernel::memory::address_space::UserAddressSpace;
use libkernel::memory::page::PageFrame;
use libkernel::memory::paging::permissions::PtePermissions;
use libkernel::memory::proc_vm::memory_map::{AddressRequest, MemoryMap};
use libkernel::memory::proc_vm::vmarea::{VMAPermissions, VMAreaKind};
use mmu_gather::pagetable::{Level, VirtRange};
use mmu_gather::tlb::{PcidSupport, TlbEvent};
use mmu_tests::{Access, CPU, Event, Fault, GIB, Options, PaperKernel, Violation, range};
use proptest::prelude::{Just, ProptestConfig, Strategy, prop_oneof, proptest};
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use proptest::{collection, sample};
use x86_64::structures::paging::PhysFrame;

use glue::{Process, boot};
use world::{Op, PAGE, PLACES, Reached, Rights, To, World, region, va};
use wrong::{Flush, Hasty, unmap_as_if_alone};

fn op() -> impl Strategy<Value = Op> {
    let cpu = || 0..4usize;
    // Most of it happens around the border.
    let place = || prop_oneof![1 => 0..PLACES, 3 => 26..38u64];
    let part = || (place(), 1..24u64);
    let rights = || sample::select(vec![Rights::ReadOnly, Rights::ReadWrite, Rights::ReadWrite]);
    let to = prop_oneof![Just(To::Anywhere), place().prop_map(To::Place)];
    prop_oneof![
        4 => (part(), rights()).prop_map(|((from, len), rights)| Op::Mmap { from, len, rights }),
        // Also across the gap.
        1 => (0..PLACES, 1..PLACES).prop_map(|(from, len)| Op::Munmap { from, len }),
        2 => part().prop_map(|(from, len)| Op::Munmap { from, len }),
        2 => (place(), 1..6u64, rights()).prop_map(|(from, len, rights)| Op::Mprotect { from, len, rights }),
        3 => (place(), 1..6u64, 1..12u64, to)
            .prop_map(|(from, len, new_len, to)| Op::Mremap { from, len, new_len, to }),
        1 => Just(Op::Fork),
        1 => Just(Op::Exit),
        16 => (cpu(), place()).prop_map(|(cpu, place)| Op::Read { cpu, place }),
        24 => (cpu(), place(), 1..u64::MAX).prop_map(|(cpu, place, word)| Op::Write { cpu, place, word }),
    ]
}

fn config() -> ProptestConfig {
    let asked = ProptestConfig::default();
    ProptestConfig { failure_persistence: None, cases: asked.cases.max(400), ..asked }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn processes_of_libkernel_see_their_own_words_and_nothing_is_freed_early_or_lost(
        ops in collection::vec((0..4usize, op()), 1..160),
        pcid in sample::select(vec![PcidSupport::Off, PcidSupport::On]),
        unmapped_first in collection::vec(0..4usize, 0..3),
    ) {
        let mut world = World::new(PaperKernel::new(Options { pcid, ..Options::default() }));
        for (which, op) in ops {
            world.take(which, op);
            world.compare();
        }
        for which in unmapped_first {
            world.unmap_all(which);
            world.compare();
        }
        world.end();
    }
}

/// Sequences that reach nothing prove nothing.
#[test]
fn the_sequences_come_to_something() {
    let mut runner = TestRunner::deterministic();
    let sequences = collection::vec((0..4usize, op()), 160);
    let mut all = Vec::new();
    for _ in 0..100 {
        let mut world = World::new(PaperKernel::new(Options::default()));
        for (which, op) in sequences.new_tree(&mut runner).expect("a sequence").current() {
            world.take(which, op);
        }
        all.push(world.reached);
        world.end();
    }
    let of = |count: fn(&Reached) -> usize| all.iter().map(count).sum::<usize>();
    let counts = [
        ("mprotect inside an area", of(|reached| reached.protected)),
        ("mremap in place", of(|reached| reached.resized)),
        ("mremap that moves", of(|reached| reached.moved)),
        ("fork", of(|reached| reached.forked)),
        ("shared pages copied", of(|reached| reached.copied)),
        ("pages no longer shared", of(|reached| reached.reused)),
    ];
    assert!(counts.iter().all(|(_, count)| *count >= 20), "{counts:?}");
}

/// A kernel, and a page of it that is mapped nowhere.
fn machine() -> (Rc<PaperKernel>, PageFrame, PhysFrame) {
    let kernel = Rc::new(PaperKernel::new(Options::default()));
    boot(&kernel);
    let frame = kernel.ledger().new_page(PAGE);
    let number = frame.start_address().as_u64() >> 12;
    let page = PageFrame::from_pfn(usize::try_from(number).expect("64 bits"));
    (kernel, page, frame)
}

/// Two pages of address space.
fn two_pages(start: u64) -> VirtRange {
    range(start, start + 2 * PAGE)
}

/// An area of two pages, with `page` as the first.
fn map<S: UserAddressSpace>(map: &mut MemoryMap<S>, start: u64, page: PageFrame) {
    let at = AddressRequest::Fixed { address: va(start), permit_overlap: false };
    map.mmap(at, 8192, VMAPermissions::rw(), VMAreaKind::Anon, String::new()).expect("room");
    map.address_space_mut().map_page(page, va(start), PtePermissions::rw(true)).expect("room");
}

#[test]
fn a_page_and_its_tables_take_one_flush_under_the_map_lock_and_are_freed_after_it() {
    let (kernel, page, _) = machine();
    // The hooks live as long as the kernel, and look at the process.
    let process: &'static Process = Box::leak(Box::new(Process::new().expect("room")));
    map(&mut process.map.write(), GIB, page);
    kernel.on(CPU[1], || process.map.write().address_space_mut().activate());
    kernel.touch(CPU[1], GIB, Access::Write).expect("mapped");
    let is_locked = || process.map.try_write().is_none();
    let is_flush = |event: &Event| matches!(event, Event::Tlb(TlbEvent::IpisSent(1)));
    kernel.once(is_flush, move |_| assert!(is_locked()));
    let [flushes, tables] = [
        |event: &Event| matches!(event, Event::Tlb(TlbEvent::IpisSent(_))),
        |event: &Event| matches!(event, Event::TableFreed(_)),
    ];
    kernel.once(tables, move |kernel| assert_eq!(kernel.count(flushes), 1));
    process.map.write().munmap(region(two_pages(GIB))).expect("mapped");
    assert_eq!(kernel.nr_hooks_waiting(), 0, "both have happened");
    assert_eq!((kernel.count(flushes), kernel.count(tables)), (1, 3));
    assert_eq!(kernel.take_violations(), []);
}

/// Maps a page in a hasty address space, lets CPU 1 use it, and unmaps it.
fn unmap_hastily(kernel: &PaperKernel, page: PageFrame, flush: Flush) {
    let mut hasty: MemoryMap<Hasty> = MemoryMap::new().expect("room");
    map(&mut hasty, GIB, page);
    hasty.address_space_mut().flush = flush;
    kernel.on(CPU[1], || hasty.address_space_mut().activate());
    kernel.touch(CPU[1], GIB, Access::Write).expect("mapped");
    hasty.munmap(region(two_pages(GIB))).expect("mapped");
}

#[test]
fn an_address_space_that_frees_before_it_flushes_is_named() {
    let (kernel, page, frame) = machine();
    unmap_hastily(&kernel, page, Flush::AfterFreeing);
    assert_eq!(kernel.take_violations(), [Violation::PageFreedTooEarly(frame, CPU[1], GIB)]);
    // It did flush in the end.
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Read), Err(Fault::NotPresent));
}

#[test]
fn an_address_space_that_never_flushes_is_named_again_with_each_use() {
    let (kernel, page, frame) = machine();
    unmap_hastily(&kernel, page, Flush::Never);
    assert_eq!(kernel.take_violations(), [Violation::PageFreedTooEarly(frame, CPU[1], GIB)]);
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Write), Ok(frame));
    assert_eq!(kernel.take_violations(), [Violation::FreedPageUsed(frame, CPU[1], GIB)]);
}

/// A debug build of the engine says it first, with the name of the rule.
#[test]
#[cfg_attr(debug_assertions, should_panic(expected = "is freed with entries in it"))]
fn a_munmap_that_forgets_the_neighbours_is_named_for_the_table_they_share() {
    let (kernel, page, _) = machine();
    let process = Process::new().expect("room");
    map(&mut process.map.write(), GIB, page);
    let neighbour = kernel.ledger().new_page(PAGE).start_address().as_u64() >> 12;
    let neighbour = PageFrame::from_pfn(usize::try_from(neighbour).expect("64 bits"));
    map(&mut process.map.write(), GIB + 4 * PAGE, neighbour);
    let shared = kernel.find_table(kernel.mm(0), GIB, Level::Pte).expect("linked").frame();
    unmap_as_if_alone(&process, two_pages(GIB)).expect("mapped");
    assert_eq!(kernel.take_violations(), [Violation::TableFreedFull(shared)]);
}
