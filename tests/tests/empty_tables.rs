//! Tables that go because they are empty, for kernels that know no neighbours where they unmap.

use std::collections::BTreeSet;

use mmu_gather::pagetable::{Bounds, Level, Marker, NonPresent, PagingMode, VirtRange};
use mmu_gather::tlb::UnmapBatch;
use mmu_gather::{Limits, unmap_range};
use mmu_tests::{
    Access, Backing, CPU, Event, Fault, GIB, GatherOnPaper, LineNotes, Locks, MIB, Options, PaperKernel,
    Supply, TIB, area, range,
};
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest};
use proptest::{collection, sample};

const PAGE: u64 = 4096;

fn unmap(kernel: &PaperKernel, part: VirtRange) {
    let vma = area(part.start(), part.end(), Backing::Anonymous);
    kernel.unmap_alone(kernel.mm(0), &Limits::DEFAULT, &vma, part);
}

fn page(address: u64) -> VirtRange {
    range(address, address + PAGE)
}

#[test]
fn a_lone_page_gives_back_its_frame_and_those_of_all_tables_above_it() {
    for (mode, tables) in [(PagingMode::FourLevel, 3), (PagingMode::FiveLevel, 4)] {
        let kernel = PaperKernel::new(Options { mode, ..Options::default() });
        let mm = kernel.new_mm();
        kernel.map(mm, TIB, Level::Pte);
        kernel.run(CPU[1], mm);
        kernel.touch(CPU[1], TIB, Access::Write).expect("mapped");
        unmap(&kernel, page(TIB));
        assert_eq!(kernel.count(|event| matches!(event, Event::PageFreed(_))), 1);
        assert_eq!(kernel.count(|event| matches!(event, Event::TableFreed(_))), tables);
        assert_eq!((kernel.nr_tables(mm), kernel.tables(mm)), ([0; 4], Vec::new()));
        assert_eq!(kernel.touch(CPU[1], TIB, Access::Read), Err(Fault::NotPresent));
    }
}

#[test]
fn an_entry_of_a_neighbour_keeps_the_tables_that_it_needs() {
    for (neighbour, tables) in [
        (TIB + PAGE, [1, 1, 1, 0]),
        (TIB + 2 * MIB, [1, 1, 1, 0]),
        (TIB + GIB, [1, 1, 1, 0]),
        (0, [1, 1, 1, 0]),
    ] {
        let kernel = PaperKernel::new(Options::default());
        let mm = kernel.new_mm();
        kernel.map(mm, TIB, Level::Pte);
        kernel.map(mm, neighbour, Level::Pte);
        unmap(&kernel, page(TIB));
        assert_eq!(kernel.nr_tables(mm), tables, "with a page at {neighbour:#x}");
        assert!(kernel.lookup(mm, neighbour).value.is_present());
        unmap(&kernel, page(neighbour));
        assert_eq!(kernel.nr_tables(mm), [0; 4]);
    }
}

#[test]
fn an_entry_that_is_kept_or_a_large_leaf_keeps_its_table() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map(mm, GIB, Level::Pte);
    kernel.put_non_present(mm, GIB + PAGE, Level::Pte, NonPresent::Marker(Marker::Guard));
    unmap(&kernel, range(GIB, GIB + 2 * MIB));
    assert_eq!(kernel.nr_tables(mm), [1, 1, 1, 0]);
    kernel.map(mm, TIB, Level::Pte);
    kernel.map(mm, TIB + 2 * MIB, Level::Pmd);
    unmap(&kernel, page(TIB));
    assert_eq!(kernel.nr_tables(mm), [1, 2, 2, 0]);
    assert!(kernel.lookup(mm, TIB + 2 * MIB).value.is_present());
}

/// Tables of an area that stays may go, too: its next fault links new ones.
#[test]
fn an_empty_table_of_the_range_goes_wherever_its_areas_end() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let vma = area(GIB, GIB + 8 * MIB, Backing::Anonymous);
    for address in [GIB, GIB + 2 * MIB, GIB + 4 * MIB] {
        kernel.map(mm, address, Level::Pte);
    }
    kernel.zap(mm, &vma, range(GIB, GIB + 4 * MIB)).free();
    assert_eq!(kernel.nr_tables(mm), [3, 1, 1, 0]);
    let mut gather = kernel.gather(mm);
    gather.unhook_empty_tables(range(GIB + MIB, GIB + 3 * MIB));
    gather.flush().free();
    assert_eq!(kernel.nr_tables(mm), [1, 1, 1, 0]);
    kernel.map(mm, GIB, Level::Pte);
    kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
    assert_eq!(kernel.nr_tables(mm), [0; 4]);
}

#[test]
fn entries_that_reclaim_has_cleared_and_not_flushed_are_flushed_for_with_their_table() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map(mm, GIB + 5 * PAGE, Level::Pte);
    kernel.run(CPU[1], mm);
    kernel.touch(CPU[1], GIB + 5 * PAGE, Access::Write).expect("mapped");
    let mut batch = UnmapBatch::new();
    let frame = kernel.reclaim(&mut batch, mm, GIB + 5 * PAGE);
    let mut gather = kernel.gather(mm);
    gather.unhook_empty_tables(page(GIB));
    gather.flush().free();
    assert_eq!(kernel.nr_tables(mm), [0; 4]);
    assert_eq!(kernel.touch(CPU[1], GIB + 5 * PAGE, Access::Read), Err(Fault::NotPresent));
    batch.flush(&kernel);
    kernel.release(frame, 1);
}

#[test]
fn another_gather_that_is_open_makes_it_flush_everything() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map_range(mm, range(GIB, GIB + 2 * PAGE));
    kernel.run(CPU[1], mm);
    kernel.touch(CPU[1], GIB + PAGE, Access::Write).expect("mapped");
    // It has cleared the entries, and not flushed; its table is empty.
    let mut other = kernel.gather(mm);
    let vma = area(GIB, GIB + 2 * PAGE, Backing::Anonymous);
    other.zap_vma_range(&vma, vma.range).expect("no large leaf");
    unmap(&kernel, page(GIB + 9 * PAGE));
    assert_eq!(kernel.nr_tables(mm), [0; 4]);
    assert_eq!(kernel.touch(CPU[1], GIB + PAGE, Access::Read), Err(Fault::NotPresent));
    other.flush().free();
}

#[test]
fn there_is_a_preemption_point_after_each_table_also_after_those_that_stay() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    for table in 0..600 {
        kernel.map(mm, GIB + table * 2 * MIB, Level::Pte);
    }
    let mut gather = kernel.gather(mm);
    let before = kernel.count(|event| *event == Event::Resched);
    gather.unhook_empty_tables(range(0, 2 * TIB));
    let points = kernel.count(|event| *event == Event::Resched) - before;
    gather.flush().free();
    assert_eq!((kernel.nr_tables(mm), points), ([600, 2, 1, 0], 603));
}

#[test]
#[expect(unsafe_code, reason = "one thread stands in for the map lock")]
fn a_large_leaf_that_the_range_cuts_is_reported_and_its_table_stays() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map(mm, GIB, Level::Pmd);
    let vma = area(GIB, GIB + 2 * MIB, Backing::Anonymous);
    // SAFETY: one thread.
    let cut = unsafe { unmap_range(&kernel, mm, &Limits::DEFAULT, &vma, range(GIB, GIB + MIB)) };
    assert_eq!(cut.err().map(|cut| cut.range()), Some(vma.range));
    assert_eq!(kernel.nr_tables(mm), [0, 1, 1, 0]);
    unmap(&kernel, vma.range);
    assert_eq!(kernel.nr_tables(mm), [0; 4]);
}

/// Pages around the ends of what a table of each level covers.
const BORDERS: [u64; 4] = [2 * MIB, GIB, 512 * GIB, 64 * TIB];
const AT_A_BORDER: u64 = 6;
const PLACES: u64 = 4 * AT_A_BORDER;

const fn address(place: u64) -> u64 {
    BORDERS[(place / AT_A_BORDER) as usize] - AT_A_BORDER / 2 * PAGE + place % AT_A_BORDER * PAGE
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Map(u64),
    Guard(u64),
    Unmap(u64, u64),
    Zap(u64, u64),
    Touch(usize, u64),
    Batches(Supply),
}

fn op() -> impl Strategy<Value = Op> {
    let place = || 0..PLACES;
    let part = || (place(), place()).prop_map(|(one, other)| (one.min(other), one.max(other)));
    let supply = prop_oneof![Just(Supply::Unlimited), any::<u64>().prop_map(Supply::Pattern)];
    prop_oneof![
        8 => place().prop_map(Op::Map),
        1 => place().prop_map(Op::Guard),
        3 => part().prop_map(|(from, to)| Op::Unmap(from, to)),
        2 => place().prop_map(|place| Op::Unmap(place, place)),
        1 => part().prop_map(|(from, to)| Op::Zap(from, to)),
        6 => (1..3usize, place()).prop_map(|(cpu, place)| Op::Touch(cpu, place)),
        1 => supply.prop_map(Op::Batches),
    ]
}

/// What is mapped, and what is linked: no more than that.
#[derive(Default)]
struct Model {
    pages: BTreeSet<u64>,
    guards: BTreeSet<u64>,
    tables: BTreeSet<(Level, u64)>,
}

impl Model {
    const LEVELS: [Level; 3] = [Level::Pte, Level::Pmd, Level::Pud];

    fn start(level: Level, address: u64) -> u64 {
        address & !(level.table_span() - 1)
    }

    fn link(&mut self, address: u64) {
        self.tables.extend(Self::LEVELS.map(|level| (level, Self::start(level, address))));
    }

    /// Lowest level first, every table on the way that has nothing in it goes.
    fn unmap(&mut self, part: VirtRange) {
        self.pages.retain(|page| !part.contains(*page));
        for level in Self::LEVELS {
            let lower = self.tables.clone();
            let is_inside = |start: u64, address: u64| Self::start(level, address) == start;
            self.tables.retain(|(of, start)| {
                let is_met = *start < part.end() && part.start() < start + of.table_span();
                let is_used = self.pages.union(&self.guards).any(|page| is_inside(*start, *page))
                    || lower.iter().any(|(below, at)| *below < level && is_inside(*start, *at));
                *of != level || !is_met || is_used
            });
        }
    }

    fn count(&self) -> [u64; 3] {
        Self::LEVELS.map(|level| self.tables.iter().filter(|(of, _)| *of == level).count() as u64)
    }
}

fn take(kernel: &PaperKernel, model: &mut Model, limits: &Limits, op: Op) {
    let mm = kernel.mm(0);
    let part = |from: u64, to: u64| range(address(from), address(to) + PAGE);
    match op {
        Op::Map(place) | Op::Guard(place)
            if model.pages.contains(&address(place)) || model.guards.contains(&address(place)) => {}
        Op::Map(place) => {
            kernel.map(mm, address(place), Level::Pte);
            model.pages.insert(address(place));
            model.link(address(place));
        }
        Op::Guard(place) => {
            let guard = NonPresent::Marker(Marker::Guard);
            kernel.put_non_present(mm, address(place), Level::Pte, guard);
            model.guards.insert(address(place));
            model.link(address(place));
        }
        Op::Unmap(from, to) => {
            let part = part(from, to);
            let vma = area(part.start(), part.end(), Backing::Anonymous);
            kernel.unmap_alone(mm, limits, &vma, part);
            model.unmap(part);
        }
        Op::Zap(from, to) => {
            let part = part(from, to);
            kernel.zap(mm, &area(part.start(), part.end(), Backing::Anonymous), part).free();
            model.pages.retain(|page| !part.contains(*page));
        }
        Op::Touch(cpu, place) => {
            let is_mapped = model.pages.contains(&address(place));
            let touched = kernel.touch(CPU[cpu], address(place), Access::Write);
            assert_eq!(touched.is_ok(), is_mapped, "{op:?}");
        }
        Op::Batches(supply) => kernel.supply_batches(supply),
    }
    let [pte, pmd, pud, _] = kernel.nr_tables(mm);
    assert_eq!([pte, pmd, pud], model.count(), "after {op:?}");
}

fn machines() -> impl Strategy<Value = Options> {
    let line_notes = sample::select(vec![LineNotes::Kept, LineNotes::NotKept]);
    let locks = sample::select(vec![Locks::PerTable, Locks::Two, Locks::One]);
    let mode = sample::select(vec![PagingMode::FourLevel, PagingMode::FiveLevel]);
    (line_notes, locks, mode).prop_map(|(line_notes, locks, mode)| Options {
        line_notes,
        locks,
        mode,
        ..Options::default()
    })
}

fn config() -> ProptestConfig {
    let asked = ProptestConfig::default();
    ProptestConfig { failure_persistence: None, cases: asked.cases.max(400), ..asked }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn exactly_the_tables_with_nothing_in_them_go(
        options in machines(),
        table_slots in 1..4u16,
        ops in collection::vec(op(), 1..80),
    ) {
        let kernel = PaperKernel::new(options);
        let mm = kernel.new_mm();
        kernel.run(CPU[1], mm);
        kernel.run(CPU[2], mm);
        let limits = Limits::DEFAULT.with_table_slots(table_slots);
        let mut model = Model::default();
        for op in ops {
            take(&kernel, &mut model, &limits, op);
        }
        assert_eq!(kernel.ledger().nr_held(), model.pages.len());
        assert_eq!(kernel.tables_with_unnoted_entries(mm), []);
        assert_eq!(kernel.take_violations(), []);
    }
}

#[test]
fn the_tables_in_the_gaps_between_areas_go_and_those_that_an_area_needs_stay() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let areas = [range(GIB, GIB + PAGE), range(GIB + 6 * MIB, GIB + 7 * MIB), range(TIB, TIB + PAGE)];
    for address in [GIB, GIB + 2 * MIB, GIB + 4 * MIB, GIB + 6 * MIB, 3 * GIB, 600 * GIB, TIB, 2 * TIB] {
        kernel.map(mm, address, Level::Pte);
    }
    let vmas = areas.map(|area| area.start());
    for address in [GIB + 2 * MIB, GIB + 4 * MIB, 3 * GIB, 600 * GIB, 2 * TIB] {
        kernel.zap(mm, &area(address, address + PAGE, Backing::Anonymous), page(address)).free();
    }
    // The range ends in the middle of a gap: what lies beyond stays.
    let mut gather = kernel.gather(mm);
    gather.unhook_tables_in_gaps(areas, range(GIB + MIB, TIB + 2 * PAGE));
    gather.flush().free();
    assert_eq!(kernel.nr_tables(mm), [4, 3, 3, 0]);
    let mut gather = kernel.gather(mm);
    gather.unhook_tables_in_gaps(areas, mm.space().user_range());
    gather.flush().free();
    assert_eq!(kernel.nr_tables(mm), [3, 2, 2, 0]);
    assert!(vmas.iter().all(|address| kernel.lookup(mm, *address).value.is_present()));
}

/// A release build would free the tables of the second area, together with its pages.
#[cfg(debug_assertions)]
#[test]
#[should_panic(expected = "the areas that stay do not ascend")]
fn areas_that_do_not_ascend_are_named_by_a_debug_build() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let mut gather = kernel.gather(mm);
    gather.unhook_tables_in_gaps([page(TIB), page(GIB)], range(2 * TIB, 3 * TIB));
}
