//! Each thing that an entry can say and its area does not is told, by what is wrong with it.
//!
//! The entries are changed behind the kernel's back, one at a time.
#![expect(unsafe_code, reason = "changes page tables behind the kernel's back")]

use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use mmu_adapter::{HostedMm, ShimKernel};
use mmu_gather::pagetable::VirtRange;
use mmu_hosted::{Backing, HostedMachine, Kernel, Options, Rights, UserAccess, ViolationKind, boot};
use mmu_kernel_shim::Config;
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

const START: u64 = 0x7000_0000_0000;
const NR_FRAMES: u64 = 4096;
const NR_PAGES: u64 = 6;

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const NO_EXECUTE: u64 = 1 << 63;

/// A kernel with one address space that has one area of `NR_PAGES` pages, which a program runs in.
struct World {
    machine: Arc<HostedMachine>,
    kernel: Arc<ShimKernel>,
    mm: Arc<HostedMm>,
}

impl World {
    fn new(backing: Backing, rights: Rights) -> Self {
        Self::at(START, backing, rights)
    }

    /// As [`new`](Self::new), with the area at `start`; pages are still counted from [`START`].
    fn at(start: u64, backing: Backing, rights: Rights) -> Self {
        let machine = Arc::new(HostedMachine::new(Options::new(1, NR_FRAMES, 1)).expect("a small machine"));
        let boot_shim = |machine: &Arc<HostedMachine>| ShimKernel::boot(machine, Config::default());
        let kernel = boot(&machine, boot_shim).expect("it has frames");
        let mm = kernel.new_mm().expect("it has frames");
        let range = VirtRange::new(start, start + NR_PAGES * 4096).expect("a good range");
        kernel.map(&mm, range, backing, rights).expect("nothing is there");
        kernel.switch_to(Some(&mm));
        Self { machine, kernel, mm }
    }

    fn touch(&self, page: u64, access: UserAccess) -> &Self {
        let address = START + page * 4096;
        let fault = || self.kernel.fault(&self.mm, address, access);
        self.machine.touch(address, access, fault).expect("the area allows it");
        self
    }

    /// The entry of a table at this level, 1 for the last, on the way to a page.
    fn entry(&self, page: u64, level: u32) -> &AtomicU64 {
        let address = START + page * 4096;
        let mut table = self.kernel.root(&self.mm);
        let mut at = 4;
        loop {
            let index = (address >> (12 + 9 * (at - 1)) & 511) as usize;
            let first = self.machine.frame_to_pointer(table).cast::<AtomicU64>();
            // SAFETY: the table has 512 entries, stays one as long as the machine, and is only
            // changed atomically.
            let entry = unsafe { &*first.wrapping_add(index) };
            if at == level {
                return entry;
            }
            table = frame_in(entry.load(Ordering::Relaxed));
            at -= 1;
        }
    }

    /// Changes the entry of a page; what is told of it.
    fn told_after(&self, page: u64, change: impl FnOnce(u64) -> u64) -> Vec<ViolationKind> {
        let entry = self.entry(page, 1);
        entry.store(change(entry.load(Ordering::Relaxed)), Ordering::Relaxed);
        self.told()
    }

    fn told(&self) -> Vec<ViolationKind> {
        // The CPU runs nothing, so that its caches, which are not what this is about, are not
        // compared with tables that were changed behind its back.
        self.kernel.switch_to(None);
        self.kernel.check_at_rest(&self.machine, &[Arc::clone(&self.mm)]);
        let kinds = self.machine.violations().told.iter().map(|told| told.kind).collect::<Vec<_>>();
        kinds.into_iter().filter(|kind| *kind != ViolationKind::SlotIsOlder).collect()
    }
}

fn frame_in(entry: u64) -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new(entry & ADDRESS))
}

fn leading_to(entry: u64, frame: u64) -> u64 {
    entry & !ADDRESS | frame << 12
}

#[test]
fn nothing_is_told_of_what_the_kernel_has_mapped_itself() {
    for backing in [Backing::Anon, Backing::Private, Backing::Shared, Backing::Pfn] {
        let world = World::new(backing, Rights::Write);
        world.touch(0, UserAccess::Read).touch(1, UserAccess::Write);
        assert_eq!(world.told(), [], "{backing}");
    }
}

#[test]
fn an_entry_that_allows_more_than_its_area_is_told() {
    let world = World::new(Backing::Shared, Rights::Read);
    let told = world.touch(0, UserAccess::Read).told_after(0, |entry| entry | WRITABLE);
    assert_eq!(told, [ViolationKind::MoreThanAreaAllows]);
    let world = World::new(Backing::Anon, Rights::Read);
    world.touch(0, UserAccess::Read);
    let range = VirtRange::new(START, START + NR_PAGES * 4096).expect("a good range");
    world.kernel.protect(&world.mm, range, Rights::Nothing).expect("nothing is split");
    assert_eq!(world.told_after(0, |entry| entry | USER), [ViolationKind::MoreThanAreaAllows]);
}

#[test]
fn an_entry_that_lets_programs_execute_what_is_no_code_is_told() {
    for rights in [Rights::Read, Rights::Write] {
        let world = World::new(Backing::Shared, rights);
        let told = world.touch(0, UserAccess::Read).told_after(0, |entry| entry & !NO_EXECUTE);
        assert_eq!(told, [ViolationKind::MoreThanAreaAllows], "{rights}");
    }
    for backing in [Backing::Anon, Backing::Private, Backing::Shared, Backing::Pfn] {
        let world = World::new(backing, Rights::Execute);
        assert_eq!(world.touch(0, UserAccess::Fetch).touch(1, UserAccess::Read).told(), [], "{backing}");
    }
}

#[test]
fn a_page_that_others_read_must_not_be_writable() {
    for backing in [Backing::Anon, Backing::Private] {
        let world = World::new(backing, Rights::Write);
        let told = world.touch(0, UserAccess::Read).told_after(0, |entry| entry | WRITABLE);
        assert_eq!(told, [ViolationKind::SharedPageWritable], "{backing}");
    }
}

#[test]
fn another_page_of_the_file_is_told() {
    let world = World::new(Backing::Shared, Rights::Write);
    world.touch(0, UserAccess::Read).touch(1, UserAccess::Read);
    let other = world.entry(1, 1).load(Ordering::Relaxed);
    assert_eq!(world.told_after(0, |_| other), [ViolationKind::WrongPageMapped]);
}

#[test]
fn a_table_or_a_frame_beyond_memory_is_no_page() {
    for beyond in [None, Some(NR_FRAMES + 3)] {
        let world = World::new(Backing::Anon, Rights::Write);
        world.touch(0, UserAccess::Write);
        let table = world.entry(0, 2).load(Ordering::Relaxed);
        let frame = beyond.unwrap_or(frame_in(table).start_address().as_u64() >> 12);
        let told = world.told_after(0, |entry| leading_to(entry, frame));
        // Nor is what a program has written there.
        assert_eq!(told.first(), Some(&ViolationKind::NoPageMapped), "{beyond:?}");
    }
}

#[test]
fn a_bit_that_nobody_asked_for_is_told() {
    // PAT, global, the kernel's own, protection keys; no execution, where code is.
    for bit in [7, 8, 9, 11, 52, 59, 63] {
        let world = World::new(Backing::Shared, Rights::Execute);
        let told = world.touch(0, UserAccess::Fetch).told_after(0, |entry| entry | 1 << bit);
        assert_eq!(told, [ViolationKind::StrayBits], "bit {bit}");
    }
}

#[test]
fn a_bit_that_an_area_asks_for_and_its_entry_has_not_is_told() {
    // Where it begins decides what it asks for.
    for (first, bit) in [(1, 4), (3, 7), (5, 9), (5, 60), (6, 3)] {
        let world = World::at(START + (first << 12), Backing::Anon, Rights::Write);
        world.touch(first, UserAccess::Write);
        assert_eq!(world.told(), [], "bit {bit}");
        let world = World::at(START + (first << 12), Backing::Anon, Rights::Write);
        let told = world.touch(first, UserAccess::Write).told_after(first, |entry| entry & !(1 << bit));
        assert_eq!(told, [ViolationKind::BitsLost], "bit {bit}");
    }
}

#[test]
fn an_entry_that_does_not_say_that_its_page_was_used_is_told() {
    let world = World::new(Backing::Anon, Rights::Write);
    let told = world.touch(0, UserAccess::Write).told_after(0, |entry| entry & !ACCESSED);
    assert_eq!(told, [ViolationKind::AccessForgotten]);
}

#[test]
fn an_entry_where_no_area_is_is_told() {
    let world = World::new(Backing::Anon, Rights::Write);
    let here = world.touch(0, UserAccess::Read).entry(0, 1).load(Ordering::Relaxed);
    assert_eq!(world.told_after(7, |_| here), [ViolationKind::EntryOutsideAreas]);
}

#[test]
fn a_table_that_is_counted_and_not_there_is_told() {
    let world = World::new(Backing::Anon, Rights::Write);
    world.touch(0, UserAccess::Read).entry(0, 2).store(0, Ordering::Relaxed);
    assert_eq!(world.told(), [ViolationKind::TablesMiscounted]);
}

#[test]
fn a_page_that_was_written_to_must_be_known_to_be_dirty() {
    for backing in [Backing::Anon, Backing::Shared] {
        let world = World::new(backing, Rights::Write);
        let told = world.touch(0, UserAccess::Write).told_after(0, |entry| entry & !DIRTY);
        assert_eq!(told, [ViolationKind::WriteLost], "{backing}");
    }
}
