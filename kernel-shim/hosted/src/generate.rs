//! Making up sequences: few address spaces, few places, many boundaries.

use mmu_gather::pagetable::{Level, VirtRange};
use mmu_gather::tlb::PcidSupport;
use mmu_kernel_shim::{Supply, UserAccess};

use crate::features::InvlpgUppers;
use crate::op::{Backing, MmId, NR_MMS, Op, Rights, Step};
use crate::options::Adversary;
use crate::random::Choices;
use crate::sequence::Sequence;

/// Places where tables of every level begin and end: bottom and top of user space, 2 MiB, 1 GiB and 512 GiB edges.
const PLACES: [u64; 7] = [
    0x1_0000,
    Level::Pmd.table_span(),
    2 * Level::Pmd.table_span() - 0x10_0000,
    Level::Pmd.table_span() + Level::Pmd.entry_span() - 0x8000,
    Level::Pud.table_span() - 0x10_0000,
    3 * Level::Pmd.table_span(),
    (1 << 47) - 0x40_0000,
];

/// Steps between two points at which all caches are compared with memory.
const SYNC_EVERY: u64 = 24;

/// Makes up a sequence of `nr_steps` steps.
#[must_use]
pub fn generate(seed: u64, nr_cpus: u32, nr_steps: usize) -> Sequence {
    let choices = Choices::new(seed);
    let churns = choices.one_in(6);
    let mut maker = Maker { choices: &choices, nr_cpus, churns, mapped: Vec::new() };
    let steps = (0..nr_steps).map(|_| maker.step()).collect();
    Sequence {
        nr_cpus,
        seed: choices.bits(),
        pcid: if choices.one_in(4) { PcidSupport::Off } else { PcidSupport::On },
        uppers: if choices.one_in(3) { InvlpgUppers::LeadingToAddress } else { InvlpgUppers::All },
        adversary: if choices.one_in(8) { Adversary::Forgetter } else { Adversary::Keeper },
        steps,
    }
}

struct Maker<'a> {
    choices: &'a Choices,
    nr_cpus: u32,
    /// Address spaces come and go, more than a CPU has slots for.
    churns: bool,
    /// What was mapped so far, as far as this knows: places worth going back to.
    mapped: Vec<(MmId, VirtRange)>,
}

impl Maker<'_> {
    fn step(&mut self) -> Step {
        // At most 64.
        let cpu = self.choices.below(u64::from(self.nr_cpus)).to_le_bytes()[0];
        if self.choices.one_in(SYNC_EVERY) {
            return Step { cpu, op: Op::Sync };
        }
        let (mm, range) = self.somewhere();
        if self.churns && self.choices.one_in(3) {
            return Step { cpu, op: if self.choices.one_in(3) { Op::Exit(mm) } else { Op::Switch(mm) } };
        }
        let op = match self.choices.below(64) {
            0..10 => self.map(),
            10..17 => Op::Unmap(mm, range),
            17..22 => Op::Discard(mm, range),
            22..25 => Op::Protect(mm, range, self.rights()),
            25..27 => Op::Remap(mm, range, self.place().start()),
            27..28 => Op::MoveStack(mm, range, 1 + self.choices.below(600)),
            28..29 => Op::Fork(mm, self.mm()),
            29..30 => Op::Exit(mm),
            30..33 => Op::Reclaim(mm, self.mm(), range),
            33..54 => {
                let access = if self.choices.one_in(3) { UserAccess::Read } else { UserAccess::Write };
                Op::Touch(self.part_of(range, 24), access)
            }
            54..58 => Op::Switch(mm),
            58..60 => Op::Lazy,
            60..62 => Op::Wake,
            62 => Op::Batches(self.supply()),
            _ => Op::Tables(if self.choices.one_in(3) { self.supply() } else { Supply::Always }),
        };
        Step { cpu, op }
    }

    fn map(&mut self) -> Op {
        let (mm, place) = (self.mm(), self.place());
        let backing = match self.choices.below(16) {
            0..7 => Backing::Anon,
            7..9 => Backing::Huge,
            9..11 => Backing::Private,
            11..13 => Backing::Shared,
            13 => Backing::Pfn,
            _ => Backing::Stack,
        };
        let range = if backing == Backing::Huge { large(place) } else { place };
        self.mapped.push((mm, range));
        if self.mapped.len() > 16 {
            self.mapped.remove(0);
        }
        let rights = if self.choices.one_in(8) { Rights::Read } else { Rights::Write };
        Op::Map(mm, range, backing, rights)
    }

    /// A place that was mapped, or a part of it, or anywhere.
    fn somewhere(&self) -> (MmId, VirtRange) {
        if self.mapped.is_empty() || self.choices.one_in(12) {
            return (self.mm(), self.place());
        }
        let (mm, range) = self.mapped[self.choices.pick(self.mapped.len())];
        let part = if self.choices.one_in(2) { range } else { self.part_of(range, range.nr_pages()) };
        (mm, part)
    }

    fn part_of(&self, range: VirtRange, most: u64) -> VirtRange {
        let skipped = self.choices.below(range.nr_pages());
        let pages = 1 + self.choices.below((range.nr_pages() - skipped).min(most));
        let start = range.start() + skipped * 4096;
        VirtRange::new(start, start + pages * 4096).unwrap_or(range)
    }

    fn place(&self) -> VirtRange {
        let base = PLACES[self.choices.pick(PLACES.len())] + self.choices.below(4) * 0x4000;
        let pages = match self.choices.below(16) {
            0..8 => 1 + self.choices.below(8),
            8..12 => 1 + self.choices.below(40),
            12..15 => 1 + self.choices.below(300),
            _ => 1 + self.choices.below(1200),
        };
        let end = (base + pages * 4096).min(1 << 47);
        // The bases are aligned, inside user space, and below the end.
        VirtRange::new(base, end).unwrap_or_else(|_| VirtRange::of_entry(Level::Pte, base))
    }

    fn mm(&self) -> MmId {
        MmId(self.choices.below(u64::from(NR_MMS)).to_le_bytes()[0])
    }

    fn rights(&self) -> Rights {
        match self.choices.below(4) {
            0 => Rights::None,
            1 => Rights::Read,
            _ => Rights::Write,
        }
    }

    fn supply(&self) -> Supply {
        match self.choices.below(4) {
            0 => Supply::Never,
            // Small numbers: 2 to 9.
            1 => Supply::ExceptEvery(2 + u32::from(self.choices.below(8).to_le_bytes()[0])),
            _ => Supply::Always,
        }
    }
}

/// The range rounded out to whole 2 MiB pages, at most two of them.
fn large(range: VirtRange) -> VirtRange {
    let span = Level::Pmd.entry_span();
    let start = range.start() & !(span - 1);
    let end = range.end().next_multiple_of(span).min(start + 2 * span).min(1 << 47);
    VirtRange::new(start.max(span), end.max(2 * span)).unwrap_or(range)
}
