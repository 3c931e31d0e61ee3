//! What the small kernel's fork promises, on CPUs that keep every translation they may keep.

mod account;

use core::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use mmu_adapter::{HostedKernel, HostedMm, Touched, boot, touch};
use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CpuId;
use mmu_hosted::{HostedMachine, Options, Schedule, give_way};
use mmu_kernel_shim::{Area, Config, PageContent, UserAccess, Vma};
use x86_64::structures::paging::PhysFrame;

use account::end;

const START: u64 = 0x7000_0000_0000;
const PAGES: u64 = 8;

fn range(first: u64, end: u64) -> VirtRange {
    VirtRange::new(START + first * 4096, START + end * 4096).expect("a good range")
}

/// Two CPUs that run one process, which has written to all its pages.
fn parent(seed: u64) -> (Arc<HostedKernel>, Arc<HostedMm>) {
    let machine = Arc::new(HostedMachine::new(Options::new(2, 8192, seed)).expect("a small machine"));
    let kernel = boot(&machine, Config::default()).expect("it has frames");
    let mm = kernel.new_mm().expect("it has frames");
    kernel.mmap(&mm, Vma { range: range(0, PAGES), area: Area::anon() }).expect("nothing is there");
    for number in 0..2 {
        machine.on_cpu(CpuId::new(number), || {
            kernel.switch_to(Some(&mm));
        });
    }
    for page in 0..PAGES {
        write(&kernel, &mm, page);
    }
    (kernel, mm)
}

fn write(kernel: &HostedKernel, mm: &HostedMm, page: u64) {
    assert_eq!(touch(kernel, mm, START + page * 4096, UserAccess::Write), Touched::Reached);
}

/// The frame that a program on this CPU reads at a page.
fn frame_at(kernel: &HostedKernel, mm: &HostedMm, page: u64) -> PhysFrame {
    let address = START + page * 4096;
    assert_eq!(touch(kernel, mm, address, UserAccess::Read), Touched::Reached);
    let reached = kernel.machine().user_access(address, UserAccess::Read).expect("it was there just now");
    reached.expect("the machine is checked")
}

#[test]
fn both_sides_read_the_same_page_until_one_of_them_writes() {
    let (kernel, mm) = parent(1);
    let child = kernel.fork(&mm, []).expect("it has frames");
    let before = frame_at(&kernel, &mm, 3);
    assert_eq!((kernel.frames().meta(before).maps(), kernel.frames().meta(before).refs()), (2, 2));

    kernel.switch_to(Some(&child));
    assert_eq!(frame_at(&kernel, &child, 3), before);
    write(&kernel, &child, 3);
    assert_ne!(frame_at(&kernel, &child, 3), before, "the child wrote into the parent's page");

    kernel.switch_to(Some(&mm));
    assert_eq!(frame_at(&kernel, &mm, 3), before);
    write(&kernel, &mm, 3);
    assert_eq!(frame_at(&kernel, &mm, 3), before, "a page that is nobody else's any more was copied");
    end(&kernel, &[&child, &mm]);
}

#[test]
fn no_cpu_can_still_write_to_a_shared_page_when_fork_returns() {
    let (kernel, mm) = parent(2);
    let other = CpuId::new(1);
    let address = START + 5 * 4096;
    kernel.machine().on_cpu(other, || write(&kernel, &mm, 5));
    let child = kernel.fork(&mm, []).expect("it has frames");
    let written = kernel.machine().on_cpu(other, || kernel.machine().user_access(address, UserAccess::Write));
    assert!(written.is_err(), "CPU 1 wrote through an entry from before the fork");
    end(&kernel, &[&mm, &child]);
}

#[test]
fn a_child_gets_neither_what_is_left_out_nor_a_second_mapping_of_large_pages() {
    let (kernel, mm) = parent(3);
    let large = VirtRange::new(START + (2 << 20), START + (4 << 20)).expect("a good range");
    kernel.mmap(&mm, Vma { range: large, area: Area::anon() }).expect("nothing is there");
    kernel.populate(&mm, large, PageContent::AnonBlock).expect("it has frames");
    let swapped = VirtRange::new(START + (8 << 20), START + (8 << 20) + 0x4000).expect("a good range");
    kernel.mmap(&mm, Vma { range: swapped, area: Area::anon() }).expect("nothing is there");
    kernel.populate(&mm, swapped, PageContent::Swap).expect("it has frames");

    let child = kernel.fork(&mm, [range(2, 4)]).expect("it has frames");
    assert_eq!(kernel.swap_slots(), 8);
    assert_eq!(child.nr_vmas(), 4, "both sides of the gap, the large pages and the swapped ones");
    kernel.switch_to(Some(&child));
    assert_ne!(touch(&kernel, &child, START + 2 * 4096, UserAccess::Read), Touched::Reached);
    // Half of the large page goes in the child: the parent's is whole.
    kernel
        .munmap(&child, VirtRange::new(large.start(), large.start() + (1 << 20)).expect("a good range"))
        .expect("it is split already");
    kernel.switch_to(Some(&mm));
    assert_eq!(touch(&kernel, &mm, large.start() + 0x1000, UserAccess::Write), Touched::Reached);
    end(&kernel, &[&mm, &child]);
}

#[test]
fn a_large_page_is_split_wherever_what_is_left_out_cuts_it() {
    let large = VirtRange::new(START + (2 << 20), START + (8 << 20)).expect("a good range");
    // The child gets the first page of one, the last, one in the middle of one, and a part that
    // reaches across three.
    for (first, last) in [(0, 1), (511, 512), (1024 + 7, 1024 + 8), (500, 1030)] {
        let (kernel, mm) = parent(first);
        kernel.mmap(&mm, Vma { range: large, area: Area::anon() }).expect("nothing is there");
        kernel.populate(&mm, large, PageContent::AnonBlock).expect("it has frames");
        let page = |number: u64| large.start() + number * 4096;
        let left_out = [(large.start(), page(first)), (page(last), large.end())]
            .into_iter()
            .filter_map(|(start, end)| VirtRange::new(start, end).ok());
        let child = kernel.fork(&mm, left_out).expect("it has frames");
        let splits = kernel.counters().snapshot().splits;
        assert_eq!(splits, (last - 1) / 512 - first / 512 + 1, "pages {first} to {last}");
        kernel.switch_to(Some(&child));
        assert_eq!(touch(&kernel, &child, page(first), UserAccess::Read), Touched::Reached);
        assert_ne!(touch(&kernel, &child, page(last), UserAccess::Read), Touched::Reached);
        end(&kernel, &[&mm, &child]);
    }
}

#[test]
fn a_page_is_not_written_in_place_while_another_address_space_waits_for_its_flush() {
    let mut nr_met = 0;
    for seed in 0..64 {
        let (kernel, mm) = parent(seed);
        let child = kernel.fork(&mm, []).expect("it has frames");
        let shared = frame_at(&kernel, &mm, 0);
        let gone = Rc::new(Cell::new(false));
        let met = Rc::new(Cell::new(None));
        let mut schedule = Schedule::new();
        {
            let (kernel, child, gone) = (Arc::clone(&kernel), Arc::clone(&child), Rc::clone(&gone));
            schedule.spawn(CpuId::new(1), move || {
                kernel.switch_to(Some(&child));
                kernel.munmap(&child, range(0, 1)).expect("no large page is there");
                gone.set(true);
            });
        }
        {
            let (kernel, mm, met) = (Arc::clone(&kernel), Arc::clone(&mm), Rc::clone(&met));
            schedule.spawn(CpuId::new(0), move || {
                let meta = kernel.frames().meta(shared);
                while !gone.get() {
                    if (meta.maps(), meta.refs()) == (1, 2) {
                        kernel.handle_fault(&mm, START, UserAccess::Write).expect("the area allows it");
                        let now = kernel.machine().user_access(START, UserAccess::Read);
                        let in_place = now.is_ok_and(|frame| frame == Some(shared));
                        // Two users now means two when the fault decided: the child's gather still
                        // holds it.
                        met.set(Some(in_place && meta.refs() == 2));
                        break;
                    }
                    give_way();
                }
            });
        }
        kernel.machine().run(schedule);
        if let Some(in_place) = met.get() {
            nr_met += 1;
            assert!(!in_place, "seed {seed}: the child's CPU can still read what the parent writes there");
        }
        end(&kernel, &[&mm, &child]);
    }
    assert!(nr_met > 0, "no seed met the moment between unmapping and flush");
}
