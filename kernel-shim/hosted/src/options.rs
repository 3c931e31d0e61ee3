//! How a hosted machine is made.

use mmu_gather::Limits;
use mmu_gather::pagetable::PagingMode;
use mmu_gather::tlb::PcidSupport;

use crate::mmu::features::{Capacity, Features};

/// Everything that decides what a machine does, except the work that runs on it.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many CPUs; 1 to 192.
    pub nr_cpus: u32,
    /// How many frames of 4 KiB.
    pub nr_frames: u64,
    /// Decides every choice the machine makes: two machines with the same options and the same work
    /// do the same.
    pub seed: u64,
    /// Whether CR4.PCIDE is set.
    pub pcid: PcidSupport,
    /// Whether CR4.LA57 is set: how many levels page tables have.
    pub paging: PagingMode,
    /// What each CPU's MMU may do.
    pub features: Features,
    /// Whether all CPUs have caches of the same size.
    pub cores: Cores,
    /// Where CPUs speculate.
    pub eagerness: Eagerness,
    /// When programs store.
    pub stores: Stores,
    /// Which of its other variants a kernel runs as, by their number: whatever the kernel makes of
    /// it. The machine makes nothing of it.
    pub variants: [bool; 2],
    /// Whether the software MMUs and the checker run.
    pub checking: Checking,
    /// What the machine does wrong, on purpose.
    pub fault: MachineFault,
    /// Whether a device shares programs' address spaces.
    pub device: Device,
    /// How the MMUs treat what they need not keep.
    pub adversary: Adversary,
    /// How much of what happens is remembered.
    pub telling: Telling,
    /// How much a CPU may do between two preemption points.
    pub most_work: MostWork,
}

/// Whether the CPUs of a machine have caches of the same size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cores {
    /// They have.
    Alike,
    /// Every second one, from CPU 1 on, holds little. All else is the same, as it is on real
    /// machines of the kind.
    EverySecondSmall,
}

/// Where CPUs speculate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eagerness {
    /// Near addresses that programs or the kernel name.
    Nearby,
    /// There; just below tables as soon as they are linked; before and behind what faults; and down
    /// any path through the tables in CR3, wherever it leads.
    Anywhere,
}

/// When programs store, besides where the work on the machine says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stores {
    /// Not while anything else happens.
    WhenTold,
    /// Also while another CPU looks at an entry and changes it: through a translation that the
    /// program's CPU has cached, writable and not dirty, so that a dirty flag is set.
    AnyTime,
}

/// Whether the machine models translation caches and watches over them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checking {
    /// Every CPU has a software MMU, CPUs interleave at every seam, and the checker holds all of it
    /// against the truth.
    On,
    /// Flushes are counted and requests delivered at once; nothing is cached. For timing and for
    /// large layouts.
    Off,
}

/// What a machine does wrong, on purpose, so that the checker can be seen to notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineFault {
    /// Nothing.
    Absent,
    /// INVLPG and the flush of a CR3 load do nothing.
    SkipFlush,
    /// A CPU that takes one flush interrupt in four answers, and flushes nothing.
    DropIpi,
    /// A CPU that takes a flush interrupt answers, and flushes nothing: each flush is of the CPU
    /// that makes the call.
    LocalFlushOnly,
}

/// How an MMU treats what it may keep and may forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adversary {
    /// Never forgets unless told, and fills at any moment.
    Keeper,
    /// Also forgets now and then.
    Forgetter,
}

/// Whether there is a device that walks the page tables of programs by itself, and caches what it
/// finds: an IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// There is none.
    Absent,
    /// There is, and it uses some of the address spaces of a sequence.
    Present,
}

/// How much a machine remembers of what happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Telling {
    /// The last few thousand events that a violation is told with.
    Last,
    /// Everything from power-on, every entry changed and every cache filled too: for a timeline.
    All,
}

/// The most that a CPU may do between two preemption points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MostWork {
    /// Leaves cleared, or restricted: all of one table.
    pub leaves: u32,
    /// Large leaves split: those that two ends of a range cut, on two levels.
    pub splits: u32,
    /// Frames given back to the allocator.
    pub freed: u32,
}

impl MostWork {
    /// Nothing is promised.
    pub const UNBOUNDED: Self = Self { leaves: u32::MAX, splits: u32::MAX, freed: u32::MAX };

    /// What gathers with these limits promise.
    ///
    /// Between two preemption points a gather frees at most a chunk of pages, the tables of a
    /// batch, one table that found no batch, the batch pages themselves, and the next chunk.
    #[must_use]
    pub const fn promised_by(limits: &Limits) -> Self {
        let chunk = limits.free_chunk as u32 + 1;
        let tables = limits.table_slots as u32 + 1;
        Self { leaves: 512, splits: 4, freed: 2 * chunk + tables + limits.batch_pages as u32 + 2 }
    }
}

impl Options {
    /// The most CPUs that a machine has: three words of a set. With sixteen, sequences take half as
    /// long again.
    pub const MOST_CPUS: u32 = 192;

    /// Frames at the bottom of memory that are not given out: frame 0, and the page of zeroes.
    pub const RESERVED_FRAMES: u64 = 2;

    /// A checked machine with PCIDs and Intel-like MMUs of realistic size.
    #[must_use]
    pub const fn new(nr_cpus: u32, nr_frames: u64, seed: u64) -> Self {
        Self {
            nr_cpus,
            nr_frames,
            seed,
            pcid: PcidSupport::On,
            cores: Cores::Alike,
            eagerness: Eagerness::Nearby,
            stores: Stores::WhenTold,
            variants: [false; 2],
            paging: PagingMode::FourLevel,
            features: Features {
                tlb_capacity: Capacity::AtMost(4096),
                structure_capacity: Capacity::AtMost(1024),
                ..Features::INTEL
            },
            checking: Checking::On,
            fault: MachineFault::Absent,
            device: Device::Absent,
            adversary: Adversary::Keeper,
            telling: Telling::Last,
            most_work: MostWork::promised_by(&Limits::DEFAULT),
        }
    }

    /// What the MMU of this CPU may do.
    #[must_use]
    pub fn features_of(&self, cpu: u32) -> Features {
        match self.cores {
            Cores::EverySecondSmall if cpu % 2 == 1 => self.features.with_small_caches(),
            Cores::Alike | Cores::EverySecondSmall => self.features,
        }
    }
}
