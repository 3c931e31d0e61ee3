//! Pages in one table, unmapped the short way: whatever is there, and whoever else is at work, the
//! result is the same as with a gather.

use core::cell::Cell;
use std::rc::Rc;

use mmu_gather::pagetable::{Bounds, Level, Marker, NonPresent};
use mmu_gather::tlb::{OnlineCpus, TlbEvent, UnmapBatch};
use mmu_gather::{GatherEvent, Limits, Vma};
use mmu_tests::{
    Access, Backing, CPU, Event, GIB, GatherOnPaper, Noted, Options, PaperKernel, PaperMm, Supply, area,
};
use x86_64::PhysAddr;
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

const PAGE: u64 = 4096;
/// In the middle of a cache line of entries, and of a table.
const HERE: u64 = GIB + 100 * PAGE;

/// What is at the address.
#[derive(Clone, Copy, Debug)]
enum There {
    NoTable,
    Nothing,
    /// Mapped, and not used yet.
    Fresh,
    Read,
    Written,
    ReadOnly,
    /// A page that is mapped a second time elsewhere.
    Shared,
    Swap,
    /// Stays when it is zapped.
    Guard,
}

const THERE: [There; 9] = [
    There::NoTable,
    There::Nothing,
    There::Fresh,
    There::Read,
    There::Written,
    There::ReadOnly,
    There::Shared,
    There::Swap,
    There::Guard,
];

/// Who else is at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meanwhile {
    Nobody,
    /// A gather is open that has cleared a page nearby.
    GatherNearby,
    /// A gather is open that has cleared this one.
    GatherHere,
    /// Reclaim has cleared a page nearby and not flushed.
    ReclaimNearby,
    ReclaimHere,
    /// A CPU loads the address space while the page's lock is held.
    Arrival,
    /// A gather begins while the page's lock is held.
    GatherLater,
}

const MEANWHILE: [Meanwhile; 7] = [
    Meanwhile::Nobody,
    Meanwhile::GatherNearby,
    Meanwhile::GatherHere,
    Meanwhile::ReclaimNearby,
    Meanwhile::ReclaimHere,
    Meanwhile::Arrival,
    Meanwhile::GatherLater,
];

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Munmap,
    /// There are no neighbours: the table goes, too.
    MunmapTable,
    Zap,
    /// There is no memory for a table batch.
    MunmapTableWithoutMemory,
}

const CALLS: [Call; 4] = [Call::Munmap, Call::MunmapTable, Call::Zap, Call::MunmapTableWithoutMemory];

impl Call {
    fn bounds(self) -> Bounds {
        match self {
            Self::MunmapTable | Self::MunmapTableWithoutMemory => Bounds::between(None, Some(3 * GIB)),
            Self::Munmap | Self::Zap => Bounds::between(Some(HERE), Some(HERE + PAGE)),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    there: There,
    meanwhile: Meanwhile,
    call: Call,
    backing: Backing,
    online: OnlineCpus,
}

fn cases() -> impl Iterator<Item = Case> {
    let backings = [Backing::Anonymous, Backing::File, Backing::Device];
    THERE.into_iter().flat_map(move |there| {
        MEANWHILE.into_iter().flat_map(move |meanwhile| {
            CALLS.into_iter().flat_map(move |call| {
                backings.into_iter().flat_map(move |backing| {
                    [OnlineCpus::Many, OnlineCpus::One].map(|online| Case {
                        there,
                        meanwhile,
                        call,
                        backing,
                        online,
                    })
                })
            })
        })
    })
}

impl Case {
    /// Whether the case is possible: what others clear must be there, and the table stays only if a
    /// neighbour does.
    fn is_possible(self) -> bool {
        let is_page = matches!(
            self.there,
            There::Fresh | There::Read | There::Written | There::ReadOnly | There::Shared
        );
        let has_table = !matches!(self.there, There::NoTable);
        let others_fit = match self.meanwhile {
            Meanwhile::Nobody | Meanwhile::Arrival | Meanwhile::GatherLater => true,
            Meanwhile::GatherNearby | Meanwhile::ReclaimNearby => has_table,
            Meanwhile::GatherHere | Meanwhile::ReclaimHere => is_page,
        };
        let table_goes = matches!(self.call, Call::MunmapTable | Call::MunmapTableWithoutMemory);
        // A table is freed only with all its pages, and never while another gather works in it.
        let alone = matches!(self.meanwhile, Meanwhile::Nobody | Meanwhile::Arrival);
        let nothing_left = is_page || matches!(self.there, There::Nothing | There::Swap);
        let few_cpus = self.online == OnlineCpus::Many || self.meanwhile != Meanwhile::Arrival;
        let device_page = self.backing != Backing::Device || is_page;
        others_fit && few_cpus && device_page && (!table_goes || (alone && nothing_left))
    }

    fn kernel(self) -> PaperKernel {
        let options =
            Options { cpus: if self.online == OnlineCpus::One { 1 } else { 4 }, ..Options::default() };
        let kernel = PaperKernel::new(Options { online: self.online, ..options });
        let mm = kernel.new_mm();
        kernel.map(mm, 3 * GIB, Level::Pte);
        self.put(&kernel, mm);
        let goes = matches!(self.call, Call::MunmapTable | Call::MunmapTableWithoutMemory);
        if !goes && !matches!(self.there, There::NoTable) {
            kernel.map(mm, HERE - PAGE, Level::Pte);
            kernel.map(mm, HERE + PAGE, Level::Pte);
        }
        for cpu in kernel.cpu_ids() {
            kernel.run(cpu, mm);
            for address in [HERE - PAGE, HERE, HERE + PAGE] {
                let access = match self.there {
                    There::Written | There::Shared => Access::Write,
                    There::Fresh if address == HERE => continue,
                    _ => Access::Read,
                };
                let _may_be_none = kernel.touch(cpu, address, access);
            }
        }
        if self.online == OnlineCpus::Many {
            kernel.go_lazy(CPU[2]);
            kernel.leave_mm(CPU[3]);
        }
        if self.call == Call::MunmapTableWithoutMemory {
            kernel.supply_batches(Supply::Left(0));
        }
        kernel
    }

    fn put(self, kernel: &PaperKernel, mm: &PaperMm) {
        let new_page = || kernel.ledger().new_page(PAGE);
        match self.there {
            There::NoTable => {}
            There::Nothing => {
                kernel.put_non_present(mm, HERE, Level::Pte, NonPresent::Swap { device: 0, slot: 9 });
                let vma = area(HERE, HERE + PAGE, Backing::Anonymous);
                kernel.zap(mm, &vma, vma.range).free();
            }
            There::Fresh | There::Read | There::Written => {
                kernel.map(mm, HERE, Level::Pte);
            }
            There::ReadOnly => kernel.map_page(mm, HERE, Level::Pte, new_page(), PageTableFlags::empty()),
            There::Shared => {
                let page = kernel.map(mm, HERE, Level::Pte);
                kernel.map_page(mm, 4 * GIB, Level::Pte, page, PageTableFlags::WRITABLE);
            }
            There::Swap => {
                kernel.put_non_present(mm, HERE, Level::Pte, NonPresent::Swap { device: 1, slot: 7 });
            }
            There::Guard => {
                kernel.put_non_present(mm, HERE, Level::Pte, NonPresent::Marker(Marker::Guard));
            }
        }
    }

    /// The result: everything that was logged, and what is left.
    fn outcome(self, unmap: impl FnOnce(&PaperKernel, &PaperMm, &Vma<Backing>)) -> Outcome {
        let kernel = self.kernel();
        let mm = kernel.mm(0);
        kernel.take_events();
        let vma = area(HERE, HERE + PAGE, self.backing);
        let nearby = area(HERE + PAGE, HERE + 2 * PAGE, Backing::Anonymous);
        let mut batch = UnmapBatch::new();
        let mut reclaimed = None;
        let mut other = None;
        match self.meanwhile {
            Meanwhile::Nobody => {}
            Meanwhile::GatherNearby | Meanwhile::GatherHere => {
                let cleared = if self.meanwhile == Meanwhile::GatherHere { &vma } else { &nearby };
                let mut gather = kernel.gather(mm);
                gather.zap_vma_range(cleared, cleared.range).expect("no leaf is cut");
                other = Some(gather);
            }
            Meanwhile::ReclaimNearby => reclaimed = Some(kernel.reclaim(&mut batch, mm, HERE + PAGE)),
            Meanwhile::ReclaimHere => reclaimed = Some(kernel.reclaim(&mut batch, mm, HERE)),
            Meanwhile::Arrival => {
                kernel.once(
                    |event| matches!(event, Event::LeafCleared(_)),
                    |kernel| kernel.run(CPU[3], kernel.mm(0)),
                );
            }
            Meanwhile::GatherLater => kernel.once(
                |event| matches!(event, Event::Gather(GatherEvent::LockDropped { .. })),
                |kernel| drop(kernel.gather(kernel.mm(0))),
            ),
        }
        let open_at_flush = Rc::new(Cell::new(None));
        let look = open_at_flush.clone();
        kernel.once(
            |event| matches!(event, Event::Tlb(TlbEvent::Requested { .. })),
            move |kernel| look.set(Some(kernel.mm(0).open_gathers())),
        );
        unmap(&kernel, mm, &vma);
        let cached = kernel.cpu_ids().map(|cpu| kernel.cached(cpu, HERE).is_some()).collect();
        drop(other);
        if let Some(frame) = reclaimed {
            let _receipt = batch.flush(&kernel);
            kernel.release(frame, 1);
        }
        Outcome {
            events: kernel.take_events(),
            left: format!("{:?}", kernel.lookup(mm, HERE)),
            cached,
            held: kernel.ledger().nr_held(),
            tables: kernel.nr_tables(mm),
            open_at_flush: open_at_flush.get(),
            open: mm.open_gathers(),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    events: Vec<Noted>,
    left: String,
    cached: Vec<bool>,
    held: usize,
    tables: [u64; 4],
    /// Gathers open when the first flush was asked for, and now.
    open_at_flush: Option<u64>,
    open: u64,
}

impl Outcome {
    /// Leaves out what may differ: where tables are; how often a lock is taken and a preemption
    /// point is offered; and when a page of a file that was flushed under the lock is freed: by a
    /// gather at once, the short way with the rest.
    fn without_order_of_freeing(mut self) -> Self {
        let is_freeing = |noted: &Noted| {
            matches!(
                noted.event,
                Event::FreeChunk { .. } | Event::PageFreed(_) | Event::Gather(GatherEvent::Released { .. })
            )
        };
        self.events.retain(|noted| !matches!(noted.event, Event::Resched | Event::LockAsked(_)));
        // Each kernel has its tables at other addresses.
        let nowhere = PhysFrame::containing_address(PhysAddr::zero());
        for noted in &mut self.events {
            match &mut noted.event {
                Event::Cr3 { root: frame, .. } | Event::TableFreed(frame) => *frame = nowhere,
                _ => {}
            }
        }
        let freed: Vec<Noted> = self.events.iter().copied().filter(is_freeing).collect();
        if self.events.iter().any(|noted| noted.event == Event::Gather(GatherEvent::DirtyFlush)) {
            self.events.retain(|noted| !is_freeing(noted));
            self.events.extend(freed);
        }
        self
    }
}

fn by_gather(case: Case, kernel: &PaperKernel, mm: &PaperMm, vma: &Vma<Backing>) {
    let mut gather = kernel.gather(mm);
    gather.zap_vma_range(vma, vma.range).expect("no leaf is cut");
    if case.call != Call::Zap {
        gather.flush_pfn_maps();
        gather.unhook_tables([*vma], case.call.bounds());
    }
    gather.flush().free();
}

#[test]
fn one_page_unmapped_the_short_way_comes_to_what_a_gather_does() {
    let mut tried = 0;
    for case in cases().filter(|case| case.is_possible()) {
        let expected = case.outcome(|kernel, mm, vma| by_gather(case, kernel, mm, vma));
        let outcome = case.outcome(|kernel, mm, vma| match case.call {
            Call::Zap => kernel.zap(mm, vma, vma.range).free(),
            _ => kernel.unmap(mm, &Limits::DEFAULT, &[*vma], case.call.bounds()),
        });
        assert_eq!(outcome.without_order_of_freeing(), expected.without_order_of_freeing(), "{case:?}");
        tried += 1;
    }
    println!("{tried} cases");
    assert!(tried > 300, "{tried} cases");
}

/// What is at the addresses of a call of several pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pages {
    /// All written to.
    Written,
    /// All read, and none may be written.
    ReadOnly,
    /// Written and read-only ones by turns.
    Mixed,
    /// One in the middle may be written and is clean.
    OneClean,
    /// One in the middle was never used.
    OneFresh,
    /// There is no page in the middle.
    Hole,
    /// A guard is in the middle; it stays when the pages are zapped.
    Guard,
}

const PAGES: [Pages; 7] = [
    Pages::Written,
    Pages::ReadOnly,
    Pages::Mixed,
    Pages::OneClean,
    Pages::OneFresh,
    Pages::Hole,
    Pages::Guard,
];

/// Around what fits into the slots on the stack, a line, and a batch page.
const NUMBERS: [u64; 11] = [2, 3, 6, 7, 8, 9, 16, 17, 40, 400, 412];

#[derive(Clone, Copy, Debug)]
struct Several {
    pages: Pages,
    nr_pages: u64,
    meanwhile: Meanwhile,
    call: Call,
    backing: Backing,
}

impl Several {
    fn is_possible(self) -> bool {
        let table_goes = matches!(self.call, Call::MunmapTable | Call::MunmapTableWithoutMemory);
        let alone = matches!(self.meanwhile, Meanwhile::Nobody | Meanwhile::Arrival);
        let last = HERE + self.nr_pages * PAGE;
        let fits = last < HERE / (2 << 20) * (2 << 20) + (2 << 20);
        fits && (!table_goes || alone && self.pages != Pages::Guard)
    }

    fn vma(self) -> Vma<Backing> {
        area(HERE, HERE + self.nr_pages * PAGE, self.backing)
    }

    fn bounds(self) -> Bounds {
        match self.call {
            Call::MunmapTable | Call::MunmapTableWithoutMemory => Bounds::between(None, Some(3 * GIB)),
            Call::Munmap | Call::Zap => Bounds::between(Some(HERE), Some(self.vma().range.end())),
        }
    }

    fn kernel(self) -> PaperKernel {
        let kernel = PaperKernel::new(Options { cpus: 4, ..Options::default() });
        let mm = kernel.new_mm();
        kernel.map(mm, 3 * GIB, Level::Pte);
        let middle = HERE + self.nr_pages / 2 * PAGE;
        let goes = matches!(self.call, Call::MunmapTable | Call::MunmapTableWithoutMemory);
        if !goes {
            kernel.map(mm, HERE - PAGE, Level::Pte);
            kernel.map(mm, self.vma().range.end(), Level::Pte);
        }
        for cpu in kernel.cpu_ids() {
            kernel.run(cpu, mm);
        }
        for (number, address) in (HERE..self.vma().range.end()).step_by(4096).enumerate() {
            let in_the_middle = address == middle;
            if in_the_middle && self.pages == Pages::Hole {
                continue;
            }
            if in_the_middle && self.pages == Pages::Guard {
                kernel.put_non_present(mm, address, Level::Pte, NonPresent::Marker(Marker::Guard));
                continue;
            }
            let read_only = self.pages == Pages::ReadOnly || self.pages == Pages::Mixed && number % 3 == 1;
            let flags = if read_only { PageTableFlags::empty() } else { PageTableFlags::WRITABLE };
            let page = kernel.ledger().new_page(PAGE);
            kernel.map_page(mm, address, Level::Pte, page, flags);
            let clean = read_only || in_the_middle && self.pages == Pages::OneClean;
            if !(in_the_middle && self.pages == Pages::OneFresh) {
                let access = if clean { Access::Read } else { Access::Write };
                // A few, so that a flush has something to find.
                for cpu in kernel.cpu_ids().take(if number < 4 { 4 } else { 1 }) {
                    kernel.touch(cpu, address, access).expect("it is mapped");
                }
            }
        }
        kernel.go_lazy(CPU[2]);
        kernel.leave_mm(CPU[3]);
        if self.call == Call::MunmapTableWithoutMemory {
            kernel.supply_batches(Supply::Left(0));
        }
        kernel
    }

    fn outcome(self, unmap: impl FnOnce(&PaperKernel, &PaperMm, &Vma<Backing>)) -> Outcome {
        let kernel = self.kernel();
        let mm = kernel.mm(0);
        kernel.take_events();
        let vma = self.vma();
        let nearby = area(vma.range.end(), vma.range.end() + PAGE, Backing::Anonymous);
        let mut batch = UnmapBatch::new();
        let (mut reclaimed, mut other) = (None, None);
        match self.meanwhile {
            Meanwhile::Nobody => {}
            Meanwhile::GatherNearby | Meanwhile::GatherHere => {
                let cleared = if self.meanwhile == Meanwhile::GatherHere { &vma } else { &nearby };
                let mut gather = kernel.gather(mm);
                gather.zap_vma_range(cleared, cleared.range).expect("no leaf is cut");
                other = Some(gather);
            }
            Meanwhile::ReclaimNearby => {
                reclaimed = Some(kernel.reclaim(&mut batch, mm, vma.range.end()));
            }
            Meanwhile::ReclaimHere => reclaimed = Some(kernel.reclaim(&mut batch, mm, HERE)),
            Meanwhile::Arrival => kernel.once(
                |event| matches!(event, Event::LeafCleared(_)),
                |kernel| kernel.run(CPU[3], kernel.mm(0)),
            ),
            Meanwhile::GatherLater => kernel.once(
                |event| matches!(event, Event::Gather(GatherEvent::LockDropped { .. })),
                |kernel| drop(kernel.gather(kernel.mm(0))),
            ),
        }
        let open_at_flush = Rc::new(Cell::new(None));
        let look = open_at_flush.clone();
        kernel.once(
            |event| matches!(event, Event::Tlb(TlbEvent::Requested { .. })),
            move |kernel| look.set(Some(kernel.mm(0).open_gathers())),
        );
        unmap(&kernel, mm, &vma);
        let cached = (0..4)
            .flat_map(|number| kernel.cpu_ids().map(move |cpu| (cpu, HERE + number * PAGE)))
            .map(|(cpu, address)| kernel.cached(cpu, address).is_some())
            .collect();
        drop(other);
        if let Some(frame) = reclaimed {
            let _receipt = batch.flush(&kernel);
            kernel.release(frame, 1);
        }
        assert_eq!(kernel.batches_lent(), 0);
        Outcome {
            events: kernel.take_events(),
            left: format!("{:?}", [HERE, HERE + self.nr_pages / 2 * PAGE].map(|at| kernel.lookup(mm, at))),
            cached,
            held: kernel.ledger().nr_held(),
            tables: kernel.nr_tables(mm),
            open_at_flush: open_at_flush.get(),
            open: mm.open_gathers(),
        }
    }
}

/// As [`Outcome::without_order_of_freeing`], and without what else may differ with more pages than
/// one: how many batch pages are taken, and in how many slices pages are freed.
fn without_batches(outcome: Outcome) -> Outcome {
    let mut outcome = outcome.without_order_of_freeing();
    outcome.events.retain(|noted| {
        let batch = GatherEvent::BatchTaken;
        let refused = GatherEvent::BatchRefused;
        !matches!(noted.event, Event::FreeChunk { .. })
            && noted.event != Event::Gather(batch)
            && noted.event != Event::Gather(refused)
    });
    outcome
}

#[test]
fn pages_of_one_table_unmapped_the_short_way_come_to_what_a_gather_does() {
    let (mut tried, mut short) = (0, 0);
    let calls = CALLS.into_iter().flat_map(|call| MEANWHILE.map(|meanwhile| (call, meanwhile)));
    for (call, meanwhile) in calls {
        for (pages, backing) in
            PAGES.into_iter().flat_map(|pages| [Backing::Anonymous, Backing::File].map(|one| (pages, one)))
        {
            for nr_pages in NUMBERS {
                let case = Several { pages, nr_pages, meanwhile, call, backing };
                if !case.is_possible() {
                    continue;
                }
                let expected = case.outcome(|kernel, mm, vma| {
                    let mut gather = kernel.gather(mm);
                    gather.zap_vma_range(vma, vma.range).expect("no leaf is cut");
                    if case.call != Call::Zap {
                        gather.flush_pfn_maps();
                        gather.unhook_tables([*vma], case.bounds());
                    }
                    gather.flush().free();
                });
                let outcome = case.outcome(|kernel, mm, vma| match case.call {
                    Call::Zap => kernel.zap(mm, vma, vma.range).free(),
                    _ => kernel.unmap(mm, &Limits::DEFAULT, &[*vma], case.bounds()),
                });
                let batches = |outcome: &Outcome| {
                    let taken = Event::Gather(GatherEvent::BatchTaken);
                    outcome.events.iter().filter(|noted| noted.event == taken).count()
                };
                assert!(batches(&outcome) <= batches(&expected), "{case:?}");
                let chunks = |outcome: &Outcome| {
                    let is_chunk = |noted: &&Noted| matches!(noted.event, Event::FreeChunk { .. });
                    outcome.events.iter().filter(is_chunk).count()
                };
                // A gather frees what waits on the stack and what waits in its batch page apart.
                short += usize::from(chunks(&outcome) < chunks(&expected));
                assert_eq!(without_batches(outcome), without_batches(expected), "{case:?}");
                tried += 1;
            }
        }
    }
    println!("{tried} cases, {short} of them freed in one slice of a batch page");
    assert!(tried > 2000, "{tried} cases");
    assert!(short > 200, "the short way of many pages was taken {short} times");
}
