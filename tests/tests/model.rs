//! Random programs against a reference that is a few sets: which pages are mapped, and which tables
//! must exist.

use std::collections::{BTreeMap, BTreeSet};

use mmu_gather::pagetable::{Bounds, Level, PagingMode, VirtRange};
use mmu_gather::tlb::{OnlineCpus, PcidSupport};
use mmu_gather::{Limits, Vma};
use mmu_tests::{
    Access, Answers, Backing, CPU, GIB, LineNotes, Locks, MIB, Options, PaperKernel, Supply, TIB, area, range,
};
use proptest::collection::vec;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest};
use x86_64::structures::paging::PhysFrame;

const PAGE: u64 = 4096;

/// Where areas are: page numbers 0 to 47, spread so that neighbours share a table, or 1 GiB, or 512
/// GiB, or nothing.
const PLACES: [u64; 6] =
    [GIB, GIB + 2 * MIB - 4 * PAGE, GIB + 6 * MIB, 2 * GIB - 3 * PAGE, 512 * GIB - 2 * PAGE, 100 * TIB];

fn address(page: u64) -> u64 {
    PLACES[usize::try_from(page / 8).expect("small")] + page % 8 * PAGE
}

#[derive(Clone, Debug)]
enum Op {
    /// Maps every page of `first..first + pages` that is not mapped.
    Map {
        first: u64,
        pages: u64,
        backing: Backing,
    },
    /// Unmaps the areas in `first..first + pages`, and their tables.
    Unmap {
        first: u64,
        pages: u64,
    },
    /// Drops the pages and keeps the tables.
    Zap {
        first: u64,
        pages: u64,
    },
    Touch {
        cpu: usize,
        page: u64,
        access: Access,
    },
    Run {
        cpu: usize,
        mm: usize,
    },
    GoLazy {
        cpu: usize,
    },
    Stop {
        cpu: usize,
    },
    Batches(u64),
}

fn ops() -> impl Strategy<Value = Op> {
    let (page, pages, cpu) = (0..48u64, 1..12u64, 0..3usize);
    let backing = prop_oneof![Just(Backing::Anonymous), Just(Backing::File)];
    let access = prop_oneof![Just(Access::Read), Just(Access::Write)];
    prop_oneof![
        4 => (page.clone(), pages.clone(), backing)
            .prop_map(|(first, pages, backing)| Op::Map { first, pages, backing }),
        2 => (page.clone(), pages.clone()).prop_map(|(first, pages)| Op::Unmap { first, pages }),
        1 => (page.clone(), pages).prop_map(|(first, pages)| Op::Zap { first, pages }),
        8 => (cpu.clone(), page, access).prop_map(|(cpu, page, access)| Op::Touch { cpu, page, access }),
        2 => (cpu.clone(), 0..2usize).prop_map(|(cpu, mm)| Op::Run { cpu, mm }),
        1 => cpu.clone().prop_map(|cpu| Op::GoLazy { cpu }),
        1 => cpu.prop_map(|cpu| Op::Stop { cpu }),
        1 => any::<u64>().prop_map(Op::Batches),
    ]
}

/// What must hold for one address space: its areas of one page each, their pages, the tables.
#[derive(Default)]
struct Reference {
    areas: BTreeMap<u64, Backing>,
    pages: BTreeMap<u64, PhysFrame>,
    tables: BTreeSet<(Level, u64)>,
}

const TABLE_LEVELS: [Level; 4] = [Level::Pte, Level::Pmd, Level::Pud, Level::P4d];

impl Reference {
    fn map(&mut self, at: u64, backing: Backing, frame: PhysFrame, mode: PagingMode) {
        self.areas.insert(at, backing);
        self.pages.insert(at, frame);
        for level in TABLE_LEVELS.into_iter().filter(|level| *level < mode.root_level()) {
            self.tables.insert((level, at & !(level.table_span() - 1)));
        }
    }

    /// Removes the areas; the neighbours that stay decide which tables are freed.
    fn unmap(&mut self, gone: VirtRange) -> Bounds {
        self.areas.retain(|at, _| !gone.contains(*at));
        self.pages.retain(|at, _| !gone.contains(*at));
        let floor = self.areas.range(..gone.start()).next_back().map(|(at, _)| at + PAGE);
        let ceiling = self.areas.range(gone.end()..).next().map(|(at, _)| *at);
        let areas = &self.areas;
        self.tables.retain(|(level, start)| areas.range(*start..start + level.table_span()).next().is_some());
        Bounds::between(floor, ceiling)
    }

    /// The areas in `range`; those that touch and are of the same kind are joined.
    fn areas_in(&self, range: VirtRange) -> Vec<Vma<Backing>> {
        let mut found: Vec<Vma<Backing>> = Vec::new();
        for (at, backing) in self.areas.range(range.start()..range.end()) {
            match found.last_mut() {
                Some(last) if last.range.end() == *at && last.area == *backing => {
                    *last = area(last.range.start(), at + PAGE, *backing);
                }
                _ => found.push(area(*at, at + PAGE, *backing)),
            }
        }
        found
    }
}

struct Run {
    kernel: PaperKernel,
    limits: Limits,
    reference: Reference,
}

impl Run {
    fn step(&mut self, op: &Op) {
        let Self { kernel, limits, reference } = self;
        let mm = kernel.mm(0);
        let span =
            |first: u64, pages: u64| range(address(first), address((first + pages - 1).min(47)) + PAGE);
        match *op {
            Op::Map { first, pages, backing } => {
                for page in first..(first + pages).min(48) {
                    let at = address(page);
                    if reference.pages.contains_key(&at) {
                        continue;
                    }
                    let backing = reference.areas.get(&at).copied().unwrap_or(backing);
                    let frame = kernel.map(mm, at, Level::Pte);
                    reference.map(at, backing, frame, kernel.options().mode);
                }
            }
            Op::Unmap { first, pages } => {
                let gone = span(first, pages);
                let vmas = reference.areas_in(gone);
                let bounds = reference.unmap(gone);
                if !vmas.is_empty() {
                    kernel.unmap(mm, limits, &vmas, bounds);
                }
            }
            Op::Zap { first, pages } => {
                let zapped = span(first, pages);
                for vma in reference.areas_in(zapped) {
                    kernel.zap(mm, &vma, vma.range).free();
                }
                reference.pages.retain(|at, _| !zapped.contains(*at));
            }
            Op::Touch { cpu, page, access } => {
                if kernel.state(CPU[cpu]).has_loaded(mm.context()) {
                    // A lazy CPU does not run programs: it speculates.
                    kernel.speculate(CPU[cpu], address(page));
                    if kernel.state(CPU[cpu]).laziness() == mmu_gather::tlb::Laziness::Active {
                        let expected = reference.pages.get(&address(page)).copied();
                        let found = kernel.touch(CPU[cpu], address(page), access).ok();
                        assert_eq!(found, expected, "what a program sees at page {page}");
                    }
                }
            }
            Op::Run { cpu, mm } => kernel.run(CPU[cpu], kernel.mm(mm)),
            Op::GoLazy { cpu } => kernel.go_lazy(CPU[cpu]),
            Op::Stop { cpu } => kernel.stop(CPU[cpu]),
            Op::Batches(pattern) => kernel.supply_batches(Supply::Pattern(pattern)),
        }
    }

    fn check(&self) {
        let Self { kernel, reference, .. } = self;
        let mm = kernel.mm(0);
        for page in 0..48 {
            let at = address(page);
            let mapped = kernel.lookup(mm, at).translate(at);
            let expected = reference.pages.get(&at).map(|frame| frame.start_address());
            assert_eq!(mapped, expected, "page {page}");
        }
        let counts = TABLE_LEVELS
            .map(|level| reference.tables.iter().filter(|(found, _)| *found == level).count() as u64);
        assert_eq!(kernel.nr_tables(mm), counts, "tables");
        assert_eq!(kernel.tables(mm).len() as u64, counts.iter().sum::<u64>(), "tables that can be reached");
        assert_eq!(kernel.ledger().nr_held(), reference.pages.len(), "pages kept");
        assert_eq!(kernel.batches_lent(), 0);
        assert_eq!(mm.open_gathers(), 0);
        assert_eq!(kernel.tables_with_unnoted_entries(mm), []);
        assert_eq!(kernel.take_violations(), []);
    }
}

fn limits() -> impl Strategy<Value = Limits> {
    (2..9u16, 2..6u16, 0..4u16, 1..4u16, 1..4u16).prop_map(
        |(bundle_slots, batch_slots, batch_pages, table_slots, free_chunk)| {
            Limits::DEFAULT
                .with_bundle_slots(bundle_slots)
                .with_batch_slots(batch_slots)
                .with_batch_pages(batch_pages)
                .with_table_slots(table_slots)
                .with_free_chunk(free_chunk)
        },
    )
}

fn machines() -> impl Strategy<Value = Options> {
    let pcid = prop_oneof![Just(PcidSupport::Off), Just(PcidSupport::On)];
    let mode = prop_oneof![3 => Just(PagingMode::FourLevel), 1 => Just(PagingMode::FiveLevel)];
    let line_notes = prop_oneof![3 => Just(LineNotes::Kept), 1 => Just(LineNotes::NotKept)];
    let locks = prop_oneof![3 => Just(Locks::PerTable), 1 => Just(Locks::Two), 1 => Just(Locks::One)];
    (pcid, mode, 0..40u64, line_notes, locks).prop_map(|(pcid, mode, flush_ceiling, line_notes, locks)| {
        Options {
            cpus: 3,
            online: OnlineCpus::Many,
            pcid,
            mode,
            flush_ceiling,
            line_notes,
            locks,
            answers: Answers::Honest,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_programs_see_what_the_reference_says(
        options in machines(),
        limits in limits(),
        ops in vec(ops(), 1..60),
    ) {
        let kernel = PaperKernel::new(options);
        kernel.new_mm();
        kernel.new_mm();
        let mut run = Run { kernel, limits, reference: Reference::default() };
        for op in &ops {
            run.step(op);
            run.check();
        }
        // And the end of it.
        let whole = run.kernel.mm(0).space().user_range();
        let vmas = run.reference.areas_in(whole);
        for cpu in run.kernel.cpu_ids() {
            run.kernel.go_lazy(cpu);
        }
        run.kernel.exit(run.kernel.mm(0), &limits, &vmas);
        run.reference.unmap(whole);
        run.check();
    }
}
