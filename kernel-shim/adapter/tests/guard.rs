//! What the small kernel's guard pages promise, on CPUs that keep every translation they may keep.

mod account;

use core::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use mmu_adapter::{HostedKernel, HostedMm, Touched, boot, touch};
use mmu_gather::pagetable::{Decoded, Level, Line, Marker, NonPresent, VirtRange};
use mmu_gather::tlb::CpuId;
use mmu_hosted::{HostedMachine, Options, Schedule, give_way};
use mmu_kernel_shim::{Area, AreaKind, Config, Error, FaultError, PageContent, Supply, UserAccess, Vma};

use account::end;

/// The first page of a table.
const START: u64 = 0x7000_0000_0000;
const PAGES: u64 = 32;
const CPUS: u32 = 3;
const REFUSED: Touched = Touched::Signal(FaultError::NotAllowed);

fn range(first: u64, end: u64) -> VirtRange {
    VirtRange::new(START + first * 4096, START + end * 4096).expect("a good range")
}

/// Three CPUs that run one process, which has written to all its pages.
fn process(seed: u64) -> (Arc<HostedKernel>, Arc<HostedMm>) {
    let machine = Arc::new(HostedMachine::new(Options::new(CPUS, 8192, seed)).expect("a small machine"));
    let kernel = boot(&machine, Config::default()).expect("it has frames");
    let mm = kernel.new_mm().expect("it has frames");
    kernel.mmap(&mm, Vma { range: range(0, PAGES), area: Area::anon() }).expect("nothing is there");
    for number in 0..CPUS {
        machine.on_cpu(CpuId::new(number), || {
            kernel.switch_to(Some(&mm));
        });
    }
    for page in 0..PAGES {
        assert_eq!(write(&kernel, &mm, page), Touched::Reached);
    }
    (kernel, mm)
}

fn write(kernel: &HostedKernel, mm: &HostedMm, page: u64) -> Touched {
    touch(kernel, mm, START + page * 4096, UserAccess::Write)
}

/// The pages, counted from the first, that are guards.
fn guards(kernel: &HostedKernel, mm: &HostedMm, pages: u64) -> Vec<u64> {
    let is_guard = |page: &u64| {
        let found = lookup(kernel, mm, *page);
        found == Decoded::NonPresent(NonPresent::Marker(Marker::Guard))
    };
    (0..pages).filter(is_guard).collect()
}

#[expect(unsafe_code, reason = "reads page tables while nothing changes them")]
fn lookup(kernel: &HostedKernel, mm: &HostedMm, page: u64) -> Decoded {
    // SAFETY: nothing else runs, so no table is freed meanwhile.
    let found = unsafe { mm.engine().space().lookup(kernel, START + page * 4096) };
    found.value.decode(found.level)
}

/// The first entries of the lines of the first table that are noted as used.
#[expect(unsafe_code, reason = "reads page tables while nothing changes them")]
fn used_lines(kernel: &HostedKernel, mm: &HostedMm) -> Vec<usize> {
    // SAFETY: nothing else runs, so no table is freed meanwhile.
    let table = unsafe { mm.engine().space().find_table(kernel, START, Level::Pte) }.expect("linked");
    let lines = table.used_lines(kernel);
    lines.into_iter().map(Line::first_entry).collect()
}

#[test]
fn a_guard_refuses_reads_and_writes_until_it_is_removed_and_the_page_is_a_new_one_then() {
    let (kernel, mm) = process(1);
    let free = kernel.frames().nr_free();
    kernel.guard_install(&mm, range(3, 5)).expect("private");
    assert_eq!(kernel.frames().nr_free(), free + 2, "what was there is freed");
    for access in [UserAccess::Read, UserAccess::Write] {
        assert_eq!(touch(&kernel, &mm, START + 3 * 4096, access), REFUSED);
        assert_eq!(touch(&kernel, &mm, START + 5 * 4096, access), Touched::Reached);
    }
    // Twice is no more than once.
    kernel.guard_install(&mm, range(4, 5)).expect("private");
    assert_eq!(kernel.guards(), 2);
    // Pages and holes in the range stay what they are.
    kernel.guard_remove(&mm, range(0, 4)).expect("private");
    assert_eq!((guards(&kernel, &mm, PAGES), kernel.guards()), (vec![4], 1));
    assert_eq!(lookup(&kernel, &mm, 3), Decoded::Empty);
    assert!(matches!(lookup(&kernel, &mm, 2), Decoded::Leaf(_)));
    assert_eq!(write(&kernel, &mm, 3), Touched::Reached);
    assert_eq!(kernel.counters().snapshot().guard_faults, 2);
    end(&kernel, &[&mm]);
}

#[test]
fn no_cpu_can_still_use_the_page_when_its_guard_is_installed() {
    let (kernel, mm) = process(2);
    let other = CpuId::new(1);
    let address = START + 7 * 4096;
    kernel.machine().on_cpu(other, || assert_eq!(write(&kernel, &mm, 7), Touched::Reached));
    kernel.guard_install(&mm, range(7, 8)).expect("private");
    let used = kernel.machine().on_cpu(other, || kernel.machine().user_access(address, UserAccess::Read));
    assert!(used.is_err(), "CPU 1 used what it had cached before");
    end(&kernel, &[&mm]);
}

#[test]
fn a_discard_keeps_guards_and_the_lines_they_are_in() {
    let (kernel, mm) = process(3);
    kernel.guard_install(&mm, range(11, 12)).expect("private");
    kernel.madvise_dontneed(&mm, range(0, PAGES)).expect("no large page");
    assert_eq!(guards(&kernel, &mm, PAGES), [11]);
    assert!(used_lines(&kernel, &mm).contains(&8), "{:?}", used_lines(&kernel, &mm));
    assert_eq!(kernel.counters().snapshot().guards_kept, 1);
    // With pages beside it in its line, the same.
    assert_eq!(write(&kernel, &mm, 10), Touched::Reached);
    kernel.madvise_dontneed(&mm, range(8, 16)).expect("no large page");
    assert_eq!(guards(&kernel, &mm, PAGES), [11]);
    assert!(used_lines(&kernel, &mm).contains(&8), "{:?}", used_lines(&kernel, &mm));
    assert_eq!(write(&kernel, &mm, 11), REFUSED);
    // Without the guard nothing keeps the line.
    kernel.guard_remove(&mm, range(0, PAGES)).expect("private");
    assert!(!used_lines(&kernel, &mm).contains(&8), "{:?}", used_lines(&kernel, &mm));
    end(&kernel, &[&mm]);
}

#[test]
fn guards_go_with_their_area_are_moved_with_it_and_copied() {
    let (kernel, mm) = process(4);
    kernel.guard_install(&mm, range(2, 6)).expect("private");
    kernel.munmap(&mm, range(2, 3)).expect("no large page");
    assert_eq!(kernel.guards(), 3);
    let child = kernel.fork(&mm, []).expect("it has frames");
    assert_eq!((guards(&kernel, &child, PAGES), kernel.guards()), (vec![3, 4, 5], 6));
    // Into the next table, over a guard of another area that goes.
    let target = range(600, 604);
    kernel.mmap(&mm, Vma { range: target, area: Area::anon() }).expect("nothing is there");
    kernel.guard_install(&mm, range(603, 604)).expect("private");
    kernel.mremap(&mm, range(4, 8), target).expect("it has frames");
    assert_eq!((guards(&kernel, &mm, 604), kernel.guards()), (vec![3, 600, 601], 6));
    assert_eq!(write(&kernel, &mm, 602), Touched::Reached);
    // A shorter place: what lies beyond it is dropped.
    kernel.guard_install(&mm, range(602, 604)).expect("private");
    kernel.mremap(&mm, target, range(700, 702)).expect("it has frames");
    assert_eq!((guards(&kernel, &mm, 704), kernel.guards()), (vec![3, 700, 701], 6));
    end(&kernel, &[&child, &mm]);
}

#[test]
fn a_large_page_is_split_where_the_range_cuts_it_and_dropped_where_it_does_not() {
    let (kernel, mm) = process(5);
    let large = range(512, 4 * 512);
    kernel.mmap(&mm, Vma { range: large, area: Area::anon() }).expect("nothing is there");
    kernel.populate(&mm, large, PageContent::AnonBlock).expect("it has frames");
    let before = kernel.counters().snapshot();
    kernel.guard_install(&mm, range(512 + 510, 3 * 512 + 2)).expect("it has frames");
    let since = kernel.counters().snapshot().since(&before);
    assert_eq!((since.splits, kernel.guards()), (2, 2 + 512 + 2));
    assert_eq!(write(&kernel, &mm, 2 * 512), REFUSED);
    assert_eq!(write(&kernel, &mm, 3 * 512 + 2), Touched::Reached);
    assert_eq!(kernel.counters().snapshot().since(&before).faults, 0, "the rest of the page went with it");
    end(&kernel, &[&mm]);
}

#[test]
fn guards_are_refused_in_shared_areas_and_for_want_of_tables() {
    let (kernel, mm) = process(6);
    for (first, kind) in [(32, AreaKind::FileShared(1)), (48, AreaKind::Pfn)] {
        let area = Area { kind, ..Area::anon() };
        kernel.mmap(&mm, Vma { range: range(first, first + 8), area }).expect("nothing is there");
        let refused = Err(Error::NotPrivate(START + first * 4096));
        assert_eq!(kernel.guard_install(&mm, range(first - 1, first + 1)), refused);
        assert_eq!(kernel.guard_remove(&mm, range(first - 1, first + 1)), refused);
    }
    assert_eq!(kernel.guards(), 0);
    // Where no area is, nothing happens.
    kernel.guard_install(&mm, range(200, 300)).expect("nothing to refuse");
    assert_eq!(kernel.guards(), 0);
    kernel.mmap(&mm, Vma { range: range(510, 514), area: Area::anon() }).expect("nothing is there");
    kernel.set_table_supply(Supply::Never);
    assert_eq!(kernel.guard_install(&mm, range(510, 514)), Err(Error::NoMemory));
    kernel.set_table_supply(Supply::Always);
    assert_eq!((guards(&kernel, &mm, 514), kernel.guards()), (vec![510, 511], 2));
    end(&kernel, &[&mm]);
}

/// Between the zap and the guards a fault may put a page in again, and another call may clear that
/// page without having flushed: then an entry that is none is found, and a CPU can still use what
/// it was.
#[test]
fn guards_are_in_place_and_their_pages_gone_whatever_runs_beside() {
    for seed in 0..200 {
        let (kernel, mm) = process(seed);
        let mut schedule = Schedule::new();
        let mut add = |cpu, work: fn(&HostedKernel, &HostedMm)| {
            let (kernel, mm) = (Arc::clone(&kernel), Arc::clone(&mm));
            schedule.spawn(CpuId::new(cpu), move || work(&kernel, &mm));
        };
        add(0, |kernel, mm| {
            for _ in 0..4 {
                kernel.guard_install(mm, range(8, 10)).expect("private");
                assert_eq!(guards(kernel, mm, PAGES), [8, 9]);
                kernel.guard_remove(mm, range(8, 10)).expect("private");
                give_way();
            }
            kernel.guard_install(mm, range(8, 10)).expect("private");
        });
        add(1, |kernel, mm| {
            for _ in 0..40 {
                write(kernel, mm, 8);
                write(kernel, mm, 9);
                // A program that only computes.
                kernel.machine().enter_user_mode();
                give_way();
                kernel.machine().leave_user_mode();
            }
        });
        add(2, |kernel, mm| {
            for _ in 0..20 {
                kernel.madvise_dontneed(mm, range(8, 16)).expect("no large page");
                give_way();
            }
        });
        kernel.machine().run(schedule);
        assert_eq!(guards(&kernel, &mm, PAGES), [8, 9], "seed {seed}");
        end(&kernel, &[&mm]);
    }
}

/// A fault at the end of a long range nearly always comes before the guard: after a few tries
/// faults are kept out.
#[test]
fn guards_get_in_however_fast_faults_are() {
    let last = PAGES + 8 * 512 - 1;
    let mut most_outrun = 0;
    for seed in 0..50 {
        let (kernel, mm) = process(seed);
        kernel
            .mmap(&mm, Vma { range: range(PAGES, last + 1), area: Area::anon() })
            .expect("nothing is there");
        let done = Rc::new(Cell::new(false));
        let mut schedule = Schedule::new();
        for cpu in 1..CPUS {
            let (kernel, mm, done) = (Arc::clone(&kernel), Arc::clone(&mm), Rc::clone(&done));
            schedule.spawn(CpuId::new(cpu), move || {
                // Upwards, as the guards come: each time a page that is none yet, and that no CPU
                // has cached until the flush.
                for page in (last - 500..=last).cycle().take_while(|_| !done.get()) {
                    write(&kernel, &mm, page);
                    give_way();
                }
            });
        }
        {
            let (kernel, mm) = (Arc::clone(&kernel), Arc::clone(&mm));
            schedule.spawn(CpuId::new(0), move || {
                kernel.guard_install(&mm, range(PAGES, last + 1)).expect("private");
                done.set(true);
            });
        }
        kernel.machine().run(schedule);
        assert_eq!(kernel.guards(), i64::try_from(last + 1 - PAGES).expect("few"), "seed {seed}");
        assert_eq!(write(&kernel, &mm, last), REFUSED, "seed {seed}");
        let outrun = kernel.counters().snapshot().guards_outrun;
        assert!(outrun <= 3, "seed {seed}: tried {outrun} times in vain");
        most_outrun = most_outrun.max(outrun);
        end(&kernel, &[&mm]);
    }
    assert_eq!(most_outrun, 3, "faults were never kept out");
}
