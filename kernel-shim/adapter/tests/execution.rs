//! Programs execute code, and nothing else: what the small kernel says of it in entries, and what
//! the checker sees of a CPU that has two translations of one page.

use std::sync::Arc;

use mmu_adapter::{HostedMm, ShimKernel};
use mmu_gather::pagetable::VirtRange;
use mmu_hosted::{
    Backing, HostedMachine, Kernel, MachineFault, NotDone, Options, Quirk, Quirks, Rights, Sequence, Signal,
    UserAccess, ViolationKind, boot, generate,
};
use mmu_kernel_shim::{Config, Discarding};

const PAGE: u64 = 0x7000_0000_0000;

struct World {
    machine: Arc<HostedMachine>,
    kernel: Arc<ShimKernel>,
    mm: Arc<HostedMm>,
}

impl World {
    fn new(options: Options, config: Config, backing: Backing, rights: Rights) -> Self {
        let machine = Arc::new(HostedMachine::new(options).expect("a small machine"));
        let kernel = boot(&machine, |machine| ShimKernel::boot(machine, config)).expect("it has frames");
        let mm = kernel.new_mm().expect("it has frames");
        kernel.map(&mm, pages(8), backing, rights).expect("nothing is there");
        kernel.switch_to(Some(&mm));
        Self { machine, kernel, mm }
    }

    fn touch(&self, access: UserAccess) -> Result<(), Signal<NotDone>> {
        self.machine.touch(PAGE, access, || self.kernel.fault(&self.mm, PAGE, access))
    }

    fn protect(&self, rights: Rights) {
        self.kernel.protect(&self.mm, pages(8), rights).expect("nothing is split");
    }

    fn told(&self) -> Vec<ViolationKind> {
        self.machine.violations().told.iter().map(|told| told.kind).collect()
    }
}

fn pages(count: u64) -> VirtRange {
    VirtRange::new(PAGE, PAGE + count * 4096).expect("a good range")
}

fn options() -> Options {
    Options::new(1, 1024, 1)
}

#[test]
fn programs_execute_where_the_area_says_that_code_is_and_nowhere_else() {
    for backing in [Backing::Anon, Backing::Private, Backing::Shared, Backing::Pfn] {
        for (rights, may) in [(Rights::Execute, true), (Rights::Read, false), (Rights::Write, false)] {
            let world = World::new(options(), Config::default(), backing, rights);
            assert_eq!(world.touch(UserAccess::Fetch).is_ok(), may, "{backing} {rights}");
            assert_eq!(world.touch(UserAccess::Read), Ok(()));
            assert_eq!(world.touch(UserAccess::Write).is_ok(), rights == Rights::Write);
            // What has been read, or written, is no code either.
            assert_eq!(world.touch(UserAccess::Fetch).is_ok(), may, "{backing} {rights}");
        }
    }
}

#[test]
fn mprotect_takes_the_right_to_execute_away_and_gives_it_back() {
    let world = World::new(options(), Config::default(), Backing::Anon, Rights::Execute);
    for _ in 0..2 {
        assert_eq!(world.touch(UserAccess::Fetch), Ok(()));
        for rights in [Rights::Read, Rights::Write, Rights::Nothing] {
            world.protect(rights);
            assert_eq!(world.touch(UserAccess::Fetch), Err(Signal::Refused(NotDone::Refused)), "{rights}");
        }
        world.protect(Rights::Execute);
    }
    assert_eq!(world.told(), []);
}

/// The page is cached by instruction fetches alone, and no flush comes: whoever looks for it by
/// what loads would use sees nothing.
#[test]
fn the_right_to_execute_that_is_left_in_a_tlb_of_instructions_is_told() {
    let split = Sequence { quirks: Quirks::default().with(Quirk::SplitTlb), ..generate(1, 1, 0) };
    for features in [options().features, split.options().features] {
        let fault = MachineFault::SkipFlush;
        let world = World::new(
            Options { features, fault, ..options() },
            Config::default(),
            Backing::Shared,
            Rights::Execute,
        );
        assert_eq!(world.touch(UserAccess::Fetch), Ok(()));
        world.protect(Rights::Read);
        assert_eq!(world.told().first(), Some(&ViolationKind::RightsUsableAfterProtect));
    }
}

#[test]
fn a_discard_that_takes_the_right_to_write_first_keeps_what_was_written() {
    let config = Config { discarding: Discarding::WriteProtectedFirst, ..Config::default() };
    let world = World::new(options(), config, Backing::Shared, Rights::Write);
    assert_eq!(world.touch(UserAccess::Write), Ok(()));
    world.kernel.discard(&world.mm, pages(8)).expect("nothing is split");
    assert_eq!(world.told(), [], "it is written back as dirty");
    // The area is as it was.
    assert_eq!(world.touch(UserAccess::Write), Ok(()));
    world.kernel.discard(&world.mm, pages(1)).expect("nothing is split");
    assert_eq!(world.told(), []);
}
