//! Two calls at once on one address space, a program on a third CPU, and what the checker says:
//! regressions by name.

use std::sync::Arc;

use mmu_adapter::{HostedKernel, HostedMm, HostedStage, touch};
use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CpuId;
use mmu_hosted::{Found, HostedMachine, Options, Schedule, give_way};
use mmu_kernel_shim::{Area, Config, PageContent, Protection, Stage, UserAccess, Vma};

const PAGE: u64 = 0x7000_0000_0000;
const SEEDS: u64 = 200;

type Space = Arc<HostedMm>;

struct Rig {
    stage: Arc<HostedStage>,
    mm: Space,
    other: Space,
}

impl Rig {
    fn new(seed: u64) -> Self {
        let machine = HostedMachine::new(Options::new(3, 4096, seed)).expect("a small machine");
        let stage = Arc::new(HostedStage::boot(machine, Config::default()).expect("it has frames"));
        let (mm, other) =
            (stage.kernel().new_mm().expect("frames"), stage.kernel().new_mm().expect("frames"));
        Self { stage, mm, other }
    }

    /// Maps one page, and lets a program on CPU 1 write to it.
    fn use_page(&self) {
        let vma = Vma { range: page(), area: Area::anon() };
        self.stage.kernel().mmap(&self.mm, vma).expect("nothing is there");
        self.stage.on_cpu(CpuId::new(1), &|| {
            self.stage.kernel().switch_to(Some(&self.mm));
            touch(self.stage.kernel(), &self.mm, PAGE, UserAccess::Write);
        });
    }

    /// Maps a large page and a neighbour, and lets a program on CPU 1 read it.
    fn use_large_page(&self) {
        let kernel = self.stage.kernel();
        let neighbour = VirtRange::new(PAGE + (8 << 20), PAGE + (9 << 20)).expect("a good range");
        for range in [block(), neighbour] {
            kernel.mmap(&self.mm, Vma { range, area: Area::anon() }).expect("nothing is there");
        }
        kernel.populate(&self.mm, block(), PageContent::CleanBlock).expect("frames");
        self.stage.on_cpu(CpuId::new(1), &|| {
            kernel.switch_to(Some(&self.mm));
            touch(kernel, &self.mm, PAGE, UserAccess::Read);
        });
    }

    fn add(&self, schedule: &mut Schedule, cpu: u32, work: impl Fn(&HostedKernel, &Space, &Space) + 'static) {
        let (stage, mm, other) = (Arc::clone(&self.stage), Arc::clone(&self.mm), Arc::clone(&self.other));
        schedule.spawn(CpuId::new(cpu), move || work(stage.kernel(), &mm, &other));
    }

    fn run(&self, schedule: Schedule) -> Found {
        self.stage.kernel().machine().run(schedule);
        self.stage.kernel().machine().violations()
    }
}

fn page() -> VirtRange {
    VirtRange::new(PAGE, PAGE + 4096).expect("a good range")
}

fn block() -> VirtRange {
    VirtRange::new(PAGE, PAGE + (2 << 20)).expect("a good range")
}

/// Reclaim takes the page while `call` works on it, and the program on CPU 1 goes on.
fn beside_reclaim(call: fn(&HostedKernel, &Space)) {
    reclaim_beside(Rig::use_page, call);
}

/// As [`beside_reclaim`], of a large page that was only read: its entry is empty at once. A
/// neighbour keeps all tables.
fn beside_reclaim_of_a_large_page(call: fn(&HostedKernel, &Space)) {
    reclaim_beside(Rig::use_large_page, call);
}

fn reclaim_beside(begin: fn(&Rig), call: fn(&HostedKernel, &Space)) {
    for seed in 0..SEEDS {
        let rig = Rig::new(seed);
        begin(&rig);
        let mut schedule = Schedule::new();
        rig.add(&mut schedule, 0, |kernel, mm, _| {
            kernel.reclaim([(&**mm, page())]);
        });
        rig.add(&mut schedule, 1, |kernel, _, _| {
            kernel.machine().enter_user_mode();
            for _ in 0..100 {
                give_way();
            }
            kernel.machine().leave_user_mode();
        });
        rig.add(&mut schedule, 2, move |kernel, mm, _| call(kernel, mm));
        let found = rig.run(schedule);
        assert_eq!(found.count, 0, "seed {seed}: {}", found.told[0]);
    }
}

#[test]
fn mprotect_makes_up_for_a_large_page_that_reclaim_has_not_flushed_yet() {
    beside_reclaim_of_a_large_page(|kernel, mm| {
        kernel.mprotect(mm, block(), Protection::Read).expect("no split");
    });
}

#[test]
fn fork_makes_up_for_a_large_page_that_reclaim_has_not_flushed_yet() {
    beside_reclaim_of_a_large_page(|kernel, mm| {
        let child = kernel.fork(mm, []).expect("frames");
        kernel.exit(&child).expect("nobody runs it");
    });
}

#[test]
fn madvise_makes_up_for_a_large_page_that_reclaim_has_not_flushed_yet() {
    beside_reclaim_of_a_large_page(|kernel, mm| kernel.madvise_dontneed(mm, block()).expect("no split"));
}

#[test]
fn munmap_makes_up_for_a_large_page_that_reclaim_has_not_flushed_yet() {
    beside_reclaim_of_a_large_page(|kernel, mm| kernel.munmap(mm, block()).expect("no split"));
}

#[test]
fn mremap_makes_up_for_a_large_page_that_reclaim_has_not_flushed_yet() {
    beside_reclaim_of_a_large_page(|kernel, mm| {
        let to = VirtRange::new(PAGE + (4 << 20), PAGE + (6 << 20)).expect("a good range");
        kernel.mremap(mm, block(), to).expect("no split");
    });
}

/// mprotect found a place in swap, changed nothing, flushed nothing, and returned before reclaim
/// had flushed: a program could go on writing to what it must only read. Linux:
/// flush_tlb_batched_pending in change_pte_range.
#[test]
fn mprotect_makes_up_for_what_reclaim_has_not_flushed_yet() {
    beside_reclaim(|kernel, mm| kernel.mprotect(mm, page(), Protection::Read).expect("no split"));
}

#[test]
fn madvise_makes_up_for_what_reclaim_has_not_flushed_yet() {
    beside_reclaim(|kernel, mm| kernel.madvise_dontneed(mm, page()).expect("no split"));
}

/// As mprotect: the parent could go on writing to what the child takes for its own. Linux: dup_mmap
/// flushes the parent whole.
#[test]
fn fork_makes_up_for_what_reclaim_has_not_flushed_yet() {
    beside_reclaim(|kernel, mm| {
        let child = kernel.fork(mm, []).expect("frames");
        kernel.exit(&child).expect("nobody runs it");
    });
}

/// Nothing was mapped, so nothing was flushed; a CPU on its way from here to elsewhere said
/// SWITCHING, counted as neither here nor lazy, and still had the root in CR3 when it was freed.
#[test]
fn exit_makes_a_cpu_that_is_switching_leave_too() {
    for seed in 0..SEEDS {
        let rig = Rig::new(seed);
        rig.stage.on_cpu(CpuId::new(1), &|| {
            rig.stage.kernel().switch_to(Some(&rig.mm));
            rig.stage.kernel().go_lazy();
        });
        let mut schedule = Schedule::new();
        rig.add(&mut schedule, 0, |kernel, mm, _| kernel.exit(mm).expect("every CPU is lazy"));
        rig.add(&mut schedule, 1, |kernel, _, other| kernel.switch_to(Some(other)));
        let found = rig.run(schedule);
        assert_eq!(found.count, 0, "seed {seed}: {}", found.told[0]);
    }
}

/// Another thread may fault a small page in where a large one is being discarded. A third then has
/// both sizes cached until it is told, with different memory behind them: neither outlives the
/// call, and that is all a discard promises.
#[test]
fn a_fault_beside_the_discard_of_a_large_page_is_no_violation() {
    let block = VirtRange::new(PAGE, PAGE + (2 << 20)).expect("a good range");
    for seed in 0..SEEDS {
        let rig = Rig::new(seed);
        let kernel = rig.stage.kernel();
        kernel.mmap(&rig.mm, Vma { range: block, area: Area::anon() }).expect("nothing is there");
        kernel.populate(&rig.mm, block, PageContent::AnonBlock).expect("frames");
        for cpu in [1, 2] {
            rig.stage.on_cpu(CpuId::new(cpu), &|| kernel.switch_to(Some(&rig.mm)));
        }
        rig.stage.on_cpu(CpuId::new(1), &|| {
            touch(kernel, &rig.mm, PAGE, UserAccess::Write);
        });
        let mut schedule = Schedule::new();
        rig.add(&mut schedule, 0, move |kernel, mm, _| kernel.madvise_dontneed(mm, block).expect("no split"));
        rig.add(&mut schedule, 1, |kernel, _, _| {
            kernel.machine().enter_user_mode();
            for _ in 0..100 {
                give_way();
            }
            kernel.machine().leave_user_mode();
        });
        rig.add(&mut schedule, 2, move |kernel, mm, _| {
            for _ in 0..seed % 16 {
                give_way();
            }
            for page in 0..64 {
                touch(kernel, mm, PAGE + page * 4096, UserAccess::Write);
            }
        });
        let found = rig.run(schedule);
        assert_eq!(found.count, 0, "seed {seed}: {}", found.told[0]);
    }
}
