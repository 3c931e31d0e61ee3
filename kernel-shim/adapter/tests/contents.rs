//! Programs read what they have written, whatever the kernel has done with the page meanwhile; and
//! if they do not, that is told.

use std::sync::Arc;

use mmu_adapter::{HostedMm, ShimKernel};
use mmu_gather::pagetable::VirtRange;
use mmu_hosted::{Backing, HostedMachine, Kernel, Options, Rights, UserAccess, ViolationKind, boot};
use mmu_kernel_shim::Config;
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

const START: u64 = 0x7000_0000_0000;
const NR_PAGES: u64 = 4;
/// Halves of a page are used as chance has it: so many times, and both were.
const OFTEN: u64 = 64;

struct World {
    machine: Arc<HostedMachine>,
    kernel: Arc<ShimKernel>,
}

impl World {
    fn new() -> Self {
        let machine = Arc::new(HostedMachine::new(Options::new(1, 4096, 1)).expect("a small machine"));
        let boot_shim = |machine: &Arc<HostedMachine>| ShimKernel::boot(machine, Config::default());
        let kernel = boot(&machine, boot_shim).expect("it has frames");
        Self { machine, kernel }
    }

    /// An address space with one area.
    fn mm(&self, backing: Backing) -> Arc<HostedMm> {
        let mm = self.kernel.new_mm().expect("it has frames");
        self.kernel.map(&mm, area(), backing, Rights::Write).expect("nothing is there");
        mm
    }

    /// A program uses half of a page, once.
    fn uses(&self, mm: &Arc<HostedMm>, page: u64, access: UserAccess) {
        self.kernel.switch_to(Some(mm));
        let address = START + page * 4096;
        let fault = || self.kernel.fault(mm, address, access);
        self.machine.touch(address, access, fault).expect("the area allows it");
    }

    /// The frame that a program finds at a page, which it reads.
    fn frame_at(&self, page: u64) -> PhysFrame {
        let found = self.machine.user_access(START + page * 4096, UserAccess::Read).expect("it is mapped");
        found.expect("the machine is checked")
    }

    /// A program reads a page, both halves of it.
    fn reads(&self, mm: &Arc<HostedMm>, page: u64) -> &Self {
        for _ in 0..OFTEN {
            self.uses(mm, page, UserAccess::Read);
        }
        self
    }

    fn writes(&self, mm: &Arc<HostedMm>, page: u64) -> PhysFrame {
        for _ in 0..OFTEN {
            self.uses(mm, page, UserAccess::Write);
        }
        self.frame_at(page)
    }

    fn told(&self) -> Vec<ViolationKind> {
        self.machine.violations().told.iter().map(|told| told.kind).collect()
    }
}

fn area() -> VirtRange {
    VirtRange::new(START, START + NR_PAGES * 4096).expect("a good range")
}

/// What a kernel does with pages that a program has written to, and reads again.
type Change = fn(&World, &Arc<HostedMm>);

#[test]
fn a_page_reads_as_it_was_written_when_it_was_swapped_moved_protected_and_forked() {
    let changes: [Change; 4] = [
        |world, mm| world.kernel.reclaim([(mm, area()), (mm, area())]).expect("it has swap"),
        |world, mm| {
            let away = VirtRange::new(START + (1 << 30), START + (1 << 30) + area().len_bytes());
            let away = away.expect("a good range");
            world.kernel.remap(mm, area(), away).expect("nothing is there");
            world.kernel.remap(mm, away, area()).expect("nothing is there");
        },
        |world, mm| {
            world.kernel.protect(mm, area(), Rights::Nothing).expect("nothing is split");
            world.kernel.protect(mm, area(), Rights::Write).expect("nothing is split");
        },
        |world, mm| {
            let child = world.kernel.fork(mm).expect("it has frames");
            world.reads(&child, 0);
            for page in 0..NR_PAGES {
                world.uses(&child, page, UserAccess::Write);
                world.reads(&child, page).reads(mm, page);
            }
        },
    ];
    for (number, change) in changes.into_iter().enumerate() {
        for backing in [Backing::Anon, Backing::Private, Backing::Shared] {
            let world = World::new();
            let mm = world.mm(backing);
            world.writes(&mm, 0);
            world.writes(&mm, 1);
            change(&world, &mm);
            for page in 0..NR_PAGES {
                world.reads(&mm, page);
                // One half keeps what it was when the other is written to.
                world.uses(&mm, page, UserAccess::Write);
                world.reads(&mm, page);
            }
            assert_eq!(world.told(), [], "change {number}, {backing}");
        }
    }
}

#[test]
fn what_is_discarded_reads_as_if_it_had_never_been_written_to() {
    for backing in [Backing::Anon, Backing::Private, Backing::Shared] {
        let world = World::new();
        let mm = world.mm(backing);
        world.writes(&mm, 0);
        world.kernel.discard(&mm, area()).expect("nothing is split");
        assert_eq!(world.reads(&mm, 0).told(), [], "{backing}");
    }
}

/// The frame is changed behind the kernel's back.
#[test]
fn what_a_program_has_not_written_is_told_by_what_it_reads() {
    let zero_page = PhysFrame::containing_address(PhysAddr::new(0x1000));
    for (number, wanted) in
        [ViolationKind::ContentOfAnother, ViolationKind::ContentOfElsewhere, ViolationKind::ContentLost]
            .into_iter()
            .enumerate()
    {
        let world = World::new();
        let (mm, other) = (world.mm(Backing::Anon), world.mm(Backing::Anon));
        let sources = [world.writes(&other, 0), world.writes(&mm, 1), zero_page];
        let page = world.writes(&mm, 0);
        world.machine.copy_frame(sources[number], page);
        world.machine.compare_contents(|_| None);
        assert_eq!(world.told(), [wanted], "at rest");
        assert_eq!(world.reads(&mm, 0).told(), [wanted; 2], "as it is read");
    }
}

#[test]
fn a_page_that_nobody_has_filled_is_told() {
    let world = World::new();
    let mm = world.mm(Backing::Anon);
    // It holds a table, or nothing yet; in any case it was not filled.
    world.uses(&mm, 0, UserAccess::Write);
    let page = world.frame_at(0);
    let unfilled = page + 1;
    world.machine.allocated(unfilled, mmu_hosted::FrameRole::Page);
    world.machine.copy_frame(unfilled, page);
    assert_eq!(world.reads(&mm, 0).told(), [ViolationKind::ContentLeft; 2]);
    let told = world.machine.violations().told.swap_remove(0).to_string();
    assert!(told.contains("it reads what was left in frame"), "{told}");
}
