//! Which tables go with a range: the boundaries, with four levels and with five.

use mmu_gather::pagetable::{Bounds, Level, PagingMode};
use mmu_gather::{Limits, Vma};
use mmu_tests::{Backing, GIB, KIB, MIB, Options, PaperKernel, area, range};

/// Top of user space in the cases below, whatever the mode.
const TOP: u64 = u64::MAX;
const PAGE: u64 = 4 * KIB;
const G: u64 = GIB;
const M: u64 = MIB;

struct Case {
    name: &'static str,
    start: u64,
    end: u64,
    floor: Option<u64>,
    ceiling: Option<u64>,
    /// PTE, PMD and PUD tables that go.
    tables: [u64; 3],
    /// P4D tables that go, with five levels.
    p4d: u64,
}

const fn case(
    name: &'static str,
    (start, end): (u64, u64),
    (floor, ceiling): (Option<u64>, Option<u64>),
    tables: [u64; 3],
    p4d: u64,
) -> Case {
    Case { name, start, end, floor, ceiling, tables, p4d }
}

const CASES: [Case; 17] = [
    case("alone in mm", (G, G + PAGE), (None, None), [1, 1, 1], 1),
    case("next area in the same 2 MiB", (G, G + PAGE), (None, Some(G + 2 * PAGE)), [0, 0, 0], 0),
    case("next area at the next 2 MiB", (G, G + PAGE), (None, Some(G + 2 * M)), [1, 0, 0], 0),
    case("next area at 2 GiB exactly", (G, G + PAGE), (None, Some(2 * G)), [1, 1, 0], 0),
    case("next area at 512 GiB exactly", (G, G + PAGE), (None, Some(512 * G)), [1, 1, 1], 0),
    case("area below ends in the same 2 MiB", (G + M, G + M + PAGE), (Some(G + PAGE), None), [0, 0, 0], 0),
    case(
        "area below ends exactly at the 2 MiB start",
        (G + 2 * M, G + 2 * M + PAGE),
        (Some(G + 2 * M), None),
        [1, 0, 0],
        0,
    ),
    case(
        "area below in the same 1 GiB, other 2 MiB",
        (G + 4 * M, G + 4 * M + PAGE),
        (Some(G + PAGE), None),
        [1, 0, 0],
        0,
    ),
    case(
        "straddles a 2 MiB edge, both sides shared",
        (G + 2 * M - PAGE, G + 2 * M + PAGE),
        (Some(G + PAGE), Some(G + 2 * M + 2 * PAGE)),
        [0, 0, 0],
        0,
    ),
    case(
        "three tables touched, next area in the last",
        (G + M, G + 5 * M),
        (Some(G), Some(G + 5 * M)),
        [2, 0, 0],
        0,
    ),
    case("exactly 1 GiB, no neighbours", (G, 2 * G), (None, None), [512, 1, 1], 1),
    case("exactly 1 GiB, touching neighbours", (G, 2 * G), (Some(G), Some(2 * G)), [512, 1, 0], 0),
    case("ceiling inside the first 2 MiB", (PAGE, 2 * PAGE), (None, Some(4 * PAGE)), [0, 0, 0], 0),
    case("last user page but one", (TOP - 2 * PAGE, TOP - PAGE), (None, None), [1, 1, 1], 1),
    case("last user page", (TOP - PAGE, TOP), (None, None), [1, 1, 1], 1),
    case("straddles 512 GiB", (512 * G - PAGE, 512 * G + PAGE), (None, None), [2, 2, 2], 1),
    case(
        "straddles 512 GiB, area below ends at 1 GiB",
        (512 * G - PAGE, 512 * G + PAGE),
        (Some(G), None),
        [2, 2, 1],
        0,
    ),
];

/// `TOP - n` counts from the end of user space.
const fn place(address: u64, mode: PagingMode) -> u64 {
    if address > mode.user_end() { mode.user_end() - (TOP - address) } else { address }
}

/// A kernel in which tables for the whole range are linked, and each neighbour has a page at the
/// end next to the range.
fn kernel_for(case: &Case, mode: PagingMode) -> (PaperKernel, Vma<Backing>) {
    let kernel = PaperKernel::new(Options { mode, ..Options::default() });
    let mm = kernel.new_mm();
    let vma = area(place(case.start, mode), place(case.end, mode), Backing::Anonymous);
    for address in (vma.range.start()..vma.range.end()).step_by(2 << 20) {
        kernel.map(mm, address, Level::Pte);
    }
    let last = vma.range.end() - PAGE;
    if kernel.lookup(mm, last).value.is_empty() {
        kernel.map(mm, last, Level::Pte);
    }
    for neighbour in case.floor.map(|floor| floor - PAGE).into_iter().chain(case.ceiling) {
        kernel.map(mm, neighbour, Level::Pte);
    }
    (kernel, vma)
}

fn tables_that_go(case: &Case, mode: PagingMode) -> [u64; 4] {
    let [pte, pmd, pud] = case.tables;
    [pte, pmd, pud, if mode == PagingMode::FiveLevel { case.p4d } else { 0 }]
}

fn check_unmapping(mode: PagingMode) {
    for case in &CASES {
        let (kernel, vma) = kernel_for(case, mode);
        let mm = kernel.mm(0);
        let before = kernel.nr_tables(mm);
        kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::between(case.floor, case.ceiling));
        let after = kernel.nr_tables(mm);
        let gone: [u64; 4] = core::array::from_fn(|level| before[level] - after[level]);
        assert_eq!(gone, tables_that_go(case, mode), "{} with {mode:?}", case.name);
        for neighbour in case.floor.map(|floor| floor - PAGE).into_iter().chain(case.ceiling) {
            assert!(kernel.lookup(mm, neighbour).value.is_present(), "{}: a neighbour's page", case.name);
        }
    }
}

#[test]
fn with_four_levels_exactly_the_tables_between_floor_and_ceiling_go() {
    check_unmapping(PagingMode::FourLevel);
}

#[test]
fn with_five_levels_exactly_the_tables_between_floor_and_ceiling_go() {
    check_unmapping(PagingMode::FiveLevel);
}

/// The walk alone, without a gather: it yields each table once, after the tables below it, with the
/// span it covered.
#[test]
fn tables_come_lowest_level_first_each_once() {
    for mode in [PagingMode::FourLevel, PagingMode::FiveLevel] {
        for case in &CASES {
            let (kernel, vma) = kernel_for(case, mode);
            let mm = kernel.mm(0);
            // Leaves first: the walk does not look at them.
            kernel.zap(mm, &vma, vma.range).free();
            let mut gone = Vec::new();
            let bounds = Bounds::between(case.floor, case.ceiling);
            unhook_tables(&kernel, vma, bounds, |table| gone.push(table));
            let count = |level| gone.iter().filter(|(found, _)| *found == level).count() as u64;
            let counts = [Level::Pte, Level::Pmd, Level::Pud, Level::P4d].map(count);
            assert_eq!(counts, tables_that_go(case, mode), "{} with {mode:?}", case.name);
            for (index, (level, span)) in gone.iter().enumerate() {
                let parents = &gone[..index];
                assert!(
                    !parents.iter().any(|(above, wider)| above > level && wider.covers(*span)),
                    "{}: {level:?} {span} after its parent",
                    case.name
                );
            }
        }
    }
}

#[expect(unsafe_code, reason = "one thread stands in for the map lock, and nothing is reused")]
fn unhook_tables(
    kernel: &PaperKernel,
    vma: Vma<Backing>,
    bounds: Bounds,
    mut sink: impl FnMut((Level, mmu_gather::pagetable::VirtRange)),
) {
    // SAFETY: one thread, and the arena reuses no table.
    unsafe {
        kernel
            .mm(0)
            .space()
            .unhook_tables(kernel, vma.range, bounds, |table| sink((table.level(), table.span())));
    }
}

/// The floor of every run of areas but the first is the overall floor, so the tables between the
/// runs are covered.
#[test]
fn areas_unmapped_together_leave_no_table_between_them() {
    for gap in [0, PAGE, 2 * M - PAGE, 2 * M, 2 * M + PAGE, 100 * M, 3 * G, 600 * G] {
        let kernel = PaperKernel::new(Options::default());
        let mm = kernel.new_mm();
        let (first, second) = (G + 3 * M, G + 3 * M + PAGE + gap);
        let areas =
            [area(first, first + PAGE, Backing::Anonymous), area(second, second + PAGE, Backing::Anonymous)];
        for vma in &areas {
            kernel.map_range(mm, vma.range);
        }
        kernel.unmap(mm, &Limits::DEFAULT, &areas, Bounds::whole());
        assert_eq!(kernel.nr_tables(mm), [0; 4], "gap of {gap:#x}");
        assert_eq!(kernel.ledger().nr_held(), 0);
    }
}

/// Tables of an area without a single page, which was never touched, or whose pages were dropped.
#[test]
fn an_area_without_pages_gives_up_its_empty_tables() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let vma = area(G, G + 8 * M, Backing::Anonymous);
    kernel.map_range(mm, range(G, G + PAGE));
    kernel.zap(mm, &vma, vma.range).free();
    assert_eq!(kernel.nr_tables(mm), [1, 1, 1, 0], "zap removes pages, not tables");
    kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
    assert_eq!(kernel.nr_tables(mm), [0; 4]);
}
