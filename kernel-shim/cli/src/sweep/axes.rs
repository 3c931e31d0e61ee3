//! What a sweep varies: one type an axis, each with its words on the command line and in reports.

use core::fmt;
use core::str::FromStr;

use mmu_gather::Limits;
use mmu_measured::shape::{Shape, Workload};
use serde::{Serialize, Serializer};

use crate::input::bundled::LAYOUTS;

/// Why a word names no value of an axis.
#[derive(Clone, Debug, thiserror::Error)]
#[error("expected {expected}")]
pub(crate) struct AxisError {
    expected: &'static str,
}

/// How many pages a gather may hold before it must flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Batch {
    /// The eight slots on the stack.
    Bundle,
    /// Those, and so many pages of so many slots.
    Pages {
        /// Batch pages.
        pages: u16,
        /// Slots used of each.
        slots: u16,
    },
    /// As many pages as it takes.
    Unlimited,
    /// [`Limits::for_pages`] of the pages that are mapped.
    Adaptive,
}

impl Batch {
    /// Those the default sweep tries, by what they hold.
    pub(crate) const ALL: [Self; 9] = [
        Self::Bundle,
        Self::Pages { pages: 1, slots: 64 },
        Self::Pages { pages: 1, slots: 126 },
        Self::Pages { pages: 1, slots: 254 },
        Self::Pages { pages: 1, slots: 510 },
        Self::Pages { pages: 2, slots: 510 },
        Self::Pages { pages: 19, slots: 510 },
        Self::Unlimited,
        Self::Adaptive,
    ];

    /// The limits of a gather that is to tear down `nr_pages`.
    #[must_use]
    pub(crate) const fn limits(self, nr_pages: u64) -> Limits {
        match self {
            Self::Bundle => Limits::DEFAULT.with_batch_pages(0),
            Self::Pages { pages, slots } => Limits::DEFAULT.with_batch_pages(pages).with_batch_slots(slots),
            Self::Unlimited => Limits::DEFAULT.with_batch_pages(u16::MAX),
            Self::Adaptive => Limits::for_pages(nr_pages),
        }
    }

    /// What an embedder writes to have it.
    #[must_use]
    pub(crate) fn in_code(self) -> String {
        match self {
            Self::Adaptive => String::from("Limits::for_pages"),
            fixed if fixed.limits(0) == Limits::DEFAULT => String::from("Limits::DEFAULT"),
            fixed => {
                let Limits { batch_pages, batch_slots, .. } = fixed.limits(0);
                format!("Limits::DEFAULT.with_batch_pages({batch_pages}).with_batch_slots({batch_slots})")
            }
        }
    }
}

impl FromStr for Batch {
    type Err = AxisError;

    fn from_str(word: &str) -> Result<Self, AxisError> {
        let error = AxisError {
            expected: "8 (the slots on the stack), 9 to 510 slots, PAGESxSLOTS such as 19x510 (1 to 999 pages of 2 to 510 \
                       slots), unlimited, or adaptive",
        };
        match word {
            "8" => return Ok(Self::Bundle),
            "unlimited" => return Ok(Self::Unlimited),
            "adaptive" => return Ok(Self::Adaptive),
            _ => {}
        }
        let (pages, slots, least) = match word.split_once('x') {
            Some((pages, slots)) => (pages.parse(), slots.parse(), 2),
            None => (Ok(1), word.parse(), 9),
        };
        match (pages, slots) {
            (Ok(pages @ 1..=999), Ok(slots @ 2..=510)) if slots >= least => Ok(Self::Pages { pages, slots }),
            _ => Err(error),
        }
    }
}

impl fmt::Display for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bundle => f.write_str("8"),
            Self::Pages { pages: 1, slots } if *slots > 8 => write!(f, "{slots}"),
            Self::Pages { pages, slots } => write!(f, "{pages}x{slots}"),
            Self::Unlimited => f.write_str("unlimited"),
            Self::Adaptive => f.write_str("adaptive"),
        }
    }
}

/// Which requests for a batch page are refused, counted from the start of each teardown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refuse {
    /// None.
    Never,
    /// Every so many-th.
    Every(u64),
    /// All.
    Always,
}

impl Refuse {
    pub(crate) const ALL: [Self; 3] = [Self::Never, Self::Every(7), Self::Always];

    /// Whether the `number`-th request is refused, counted from 1.
    #[must_use]
    #[inline]
    pub(crate) const fn refuses(self, number: u64) -> bool {
        match self {
            Self::Never => false,
            Self::Every(every) => number.is_multiple_of(every),
            Self::Always => true,
        }
    }
}

impl FromStr for Refuse {
    type Err = AxisError;

    fn from_str(word: &str) -> Result<Self, AxisError> {
        match (word, word.parse()) {
            ("never", _) => Ok(Self::Never),
            ("always", _) => Ok(Self::Always),
            (_, Ok(every @ 2..)) => Ok(Self::Every(every)),
            _ => {
                Err(AxisError { expected: "never, always, or N from 2 on: every N-th batch page is refused" })
            }
        }
    }
}

impl fmt::Display for Refuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("never"),
            Self::Every(every) => write!(f, "{every}"),
            Self::Always => f.write_str("always"),
        }
    }
}

/// How many pages are torn down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct NrPages(pub u64);

impl NrPages {
    pub(crate) const ALL: [Self; 11] = [
        Self(1),
        Self(2),
        Self(4),
        Self(8),
        Self(32),
        Self(33),
        Self(34),
        Self(512),
        Self(513),
        Self(32 << 10),
        Self(256 << 10),
    ];
    /// Four GiB of 4 KiB pages.
    const MOST: u64 = 1 << 20;
}

impl NrPages {
    /// With its unit.
    pub(crate) fn in_words(self) -> String {
        if self.0 == 1 { String::from("1 page") } else { format!("{self} pages") }
    }
}

impl FromStr for NrPages {
    type Err = AxisError;

    fn from_str(word: &str) -> Result<Self, AxisError> {
        let (digits, shift) = match (word.strip_suffix("Ki"), word.strip_suffix("Mi")) {
            (Some(digits), _) => (digits, 10),
            (_, Some(digits)) => (digits, 20),
            _ => (word, 0),
        };
        let number = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
        match number {
            Some(number @ 1..=Self::MOST) => Ok(Self(number)),
            _ => Err(AxisError { expected: "a number of pages from 1 to 1Mi, such as 513 or 32Ki" }),
        }
    }
}

impl fmt::Display for NrPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 >= 4096 && self.0.is_multiple_of(1024) {
            write!(f, "{}Ki", self.0 >> 10)
        } else {
            write!(f, "{}", self.0)
        }
    }
}

/// How the pages lie: a workload of `mmu_measured`, of any size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Arrangement {
    /// W1: side by side, frames in order.
    Dense,
    /// W3: one in each 2 MiB.
    Sparse,
    /// W4: areas of 4 to 64 pages, one in each 1 MiB.
    Areas,
    /// W5: 2 MiB leaves.
    Huge,
    /// W6: as dense, frames and tables in random order.
    Shuffled,
    /// As in a captured process of this name.
    Process(&'static str),
}

impl Arrangement {
    pub(crate) const ALL: [Self; 5] = [Self::Dense, Self::Sparse, Self::Areas, Self::Huge, Self::Shuffled];

    const fn workload(self) -> Option<Workload> {
        match self {
            Self::Dense => Some(Workload::W1Dense),
            Self::Sparse => Some(Workload::W3Sparse),
            Self::Areas => Some(Workload::W4Areas),
            Self::Huge => Some(Workload::W5Huge),
            Self::Shuffled => Some(Workload::W6Shuffled),
            Self::Process(_) => None,
        }
    }

    /// So many pages laid out like this; `None` if the machine does not have enough frames, and for
    /// a process.
    #[must_use]
    pub(crate) fn shape(self, pages: NrPages) -> Option<Shape> {
        self.workload()?.of_leaves(pages.0)
    }
}

impl FromStr for Arrangement {
    type Err = AxisError;

    fn from_str(word: &str) -> Result<Self, AxisError> {
        let named = |arrangement: &Self| {
            let workload = arrangement.workload();
            arrangement.to_string() == word
                || workload.is_some_and(|workload| workload.name().eq_ignore_ascii_case(word))
        };
        let processes = LAYOUTS.iter().map(|bundled| Self::Process(bundled.name));
        Self::ALL.into_iter().chain(processes).find(named).ok_or(AxisError {
            expected: "dense (W1), sparse (W3), areas (W4), huge (W5), shuffled (W6), or a bundled process such as \
                       redis-server",
        })
    }
}

impl fmt::Display for Arrangement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dense => "dense",
            Self::Sparse => "sparse",
            Self::Areas => "areas",
            Self::Huge => "huge",
            Self::Shuffled => "shuffled",
            Self::Process(name) => name,
        })
    }
}

/// Which CPUs have the address space loaded: the one that tears down, and others that run in it or
/// are lazy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CpuMix {
    /// All of them. One means that no other is online, so that entries are cleared with plain
    /// stores.
    pub total: u32,
    /// Those that are lazy.
    pub lazy: u32,
}

impl CpuMix {
    pub(crate) const ALL: [Self; 3] =
        [Self { total: 1, lazy: 0 }, Self { total: 2, lazy: 0 }, Self { total: 8, lazy: 6 }];
}

impl FromStr for CpuMix {
    type Err = AxisError;

    fn from_str(word: &str) -> Result<Self, AxisError> {
        let (total, lazy) = match word.split_once("lazy") {
            Some((total, lazy)) => (total.parse(), lazy.parse()),
            None => (word.parse(), Ok(0)),
        };
        match (total, lazy) {
            (Ok(total @ 1..=64), Ok(lazy)) if lazy < total => Ok(Self { total, lazy }),
            _ => Err(AxisError {
                expected: "1 to 64 CPUs, or such as 8lazy6: of 8 CPUs 6 are lazy, and one at least is not",
            }),
        }
    }
}

impl fmt::Display for CpuMix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { total, lazy: 0 } => write!(f, "{total}"),
            Self { total, lazy } => write!(f, "{total}lazy{lazy}"),
        }
    }
}

/// More pages than this are flushed by dropping the whole context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ceiling {
    /// So many are still invalidated one by one.
    Pages(u64),
    /// Always one by one.
    Never,
}

impl Ceiling {
    pub(crate) const ALL: [Self; 5] =
        [Self::Pages(0), Self::Pages(1), Self::Pages(33), Self::Pages(512), Self::Never];

    /// As the engine wants it.
    #[must_use]
    pub(crate) const fn pages(self) -> u64 {
        match self {
            Self::Pages(pages) => pages,
            Self::Never => u64::MAX,
        }
    }
}

impl FromStr for Ceiling {
    type Err = AxisError;

    fn from_str(word: &str) -> Result<Self, AxisError> {
        match (word, word.parse()) {
            ("never", _) => Ok(Self::Never),
            (_, Ok(pages)) => Ok(Self::Pages(pages)),
            _ => Err(AxisError { expected: "a number of pages, or never: no flush drops the whole context" }),
        }
    }
}

impl fmt::Display for Ceiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pages(pages) => write!(f, "{pages}"),
            Self::Never => f.write_str("never"),
        }
    }
}

macro_rules! serialize_as_words {
    ($($axis:ty),*) => {$(
        impl Serialize for $axis {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    )*};
}
serialize_as_words!(Batch, Refuse, Arrangement, CpuMix, Ceiling);

impl Serialize for NrPages {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

/// Everything that is the same for the settings that are compared with one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Conditions {
    /// How the pages lie.
    pub shape: Arrangement,
    /// How many there are.
    pub size: NrPages,
    /// Who must be told.
    pub cpus: CpuMix,
    /// When pages are no longer invalidated one by one.
    pub ceiling: Ceiling,
    /// Which batch pages are refused.
    pub refuse: Refuse,
}

impl Conditions {
    /// What the default sweep departs from, one axis at a time.
    pub(crate) const BASE: Self = Self {
        shape: Arrangement::Dense,
        size: NrPages(32 << 10),
        cpus: CpuMix { total: 2, lazy: 0 },
        ceiling: Ceiling::Pages(33),
        refuse: Refuse::Never,
    };
}

impl fmt::Display for Conditions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { shape, size, cpus, ceiling, refuse } = self;
        write!(
            f,
            "{shape}, {}, CPUs {cpus}, ceiling {ceiling}, batch pages refused: {refuse}",
            size.in_words()
        )
    }
}
