//! Reclaim of large pages: one that nobody has written to goes whole, with one flush; any other
//! stays.

use std::sync::Arc;

use mmu_adapter::{HostedKernel, HostedMm, HostedStage, touch};
use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CpuId;
use mmu_hosted::{HostedMachine, Options};
use mmu_kernel_shim::{Area, Config, FrameKind, PageContent, Stage, UserAccess, Vma};

const LARGE: u64 = 2 << 20;
const START: u64 = 0x7000_0000_0000;
const PROGRAM: CpuId = CpuId::new(1);

type Space = Arc<HostedMm>;

/// `content` in three large pages of one area, which a program on CPU 1 has read.
fn three_blocks(content: PageContent) -> (HostedStage, Space) {
    let machine = HostedMachine::new(Options::new(2, 8192, 1)).expect("a small machine");
    let stage = HostedStage::boot(machine, Config::default()).expect("it has frames");
    let mm = stage.kernel().new_mm().expect("frames");
    stage.kernel().mmap(&mm, Vma { range: blocks(3), area: Area::anon() }).expect("nothing is there");
    stage.kernel().populate(&mm, blocks(3), content).expect("frames");
    on_program(&stage, |kernel| {
        kernel.switch_to(Some(&mm));
        for address in (START..blocks(3).end()).step_by(1 << 21) {
            touch(kernel, &mm, address + 0x5000, UserAccess::Read);
        }
    });
    (stage, mm)
}

fn on_program(stage: &HostedStage, work: impl Fn(&HostedKernel) + Sync) {
    stage.on_cpu(PROGRAM, &|| work(stage.kernel()));
}

fn blocks(count: u64) -> VirtRange {
    VirtRange::new(START, START + count * LARGE).expect("a good range")
}

fn nr_blocks(stage: &HostedStage) -> u64 {
    stage.kernel().frames().count(FrameKind::Block)
}

fn check(stage: &HostedStage) {
    let found = stage.kernel().machine().violations();
    assert_eq!(found.count, 0, "{}", found.told[0]);
    assert_eq!(stage.kernel().counters().snapshot().double_frees, 0);
}

#[test]
fn large_pages_that_were_only_read_go_whole_and_leave_no_place_in_swap() {
    let (stage, mm) = three_blocks(PageContent::CleanBlock);
    // One page of the first, all of the second, nothing of the third.
    let range = VirtRange::new(START + LARGE - 4096, START + 2 * LARGE).expect("a good range");
    assert_eq!(stage.kernel().reclaim([(&*mm, range)]), 2 * 512);
    assert_eq!((nr_blocks(&stage), stage.kernel().swap_slots()), (1, 0));
    check(&stage);
    // What they held is there again.
    on_program(&stage, |kernel| {
        touch(kernel, &mm, START + 0x5000, UserAccess::Read);
        touch(kernel, &mm, START + LARGE, UserAccess::Write);
    });
    check(&stage);
    on_program(&stage, |kernel| kernel.switch_to(None));
    stage.kernel().exit(&mm).expect("nobody runs it");
    assert_eq!((nr_blocks(&stage), stage.kernel().lost()), (0, (0, 0)));
    check(&stage);
}

#[test]
fn large_pages_that_were_written_to_stay() {
    let (stage, mm) = three_blocks(PageContent::AnonBlock);
    assert_eq!(stage.kernel().reclaim([(&*mm, blocks(3))]), 0);
    assert_eq!(nr_blocks(&stage), 3);
    let (stage, mm) = three_blocks(PageContent::CleanBlock);
    on_program(&stage, |kernel| {
        touch(kernel, &mm, START + LARGE, UserAccess::Write);
    });
    assert_eq!(stage.kernel().reclaim([(&*mm, blocks(3))]), 2 * 512);
    assert_eq!(nr_blocks(&stage), 1);
    check(&stage);
}

/// Many address spaces, one flush: the program on CPU 1 is interrupted once.
#[test]
fn large_pages_share_the_flush_of_the_batch() {
    let (stage, mm) = three_blocks(PageContent::CleanBlock);
    let before = stage.kernel().counters().snapshot().ipis_sent;
    assert_eq!(stage.kernel().reclaim([(&*mm, blocks(3))]), 3 * 512);
    assert_eq!(stage.kernel().counters().snapshot().ipis_sent - before, 1);
    check(&stage);
}
