//! The workloads: which addresses are mapped, to which frames.

use mmu_gather::pagetable::{Level, VirtRange};
use rand::RngExt;

use crate::memory::{DATA_BYTES, Memory, Order};
use crate::shuffle::{random, shuffle};

const START: u64 = 0x10_0000_0000;
const MIB: u64 = 1 << 20;
/// Below this many last-level tables, all tables fit into the memory for them.
const MOST_SPARSE: u64 = 1 << 20;

/// How large the workloads are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// As the table in README.md says.
    Full,
    /// A quarter, where memory is short.
    Quarter,
    /// A few thousand leaves: for trying whether everything runs.
    Small,
    /// A few hundred, which can be stepped through.
    Tiny,
}

impl Size {
    /// The largest size for which this machine has the memory: full workloads touch about 3 GiB at
    /// the same time.
    #[must_use]
    pub fn for_this_machine() -> Self {
        let available = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        });
        if available.unwrap_or(0) > 6 << 20 { Self::Full } else { Self::Quarter }
    }
}

/// A workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// 1 GiB of 4 KiB pages, frames in order.
    W1Dense,
    /// 64 MiB of 4 KiB pages, frames in order.
    W2Dense64,
    /// One page in each 2 MiB, over 128 GiB.
    W3Sparse,
    /// 10,000 areas of 4 to 64 pages, one at a random place in each 1 MiB.
    W4Areas,
    /// 64 GiB of 2 MiB leaves.
    W5Huge,
    /// As W1, frames a random sample in random order, tables in random order.
    W6Shuffled,
    /// One page at a time, in random order: the odd pages of 2 MiB whose even pages stay; 100,000
    /// times.
    W7OnePage,
    /// Calls of so many pages in random order, in a table that stays: after each area a page stays.
    Calls(usize),
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::W1Dense,
        Self::W2Dense64,
        Self::W3Sparse,
        Self::W4Areas,
        Self::W5Huge,
        Self::W6Shuffled,
        Self::W7OnePage,
    ];

    /// Calls of few pages, as programs make most: munmap and DONTNEED of 1 to 64 pages.
    pub const CALLS: [Self; 8] = [
        Self::Calls(1),
        Self::Calls(2),
        Self::Calls(4),
        Self::Calls(8),
        Self::Calls(16),
        Self::Calls(33),
        Self::Calls(64),
        Self::Calls(256),
    ];

    /// Its short name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::W1Dense => "W1",
            Self::W2Dense64 => "W2",
            Self::W3Sparse => "W3",
            Self::W4Areas => "W4",
            Self::W5Huge => "W5",
            Self::W6Shuffled => "W6",
            Self::W7OnePage => "W7",
            Self::Calls(_) => "calls",
        }
    }

    /// Its layout.
    #[must_use]
    pub fn shape(self, size: Size) -> Shape {
        let pick = |full: u64, small: u64| match size {
            Size::Full => full,
            Size::Quarter => full / 4,
            Size::Small => small,
            Size::Tiny => small.div_ceil(4),
        };
        match self {
            Self::W1Dense => Shape::dense(self, pick(1024 * MIB, 8 * MIB), Order::Ascending),
            Self::W2Dense64 => Shape::dense(self, pick(64 * MIB, 8 * MIB), Order::Ascending),
            Self::W3Sparse => Shape::sparse(self, pick(65536, 16)),
            Self::W4Areas => Shape::areas(self, pick(10_000, 40), u64::MAX),
            Self::W5Huge => Shape::huge(self, pick(32768, 1024)),
            Self::W6Shuffled => Shape::dense(self, pick(1024 * MIB, 8 * MIB), Order::Shuffled),
            Self::W7OnePage if size == Size::Tiny => Shape::calls(self, 1, 1, 64),
            Self::W7OnePage => Shape::calls(self, pick(100_000 / 256 + 1, 1), 1, 256),
            Self::Calls(pages) => Shape::calls(self, pick(400, 1), pages, 256),
        }
    }

    /// Its layout with as many leaves as asked for; `None` if there are not so many frames. W7 and
    /// calls have no other size than their own.
    #[must_use]
    pub fn of_leaves(self, leaves: u64) -> Option<Shape> {
        // W6 samples its frames from 64 times as many.
        let frames_a_leaf = match self {
            Self::W5Huge => 512,
            Self::W6Shuffled => 64,
            _ => 1,
        };
        let most_tables = if self == Self::W3Sparse { leaves } else { 0 };
        let fits = leaves.checked_mul(frames_a_leaf).is_some_and(|frames| frames <= DATA_BYTES >> 12)
            && most_tables < MOST_SPARSE;
        if !fits || leaves == 0 {
            return None;
        }
        match self {
            Self::W1Dense | Self::W2Dense64 => Some(Shape::dense(self, leaves << 12, Order::Ascending)),
            Self::W3Sparse => Some(Shape::sparse(self, leaves)),
            Self::W4Areas => Some(Shape::areas(self, u64::MAX, leaves)),
            Self::W5Huge => Some(Shape::huge(self, leaves)),
            Self::W6Shuffled => Some(Shape::dense(self, leaves << 12, Order::Shuffled)),
            Self::W7OnePage | Self::Calls(_) => None,
        }
    }
}

/// One page of a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Where it is mapped.
    pub address: u64,
    /// Physical address of its (first) frame.
    pub physical: u64,
}

/// What is unmapped, and what stays.
#[derive(Debug)]
pub struct Shape {
    /// Which workload it is.
    pub workload: Workload,
    /// Level of the tables that hold the leaves.
    pub level: Level,
    /// The areas that go; ascending, but for W7 and calls, which take one after the other in this
    /// order.
    pub areas: Vec<VirtRange>,
    /// Their pages; ascending within an area.
    pub leaves: Vec<Leaf>,
    /// 2 MiB leaves among them, where the others are 4 KiB; ascending.
    pub blocks: Vec<Leaf>,
    /// Pages that stay.
    pub staying: Vec<Leaf>,
    /// The order in which the allocator hands out tables.
    pub tables: Order,
    /// How often the leaves are mapped again and unmapped again, for one sample.
    pub repeats: u64,
}

impl Shape {
    /// Whether each area goes by a call of its own, in a table that stays.
    #[must_use]
    pub const fn is_one_by_one(&self) -> bool {
        !self.staying.is_empty()
    }

    /// Leaves torn down for one sample.
    #[must_use]
    pub const fn nr_leaves(&self) -> u64 {
        (self.leaves.len() + self.blocks.len()) as u64 * self.repeats
    }

    /// A shape in which nothing is mapped yet, by leaves of `level`.
    #[must_use]
    pub const fn empty(workload: Workload, level: Level) -> Self {
        Self {
            workload,
            level,
            areas: Vec::new(),
            leaves: Vec::new(),
            blocks: Vec::new(),
            staying: Vec::new(),
            tables: Order::Ascending,
            repeats: 1,
        }
    }

    fn dense(workload: Workload, bytes: u64, order: Order) -> Self {
        let pages = bytes >> 12;
        let mut frames: Vec<u64> = (0..pages).map(frame).collect();
        if order == Order::Shuffled {
            // A random sample of 64 times as many, in random order.
            let sample = rand::seq::index::sample(&mut random(), frames.len() * 64, frames.len());
            frames = sample.into_iter().map(|number| frame(number as u64)).collect();
        }
        Self {
            areas: vec![area(START, bytes)],
            leaves: (0..pages)
                .zip(frames)
                .map(|(page, physical)| Leaf { address: START + (page << 12), physical })
                .collect(),
            tables: order,
            ..Self::empty(workload, Level::Pte)
        }
    }

    fn sparse(workload: Workload, tables: u64) -> Self {
        let mut random = random();
        let leaves = (0..tables).map(|table| Leaf {
            address: START + (table << 21) + (random.random_range(0..512) << 12),
            physical: frame(table),
        });
        let leaves = leaves.collect();
        Self { areas: vec![area(START, tables << 21)], leaves, ..Self::empty(workload, Level::Pte) }
    }

    /// `count` areas, or fewer if those have `most_leaves` pages.
    fn areas(workload: Workload, count: u64, most_leaves: u64) -> Self {
        let mut random = random();
        let mut shape = Self::empty(workload, Level::Pte);
        for slot in 0..count {
            let left = most_leaves - shape.leaves.len() as u64;
            if left == 0 {
                break;
            }
            let pages = random.random_range(4..=64).min(left);
            let first = random.random_range(0..=256 - pages);
            let start = START + slot * MIB + (first << 12);
            shape.areas.push(area(start, pages << 12));
            for page in 0..pages {
                let physical = frame(shape.leaves.len() as u64);
                shape.leaves.push(Leaf { address: start + (page << 12), physical });
            }
        }
        shape
    }

    fn huge(workload: Workload, blocks: u64) -> Self {
        let leaves =
            (0..blocks).map(|block| Leaf { address: START + (block << 21), physical: frame(block << 9) });
        let leaves = leaves.collect();
        Self { areas: vec![area(START, blocks << 21)], leaves, ..Self::empty(workload, Level::Pmd) }
    }

    /// Areas of `pages` pages in 2 MiB, at most `most` of them, and a page that stays after each.
    fn calls(workload: Workload, repeats: u64, pages: usize, most: usize) -> Self {
        let all: Vec<Leaf> =
            (0..512).map(|page| Leaf { address: START + (page << 12), physical: frame(page) }).collect();
        let (staying, mut parts): (Vec<&[Leaf]>, Vec<&[Leaf]>) =
            all.chunks_exact(pages + 1).map(|part| part.split_at(1)).unzip();
        shuffle(&mut parts);
        parts.truncate(most);
        let bytes = (pages as u64) << 12;
        let areas = parts.iter().map(|part| area(part[0].address, bytes)).collect();
        let [staying, leaves] = [staying.concat(), parts.concat()];
        Self { areas, leaves, staying, repeats, ..Self::empty(workload, Level::Pte) }
    }
}

fn frame(number: u64) -> u64 {
    debug_assert!(number < DATA_BYTES >> 12, "frame {number} is beyond memory");
    Memory::data_start() + (number << 12)
}

fn area(start: u64, bytes: u64) -> VirtRange {
    VirtRange::new(start, start + bytes).expect("workloads lie in user space")
}
