//! A device that walks page tables by itself hears of every flush, by the hook for secondary TLBs,
//! before a frame is freed.

use std::sync::Arc;

use mmu_adapter::{Hosted, HostedKernel, HostedMm, HostedStage, touch};
use mmu_gather::pagetable::{Level, VirtRange};
use mmu_hosted::{FrameRole, HostedMachine, Note, Options, Violation, ViolationKind};
use mmu_kernel_shim::{Area, Config, Protection, Stage, UserAccess, Vma};

const PAGE: u64 = 0x7000_0000_0000;

type Space = Arc<HostedMm>;

struct Rig {
    stage: HostedStage,
    spaces: Vec<Space>,
}

impl Rig {
    /// As many address spaces as asked for, four pages each. Programs have written to all of them,
    /// and the device has used them.
    fn new(nr_spaces: usize) -> Self {
        let machine = HostedMachine::new(Options::new(2, 4096, 1)).expect("a small machine");
        let stage = HostedStage::boot(machine, Config::default()).expect("it has frames");
        let spaces = (0..nr_spaces).map(|_| stage.kernel().new_mm().expect("frames")).collect();
        let rig = Self { stage, spaces };
        for mm in &rig.spaces {
            rig.machine().attach_device(mm.engine().context().ctx_id(), mm.root());
            rig.kernel().mmap(mm, Vma { range: pages(4), area: Area::anon() }).expect("nothing is there");
            rig.kernel().switch_to(Some(mm));
            for address in (PAGE..pages(4).end()).step_by(4096) {
                touch(rig.kernel(), mm, address, UserAccess::Write);
                assert!(rig.device(mm, address, UserAccess::Read), "it is mapped");
            }
        }
        rig.kernel().switch_to(None);
        rig
    }

    fn kernel(&self) -> &HostedKernel {
        self.stage.kernel()
    }

    fn machine(&self) -> &Hosted {
        self.kernel().machine()
    }

    /// Whether the device reaches a page at this address.
    fn device(&self, mm: &Space, address: u64, access: UserAccess) -> bool {
        self.machine().device_access(mm.engine().context().ctx_id(), address, access).is_some()
    }

    fn check(&self) {
        let found = self.machine().violations();
        assert_eq!(found.count, 0, "{}", found.told[0]);
    }
}

fn pages(count: u64) -> VirtRange {
    VirtRange::new(PAGE, PAGE + count * 4096).expect("a good range")
}

#[test]
fn reclaim_frees_no_page_that_a_device_has_cached() {
    let rig = Rig::new(1);
    assert_eq!(rig.kernel().reclaim([(&*rig.spaces[0], pages(4))]), 4);
    assert!(!rig.device(&rig.spaces[0], PAGE, UserAccess::Read));
    rig.check();
}

/// A batch keeps notes of eight; of the others the device hears while entries are still being
/// cleared.
#[test]
fn a_device_hears_of_every_address_space_in_a_batch_of_many() {
    for nr_spaces in [7, 8, 9, 10, 20] {
        let rig = Rig::new(nr_spaces);
        let victims = || rig.spaces.iter().map(|mm| (&**mm, pages(2)));
        // Twice the same spaces: some are noted anew after the device was told of them.
        let again = rig.spaces.iter().map(|mm| (&**mm, pages(4)));
        assert_eq!(rig.kernel().reclaim(victims().chain(again)), 4 * nr_spaces as u64);
        for mm in &rig.spaces {
            assert!(
                !rig.device(mm, PAGE, UserAccess::Read) && !rig.device(mm, PAGE + 0x3000, UserAccess::Read)
            );
        }
        rig.check();
    }
}

#[test]
fn a_gather_frees_no_page_and_no_table_that_a_device_has_cached() {
    let rig = Rig::new(2);
    let mm = &rig.spaces[0];
    rig.kernel().madvise_dontneed(mm, pages(1)).expect("no split");
    assert!(!rig.device(mm, PAGE, UserAccess::Read));
    assert!(rig.device(mm, PAGE + 4096, UserAccess::Read), "it forgets no more than the span");
    rig.kernel().mprotect(mm, pages(2), Protection::Read).expect("no split");
    assert!(!rig.device(mm, PAGE + 4096, UserAccess::Write));
    assert!(rig.device(mm, PAGE + 0x2000, UserAccess::Write));
    rig.kernel().munmap(mm, pages(4)).expect("mapped");
    assert!(!rig.device(mm, PAGE + 0x2000, UserAccess::Read));
    // Nobody runs it, so no CPU is flushed: the device all the same.
    rig.kernel().exit(&rig.spaces[1]).expect("nobody runs it");
    rig.check();
}

/// Pages that leave by a call the device is not told of are seen: the hook is what keeps this
/// machine quiet.
#[test]
fn a_frame_freed_without_a_word_to_the_device_is_a_violation() {
    let rig = Rig::new(1);
    let mm = &rig.spaces[0];
    let found = rig.machine().device_access(mm.engine().context().ctx_id(), PAGE, UserAccess::Read);
    rig.machine().note(Note::Freed(found.expect("mapped"), FrameRole::Page));
    let found = rig.machine().violations();
    assert_eq!(found.count, 1);
    let Violation { kind, address, entry, .. } = &found.told[0];
    assert_eq!((*kind, *address), (ViolationKind::DeviceReachesAfterFree, PAGE));
    assert_eq!(entry.map(|entry| 1 << entry.span_shift), Some(Level::Pte.entry_span()));
}
