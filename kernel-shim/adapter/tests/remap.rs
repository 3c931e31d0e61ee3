//! What the small kernel's mremap promises when it refuses.

use std::sync::Arc;

use mmu_adapter::{Touched, boot, touch};
use mmu_gather::pagetable::VirtRange;
use mmu_hosted::{HostedMachine, Options};
use mmu_kernel_shim::{Area, Config, Error, Supply, UserAccess, Vma};

const START: u64 = 0x7000_0000_0000;

fn range(first: u64, end: u64) -> VirtRange {
    VirtRange::new(START + first * 4096, START + end * 4096).expect("a good range")
}

#[test]
fn what_is_at_the_target_stays_when_the_source_is_not_inside_one_area() {
    let machine = Arc::new(HostedMachine::new(Options::new(1, 8192, 1)).expect("a small machine"));
    let kernel = boot(&machine, Config::default()).expect("it has frames");
    let mm = kernel.new_mm().expect("it has frames");
    for area in [range(0, 4), range(100, 108)] {
        kernel.mmap(&mm, Vma { range: area, area: Area::anon() }).expect("nothing is there");
    }
    kernel.switch_to(Some(&mm));
    let target = range(100, 108);
    assert_eq!(touch(&kernel, &mm, target.start(), UserAccess::Write), Touched::Reached);
    let frame =
        kernel.machine().user_access(target.start(), UserAccess::Read).expect("it was there just now");
    // Nothing there; half of it there.
    for (source, at) in [(range(50, 58), range(50, 58).start()), (range(2, 10), range(2, 10).start())] {
        assert_eq!(kernel.mremap(&mm, source, target), Err(Error::NoArea(at)));
        assert_eq!(mm.nr_vmas(), 2, "the target was unmapped");
        assert_eq!(kernel.machine().user_access(target.start(), UserAccess::Read), Ok(frame));
    }
    // Nor does anything move for want of tables.
    assert_eq!(touch(&kernel, &mm, range(0, 1).start(), UserAccess::Write), Touched::Reached);
    kernel.set_table_supply(Supply::Never);
    assert_eq!(kernel.mremap(&mm, range(0, 4), range(1 << 20, (1 << 20) + 4)), Err(Error::NoMemory));
    assert_eq!(
        kernel.machine().user_access(range(0, 1).start(), UserAccess::Read).map(|frame| frame.is_some()),
        Ok(true)
    );
    kernel.switch_to(None);
    kernel.exit(&mm).expect("nobody runs it");
    kernel.drop_caches();
    assert_eq!((kernel.lost(), machine.violations().count), ((0, 0), 0));
}
