//! `memory_set`, the areas of ArceOS as published, on the engine: random calls against a model that
//! knows pages and nothing else, on four CPUs, under the checker of the paper kernel.

mod glue;
mod wrong;

use std::collections::BTreeMap;

use memory_set::{MappingError, MemoryArea, MemorySet};
use mmu_gather::pagetable::{Level, VirtRange};
use mmu_gather::tlb::{Laziness, PcidSupport, TlbEvent};
use mmu_tests::{
    Access, Backing, CPU, Event, Fault, GIB, LineNotes, MIB, Options, PaperKernel, Supply, Violation, range,
};
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest};
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use proptest::{collection, sample};
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

use glue::{AddressSpace, Backed, Pending};
use wrong::{Flush, Hasty, unmap_as_if_alone};

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
    Map { from: u64, len: u64, flags: PageTableFlags, backing: Backing, tables: Supply },
    Unmap { from: u64, len: u64 },
    Protect { from: u64, len: u64, flags: PageTableFlags },
    Clear,
    Touch { cpu: usize, place: u64, access: Access },
    Speculate { cpu: usize, place: u64 },
    Run { cpu: usize },
    GoLazy { cpu: usize },
    Stop { cpu: usize },
}

fn op() -> impl Strategy<Value = Op> {
    let cpu = || 0..4usize;
    // Most of it happens around the border.
    let place = || prop_oneof![1 => 0..PLACES, 3 => 26..38u64];
    let part = || (place(), 1..24u64);
    let flags = || sample::select(vec![PageTableFlags::empty(), PageTableFlags::WRITABLE]);
    let backing = sample::select(vec![Backing::Anonymous, Backing::File]);
    let tables = prop_oneof![6 => Just(Supply::Unlimited), 1 => (0..6u32).prop_map(Supply::Left)];
    let access = sample::select(vec![Access::Read, Access::Write]);
    prop_oneof![
        4 => (part(), flags(), backing, tables).prop_map(|((from, len), flags, backing, tables)| Op::Map {
            from,
            len,
            flags,
            backing,
            tables
        }),
        // Also across the gap.
        3 => (0..PLACES, 1..PLACES).prop_map(|(from, len)| Op::Unmap { from, len }),
        3 => part().prop_map(|(from, len)| Op::Unmap { from, len }),
        3 => (part(), flags()).prop_map(|((from, len), flags)| Op::Protect { from, len, flags }),
        1 => Just(Op::Clear),
        24 => (cpu(), place(), access).prop_map(|(cpu, place, access)| Op::Touch { cpu, place, access }),
        3 => (cpu(), place()).prop_map(|(cpu, place)| Op::Speculate { cpu, place }),
        3 => cpu().prop_map(|cpu| Op::Run { cpu }),
        1 => cpu().prop_map(|cpu| Op::GoLazy { cpu }),
        1 => cpu().prop_map(|cpu| Op::Stop { cpu }),
    ]
}

/// How an address space ends.
#[derive(Clone, Copy, Debug)]
enum End {
    WithAreas,
    UnmappedFirst,
}

/// Each mapped page: its frame, and its flags. That is all the model knows.
type Model = BTreeMap<u64, (PhysFrame, PageTableFlags)>;

struct World<'k> {
    kernel: &'k PaperKernel,
    space: AddressSpace<'k>,
    model: Model,
}

impl<'k> World<'k> {
    /// Nothing is mapped yet, and every CPU runs a program.
    fn new(kernel: &'k PaperKernel) -> Self {
        let space = AddressSpace::new(kernel);
        kernel.cpu_ids().for_each(|cpu| kernel.run(cpu, space.mm));
        Self { kernel, space, model: Model::new() }
    }

    /// Places `from..from + len`, as far as there are any; a mapping ends at the gap.
    fn part(from: u64, len: u64, end: u64) -> VirtRange {
        range(address(from), address((from + len).min(end) - 1) + PAGE)
    }

    fn take(&mut self, op: Op) {
        match op {
            Op::Map { from, len, flags, backing, tables } => {
                let part = Self::part(from, len, if from < 64 { 64 } else { PLACES });
                self.kernel.supply_tables(tables);
                let mapped = self.space.map(part, flags, backing);
                self.kernel.supply_tables(Supply::Unlimited);
                self.model.retain(|page, _| !part.contains(*page));
                match mapped {
                    Ok(()) => {
                        for page in (part.start()..part.end()).step_by(4096) {
                            let (frame, _) = self.entry(page).expect("mapped now");
                            self.model.insert(page, (frame, flags));
                        }
                    }
                    Err(error) => {
                        assert_eq!(error, MappingError::BadState);
                        assert_ne!(tables, Supply::Unlimited);
                    }
                }
            }
            Op::Unmap { from, len } => {
                let part = Self::part(from, len, PLACES);
                self.space.unmap(part).expect("munmap has no error");
                self.model.retain(|page, _| !part.contains(*page));
            }
            Op::Protect { from, len, flags } => {
                let part = Self::part(from, len, PLACES);
                self.space.protect(part, flags).expect("mprotect has no error");
                self.model.range_mut(part.start()..part.end()).for_each(|(_, page)| page.1 = flags);
            }
            Op::Clear => {
                self.space.clear().expect("nothing is in the way");
                self.model.clear();
            }
            Op::Touch { cpu, place, access } if self.runs(cpu) => {
                let expected = match self.model.get(&address(place)) {
                    Some((_, flags)) if access == Access::Write && flags.is_empty() => Err(Fault::ReadOnly),
                    Some((frame, _)) => Ok(*frame),
                    None => Err(Fault::NotPresent),
                };
                assert_eq!(self.kernel.touch(CPU[cpu], address(place), access), expected, "{op:?}");
            }
            Op::Touch { .. } => {}
            Op::Speculate { cpu, place } => {
                // The pages that a lazy CPU has cached may be stale: it does not use them before it
                // wakes.
                let is_lazy = self.kernel.state(CPU[cpu]).laziness() == Laziness::Lazy;
                if !is_lazy || self.kernel.cached(CPU[cpu], address(place)).is_none() {
                    self.kernel.speculate(CPU[cpu], address(place));
                }
            }
            Op::Run { cpu } => self.kernel.run(CPU[cpu], self.space.mm),
            Op::GoLazy { cpu } => self.kernel.go_lazy(CPU[cpu]),
            Op::Stop { cpu } => self.kernel.stop(CPU[cpu]),
        }
    }

    fn runs(&self, cpu: usize) -> bool {
        let state = self.kernel.state(CPU[cpu]);
        state.has_loaded(self.space.mm.context()) && state.laziness() == Laziness::Active
    }

    /// What the tables have for `page`.
    fn entry(&self, page: u64) -> Option<(PhysFrame, PageTableFlags)> {
        let found = self.kernel.lookup(self.space.mm, page);
        let frame = PhysFrame::containing_address(found.translate(page)?);
        Some((frame, found.value.flags() & PageTableFlags::WRITABLE))
    }

    /// Areas, tables and counts are as the model says.
    fn compare(&self) {
        let areas = self.space.areas.read();
        for page in (0..PLACES).map(address) {
            let flags = areas.find(usize::try_from(page).expect("64 bits")).map(MemoryArea::flags);
            let expected = self.model.get(&page).copied();
            assert_eq!(self.entry(page), expected, "the entry of {page:#x}");
            assert_eq!(flags, expected.map(|(_, flags)| flags), "the area of {page:#x}");
        }
        assert_eq!(self.kernel.ledger().nr_held(), self.model.len(), "every other page is free");
        let kept = self.kernel.tables(self.space.mm);
        assert!(kept.iter().all(|(_, table)| self.kernel.has_entries(*table)), "an empty table was kept");
        let counted: u64 = self.kernel.nr_tables(self.space.mm).iter().sum();
        assert_eq!(counted, kept.len() as u64, "also those that the mapper linked");
        assert_eq!(self.kernel.take_violations(), []);
    }

    fn end(mut self, end: End, lazy: u8) {
        if let End::UnmappedFirst = end {
            self.take(Op::Unmap { from: 0, len: PLACES });
            self.compare();
            assert_eq!(self.kernel.tables(self.space.mm), []);
        }
        for (cpu, id) in self.kernel.cpu_ids().enumerate() {
            if lazy >> cpu & 1 == 1 { self.kernel.go_lazy(id) } else { self.kernel.stop(id) }
        }
        let mm = self.space.mm;
        self.space.exit();
        assert_eq!(self.kernel.ledger().nr_held(), 0);
        assert_eq!(self.kernel.tables(mm), []);
        assert_eq!(self.kernel.batches_lent(), 0);
        assert_eq!(self.kernel.take_violations(), []);
    }
}

/// The `x86_64` crate's mapper does not note which lines of a table it uses.
fn machine(pcid: PcidSupport) -> PaperKernel {
    PaperKernel::new(Options { pcid, line_notes: LineNotes::NotKept, ..Options::default() })
}

fn config() -> ProptestConfig {
    let asked = ProptestConfig::default();
    ProptestConfig { failure_persistence: None, cases: asked.cases.max(400), ..asked }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn areas_of_memory_set_agree_with_a_model_and_nothing_is_freed_early_or_lost(
        ops in collection::vec(op(), 1..120),
        pcid in sample::select(vec![PcidSupport::Off, PcidSupport::On]),
        end in sample::select(vec![End::WithAreas, End::UnmappedFirst]),
        lazy in any::<u8>(),
    ) {
        let kernel = machine(pcid);
        let mut world = World::new(&kernel);
        for op in ops {
            world.take(op);
            world.compare();
        }
        world.end(end, lazy);
    }
}

/// Sequences that reach nothing prove nothing.
#[test]
fn the_sequences_come_to_something() {
    let mut runner = TestRunner::deterministic();
    let sequences = collection::vec(op(), 120);
    let (mut areas_cut, mut pages, mut tables, mut interrupts) = (0, 0, 0, 0);
    for _ in 0..100 {
        let kernel = machine(PcidSupport::On);
        let mut world = World::new(&kernel);
        for op in sequences.new_tree(&mut runner).expect("a sequence").current() {
            let before = world.space.areas.read().len();
            world.take(op);
            let is_cut = matches!(op, Op::Unmap { .. }) && world.space.areas.read().len() > before;
            areas_cut += usize::from(is_cut);
        }
        pages += kernel.count(|event| matches!(event, Event::PageFreed(_)));
        tables += kernel.count(|event| matches!(event, Event::TableFreed(_)));
        interrupts += kernel.count(|event| matches!(event, Event::Ipi { .. }));
        world.end(End::WithAreas, 0);
    }
    let counts = [
        ("areas cut in two", areas_cut),
        ("pages freed", pages),
        ("tables freed", tables),
        ("interrupts", interrupts),
    ];
    assert!(counts.iter().all(|(_, count)| *count >= 20), "{counts:?}");
}

#[test]
fn every_flush_comes_under_the_lock_of_the_areas_and_every_free_after_it() {
    // The hooks live as long as the kernel, which they look at.
    let kernel: &'static PaperKernel = Box::leak(Box::new(machine(PcidSupport::On)));
    let space: &'static AddressSpace<'static> = Box::leak(Box::new(AddressSpace::new(kernel)));
    let part = range(BORDER - 2 * PAGE, BORDER + 2 * PAGE);
    space.map(part, PageTableFlags::WRITABLE, Backing::Anonymous).expect("room");
    kernel.run(CPU[1], space.mm);
    kernel.touch(CPU[1], BORDER, Access::Write).expect("mapped");
    let is_locked = || space.areas.try_write().is_none();
    kernel.once(|event| matches!(event, Event::Tlb(TlbEvent::IpisSent(1))), move |_| assert!(is_locked()));
    kernel.once(|event| matches!(event, Event::PageFreed(_)), move |_| assert!(!is_locked()));
    kernel.once(|event| matches!(event, Event::TableFreed(_)), move |_| assert!(!is_locked()));
    space.unmap(part).expect("mapped");
    assert_eq!(kernel.nr_hooks_waiting(), 0, "all three have happened");
    assert_eq!(kernel.take_violations(), []);
}

/// Maps two pages with a hasty backend, lets CPU 1 use them, and unmaps them: the frames, and what
/// the checker says.
fn unmap_hastily(kernel: &PaperKernel, flush: Flush) -> ([PhysFrame; 2], Vec<Violation>) {
    let mm = kernel.new_mm();
    let mut pending = Pending::new(kernel, mm);
    let backend = Hasty { right: Backed { kernel, mm, backing: Backing::Anonymous }, flush };
    let start = usize::try_from(GIB).expect("64 bits");
    let mut areas = MemorySet::new();
    let area = MemoryArea::new(start, 2 * 4096, PageTableFlags::WRITABLE, backend);
    areas.map(area, &mut pending, false).expect("room");
    kernel.run(CPU[1], mm);
    let frames = [GIB, GIB + PAGE].map(|page| kernel.touch(CPU[1], page, Access::Write).expect("mapped"));
    areas.unmap(start, 2 * 4096, &mut pending).expect("mapped");
    drop(pending.flush([], range(GIB, GIB + 2 * PAGE)));
    (frames, kernel.take_violations())
}

#[test]
fn a_backend_that_frees_before_it_flushes_is_named_for_pages_and_tables() {
    let kernel = machine(PcidSupport::On);
    let (frames, said) = unmap_hastily(&kernel, Flush::AfterFreeing);
    assert_eq!(
        said[..2],
        [
            Violation::PageFreedTooEarly(frames[0], CPU[1], GIB),
            Violation::PageFreedTooEarly(frames[1], CPU[1], GIB + PAGE)
        ]
    );
    let tables = said[2..]
        .iter()
        .filter(|said| matches!(said, Violation::TableFreedTooEarly(_, cpu, _) if *cpu == CPU[1]));
    assert_eq!((tables.count(), said.len()), (3, 5), "{said:?}");
    // It did flush in the end.
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Read), Err(Fault::NotPresent));
    assert_eq!(kernel.take_violations(), []);
}

#[test]
fn a_backend_that_never_flushes_is_named_again_with_each_use() {
    let kernel = machine(PcidSupport::On);
    let (frames, said) = unmap_hastily(&kernel, Flush::Never);
    assert_eq!(said.len(), 5, "{said:?}");
    assert_eq!(kernel.touch(CPU[1], GIB, Access::Read), Ok(frames[0]));
    assert_eq!(kernel.take_violations(), [Violation::FreedPageUsed(frames[0], CPU[1], GIB)]);
    // No page is there, but the CPU looks for it in a table that was freed.
    assert_eq!(kernel.touch(CPU[1], GIB + 2 * PAGE, Access::Read), Err(Fault::NotPresent));
    let said = kernel.take_violations();
    assert!(
        matches!(said[..], [Violation::FreedTableWalked(_, cpu, at)] if (cpu, at) == (CPU[1], GIB + 2 * PAGE))
    );
}

/// A debug build of the engine says it first, with the name of the rule.
#[test]
#[cfg_attr(debug_assertions, should_panic(expected = "is freed with entries in it"))]
fn a_munmap_that_forgets_the_neighbours_is_named_for_the_table_they_share() {
    let kernel = machine(PcidSupport::On);
    let space = AddressSpace::new(&kernel);
    for start in [GIB, GIB + 4 * PAGE] {
        let part = range(start, start + 2 * PAGE);
        space.map(part, PageTableFlags::WRITABLE, Backing::Anonymous).expect("room");
    }
    let shared = kernel.find_table(space.mm, GIB, Level::Pte).expect("linked").frame();
    unmap_as_if_alone(&space, range(GIB, GIB + 2 * PAGE)).expect("mapped");
    assert_eq!(kernel.take_violations(), [Violation::TableFreedFull(shared)]);
}
