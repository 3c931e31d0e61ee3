//! The workloads: which addresses are mapped, to which frames.

use mmu_gather::pagetable::{Level, VirtRange};
use rand::RngExt;
use x86_64::structures::paging::PageTableFlags;

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
    /// Calls of so many pages in random order, each alone in its table, which goes too; the table
    /// above stays.
    CallsWithTable(usize),
    /// As W2, with entries as programs really leave them.
    Kinds(Kind),
}

/// What is in the entries of the pages that go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Programs have written to each page.
    Written,
    /// Programs have read each page, and may not write: most pages of files.
    ReadOnly,
    /// As [`Written`](Self::Written), but one page in each line of eight entries is read-only.
    OneReadOnly,
    /// Each page may be written and was only read.
    Clean,
    /// As [`Written`](Self::Written), and every second entry is empty.
    EverySecond,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Written, Self::ReadOnly, Self::OneReadOnly, Self::Clean, Self::EverySecond];

    /// What the table calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Written => "written",
            Self::ReadOnly => "read-only",
            Self::OneReadOnly => "one read-only in eight",
            Self::Clean => "writable, clean",
            Self::EverySecond => "every second empty",
        }
    }

    /// The flags of the entry for the page at `address`.
    pub(crate) fn flags(self, address: u64) -> PageTableFlags {
        let read = PageTableFlags::USER_ACCESSIBLE | PageTableFlags::ACCESSED;
        match self {
            Self::ReadOnly => read,
            Self::OneReadOnly if (address >> 12) % 8 == 3 => read,
            Self::Clean => read | PageTableFlags::WRITABLE,
            Self::Written | Self::OneReadOnly | Self::EverySecond => {
                read | PageTableFlags::WRITABLE | PageTableFlags::DIRTY
            }
        }
    }
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

    /// The same calls, each of all pages of a table, which goes with them.
    pub const CALLS_WITH_TABLE: [Self; 8] = [
        Self::CallsWithTable(1),
        Self::CallsWithTable(2),
        Self::CallsWithTable(4),
        Self::CallsWithTable(8),
        Self::CallsWithTable(16),
        Self::CallsWithTable(33),
        Self::CallsWithTable(64),
        Self::CallsWithTable(256),
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
            Self::CallsWithTable(_) => "calls with table",
            Self::Kinds(kind) => kind.name(),
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
            Self::CallsWithTable(pages) => Shape::calls_with_table(self, pick(400, 4), pages),
            Self::Kinds(kind) => Shape::kinds(self, kind, pick(64 * MIB, 8 * MIB)),
        }
    }

    /// Its layout with as many leaves as asked for; `None` if there are not so many frames. W7,
    /// calls and kinds have no other size than their own.
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
            Self::W7OnePage | Self::Calls(_) | Self::CallsWithTable(_) | Self::Kinds(_) => None,
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
    /// What is in the entries.
    pub kind: Kind,
    /// The order in which the allocator hands out tables.
    pub tables: Order,
    /// How often the leaves are mapped again and unmapped again, for one sample.
    pub repeats: u64,
}

impl Shape {
    /// Whether each area goes by a call of its own.
    #[must_use]
    pub const fn is_one_by_one(&self) -> bool {
        !self.staying.is_empty()
    }

    /// Whether the last-level table of each area goes with it, by a call of its own.
    #[must_use]
    pub const fn tables_go_one_by_one(&self) -> bool {
        matches!(self.workload, Workload::CallsWithTable(_))
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
            kind: Kind::Written,
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

    fn kinds(workload: Workload, kind: Kind, bytes: u64) -> Self {
        let mut shape = Self { kind, ..Self::dense(workload, bytes, Order::Ascending) };
        if kind == Kind::EverySecond {
            shape.leaves.retain(|leaf| (leaf.address >> 12).is_multiple_of(2));
        }
        shape
    }

    /// Areas of `pages` pages, each alone in its 2 MiB; in the next 2 MiB a page stays.
    fn calls_with_table(workload: Workload, repeats: u64, pages: usize) -> Self {
        const AREAS: u64 = 64;
        let bytes = (pages as u64) << 12;
        let mut starts: Vec<u64> = (0..AREAS).map(|number| START + (number << 22)).collect();
        let stays =
            |number| Leaf { address: START + (number << 22) + 2 * MIB, physical: frame((1 << 20) + number) };
        shuffle(&mut starts);
        let page = |address| Leaf { address, physical: frame((address - START) >> 12) };
        Self {
            areas: starts.iter().map(|start| area(*start, bytes)).collect(),
            leaves: starts.iter().flat_map(|start| (*start..start + bytes).step_by(4096).map(page)).collect(),
            staying: (0..AREAS).map(stays).collect(),
            repeats,
            ..Self::empty(workload, Level::Pte)
        }
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
