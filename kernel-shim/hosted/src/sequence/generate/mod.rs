//! Making up sequences: few address spaces, few places, many boundaries.
//!
//! | manner | what it is good at |
//! |---|---|
//! | wide | every operation on every place: tables, boundaries, capacities |
//! | dense | as wide, but it begins with a call on more pages than a table has, all of them there |
//! | sparse | as wide, but it begins with a call on more tables, or large pages, than the ceiling |
//! | lives | address spaces come and go, more than a CPU has slots for |
//! | crowd | as focus, on more than 64 CPUs, most of which have one address space loaded |
//! | giants | pages of 1 GiB, and what they are split into |
//! | focus | all CPUs on a few pages: two calls meet on one entry that a third CPU has cached |
//!
//! ```text
//!  mod      which manner, and what the machine is like
//!    │
//!    v
//!  dense, sparse, focus     what these manners are made of; meet: calls that meet others
//!    │
//!    v
//!  maker    steps, and what all manners choose from
//! ```

mod dense;
mod focus;
mod maker;
mod meet;
mod sparse;

use mmu_gather::pagetable::PagingMode;
use mmu_gather::tlb::PcidSupport;

use crate::mmu::features::{InvlpgUppers, SettingDirty};
use crate::options::{Adversary, Device};
use crate::random::Choices;
use crate::sequence::bytes::FRAMES;
use crate::sequence::generate::maker::{Maker, Manner, Places};
use crate::sequence::op::{NR_MMS, Op, Step};
use crate::sequence::quirks::{Quirk, Quirks};
use crate::sequence::text::Sequence;
use crate::vocabulary::{Backing, Rights, UserAccess};

/// Address spaces of most sequences: few, so that steps meet.
const FEW_MMS: u8 = 3;

/// Sequences of this many CPUs at least are at times given many more.
const ENOUGH_CPUS: u32 = 4;

/// Makes up a sequence of `nr_steps` steps.
///
/// One in a few hundred has more CPUs than `nr_cpus`, if those are four or more: above 64.
#[must_use]
pub fn generate(seed: u64, nr_cpus: u32, nr_steps: usize) -> Sequence {
    let choices = Choices::new(seed);
    // What is rare is chosen apart: whatever is added to it leaves the other sequences alone.
    let rare = Choices::new(seed.rotate_left(32) ^ 0x7265_6163);
    let owing = Choices::new(seed.rotate_left(16) ^ 0x6f77_6564);
    let rights_go = owing.one_in(12);
    let paging = if rare.one_in(8) { PagingMode::FiveLevel } else { PagingMode::FourLevel };
    let places = Places(paging);
    let manner = match choices.below(256) {
        0..92 => Manner::Wide,
        // Few: one costs as much as two others.
        92..96 => Manner::Dense,
        96..128 => Manner::Lives,
        _ => Manner::Focus {
            place: places.nth(choices.bits()),
            switches: choices.below(4) * 4,
            // Where guards are, programs are refused: not everywhere.
            guards: if choices.one_in(4) { 8 } else { 0 },
            // Programs that share pages until one of them writes.
            forks: if choices.one_in(4) { 4 } else { 0 },
            // A lost dirty bit is seen in shared pages of a file only, and reclaim takes large
            // pages only if they are clean.
            mostly: match choices.below(16) {
                0..4 => Backing::Shared,
                4..6 => Backing::Clean,
                6 => Backing::Zeroes,
                7 => Backing::Folios,
                _ => Backing::Anon,
            },
            scarce: choices.one_in(8),
            owed: if owing.one_in(8) { 8 } else { 0 },
            rights_go: if rights_go { 24 } else { 0 },
        },
    };
    let manner = match rare.below(512) {
        0..8 => Manner::Giants,
        8..12 => Manner::Sparse,
        // One of these costs as much as several others.
        12 if nr_cpus >= ENOUGH_CPUS => Manner::Crowd,
        _ => manner,
    };
    let has_scenes_of_rights = matches!(manner, Manner::Focus { rights_go: 1.., .. });
    let nr_cpus = if manner == Manner::Crowd { 65 + low(rare.below(66)) } else { nr_cpus };
    let has_many = manner == Manner::Lives || rare.one_in(16);
    // Few are soon used again, and run out.
    let nr_frames = if rare.one_in(24) { FRAMES[1 + rare.pick(FRAMES.len() - 1)] } else { FRAMES[0] };
    let mut maker = Maker::new(&choices, places, nr_cpus, if has_many { NR_MMS } else { FEW_MMS }, manner);
    match manner {
        Manner::Dense => maker.begin_dense(),
        Manner::Sparse => maker.begin_sparse(),
        Manner::Crowd => maker.begin_crowded(nr_steps),
        Manner::Focus { scarce: true, .. } => maker.begin_scarce(),
        _ => {}
    }
    // By choices of their own: the rest is what it is without.
    let others = Choices::new(!seed);
    let quirks = match Quirks::draw(&others) {
        // The kernel that does so, on a machine where it may go wrong.
        quirks if has_scenes_of_rights => quirks.with(Quirk::Variant2).with(Quirk::Stores),
        quirks => quirks,
    };
    let steps = (0..nr_steps).map(|_| with_code(maker.step(), &others)).collect();
    Sequence {
        nr_cpus,
        seed: choices.bits(),
        pcid: if choices.one_in(4) { PcidSupport::Off } else { PcidSupport::On },
        uppers: if choices.one_in(3) { InvlpgUppers::LeadingToAddress } else { InvlpgUppers::All },
        adversary: if choices.one_in(8) { Adversary::Forgetter } else { Adversary::Keeper },
        dirty: if choices.one_in(2) || has_scenes_of_rights {
            SettingDirty::Unchecked
        } else {
            SettingDirty::Checked
        },
        device: if choices.one_in(4) { Device::Present } else { Device::Absent },
        paging,
        nr_frames,
        quirks,
        steps,
    }
}

/// The step, where it reads or lets programs read, at times with instructions instead.
fn with_code(step: Step, choices: &Choices) -> Step {
    let op = match step.op {
        Op::Map(mm, range, backing, Rights::Write) if choices.one_in(16) => {
            Op::Map(mm, range, backing, Rights::Execute)
        }
        Op::Map(mm, range, backing, Rights::Read) if choices.one_in(2) => {
            Op::Map(mm, range, backing, Rights::Execute)
        }
        Op::Protect(mm, range, Rights::Read) if choices.one_in(2) => Op::Protect(mm, range, Rights::Execute),
        Op::Touch(range, UserAccess::Read) if choices.one_in(4) => Op::Touch(range, UserAccess::Fetch),
        op => op,
    };
    Step { op, ..step }
}

/// A small number as it is.
fn low(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(0)
}
