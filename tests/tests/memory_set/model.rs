//! Random calls against a model that knows pages and nothing else. The kit looks whether programs
//! reach what they must not; this looks whether they reach what they should, and that no table is
//! kept that nothing needs.

use std::collections::BTreeMap;
use std::sync::Arc;

use memory_set::{MappingError, MemoryArea};
use mmu_gather::pagetable::{Level, VirtRange};
use mmu_hosted::{Rights, Supply, UnderMapLock, boot};
use mmu_tests::{GIB, HostedPlatform, MIB, range};
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest};
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use proptest::{collection, sample};
use x86_64::PhysAddr;
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

use crate::glue::{AddressSpace, Backed, Populate};
use crate::kit::{Layer, flags};
use crate::runs::quiet_machine;

const PAGE: u64 = 4096;
/// Pages around the border of two top-level entries, and pages around the next border of 2 MiB.
const PLACES: u64 = 64 + 32;
const BORDER: u64 = 512 * GIB;

/// The address of a place. Places ascend, with one gap between 63 and 64.
const fn address(place: u64) -> u64 {
    if place < 64 {
        BORDER - 32 * PAGE + place * PAGE
    } else {
        BORDER + 2 * MIB - 16 * PAGE + (place - 64) * PAGE
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Replace { from: u64, len: u64, rights: Rights, populate: Populate, tables: Supply },
    Unmap { from: u64, len: u64 },
    Protect { from: u64, len: u64, rights: Rights },
    Clear,
    Fault { place: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    // Most of it happens around the border.
    let place = || prop_oneof![1 => 0..PLACES, 3 => 26..38u64];
    let part = || (place(), 1..24u64);
    let rights = || sample::select(vec![Rights::Read, Rights::Write]);
    let populate = sample::select(vec![Populate::AtOnce, Populate::WhenUsed]);
    let tables = prop_oneof![6 => Just(Supply::Always), 1 => (1..6u32).prop_map(Supply::ExceptEvery)];
    prop_oneof![
        4 => (part(), rights(), populate, tables).prop_map(|((from, len), rights, populate, tables)| {
            Op::Replace { from, len, rights, populate, tables }
        }),
        // Also across the gap.
        3 => (0..PLACES, 1..PLACES).prop_map(|(from, len)| Op::Unmap { from, len }),
        3 => part().prop_map(|(from, len)| Op::Unmap { from, len }),
        3 => (part(), rights()).prop_map(|((from, len), rights)| Op::Protect { from, len, rights }),
        1 => Just(Op::Clear),
        8 => place().prop_map(|place| Op::Fault { place }),
    ]
}

/// How an address space ends.
#[derive(Clone, Copy, Debug)]
enum End {
    WithAreas,
    UnmappedFirst,
}

/// Each page of an area: its frame, if it has one, and its flags. That is all the model knows.
type Model = BTreeMap<u64, (Option<PhysFrame>, PageTableFlags)>;

struct World {
    layer: Arc<Layer<Backed>>,
    space: AddressSpace<Backed>,
    model: Model,
    /// How often there was no memory for an area.
    nr_refused: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        let machine = quiet_machine(seed);
        let layer = boot(&machine, Layer::boot).expect("memory");
        let space = AddressSpace::new(&layer.platform).expect("memory");
        Self { layer, space, model: Model::new(), nr_refused: 0 }
    }

    fn kernel(&self) -> &HostedPlatform {
        &self.layer.platform
    }

    /// Places `from..from + len`, as far as there are any; a mapping ends at the gap.
    fn part(from: u64, len: u64, end: u64) -> VirtRange {
        range(address(from), address((from + len).min(end) - 1) + PAGE)
    }

    fn take(&mut self, op: Op) {
        match op {
            Op::Replace { from, len, rights, populate, tables } => {
                let part = Self::part(from, len, if from < 64 { 64 } else { PLACES });
                self.kernel().supply_tables(tables);
                let mapped = self.space.replace(part, flags(rights), populate);
                self.kernel().supply_tables(Supply::Always);
                self.model.retain(|page, _| !part.contains(*page));
                match mapped {
                    Ok(()) => {
                        for page in (part.start()..part.end()).step_by(4096) {
                            let frame = self.entry(page).map(|(frame, _)| frame);
                            assert_eq!(frame.is_some(), populate == Populate::AtOnce);
                            self.model.insert(page, (frame, flags(rights)));
                        }
                    }
                    Err(error) => {
                        self.nr_refused += 1;
                        assert_eq!(error, MappingError::BadState);
                        assert_ne!((populate, tables), (Populate::AtOnce, Supply::Always));
                    }
                }
            }
            Op::Unmap { from, len } => {
                let part = Self::part(from, len, PLACES);
                self.space.unmap(part).expect("munmap has no error");
                self.model.retain(|page, _| !part.contains(*page));
            }
            Op::Protect { from, len, rights } => {
                let part = Self::part(from, len, PLACES);
                self.space.protect(part, flags(rights)).expect("mprotect has no error");
                let pages = self.model.range_mut(part.start()..part.end());
                pages.for_each(|(_, page)| page.1 = flags(rights));
            }
            Op::Clear => {
                self.space.clear().expect("nothing is in the way");
                self.model.clear();
            }
            Op::Fault { place } => {
                let answered = self.space.fault(address(place), flags(Rights::Read));
                let frame = self.entry(address(place)).map(|(frame, _)| frame);
                let page = self.model.get_mut(&address(place));
                assert_eq!(answered.is_ok(), page.is_some());
                if let Some((known, _)) = page {
                    assert!(known.is_none() || *known == frame, "a page came in the place of another");
                    *known = Some(frame.expect("it was answered"));
                }
            }
        }
    }

    fn nr_areas(&self) -> usize {
        self.space.areas.lock(UnderMapLock::WaitsForNobody).len()
    }

    /// What the tables have for `page`.
    fn entry(&self, page: u64) -> Option<(PhysFrame, PageTableFlags)> {
        let found = self.kernel().lookup(&self.space.mm, page);
        let frame = PhysFrame::containing_address(found.translate(page)?);
        Some((frame, found.value.flags() & flags(Rights::Write)))
    }

    /// The tables below `table`, which is of `level` and begins at `start`. One that is empty is
    /// there for an area.
    fn nr_tables_below(&self, table: PhysFrame, level: Level, start: u64) -> u64 {
        let Some(below) = level.below() else { return 0 };
        let entries = self.kernel().machine().entries_of(table).zip(0..512u64);
        let counted = entries.filter(|(entry, _)| *entry != 0).map(|(entry, index)| {
            let table = PhysFrame::containing_address(PhysAddr::new(entry & 0xf_ffff_ffff_f000));
            let span = VirtRange::of_entry(level, start + index * level.entry_span());
            let is_empty = self.kernel().machine().entries_of(table).all(|entry| entry == 0);
            let is_needed = self.model.range(span.start()..span.end()).next().is_some();
            assert!(is_needed || !is_empty, "an empty table was kept for {span}");
            1 + self.nr_tables_below(table, below, span.start())
        });
        counted.sum()
    }

    /// Areas, tables and counts are as the model says.
    fn compare(&self) {
        let areas = self.space.areas.lock(UnderMapLock::WaitsForNobody);
        for page in (0..PLACES).map(address) {
            let flags = areas.find(usize::try_from(page).expect("64 bits")).map(MemoryArea::flags);
            let expected = self.model.get(&page).copied();
            let entry = expected.and_then(|(frame, flags)| Some((frame?, flags)));
            assert_eq!(self.entry(page), entry, "the entry of {page:#x}");
            assert_eq!(flags, expected.map(|(_, flags)| flags), "the area of {page:#x}");
        }
        let nr_pages = self.model.values().filter(|(frame, _)| frame.is_some()).count();
        assert_eq!(self.kernel().nr_pages(), nr_pages, "every other page is free");
        let space = self.space.mm.space();
        let counted = [Level::Pte, Level::Pmd, Level::Pud].map(|level| space.nr_tables(level));
        assert_eq!(
            counted.iter().sum::<u64>(),
            self.nr_tables_below(space.root(), Level::P4d, 0),
            "also those that the mapper linked"
        );
        assert_eq!(self.kernel().machine().violations().count, 0);
    }

    fn end(mut self, end: End) {
        if let End::UnmappedFirst = end {
            self.take(Op::Unmap { from: 0, len: PLACES });
            self.compare();
            assert_eq!(self.nr_tables_below(self.space.mm.space().root(), Level::P4d, 0), 0);
        }
        self.space.exit();
        let machine = self.kernel().machine();
        assert_eq!(machine.not_freed(), []);
        assert_eq!((machine.violations().count, machine.double_frees()), (0, 0));
    }
}

fn config() -> ProptestConfig {
    let asked = ProptestConfig::default();
    ProptestConfig { failure_persistence: None, cases: asked.cases.max(200), ..asked }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn areas_of_memory_set_agree_with_a_model_and_no_table_is_kept_for_nothing(
        ops in collection::vec(op(), 1..80),
        seed in any::<u64>(),
        end in sample::select(vec![End::WithAreas, End::UnmappedFirst]),
    ) {
        let mut world = World::new(seed);
        for op in ops {
            world.take(op);
            world.compare();
        }
        world.end(end);
    }
}

/// Sequences that reach nothing prove nothing.
#[test]
fn the_sequences_come_to_something() {
    let mut runner = TestRunner::deterministic();
    let sequences = collection::vec(op(), 80);
    let (mut areas_cut, mut refused, mut pages) = (0, 0, 0);
    for seed in 0..60 {
        let mut world = World::new(seed);
        for op in sequences.new_tree(&mut runner).expect("a sequence").current() {
            let areas = world.nr_areas();
            world.take(op);
            areas_cut += usize::from(matches!(op, Op::Unmap { .. }) && world.nr_areas() > areas);
            pages += world.kernel().nr_pages();
        }
        refused += world.nr_refused;
        world.end(End::WithAreas);
    }
    let counts = [("areas cut in two", areas_cut), ("mmap refused", refused), ("pages mapped", pages)];
    assert!(counts.iter().all(|(_, count)| *count >= 20), "{counts:?}");
}
