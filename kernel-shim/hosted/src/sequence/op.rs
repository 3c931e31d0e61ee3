//! The language of sequences: what a CPU does next, in one line.
//!
//! ```text
//! 0 map m1 40000000+16 anon write
//! 2 touch 40003000 write
//! 0 unmap m1 40002000+4
//! ```
//!
//! The number in front is the CPU. `mN` is one of a few address spaces; a range is a hexadecimal
//! start and a number of pages. Fuzzing, replay and property tests all speak it.

use core::fmt;

use mmu_gather::pagetable::{PagingMode, VirtRange};

use crate::vocabulary::{Backing, Guarding, Rights, Supply, UserAccess};

/// Pages of the stack of a new program.
pub(crate) const STACK_PAGES: u64 = 16;

/// How many address spaces a sequence can have: more than a CPU has PCIDs for. Most sequences use
/// the first three.
pub const NR_MMS: u8 = 8;

/// One of the address spaces of a sequence: `0..NR_MMS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MmId(pub u8);

/// What a CPU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// mmap(2) where nothing is.
    Map(MmId, VirtRange, Backing, Rights),
    /// munmap(2).
    Unmap(MmId, VirtRange),
    /// madvise(MADV_DONTNEED).
    Discard(MmId, VirtRange),
    /// mprotect(2).
    Protect(MmId, VirtRange, Rights),
    /// mremap(2) to a fixed place, of the same length.
    Remap(MmId, VirtRange, u64),
    /// The move of a new program's stack, down by this many pages.
    MoveStack(MmId, VirtRange, u64),
    /// fork(2): the second becomes a copy of the first; what it was before exits.
    Fork(MmId, MmId),
    /// The last program leaves; a new address space takes its place.
    Exit(MmId),
    /// Reclaim takes the pages away, and goes on with the same addresses of the second.
    Reclaim(MmId, MmId, VirtRange),
    /// The program on the CPU reads, writes or fetches an instruction at the start of each page.
    Touch(VirtRange, UserAccess),
    /// The CPU runs programs of this address space.
    Switch(MmId),
    /// The CPU runs kernel threads only.
    Lazy,
    /// The CPU goes on with the program it had before it went lazy.
    Wake,
    /// Batch pages get scarce, or not.
    Batches(Supply),
    /// Page tables get scarce, or not.
    Tables(Supply),
    /// The CPU stays away for long at this seam of what it does next: others get whole operations
    /// done meanwhile.
    Preempt(u32),
    /// Everything before is done before anything after begins, and the checker compares all caches
    /// with memory.
    Sync,
    /// madvise(MADV_GUARD_INSTALL) or madvise(MADV_GUARD_REMOVE).
    Guard(MmId, VirtRange, Guarding),
    /// The CPU is switched off. Its steps are refused until it is on again.
    Offline,
    /// The CPU is switched on again.
    Online,
    /// Frames for programs' pages get scarce, or not.
    Frames(Supply),
    /// execve(2): the CPU goes on in a new address space, whose stack moves down by this many
    /// pages; what was there before exits.
    Exec(MmId, u64),
}

/// One line of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The CPU, modulo those the machine has.
    pub cpu: u16,
    /// What it does.
    pub op: Op,
}

impl Op {
    /// The word it begins with.
    #[must_use]
    pub const fn word(self) -> &'static str {
        Self::WORDS[self.number()]
    }

    /// The address space it names first, if it names one.
    #[must_use]
    pub const fn mm(self) -> Option<MmId> {
        match self {
            Self::Map(mm, ..)
            | Self::Unmap(mm, _)
            | Self::Discard(mm, _)
            | Self::Guard(mm, ..)
            | Self::Protect(mm, ..)
            | Self::Remap(mm, ..)
            | Self::MoveStack(mm, ..)
            | Self::Fork(mm, _)
            | Self::Exit(mm)
            | Self::Exec(mm, _)
            | Self::Reclaim(mm, ..)
            | Self::Switch(mm) => Some(mm),
            _ => None,
        }
    }

    /// The address space and the addresses whose areas or entries it changes, if it names any.
    pub(crate) const fn changes(self) -> Option<(MmId, VirtRange)> {
        match self {
            Self::Map(mm, range, ..)
            | Self::Unmap(mm, range)
            | Self::Discard(mm, range)
            | Self::Guard(mm, range, _)
            | Self::Protect(mm, range, _)
            | Self::Remap(mm, range, _)
            | Self::Reclaim(mm, _, range) => Some((mm, range)),
            _ => None,
        }
    }

    /// The end of the addresses it names; 0 if it names none.
    pub(crate) fn end(self) -> u64 {
        let end = self.range().map_or(0, VirtRange::end);
        match self {
            Self::Remap(_, range, to) => end.max(to.saturating_add(range.len_bytes())),
            _ => end,
        }
    }

    /// How many pages it names.
    pub(crate) const fn nr_pages(self) -> u64 {
        match self.range() {
            Some(range) => range.nr_pages(),
            None if matches!(self, Self::Exec(..)) => 2 * STACK_PAGES,
            None => 0,
        }
    }

    /// The addresses that it names first, if it names any.
    #[must_use]
    pub const fn range(self) -> Option<VirtRange> {
        match self {
            Self::Map(_, range, ..)
            | Self::Unmap(_, range)
            | Self::Discard(_, range)
            | Self::Guard(_, range, _)
            | Self::Protect(_, range, _)
            | Self::Remap(_, range, _)
            | Self::MoveStack(_, range, _)
            | Self::Reclaim(_, _, range)
            | Self::Touch(range, _) => Some(range),
            Self::Fork(..)
            | Self::Exec(..)
            | Self::Exit(_)
            | Self::Switch(_)
            | Self::Lazy
            | Self::Wake
            | Self::Batches(_)
            | Self::Tables(_)
            | Self::Frames(_)
            | Self::Preempt(_)
            | Self::Sync
            | Self::Offline
            | Self::Online => None,
        }
    }

    /// The words of all operations. New ones come last: saved bytes name operations by their
    /// number.
    pub const WORDS: [&'static str; 22] = [
        "map",
        "unmap",
        "discard",
        "protect",
        "remap",
        "movestack",
        "fork",
        "exit",
        "reclaim",
        "touch",
        "switch",
        "lazy",
        "wake",
        "batches",
        "tables",
        "sync",
        "preempt",
        "guard",
        "offline",
        "online",
        "frames",
        "exec",
    ];

    /// Which operation it is, as an index of [`WORDS`](Self::WORDS).
    #[must_use]
    pub const fn number(self) -> usize {
        match self {
            Self::Map(..) => 0,
            Self::Unmap(..) => 1,
            Self::Discard(..) => 2,
            Self::Protect(..) => 3,
            Self::Remap(..) => 4,
            Self::MoveStack(..) => 5,
            Self::Fork(..) => 6,
            Self::Exit(..) => 7,
            Self::Reclaim(..) => 8,
            Self::Touch(..) => 9,
            Self::Switch(..) => 10,
            Self::Lazy => 11,
            Self::Wake => 12,
            Self::Batches(..) => 13,
            Self::Tables(..) => 14,
            Self::Sync => 15,
            Self::Preempt(_) => 16,
            Self::Guard(..) => 17,
            Self::Offline => 18,
            Self::Online => 19,
            Self::Frames(..) => 20,
            Self::Exec(..) => 21,
        }
    }
}

struct Pages(VirtRange);

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}+{}", self.0.start(), self.0.nr_pages())
    }
}

impl fmt::Display for MmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "m{}", self.0)
    }
}

struct Scarcity(Supply);

impl fmt::Display for Scarcity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Supply::Always => f.write_str("always"),
            Supply::Never => f.write_str("never"),
            Supply::ExceptEvery(every) => write!(f, "{every}"),
            Supply::Nth(number) => write!(f, "nth-{number}"),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.cpu, self.op.word())?;
        match self.op {
            Op::Map(mm, range, backing, rights) => write!(f, " {mm} {} {backing} {rights}", Pages(range)),
            Op::Unmap(mm, range) | Op::Discard(mm, range) => write!(f, " {mm} {}", Pages(range)),
            Op::Protect(mm, range, rights) => write!(f, " {mm} {} {rights}", Pages(range)),
            Op::Remap(mm, range, to) => write!(f, " {mm} {} {to:x}", Pages(range)),
            Op::MoveStack(mm, range, pages) => write!(f, " {mm} {} {pages}", Pages(range)),
            Op::Fork(parent, child) => write!(f, " {parent} {child}"),
            Op::Exit(mm) | Op::Switch(mm) => write!(f, " {mm}"),
            Op::Reclaim(first, second, range) => write!(f, " {first} {second} {}", Pages(range)),
            Op::Touch(range, UserAccess::Read) => write!(f, " {} read", Pages(range)),
            Op::Touch(range, UserAccess::Write) => write!(f, " {} write", Pages(range)),
            Op::Touch(range, UserAccess::Fetch) => write!(f, " {} fetch", Pages(range)),
            Op::Batches(supply) | Op::Tables(supply) | Op::Frames(supply) => {
                write!(f, " {}", Scarcity(supply))
            }
            Op::Preempt(seams) => write!(f, " {seams}"),
            Op::Exec(mm, pages) => write!(f, " {mm} {pages}"),
            Op::Guard(mm, range, guarding) => write!(f, " {mm} {} {guarding}", Pages(range)),
            Op::Lazy | Op::Wake | Op::Sync | Op::Offline | Op::Online => Ok(()),
        }
    }
}

/// Reads one line.
///
/// # Errors
/// What was expected.
pub(crate) fn parse_step(line: &str) -> Result<Step, &'static str> {
    let mut words = line.split_ascii_whitespace();
    let cpu = words.next().and_then(|word| word.parse().ok()).ok_or("the number of a CPU")?;
    let word = words.next().ok_or("an operation")?;
    let op = parse_op(word, &mut words)?;
    if words.next().is_some() {
        return Err("nothing more on this line");
    }
    Ok(Step { cpu, op })
}

fn parse_op<'a>(word: &str, words: &mut impl Iterator<Item = &'a str>) -> Result<Op, &'static str> {
    Ok(match word {
        "map" => {
            let (mm, range) = (mm(words.next())?, range(words.next())?);
            let backing = match words.next() {
                Some("anon") => Backing::Anon,
                Some("huge") => Backing::Huge,
                Some("clean") => Backing::Clean,
                Some("private") => Backing::Private,
                Some("shared") => Backing::Shared,
                Some("pfn") => Backing::Pfn,
                Some("stack") => Backing::Stack,
                Some("giant") => Backing::Giant,
                Some("zeroes") => Backing::Zeroes,
                Some("folios") => Backing::Folios,
                _ => {
                    return Err("anon, huge, clean, private, shared, pfn, stack, giant, zeroes or folios");
                }
            };
            Op::Map(mm, range, backing, rights(words.next())?)
        }
        "unmap" => Op::Unmap(mm(words.next())?, range(words.next())?),
        "discard" => Op::Discard(mm(words.next())?, range(words.next())?),
        "protect" => Op::Protect(mm(words.next())?, range(words.next())?, rights(words.next())?),
        "remap" => Op::Remap(mm(words.next())?, range(words.next())?, address(words.next())?),
        "movestack" => {
            let (mm, range) = (mm(words.next())?, range(words.next())?);
            Op::MoveStack(mm, range, pages(words.next())?)
        }
        "fork" => Op::Fork(mm(words.next())?, mm(words.next())?),
        "exit" => Op::Exit(mm(words.next())?),
        "exec" => Op::Exec(mm(words.next())?, pages(words.next())?),
        "reclaim" => Op::Reclaim(mm(words.next())?, mm(words.next())?, range(words.next())?),
        "touch" => {
            let range = range(words.next())?;
            match words.next() {
                Some("read") => Op::Touch(range, UserAccess::Read),
                Some("write") => Op::Touch(range, UserAccess::Write),
                Some("fetch") => Op::Touch(range, UserAccess::Fetch),
                _ => return Err("read, write or fetch"),
            }
        }
        "switch" => Op::Switch(mm(words.next())?),
        "lazy" => Op::Lazy,
        "wake" => Op::Wake,
        "batches" => Op::Batches(supply(words.next())?),
        "tables" => Op::Tables(supply(words.next())?),
        "frames" => Op::Frames(supply(words.next())?),
        "sync" => Op::Sync,
        "offline" => Op::Offline,
        "online" => Op::Online,
        "preempt" => {
            let seams = words.next().and_then(|word| word.parse().ok()).ok_or("a number of seams")?;
            Op::Preempt(seams)
        }
        "guard" => {
            let (mm, range) = (mm(words.next())?, range(words.next())?);
            match words.next() {
                Some("install") => Op::Guard(mm, range, Guarding::Install),
                Some("remove") => Op::Guard(mm, range, Guarding::Remove),
                _ => return Err("install or remove"),
            }
        }
        _ => {
            return Err(
                "an operation: map, unmap, discard, guard, protect, remap, movestack, fork, exit, exec, reclaim, touch, switch, lazy, wake, batches, tables, frames, sync, preempt, offline or online",
            );
        }
    })
}

fn mm(word: Option<&str>) -> Result<MmId, &'static str> {
    let number = word.and_then(|word| word.strip_prefix('m')).and_then(|number| number.parse().ok());
    number.filter(|number| *number < NR_MMS).map(MmId).ok_or("an address space: m0 to m7")
}

fn pages(word: Option<&str>) -> Result<u64, &'static str> {
    word.and_then(|word| word.parse().ok()).ok_or("a number of pages")
}

fn address(word: Option<&str>) -> Result<u64, &'static str> {
    let address = word.and_then(|word| u64::from_str_radix(word, 16).ok());
    address.filter(|address| address.is_multiple_of(4096)).ok_or("a hexadecimal address, a multiple of 1000")
}

fn range(word: Option<&str>) -> Result<VirtRange, &'static str> {
    const EXPECTED: &str = "a range: hexadecimal start, a multiple of 1000, + and pages";
    let (start, pages) = word.and_then(|word| word.split_once('+')).ok_or(EXPECTED)?;
    let start = address(Some(start))?;
    let pages: u64 = pages.parse().map_err(|_| EXPECTED)?;
    let end = pages.checked_mul(4096).and_then(|bytes| start.checked_add(bytes)).ok_or(EXPECTED)?;
    VirtRange::new(start, end)
        .ok()
        .filter(|range| range.end() <= PagingMode::FiveLevel.user_end())
        .ok_or(EXPECTED)
}

fn rights(word: Option<&str>) -> Result<Rights, &'static str> {
    match word {
        Some("none") => Ok(Rights::Nothing),
        Some("read") => Ok(Rights::Read),
        Some("write") => Ok(Rights::Write),
        Some("execute") => Ok(Rights::Execute),
        _ => Err("none, read, write or execute"),
    }
}

fn supply(word: Option<&str>) -> Result<Supply, &'static str> {
    const EXPECTED: &str = "always, never, a number, or nth- and a number";
    let word = word.ok_or(EXPECTED)?;
    let number = |digits: &str| digits.parse().map_err(|_| EXPECTED);
    Ok(match word {
        "always" => Supply::Always,
        "never" => Supply::Never,
        _ => match word.strip_prefix("nth-") {
            Some(digits) => Supply::Nth(number(digits)?),
            None => Supply::ExceptEvery(number(word)?),
        },
    })
}
