//! Kernels without a lock for each table: what they do is the same as with one each.

use core::ptr;
use core::time::Duration;
use std::sync::{Arc, Barrier, mpsc};
use std::thread;

use mmu_gather::pagetable::{Bounds, HashedLocks, Level};
use mmu_gather::{Limits, Vma};
use mmu_tests::{
    Access, Backing, CPU, GIB, GatherOnPaper, LineNotes, Locks, MIB, Options, PaperKernel, area,
};
use proptest::prelude::{ProptestConfig, Strategy, prop_oneof, proptest};
use proptest::{collection, sample};

const PAGE: u64 = 4096;
/// Pages around the ends of what a table of each level covers.
const BORDERS: [u64; 3] = [2 * MIB, GIB, 512 * GIB];
const AT_A_BORDER: u64 = 8;
const PLACES: u64 = 3 * AT_A_BORDER;

const fn address(place: u64) -> u64 {
    BORDERS[(place / AT_A_BORDER) as usize] - AT_A_BORDER / 2 * PAGE + place % AT_A_BORDER * PAGE
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Map(u64),
    /// The pages from one place to another, and the tables that no other place needs.
    Unmap(u64, u64),
    Zap(u64, u64),
    Move(u64, u64),
    Touch(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let place = || 0..PLACES;
    prop_oneof![
        4 => place().prop_map(Op::Map),
        2 => (place(), place()).prop_map(|(from, to)| Op::Unmap(from.min(to), from.max(to))),
        1 => (place(), place()).prop_map(|(from, to)| Op::Zap(from.min(to), from.max(to))),
        3 => (place(), place()).prop_map(|(from, to)| Op::Move(from, to)),
        3 => place().prop_map(Op::Touch),
    ]
}

fn area_of(from: u64, to: u64) -> Vma<Backing> {
    area(address(from), address(to) + PAGE, Backing::Anonymous)
}

/// Makes the change; returns whether it could be made.
fn take(kernel: &PaperKernel, op: Op) -> bool {
    let mm = kernel.mm(0);
    let is_mapped = |place: u64| kernel.lookup(mm, address(place)).value.is_present();
    match op {
        Op::Map(place) if is_mapped(place) => return false,
        Op::Map(place) => {
            kernel.map(mm, address(place), Level::Pte);
        }
        Op::Unmap(from, to) => {
            let below = (0..from).rev().find(|place| is_mapped(*place)).map(|place| address(place) + PAGE);
            let above = (to + 1..PLACES).find(|place| is_mapped(*place)).map(address);
            // All of the gap that there will be: a move leaves empty tables where no page is.
            let end = above.unwrap_or(mm.space().user_range().end());
            let gap = area(below.unwrap_or(0), end, Backing::Anonymous);
            kernel.unmap(mm, &Limits::DEFAULT, &[gap], Bounds::between(below, above));
        }
        Op::Zap(from, to) => {
            let vma = area_of(from, to);
            kernel.zap(mm, &vma, vma.range).free();
        }
        Op::Move(from, to) if from == to => return false,
        Op::Move(from, to) => {
            let mut gather = kernel.gather(mm);
            let is_moved = gather.move_pages(area_of(from, from).range, address(to)).is_ok();
            gather.flush().free();
            return is_moved;
        }
        Op::Touch(place) => return kernel.touch(CPU[1], address(place), Access::Write).is_ok(),
    }
    true
}

fn config() -> ProptestConfig {
    let asked = ProptestConfig::default();
    ProptestConfig { failure_persistence: None, cases: asked.cases.max(400), ..asked }
}

proptest! {
    #![proptest_config(config())]

    /// A lock that is taken twice is waited for in vain: the kernel on paper panics then.
    #[test]
    fn one_lock_for_all_tables_or_two_that_collide_on_every_path_change_nothing(
        ops in collection::vec(op(), 1..80),
        line_notes in sample::select(vec![LineNotes::Kept, LineNotes::NotKept]),
    ) {
        let kernels = [Locks::PerTable, Locks::Two, Locks::One]
            .map(|locks| PaperKernel::new(Options { locks, line_notes, ..Options::default() }));
        for kernel in &kernels {
            kernel.run(CPU[1], kernel.new_mm());
        }
        for op in ops {
            let [made, with_two, with_one] = kernels.each_ref().map(|kernel| take(kernel, op));
            assert!(with_two == made && with_one == made, "{op:?}");
        }
        for kernel in &kernels {
            let mm = kernel.mm(0);
            assert_eq!(kernel.nr_tables(mm), kernels[0].nr_tables(kernels[0].mm(0)));
            for place in 0..PLACES {
                let first = kernels[0].lookup(kernels[0].mm(0), address(place));
                let found = kernel.lookup(mm, address(place));
                assert_eq!(found.value.is_present(), first.value.is_present());
                assert_eq!(found.translate(address(place)), first.translate(address(place)));
            }
            assert_eq!(kernel.take_violations(), []);
        }
    }
}

/// Two tables that have different locks of two.
fn tables_with_two_locks(kernel: &PaperKernel) -> [u64; 2] {
    let mm = kernel.new_mm();
    let lock_of = |address: u64| {
        let table = kernel.find_table(mm, address, Level::Pte).expect("linked");
        ptr::from_ref(LOCKS.lock_of(table.frame()))
    };
    let places = (0..64).map(|place| place * 2 * MIB);
    let first = GIB;
    kernel.map(mm, first, Level::Pte);
    for place in places {
        let address = 2 * GIB + place;
        kernel.map(mm, address, Level::Pte);
        if lock_of(address) != lock_of(first) {
            return [first, address];
        }
    }
    panic!("64 tables have one lock");
}

static LOCKS: HashedLocks<2> = HashedLocks::new();

/// A memory whose locks are real ones, for more than one thread.
mod threads {
    #![expect(unsafe_code, reason = "a memory for two threads")]

    use mmu_gather::pagetable::{Level, TableLock, TableMemory, TableView};
    use x86_64::PhysAddr;
    use x86_64::structures::paging::mapper::PageTableFrameMapping;
    use x86_64::structures::paging::{PageTable, PhysFrame};

    use super::LOCKS;

    pub(super) struct Memory;

    // SAFETY: a frame's number is its address in this process.
    unsafe impl PageTableFrameMapping for Memory {
        fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
            core::ptr::with_exposed_provenance_mut(
                usize::try_from(frame.start_address().as_u64()).expect("64 bits"),
            )
        }
    }

    // SAFETY: nothing is allocated or freed.
    unsafe impl TableMemory for Memory {
        type Lock = TableLock<spin::Spin>;

        unsafe fn table_lock(&self, frame: PhysFrame) -> &TableLock<spin::Spin> {
            LOCKS.lock_of(frame)
        }

        fn allocate_table(&self) -> Option<PhysFrame> {
            None
        }

        unsafe fn free_tables(&self, _: &[PhysFrame]) {}
    }

    /// Takes the locks of two tables so many times.
    pub(super) fn lock_both(tables: [u64; 2], times: usize) {
        let [first, second] = tables.map(|table| {
            let frame = PhysFrame::containing_address(PhysAddr::new(table));
            // SAFETY: the test keeps its tables.
            unsafe { TableView::new(&Memory, frame, Level::Pte) }
        });
        for _ in 0..times {
            let both = first.lock_both(&Memory, second);
            assert!(first.try_lock(&Memory).is_none() && second.try_lock(&Memory).is_none());
            drop(both);
        }
    }
}

#[test]
fn two_that_take_two_locks_in_opposite_order_do_not_deadlock() {
    let kernel: &'static PaperKernel = Box::leak(Box::new(PaperKernel::new(Options::default())));
    let tables = tables_with_two_locks(kernel).map(|address| {
        let table = kernel.find_table(kernel.mm(0), address, Level::Pte).expect("linked");
        table.frame().start_address().as_u64()
    });
    let begin = Arc::new(Barrier::new(2));
    let (done, wait) = mpsc::channel();
    for tables in [tables, [tables[1], tables[0]]] {
        let (done, begin) = (done.clone(), Arc::clone(&begin));
        thread::spawn(move || {
            begin.wait();
            threads::lock_both(tables, 1_000_000);
            done.send(()).expect("somebody waits");
        });
    }
    for _ in 0..2 {
        wait.recv_timeout(Duration::from_secs(60)).expect("neither waits for the other for ever");
    }
}
