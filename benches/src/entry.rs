//! The rows of the table: who tears a shape down, and one sample of it.
#![expect(unsafe_code, reason = "loads address spaces into CPUs that are only played")]

use core::time::Duration;
use std::time::Instant;

use mmu_gather::Limits;
use mmu_gather::tlb::OnlineCpus;

use crate::engine;
use crate::floors::{self, Clear};
use crate::peers::{self, Multiarch, Tables, Told};
use mmu_measured::machine::{AtUnmap, Batched, Combined, Counting, Locked, Machine};
use mmu_measured::memory::Memory;
use mmu_measured::shape::{Shape, Workload};
use mmu_measured::space::Space;

/// Measures pieces of work and adds them up.
pub trait Meter {
    /// Does `work` and adds what it cost.
    fn measure<R>(&mut self, work: impl FnOnce() -> R) -> R;
}

/// Adds up time.
#[derive(Debug, Default)]
pub struct Clock {
    /// The sum.
    pub elapsed: Duration,
}

impl Clock {
    /// Nanoseconds for each of `leaves`.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "fewer than 2^52 leaves")]
    pub fn nanoseconds_for(&self, leaves: u64) -> f64 {
        self.elapsed.as_secs_f64() * 1e9 / leaves as f64
    }
}

impl Meter for Clock {
    #[inline]
    fn measure<R>(&mut self, work: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = work();
        self.elapsed += start.elapsed();
        result
    }
}

/// Which of the engine's paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// `exit_mmap`: plain stores.
    Exit,
    /// One munmap of everything, other CPUs online: locked exchanges. W7: a munmap a page.
    Munmap,
    /// One munmap an area.
    MunmapEach,
    /// As [`Munmap`](Self::Munmap), this CPU being the only one: plain stores.
    OneCpu,
    /// One madvise(MADV_DONTNEED) an area.
    Discard,
}

/// How frames are counted; see [`mmu_measured::machine`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counts {
    /// Both counts after the flush.
    Batched,
    /// The map count as the entry is cleared.
    AtUnmap,
    /// One count for both.
    Combined,
    /// Both with locked instructions.
    Locked,
}

/// A row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Clears entries and appends their frames.
    ClearOnly,
    /// Counts, free list and tables, too.
    Floor(Clear),
    /// The same for one call at a time, with what the protocol asks of whoever has other CPUs.
    Protocol,
    /// The engine.
    Engine(Path, Counts),
    /// `x86_64`.
    X86_64(Told, Tables),
    /// `page_table_multiarch`; tables freed by dropping the page table.
    Multiarch(Told, Tables),
}

impl Entry {
    /// The rows of the main table, floors first.
    pub const MAIN: [Self; 9] = [
        Self::ClearOnly,
        Self::PLAIN,
        Self::EXCHANGE,
        Self::Protocol,
        Self::Engine(Path::Exit, Counts::Batched),
        Self::Engine(Path::OneCpu, Counts::Batched),
        Self::Engine(Path::Munmap, Counts::Batched),
        Self::X86_64(Told::Areas, Tables::Freed),
        Self::Multiarch(Told::Areas, Tables::Freed),
    ];
    /// What the same costs under other conditions.
    pub const VARIANTS: [Self; 9] = [
        Self::Engine(Path::MunmapEach, Counts::Batched),
        Self::Engine(Path::Exit, Counts::Combined),
        Self::Engine(Path::Exit, Counts::AtUnmap),
        Self::Engine(Path::Munmap, Counts::AtUnmap),
        Self::Engine(Path::Munmap, Counts::Locked),
        Self::X86_64(Told::Areas, Tables::Kept),
        Self::X86_64(Told::Pages, Tables::Freed),
        Self::Multiarch(Told::Areas, Tables::Kept),
        Self::Multiarch(Told::Pages, Tables::Freed),
    ];
    /// The engine alone.
    pub const ENGINE: [Self; 3] = [
        Self::Engine(Path::Exit, Counts::Batched),
        Self::Engine(Path::Munmap, Counts::Batched),
        Self::Engine(Path::MunmapEach, Counts::Batched),
    ];
    /// The rows of the table of calls.
    pub const CALLS: [Self; 6] = [
        Self::Protocol,
        Self::Engine(Path::Munmap, Counts::Batched),
        Self::Engine(Path::Discard, Counts::Batched),
        Self::X86_64(Told::Areas, Tables::Freed),
        Self::X86_64(Told::Areas, Tables::Kept),
        Self::Multiarch(Told::Areas, Tables::Kept),
    ];
    /// The rows of the table of calls whose table goes.
    pub const CALLS_WITH_TABLE: [Self; 3] = [
        Self::Protocol,
        Self::Engine(Path::Munmap, Counts::Batched),
        Self::X86_64(Told::Areas, Tables::Freed),
    ];
    /// The rows of the table by kinds of entries.
    pub const KINDS: [Self; 5] = [
        Self::PLAIN,
        Self::EXCHANGE,
        Self::Engine(Path::Exit, Counts::Batched),
        Self::Engine(Path::Munmap, Counts::Batched),
        Self::Engine(Path::Discard, Counts::Batched),
    ];
    /// The floor with plain stores: what exit is held against.
    pub const PLAIN: Self = Self::Floor(Clear::Plain);
    /// The floor with locked exchanges: what munmap is held against.
    pub const EXCHANGE: Self = Self::Floor(Clear::Exchange);

    /// Whether the row means anything for `workload`.
    #[must_use]
    pub const fn applies_to(self, workload: Workload) -> bool {
        let table_stays = matches!(workload, Workload::W7OnePage | Workload::Calls(_));
        let one_by_one = table_stays || matches!(workload, Workload::CallsWithTable(_));
        match self {
            Self::Engine(Path::Exit, _) => !one_by_one,
            Self::Protocol => one_by_one,
            Self::Engine(Path::Discard, _) | Self::X86_64(_, Tables::Kept) if one_by_one => table_stays,
            Self::Engine(Path::Discard, _) => matches!(workload, Workload::Kinds(_)),
            Self::Engine(Path::MunmapEach, _) => matches!(workload, Workload::W4Areas),
            // Elsewhere every page of the areas exists.
            Self::X86_64(Told::Pages, _) | Self::Multiarch(Told::Pages, _) => {
                matches!(workload, Workload::W3Sparse)
            }
            // Dropping the page table would free what stays.
            Self::Multiarch(_, Tables::Freed) => !one_by_one,
            Self::Multiarch(..) if one_by_one => table_stays,
            _ => true,
        }
    }

    /// The row's name.
    #[must_use]
    pub fn name(self) -> String {
        let tables = |tables| if tables == Tables::Kept { ", tables kept" } else { "" };
        let told = |told| if told == Told::Pages { ", told the pages" } else { "" };
        match self {
            Self::ClearOnly => "floor: plain clear, append".into(),
            Self::Floor(Clear::Plain) => "floor: + counts, free list, tables".into(),
            Self::Floor(Clear::Exchange) => "floor: same, exchange per entry".into(),
            Self::Protocol => "floor: same, walk, locks, generation".into(),
            Self::Engine(path, counts) => {
                let path = match path {
                    Path::Exit => "exit",
                    Path::Munmap => "munmap",
                    Path::MunmapEach => "a munmap an area",
                    Path::OneCpu => "munmap, one CPU online",
                    Path::Discard => "DONTNEED",
                };
                let counts = match counts {
                    Counts::Batched => "",
                    Counts::AtUnmap => ", map count at the entry",
                    Counts::Combined => ", one combined count",
                    Counts::Locked => ", two locked counts",
                };
                format!("mmu-gather: {path}{counts}")
            }
            Self::X86_64(what, kept) => format!("x86_64 0.15.5{}{}", told(what), tables(kept)),
            Self::Multiarch(what, kept) => {
                format!("page_table_multiarch 0.6.2{}{}", told(what), tables(kept))
            }
        }
    }
}

/// Takes samples: one machine for each way of counting, so that batch pages are there as in a
/// kernel that runs.
#[derive(Debug)]
pub struct Sampler<'m> {
    batched: [Machine<'m, Batched>; 2],
    at_unmap: Machine<'m, AtUnmap>,
    combined: Machine<'m, Combined>,
    locked: Machine<'m, Locked>,
    limits: Limits,
}

impl<'m> Sampler<'m> {
    /// A sampler over `memory`, with the engine's default capacities.
    #[must_use]
    pub fn new(memory: &'m Memory) -> Self {
        Self {
            batched: [Machine::new(memory, OnlineCpus::Many), Machine::new(memory, OnlineCpus::One)],
            at_unmap: Machine::new(memory, OnlineCpus::Many),
            combined: Machine::new(memory, OnlineCpus::Many),
            locked: Machine::new(memory, OnlineCpus::Many),
            limits: Limits::DEFAULT,
        }
    }

    /// Maps `shape`, has `entry` tear it down under `meter`, and checks that all was freed.
    ///
    /// # Panics
    /// If it was not.
    pub fn sample(&self, shape: &Shape, entry: Entry, meter: &mut impl Meter) {
        match entry {
            Entry::Engine(path, counts) => match (counts, path) {
                (Counts::Batched, Path::OneCpu) => self.engine(&self.batched[1], shape, path, meter),
                (Counts::Batched, _) => self.engine(&self.batched[0], shape, path, meter),
                (Counts::AtUnmap, _) => self.engine(&self.at_unmap, shape, path, meter),
                (Counts::Combined, _) => self.engine(&self.combined, shape, path, meter),
                (Counts::Locked, _) => self.engine(&self.locked, shape, path, meter),
            },
            Entry::Multiarch(told, tables) => self.multiarch(shape, told, tables, meter),
            Entry::ClearOnly | Entry::Floor(_) | Entry::Protocol | Entry::X86_64(..) => {
                self.plain(shape, entry, meter)
            }
        }
    }

    fn engine<C: Counting>(
        &self,
        machine: &Machine<'m, C>,
        shape: &Shape,
        path: Path,
        meter: &mut impl Meter,
    ) {
        let mut space = Space::new(machine, shape);
        // SAFETY: the space is boxed, and left below before it goes.
        unsafe { machine.load(&space.mm) };
        if path == Path::Exit {
            machine.go_lazy();
        }
        for round in 0..shape.repeats {
            if round > 0 {
                space.refill(machine);
            }
            meter.measure(|| match path {
                Path::Exit => engine::exit(machine, &space, &self.limits),
                Path::Discard => engine::discard(machine, &space, &self.limits),
                _ if shape.is_one_by_one() => engine::munmap_each(machine, &space, &self.limits),
                Path::Munmap | Path::OneCpu => engine::munmap(machine, &space, &self.limits),
                Path::MunmapEach => engine::munmap_each(machine, &space, &self.limits),
            });
            let tables = if path == Path::Discard { 0 } else { space.nr_tables() };
            space.check(machine, shape.leaves.len() as u64, tables);
        }
        machine.leave();
    }

    fn plain(&self, shape: &Shape, entry: Entry, meter: &mut impl Meter) {
        let machine = &self.batched[0];
        let mut space = Space::new(machine, shape);
        for round in 0..shape.repeats {
            if round > 0 {
                space.refill(machine);
            }
            meter.measure(|| match entry {
                Entry::ClearOnly => floors::clear_only(&space),
                Entry::Floor(clear) => floors::tear_down(machine, &space, clear),
                Entry::Protocol => floors::unmap_one_by_one(machine, &space),
                Entry::X86_64(told, tables) => peers::x86_64(machine, &space, told, tables),
                Entry::Engine(..) | Entry::Multiarch(..) => {}
            });
            let pages = if entry == Entry::ClearOnly { 0 } else { shape.leaves.len() as u64 };
            let kept = matches!(entry, Entry::ClearOnly | Entry::X86_64(_, Tables::Kept));
            space.check(machine, pages, if kept { 0 } else { space.nr_tables() });
        }
    }

    fn multiarch(&self, shape: &Shape, told: Told, tables: Tables, meter: &mut impl Meter) {
        let machine = &self.batched[0];
        let mut peer = Multiarch::new(machine, shape);
        if tables == Tables::Freed {
            let space = meter.measure(|| {
                peer.unmap(told);
                peer.drop_tables()
            });
            // The root, too.
            space.check(machine, shape.leaves.len() as u64, space.nr_tables() + 1);
            return;
        }
        for round in 0..shape.repeats {
            if round > 0 {
                peer.space.refill(machine);
            }
            meter.measure(|| peer.unmap(told));
            peer.space.check(machine, shape.leaves.len() as u64, 0);
        }
        let _ = peer.drop_tables();
    }
}
