//! What the small kernel's areas promise: which frames they show, and where they end.

use std::sync::Arc;

use mmu_adapter::{HostedKernel, HostedMm, Touched, boot, touch};
use mmu_gather::pagetable::VirtRange;
use mmu_hosted::{HostedMachine, Options};
use mmu_kernel_shim::{Area, AreaKind, Config, FaultError, Growth, PageContent, Protection, UserAccess, Vma};
use x86_64::structures::paging::PhysFrame;

const START: u64 = 0x7000_0000_0000;

fn range(first: u64, end: u64) -> VirtRange {
    VirtRange::new(START + first * 4096, START + end * 4096).expect("a good range")
}

/// A kernel on one CPU that runs an address space with `areas`.
struct Small {
    machine: Arc<HostedMachine>,
    kernel: Arc<HostedKernel>,
    mm: Arc<HostedMm>,
}

impl Small {
    fn new(areas: &[(VirtRange, Area)]) -> Self {
        let machine = Arc::new(HostedMachine::new(Options::new(1, 8192, 1)).expect("a small machine"));
        let kernel = boot(&machine, Config::default()).expect("it has frames");
        let mm = kernel.new_mm().expect("it has frames");
        for (range, area) in areas {
            kernel.mmap(&mm, Vma { range: *range, area: *area }).expect("nothing is there");
        }
        kernel.switch_to(Some(&mm));
        Self { machine, kernel, mm }
    }

    /// The frame that a program reaches at this page.
    fn frame_at(&self, page: u64, access: UserAccess) -> PhysFrame {
        let address = START + page * 4096;
        assert_eq!(touch(&self.kernel, &self.mm, address, access), Touched::Reached, "page {page}");
        let frame = self.kernel.machine().user_access(address, access).expect("it was reached just now");
        frame.expect("the machine is checked")
    }

    fn end(self) {
        self.kernel.switch_to(None);
        self.kernel.exit(&self.mm).expect("nobody runs it");
        self.kernel.drop_caches();
        assert_eq!((self.kernel.lost(), self.machine.violations().count), ((0, 0), 0));
    }
}

/// Once, the area kept the offset that it had at its old place, and showed another page of the file
/// when the page was gone.
#[test]
fn an_area_that_exec_moves_shows_the_same_part_of_its_file() {
    let shared = Area { kind: AreaKind::FileShared(2), ..Area::anon() };
    let small = Small::new(&[(range(300, 304), shared)]);
    let before = small.frame_at(301, UserAccess::Write);
    small.kernel.move_stack(&small.mm, range(300, 304), 185 << 12).expect("there is room");
    assert_eq!(small.frame_at(301 - 185, UserAccess::Read), before);
    small.kernel.madvise_dontneed(&small.mm, range(300 - 185, 304 - 185)).expect("nothing is to be split");
    assert_eq!(small.frame_at(301 - 185, UserAccess::Read), before, "another page of the file");
    small.end();
}

/// Once, both were the page of zeroes, which a program could then write to.
#[test]
fn a_device_has_a_frame_of_its_own_and_nobody_writes_to_the_page_of_zeroes() {
    let of = |kind| Area { kind, ..Area::anon() };
    let small = Small::new(&[
        (range(0, 1), of(AreaKind::Pfn)),
        (range(10, 11), Area::anon()),
        (range(20, 21), of(AreaKind::FileShared(1))),
        (range(30, 31), of(AreaKind::Pfn)),
    ]);
    let zeroes = small.frame_at(10, UserAccess::Read);
    assert_ne!(small.frame_at(0, UserAccess::Write), zeroes);
    small.kernel.populate(&small.mm, range(30, 31), PageContent::Pfn).expect("it has frames");
    assert_ne!(small.frame_at(30, UserAccess::Write), zeroes);
    // A hole of the file, say.
    small.kernel.populate(&small.mm, range(20, 21), PageContent::Zero).expect("it has frames");
    assert_eq!(small.frame_at(20, UserAccess::Read), zeroes);
    assert_ne!(small.frame_at(20, UserAccess::Write), zeroes);
    small.end();
}

/// What is below a stack, and how near to it the stack then comes.
#[test]
fn a_stack_leaves_a_gap_to_the_area_below() {
    let stack = Area { growth: Growth::Down, ..Area::anon() };
    let none = Area { protection: Protection::Nothing, ..Area::anon() };
    // The gap is 256 pages, and a fault at most 256 pages below a stack makes it grow.
    for (below, lowest) in [(Area::anon(), 257), (none, 1), (stack, 1)] {
        let small = Small::new(&[(range(0, 1), below), (range(400, 401), stack)]);
        let grow = |page: u64| small.kernel.handle_fault(&small.mm, START + page * 4096, UserAccess::Write);
        assert_eq!(grow(400 - 257), Err(FaultError::NoArea), "a jump too far");
        for page in (lowest..400).rev().step_by(100) {
            assert_eq!(grow(page), Ok(()), "page {page} above {below:?}");
        }
        assert_eq!(grow(lowest), Ok(()));
        if lowest > 1 {
            assert_eq!(grow(lowest - 1), Err(FaultError::NoArea), "above {below:?}");
        }
        small.end();
    }
}

/// Once, such a write was answered by nothing, and came again for ever.
#[test]
fn a_write_to_a_large_page_that_may_not_be_written_to_gets_a_page_of_its_own() {
    const BLOCK: u64 = 512;
    let private = Area { kind: AreaKind::FilePrivate(1), ..Area::anon() };
    for (area, content) in [(Area::anon(), PageContent::ZeroBlock), (private, PageContent::FileBlock)] {
        let small = Small::new(&[(range(0, BLOCK), area)]);
        small.kernel.populate(&small.mm, range(0, BLOCK), content).expect("it has frames");
        let next = small.frame_at(8, UserAccess::Read);
        // The frame may be the same: nobody else had the page of the file.
        for (page, copied) in [(7, 1), (8, 2), (8, 2)] {
            small.frame_at(page, UserAccess::Write);
            let counted = small.kernel.counters().snapshot();
            assert_eq!((counted.copies, counted.splits), (copied, 1), "{content:?}, page {page}");
        }
        assert_eq!(small.frame_at(9, UserAccess::Read), next + 1, "{content:?}");
        small.end();
    }
}
