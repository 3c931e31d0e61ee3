//! Sequences as bytes: any bytes are a sequence, and one that differs in few bytes differs in few
//! steps.
//!
//! That is what a fuzzer which mutates bytes wants. Ten bytes of header, then sixteen a step,
//! whatever is left over being ignored:
//!
//! | byte | header | step |
//! |---|---|---|
//! | 0 | CPUs | CPU |
//! | 1 | what the MMUs are like | operation, by its number |
//! | 2 | seed, 8 bytes | address space, and another in the high half |
//! | 3 | | backing, rights, access, install or remove; or how scarce |
//! | 4 | | first page, 5 bytes |
//! | 9 | | pages, 2 bytes |
//! | 11 | | where to, 5 bytes; or a small number |
//!
//! Most values of a page lead to one of a few places where tables begin and end, for steps must
//! meet to matter; the others are the page itself, so that addresses of real programs can be said.
//!
//! Sixteen bytes with 255 for the operation are no step: bytes 4 and 5 say which quirks the machine
//! has.
//!
//! Another byte that is no number of an operation means the one it meant when there were 17, and so
//! with backings, of which there were 6, and address spaces, of which there were 3: saved bytes
//! keep their meaning.

use mmu_gather::pagetable::{Level, PagingMode, VirtRange};
use mmu_gather::tlb::PcidSupport;

use crate::memory::index;
use crate::mmu::features::{InvlpgUppers, SettingDirty};
use crate::options::{Adversary, Device};
use crate::sequence::op::{MmId, NR_MMS, Op, Step};
use crate::sequence::places::{HIGH_PLACES, MOST_TOUCHED, PLACES};
use crate::sequence::quirks::Quirks;
use crate::sequence::text::{NR_FRAMES, Sequence};
use crate::vocabulary::{Backing, Guarding, Rights, Supply, UserAccess};

/// Bytes of the header.
const HEADER: usize = 10;
/// Bytes of a step.
const STEP: usize = 16;
/// The operation of what is no step.
const QUIRKS: u8 = 255;
/// Steps after these are ignored: an input must not run for long.
const MOST_STEPS: usize = 256;
/// CPUs of a machine.
const MOST_CPUS: u32 = 8;
/// Pages of one range.
const MOST_PAGES: u64 = 2048;
/// Address spaces that there were at first.
const FIRST_MMS: u8 = 3;
/// Bits of a page number; the five above them are 0 if it is meant as it stands.
const PAGE_BITS: u32 = 35;
/// With five levels, the bit that says that a page is so far from a place, and the bits that say
/// how far, half of them downwards.
const EXACT: u32 = 39;
const FAR_BITS: u32 = 32;
/// Frames of a machine, by two bits.
pub(crate) const FRAMES: [u64; 4] = [NR_FRAMES, 2600, 700, 240];
const SEAMS: u64 = 1 << 12;
/// From this byte on a supply refuses one request only. Before there was that, it refused one of so
/// many, which hardly ever came.
const FIRST_NTH: u8 = 192;
/// Operations there were at first.
const FIRST_OPS: usize = 17;

impl Sequence {
    /// The sequence that these bytes are. Any are.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let (header, steps) = bytes.split_at(bytes.len().min(HEADER));
        let byte = |at: usize| header.get(at).copied().unwrap_or(0);
        let seed = core::array::from_fn(|at| byte(2 + at));
        let flags = byte(1);
        let paging = if flags & 32 == 0 { PagingMode::FourLevel } else { PagingMode::FiveLevel };
        let nr_cpus = 1 + u32::from(byte(0)) % MOST_CPUS;
        Self {
            nr_cpus,
            seed: u64::from_le_bytes(seed),
            pcid: if flags & 1 == 0 { PcidSupport::On } else { PcidSupport::Off },
            uppers: if flags & 2 == 0 { InvlpgUppers::All } else { InvlpgUppers::LeadingToAddress },
            adversary: if flags & 4 == 0 { Adversary::Keeper } else { Adversary::Forgetter },
            dirty: if flags & 8 == 0 { SettingDirty::Checked } else { SettingDirty::Unchecked },
            device: if flags & 16 == 0 { Device::Absent } else { Device::Present },
            quirks: quirks(steps.as_chunks().0),
            paging,
            nr_frames: FRAMES[usize::from(flags >> 6)],
            steps: (steps.as_chunks().0.iter())
                .filter(is_step)
                .take(MOST_STEPS)
                .map(|bytes| step(bytes, paging))
                .map(|step| Step { cpu: u16::from(low(u64::from(u32::from(step.cpu) % nr_cpus))), ..step })
                .collect(),
        }
    }

    /// Bytes that are this sequence. What they cannot say is cut: CPUs beyond 8, steps beyond 256,
    /// pages beyond 2048 and touches beyond 64; of numbers of frames there are four.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut flags = 0;
        flags |= u8::from(self.pcid == PcidSupport::Off);
        flags |= u8::from(self.uppers == InvlpgUppers::LeadingToAddress) << 1;
        flags |= u8::from(self.adversary == Adversary::Forgetter) << 2;
        flags |= u8::from(self.dirty == SettingDirty::Unchecked) << 3;
        flags |= u8::from(self.device == Device::Present) << 4;
        flags |= u8::from(self.paging == PagingMode::FiveLevel) << 5;
        let fewer = FRAMES.iter().rposition(|frames| *frames >= self.nr_frames).unwrap_or(0);
        flags |= low(fewer as u64) << 6;
        let mut bytes = vec![low(u64::from(self.nr_cpus.clamp(1, MOST_CPUS) - 1)), flags];
        bytes.extend(self.seed.to_le_bytes());
        if self.quirks != Quirks::default() {
            bytes.extend(bytes_of_quirks(self.quirks));
        }
        for step in self.steps.iter().take(MOST_STEPS) {
            bytes.extend(bytes_of(*step, self.paging));
        }
        bytes
    }
}

fn is_step(bytes: &&[u8; STEP]) -> bool {
    bytes[1] != QUIRKS
}

/// All quirks that any of these say.
fn quirks(chunks: &[[u8; STEP]]) -> Quirks {
    let of_quirks = chunks.iter().filter(|bytes| !is_step(bytes));
    Quirks::from_bits(of_quirks.fold(0, |bits, bytes| bits | u16::from_le_bytes([bytes[4], bytes[5]])))
}

fn bytes_of_quirks(quirks: Quirks) -> [u8; STEP] {
    let mut bytes = [0; STEP];
    bytes[1] = QUIRKS;
    bytes[4..6].copy_from_slice(&quirks.bits().to_le_bytes());
    bytes
}

#[cfg(feature = "arbitrary")]
impl<'a> arbitrary::Arbitrary<'a> for Sequence {
    /// All bytes that are left, by [`Sequence::from_bytes`].
    fn arbitrary(bytes: &mut arbitrary::Unstructured<'a>) -> arbitrary::Result<Self> {
        let left = bytes.len();
        Ok(Self::from_bytes(bytes.bytes(left)?))
    }
}

fn step(bytes: &[u8; STEP], paging: PagingMode) -> Step {
    let [cpu, op, mms, what, p0, p1, p2, p3, p4, count_low, count_high, to @ ..] = *bytes;
    let page = [p0, p1, p2, p3, p4];
    let mm = mm_of(mms & 0xf);
    let other = mm_of(mms >> 4);
    let count = u64::from(u16::from_le_bytes([count_low, count_high]));
    let page = page_of(page, paging);
    let range = range(page, pages(count), paging);
    let small = number(to);
    let number =
        if usize::from(op) < Op::WORDS.len() { usize::from(op) } else { usize::from(op) % FIRST_OPS };
    let op = match number {
        0 => Op::Map(mm, range, backing(what), rights(what)),
        1 => Op::Unmap(mm, range),
        2 => Op::Discard(mm, range),
        3 => Op::Protect(mm, range, rights(what)),
        4 => Op::Remap(mm, range, page_of(to, paging).min(user_pages(paging) - 1) << 12),
        5 => Op::MoveStack(mm, range, 1 + small % MOST_PAGES),
        6 => Op::Fork(mm, other),
        7 => Op::Exit(mm),
        8 => Op::Reclaim(mm, other, range),
        9 => {
            let access = match what {
                FETCH => UserAccess::Fetch,
                _ if what & 1 == 0 => UserAccess::Write,
                _ => UserAccess::Read,
            };
            Op::Touch(self::range(page, pages(count).min(MOST_TOUCHED), paging), access)
        }
        10 => Op::Switch(mm),
        11 => Op::Lazy,
        12 => Op::Wake,
        13 => Op::Batches(supply(what)),
        14 => Op::Tables(supply(what)),
        15 => Op::Sync,
        17 => Op::Guard(mm, range, if what & 1 == 0 { Guarding::Install } else { Guarding::Remove }),
        18 => Op::Offline,
        19 => Op::Online,
        20 => Op::Frames(supply(what)),
        21 => Op::Exec(mm, 1 + small % MOST_PAGES),
        // Seams are counted in thousands at the most.
        _ => Op::Preempt(u32::try_from(small % SEAMS).unwrap_or(0)),
    };
    Step { cpu: u16::from(cpu), op }
}

fn bytes_of(Step { cpu, op }: Step, paging: PagingMode) -> [u8; STEP] {
    let mut bytes = [0; STEP];
    bytes[0] = low(u64::from(cpu));
    bytes[1] = low(op.number() as u64);
    let mut mms = (0, 0);
    let mut what = 0;
    let mut place = None;
    let mut to = 0;
    match op {
        Op::Map(mm, range, backing, rights) => {
            (mms.0, place) = (mm.0, Some(range));
            what = backing_bits(backing) | rights_bits(rights);
        }
        Op::Unmap(mm, range) | Op::Discard(mm, range) => (mms.0, place) = (mm.0, Some(range)),
        Op::Protect(mm, range, rights) => {
            (mms.0, place, what) = (mm.0, Some(range), rights_bits(rights));
        }
        Op::Remap(mm, range, target) => {
            (mms.0, place, to) = (mm.0, Some(range), number_of(target >> 12, paging));
        }
        Op::MoveStack(mm, range, pages) => (mms.0, place, to) = (mm.0, Some(range), pages.saturating_sub(1)),
        Op::Fork(mm, other) => mms = (mm.0, other.0),
        Op::Exit(mm) | Op::Switch(mm) => mms.0 = mm.0,
        Op::Exec(mm, pages) => (mms.0, to) = (mm.0, pages.saturating_sub(1)),
        Op::Reclaim(mm, other, range) => (mms, place) = ((mm.0, other.0), Some(range)),
        Op::Touch(range, access) => (place, what) = (Some(range), access_bits(access)),
        Op::Batches(supply) | Op::Tables(supply) | Op::Frames(supply) => what = supply_bits(supply),
        Op::Preempt(seams) => to = u64::from(seams),
        Op::Guard(mm, range, guarding) => {
            (mms.0, place, what) = (mm.0, Some(range), u8::from(guarding == Guarding::Remove));
        }
        Op::Lazy | Op::Wake | Op::Sync | Op::Offline | Op::Online => {}
    }
    bytes[2] = mms.0 | mms.1 << 4;
    bytes[3] = what;
    if let Some(range) = place {
        bytes[4..9].copy_from_slice(&number_of(range.start() >> 12, paging).to_le_bytes()[..5]);
        bytes[9..11].copy_from_slice(&(range.nr_pages().min(MOST_PAGES) - 1).to_le_bytes()[..2]);
    }
    bytes[11..].copy_from_slice(&to.to_le_bytes()[..5]);
    bytes
}

fn number(bytes: [u8; 5]) -> u64 {
    let [a, b, c, d, e] = bytes;
    u64::from_le_bytes([a, b, c, d, e, 0, 0, 0])
}

/// The address space that four bits name. Those that name none now mean what they meant when there
/// were three.
const fn mm_of(bits: u8) -> MmId {
    MmId(if bits < NR_MMS { bits } else { bits % FIRST_MMS })
}

/// The page that five bytes name: itself, or one of the first 64 of a place.
fn page_of(bytes: [u8; 5], paging: PagingMode) -> u64 {
    let number = number(bytes);
    if number >> PAGE_BITS == 0 {
        return number;
    }
    if paging == PagingMode::FiveLevel && number >> EXACT != 0 {
        let place = HIGH_PLACES[index(number >> FAR_BITS) % HIGH_PLACES.len()] >> 12;
        let far = number & ((1 << FAR_BITS) - 1);
        return (place + far).saturating_sub(1 << (FAR_BITS - 1));
    }
    let places = PLACES.into_iter().chain(match paging {
        PagingMode::FourLevel => [].iter().copied(),
        PagingMode::FiveLevel => HIGH_PLACES.iter().copied(),
    });
    let place = usize::from(bytes[1]) % places.clone().count();
    let place = places.into_iter().nth(place).unwrap_or(PLACES[0]);
    (place >> 12) + u64::from(bytes[0] % 64)
}

/// The five bytes that name a page, as a number: beyond what four levels reach, the nearest that
/// can be said.
fn number_of(page: u64, paging: PagingMode) -> u64 {
    if page >> PAGE_BITS == 0 || paging == PagingMode::FourLevel {
        return page;
    }
    let distance = |place: &(usize, u64)| (place.1 >> 12).abs_diff(page);
    let (nearest, place) = (0..).zip(HIGH_PLACES).min_by_key(distance).unwrap_or((0, HIGH_PLACES[0]));
    let far = (page + (1 << (FAR_BITS - 1))).saturating_sub(place >> 12).min((1 << FAR_BITS) - 1);
    far | (nearest as u64) << FAR_BITS | 1 << EXACT
}

/// Pages of user space.
const fn user_pages(paging: PagingMode) -> u64 {
    paging.user_end() >> 12
}

/// The number of pages that two bytes name: few, mostly.
const fn pages(count: u64) -> u64 {
    1 + if count < 2 * MOST_PAGES { count % MOST_PAGES } else { count % 16 }
}

fn range(first: u64, pages: u64, paging: PagingMode) -> VirtRange {
    let first = first.min(user_pages(paging) - 1);
    let end = (first + pages).min(user_pages(paging));
    VirtRange::new(first << 12, end << 12).unwrap_or_else(|_| VirtRange::of_entry(Level::Pte, first << 12))
}

const BACKINGS: [Backing; 10] = [
    Backing::Anon,
    Backing::Huge,
    Backing::Private,
    Backing::Shared,
    Backing::Pfn,
    Backing::Stack,
    Backing::Clean,
    Backing::Giant,
    Backing::Zeroes,
    Backing::Folios,
];
/// Backings there were at first: other numbers keep the meaning that they had then.
const FIRST_BACKINGS: usize = 6;
const RIGHTS: [Rights; 4] = [Rights::Write, Rights::Read, Rights::Nothing, Rights::Execute];
/// Rights there were at first.
const FIRST_RIGHTS: usize = 3;
/// What fetches; other even numbers write, and odd ones read.
const FETCH: u8 = 2;

const fn access_bits(access: UserAccess) -> u8 {
    match access {
        UserAccess::Write => 0,
        UserAccess::Read => 1,
        UserAccess::Fetch => FETCH,
    }
}

fn backing(what: u8) -> Backing {
    let number = usize::from(what & 0xf);
    BACKINGS.get(number).copied().unwrap_or(BACKINGS[number % FIRST_BACKINGS])
}

fn backing_bits(backing: Backing) -> u8 {
    low(BACKINGS.iter().position(|other| *other == backing).unwrap_or(0) as u64)
}

fn rights(what: u8) -> Rights {
    let number = usize::from(what >> 4);
    RIGHTS.get(number).copied().unwrap_or(RIGHTS[number % FIRST_RIGHTS])
}

fn rights_bits(rights: Rights) -> u8 {
    low(RIGHTS.iter().position(|other| *other == rights).unwrap_or(0) as u64) << 4
}

fn supply(what: u8) -> Supply {
    match what {
        0 => Supply::Always,
        1 => Supply::Never,
        number @ FIRST_NTH.. => Supply::Nth(u32::from(number - FIRST_NTH) + 1),
        every => Supply::ExceptEvery(u32::from(every)),
    }
}

fn supply_bits(supply: Supply) -> u8 {
    match supply {
        Supply::Always => 0,
        Supply::Never => 1,
        Supply::ExceptEvery(every) => low(u64::from(every.clamp(2, u32::from(FIRST_NTH) - 1))),
        Supply::Nth(number) => FIRST_NTH + low(u64::from(number.clamp(1, 256 - u32::from(FIRST_NTH)) - 1)),
    }
}

/// The lowest byte.
const fn low(number: u64) -> u8 {
    number.to_le_bytes()[0]
}
