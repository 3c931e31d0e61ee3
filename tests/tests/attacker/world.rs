//! The kernel that is attacked, what it has promised, and the moves carried out.

use core::any::Any;
use core::panic::AssertUnwindSafe;
use std::collections::BTreeSet;
use std::panic::catch_unwind;

use mmu_gather::pagetable::{Level, TableView, UnhookedTable, VirtRange};
use mmu_gather::tlb::{CpuId, Flushed, Laziness, PcidSupport, UnmapBatch};
use mmu_gather::{FlushedGather, GatherEvent, Limits, MmuGather, Vma, VmaKind};
use mmu_tests::{
    Backing, CPU, Event, GIB, LineNotes, MIB, Options, PaperKernel, PaperMm, Supply, area, range,
};
use x86_64::structures::paging::PhysFrame;

use crate::moves::flush_batch;
use crate::ops::{Address, Nonsense, NonsenseVma, Op};

pub(crate) const PAGE: u64 = 4096;
/// More pages than a gather has room for without a batch page.
const AREA_PAGES: u64 = 10;
pub(crate) const NR_CPUS: u32 = 4;
pub(crate) const NR_MMS: usize = 2;

/// Panics that are documented, and those of closures and iterators that the attacker passes to the
/// engine.
const ALLOWED: [&str; 8] = [
    "belongs to another address space",
    "was not translated through",
    "does not fit a set of",
    "not a user address",
    "not a page of the range",
    "slice index starts at",
    "index out of bounds",
    OWN,
];

/// Of these, the panics after which something that was handed over is lost.
const LOSES: [&str; 3] = [ALLOWED[0], ALLOWED[1], OWN];
pub(crate) const OWN: &str = "the attacker's own";

/// Where something can be mapped, with what behind it.
fn places() -> Vec<(u64, Level, Backing)> {
    let small =
        |start: u64, backing| (0..AREA_PAGES).map(move |page| (start + page * PAGE, Level::Pte, backing));
    small(GIB, Backing::Anonymous)
        .chain(small(GIB + 2 * MIB, Backing::File))
        .chain(small(GIB + 510 * MIB, Backing::Anonymous))
        .chain(small(3 * GIB, Backing::Device))
        .chain([
            (2 * GIB, Level::Pmd, Backing::Anonymous),
            (2 * GIB + 2 * MIB, Level::Pmd, Backing::Anonymous),
        ])
        .collect()
}

pub(crate) fn areas() -> [Vma<Backing>; 5] {
    [
        area(GIB, GIB + AREA_PAGES * PAGE, Backing::Anonymous),
        area(GIB + 2 * MIB, GIB + 2 * MIB + AREA_PAGES * PAGE, Backing::File),
        area(GIB + 510 * MIB, GIB + 510 * MIB + AREA_PAGES * PAGE, Backing::Anonymous),
        area(2 * GIB, 2 * GIB + 4 * MIB, Backing::Anonymous),
        area(3 * GIB, 3 * GIB + AREA_PAGES * PAGE, Backing::Device),
    ]
}

pub(crate) struct Open<'a> {
    pub(crate) gather: MmuGather<'a, 'a, PaperKernel>,
    pub(crate) mm: usize,
    /// Places it has visited and left empty: gone once it has flushed.
    pub(crate) covered: BTreeSet<u64>,
    /// Of those, the places that it cleared itself.
    pub(crate) cleared: BTreeSet<u64>,
}

pub(crate) struct Batch {
    pub(crate) batch: UnmapBatch<PaperKernel>,
    pub(crate) taken: Vec<Taken>,
}

/// A page that reclaim took, and has not freed yet.
#[derive(Clone, Copy)]
pub(crate) struct Taken {
    pub(crate) mm: usize,
    pub(crate) address: u64,
    pub(crate) frame: PhysFrame,
    /// Whether nothing was mapped there since.
    pub(crate) still_gone: bool,
}

pub(crate) struct World<'a> {
    pub(crate) kernel: &'a PaperKernel,
    pub(crate) places: Vec<(u64, Level, Backing)>,
    pub(crate) gathers: Vec<Open<'a>>,
    pub(crate) flushed: Vec<FlushedGather<'a, PaperKernel>>,
    pub(crate) batches: [Batch; 2],
    pub(crate) receipts: Vec<Flushed>,
    pub(crate) unhooked: Vec<UnhookedTable>,
    pub(crate) offline: BTreeSet<u32>,
    /// The CPU on which all this is called.
    pub(crate) here: CpuId,
    /// Places of which a flush has promised that no CPU uses them any more, and which were not
    /// mapped since.
    pub(crate) promised: [BTreeSet<u64>; NR_MMS],
    /// Whether something was leaked on purpose, or the kernel was told something untrue.
    pub(crate) leaks: bool,
    pub(crate) nr_devices: usize,
    pub(crate) refused: BTreeSet<&'static str>,
}

/// What a sequence reached.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reached {
    pub(crate) pages_freed: usize,
    pub(crate) tables_freed: usize,
    pub(crate) interrupts: usize,
    pub(crate) nested: usize,
    pub(crate) deferred: usize,
    pub(crate) forced: usize,
    /// The documented panics, by their words.
    pub(crate) refused: BTreeSet<&'static str>,
    /// Whether leaks were looked for at the end.
    pub(crate) nothing_forgotten: bool,
}

/// Carries the moves out; what was reached, or what was found.
pub(crate) fn attack(ops: &[Op]) -> Result<Reached, String> {
    let options = Options {
        cpus: NR_CPUS,
        pcid: if ops.len().is_multiple_of(2) { PcidSupport::On } else { PcidSupport::Off },
        line_notes: if ops.len().is_multiple_of(3) { LineNotes::NotKept } else { LineNotes::Kept },
        flush_ceiling: if ops.len().is_multiple_of(7) { 512 } else { 33 },
        ..Options::default()
    };
    let kernel = PaperKernel::new(options);
    for _ in 0..NR_MMS {
        kernel.new_mm();
    }
    let result = World::new(&kernel).play(ops);
    let violations = kernel.take_violations();
    if !violations.is_empty() {
        return Err(format!("{violations:?}; {:?}", result.err()));
    }
    let is_gather = |event: &Event, wanted: GatherEvent| *event == Event::Gather(wanted);
    Ok(Reached {
        pages_freed: kernel.count(|event| matches!(event, Event::PageFreed(_))),
        tables_freed: kernel.count(|event| matches!(event, Event::TableFreed(_))),
        interrupts: kernel.count(|event| matches!(event, Event::Ipi { .. })),
        nested: kernel.count(|event| is_gather(event, GatherEvent::NestedFlush)),
        deferred: kernel.count(|event| is_gather(event, GatherEvent::DeferredFlushSeen)),
        forced: kernel.count(|event| is_gather(event, GatherEvent::ForcedFlush)),
        ..result?
    })
}

fn words(panic: &(dyn Any + Send)) -> String {
    let fixed = panic.downcast_ref::<&str>().map(|words| (*words).to_owned());
    fixed.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".to_owned())
}

pub(crate) fn level(number: u8) -> Level {
    Level::ALL[usize::from(number) % 5]
}

fn backing(number: u8) -> Backing {
    [Backing::Anonymous, Backing::Anonymous, Backing::File, Backing::Device][usize::from(number) % 4]
}

impl<'a> World<'a> {
    fn new(kernel: &'a PaperKernel) -> Self {
        let batch = || Batch { batch: UnmapBatch::new(), taken: Vec::new() };
        Self {
            kernel,
            places: places(),
            gathers: Vec::new(),
            flushed: Vec::new(),
            batches: [batch(), batch()],
            receipts: Vec::new(),
            unhooked: Vec::new(),
            offline: BTreeSet::new(),
            here: CPU[0],
            promised: [BTreeSet::new(), BTreeSet::new()],
            leaks: false,
            nr_devices: 0,
            refused: BTreeSet::new(),
        }
    }

    fn play(mut self, ops: &[Op]) -> Result<Reached, String> {
        for (number, op) in ops.iter().enumerate() {
            let (kernel, here) = (self.kernel, self.here);
            kernel
                .on(here, || self.guarded(|world| world.carry_out(op)))
                .map_err(|found| format!("{number} {op:?}: {found}"))?;
            self.check().map_err(|found| format!("after {number} {op:?}: {found}"))?;
        }
        self.guarded(Self::end)?;
        Ok(Reached { refused: self.refused, nothing_forgotten: !self.leaks, ..Reached::default() })
    }

    /// Does something that may panic as it is documented, and in no other way.
    fn guarded(&mut self, act: impl FnOnce(&mut Self) -> Result<(), String>) -> Result<(), String> {
        catch_unwind(AssertUnwindSafe(|| act(self))).unwrap_or_else(|panic| {
            let words = words(&*panic);
            // What such a call was given is lost.
            self.leaks |= LOSES.iter().any(|loses| words.contains(loses));
            let allowed = ALLOWED.iter().find(|allowed| words.contains(**allowed)).ok_or(words)?;
            self.refused.insert(allowed);
            Ok(())
        })
    }

    /// Checks that no CPU uses what was promised to be gone.
    fn check(&self) -> Result<(), String> {
        for (number, promised) in self.promised.iter().enumerate() {
            let mm = self.kernel.mm(number);
            let here = (0..NR_CPUS).map(CpuId::new).filter(|cpu| {
                let state = self.kernel.state(*cpu);
                state.has_loaded(mm.context()) && state.laziness() == Laziness::Active
            });
            for cpu in here {
                for address in promised {
                    if let Some(stale) = self.kernel.cached(cpu, *address) {
                        return Err(format!("{cpu} still uses {address:#x} of {number}: {stale:?}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// The end, done right: every gather finishes, and both address spaces exit.
    fn end(&mut self) -> Result<(), String> {
        let kernel = self.kernel;
        kernel.supply_batches(Supply::Unlimited);
        self.gathers.clear();
        self.flushed.clear();
        self.leaks |= !self.unhooked.is_empty();
        for batch in &mut self.batches {
            drop(flush_batch(kernel, batch));
        }
        for cpu in (0..NR_CPUS).filter(|cpu| !self.offline.contains(cpu)) {
            kernel.stop(CpuId::new(cpu));
        }
        kernel.on(self.here, || {
            for number in 0..NR_MMS {
                kernel.exit(kernel.mm(number), &Limits::DEFAULT, &areas());
            }
        });
        for number in 0..NR_MMS {
            if kernel.nr_tables(kernel.mm(number)) != [0; 4] {
                return Err(format!("tables are left: {:?}", kernel.nr_tables(kernel.mm(number))));
            }
        }
        let held = kernel.ledger().nr_held();
        if !self.leaks && (held != self.nr_devices || kernel.batches_lent() != 0) {
            return Err(format!(
                "{held} pages ({} of devices), {} batch pages leak",
                self.nr_devices,
                kernel.batches_lent()
            ));
        }
        Ok(())
    }

    pub(crate) fn mm(&self, number: u8) -> (usize, &'a PaperMm) {
        let number = usize::from(number) % NR_MMS;
        (number, self.kernel.mm(number))
    }

    pub(crate) fn place(&self, number: u8) -> (u64, Level, Backing) {
        self.places[usize::from(number) % self.places.len()]
    }

    pub(crate) fn address(&self, address: Address) -> u64 {
        let (place, level, _) = self.place(address.place);
        match address.bias % 12 {
            0..5 => place,
            5 => place + level.entry_span(),
            6 => place & !(2 * MIB - 1),
            7 => place + address.any % (4 * MIB),
            8 => [0, 1 << 47, 1 << 56, u64::MAX, 1 << 63][usize::try_from(address.any % 5).unwrap_or(0)],
            9 => 4 * GIB,
            10 => GIB,
            _ => address.any,
        }
    }

    pub(crate) fn range(&self, nonsense: Nonsense) -> VirtRange {
        let (one, other) = (self.address(nonsense.ends.0), self.address(nonsense.ends.1));
        let level = level(nonsense.level);
        match nonsense.how % 24 {
            0 => range(0, 1 << 47),
            1 | 5..12 => areas()[usize::from(nonsense.level) % 5].range,
            2 => VirtRange::of_entry(level, one),
            3 => range(GIB, 4 * GIB).within_entry(level, one),
            4 => range(0, 1 << 56),
            _ => VirtRange::new(one.min(other), one.max(other)).unwrap_or(range(GIB, GIB + 2 * PAGE)),
        }
    }

    pub(crate) fn vma(&mut self, vma: NonsenseVma) -> Vma<Backing> {
        let (range, mut backing) = (self.range(vma.range), backing(vma.backing));
        // What backs an area is what the kernel says; most often it says the truth.
        if vma.backing < 230
            && let Some((.., really)) = self.places.iter().find(|(address, ..)| range.contains(*address))
        {
            backing = *really;
        }
        self.leaks |= self.places.iter().any(|(address, _, really)| {
            range.contains(*address) && (*really == Backing::Device) != (backing == Backing::Device)
        });
        let kind = if vma.kind { VmaKind::Normal } else { VmaKind::PfnMap };
        Vma { range, kind, area: backing }
    }

    pub(crate) fn open(&mut self, number: u8) -> Option<&mut Open<'a>> {
        let nr_open = self.gathers.len();
        (nr_open > 0).then(|| &mut self.gathers[usize::from(number) % nr_open])
    }

    pub(crate) fn take(&mut self, number: u8) -> Option<Open<'a>> {
        let nr_open = self.gathers.len();
        (nr_open > 0).then(|| self.gathers.swap_remove(usize::from(number) % nr_open))
    }

    pub(crate) fn is_empty(&self, mm: usize, address: u64) -> bool {
        self.kernel.lookup(self.kernel.mm(mm), address).value.is_empty()
    }

    /// What a zap over `range` promises to be gone.
    pub(crate) fn in_range(&self, mm: usize, ranges: &[VirtRange]) -> (BTreeSet<u64>, BTreeSet<u64>) {
        let places = self.places.iter().map(|(address, ..)| *address);
        let covered: BTreeSet<u64> =
            places.filter(|place| ranges.iter().any(|range| range.contains(*place))).collect();
        let mapped = covered.iter().copied().filter(|place| !self.is_empty(mm, *place)).collect();
        (covered, mapped)
    }

    /// Notes what a zap by gather `number` has cleared, whether it unwound or not.
    pub(crate) fn zapped(&mut self, number: u8, covered: BTreeSet<u64>, mapped: &BTreeSet<u64>, whole: bool) {
        let Some(mm) = self.open(number).map(|open| open.mm) else { return };
        let gone: BTreeSet<u64> = covered.into_iter().filter(|place| self.is_empty(mm, *place)).collect();
        let Some(open) = self.open(number) else { return };
        open.cleared.extend(gone.intersection(mapped));
        if whole {
            open.covered.extend(gone);
        }
    }

    pub(crate) fn promise(&mut self, mm: usize, gone: BTreeSet<u64>) {
        self.promised[mm].extend(gone);
    }

    /// A page is mapped there, so nothing is promised of the place any more.
    pub(crate) fn mapped(&mut self, mm: usize, address: u64) {
        self.promised[mm].remove(&address);
        for open in self.gathers.iter_mut().filter(|open| open.mm == mm) {
            open.covered.remove(&address);
            open.cleared.remove(&address);
        }
        for taken in self.batches.iter_mut().flat_map(|batch| &mut batch.taken) {
            taken.still_gone &= (taken.mm, taken.address) != (mm, address);
        }
    }

    pub(crate) fn view(&self, mm: u8, place: u8, number: u8) -> Option<TableView<'a>> {
        self.kernel.find_table(self.mm(mm).1, self.place(place).0, level(number))
    }

    pub(crate) fn is_open(&self, mm: usize) -> bool {
        self.gathers.iter().any(|open| open.mm == mm)
    }
}
