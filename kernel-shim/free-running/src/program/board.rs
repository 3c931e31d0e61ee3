//! What all CPUs know: the address spaces, who has mapped what there, and which phase it is.

use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mmu_kernel_shim::{Error, Mm};

use crate::here::Interrupted;
use crate::machine::{FreeKernel, FreeMachine};
use crate::stamp::GENERATION_MASK;

pub(crate) type Space = Arc<Mm<Arc<FreeMachine>>>;

/// Address spaces in which all CPUs map, use and unmap. With its own ones a CPU runs more than it
/// has slots for (6), so that those are given up and taken again.
pub(crate) const SHARED_SPACES: usize = 4;
/// Those of each CPU alone.
pub(crate) const OWN_SPACES: usize = 3;
/// Address spaces that are left, at most, for whoever finds them to take down.
const MOST_ORPHANS: usize = 4;

/// All of a run that its threads share.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) kernel: FreeKernel,
    pub(crate) machine: Arc<FreeMachine>,
    pub(crate) board: Board,
}

impl Interrupted for World {
    fn serve(&self, cpu: usize) {
        self.machine.serve(cpu, &|| self.kernel.flush_interrupt());
    }

    fn spin(&self, cpu: usize) {
        self.machine.spin(cpu, &|| self.kernel.flush_interrupt());
    }

    fn on_signal(&self, cpu: usize) -> bool {
        self.machine.on_signal(cpu, &|| self.kernel.flush_interrupt())
    }
}

#[derive(Debug)]
pub(crate) struct Board {
    pub(crate) shared: Vec<SharedSpace>,
    /// That of the duels.
    pub(crate) duel: SharedSpace,
    pub(crate) own: Vec<[(u64, Space); OWN_SPACES]>,
    /// Of children.
    next_number: AtomicU64,
    orphans: Mutex<Vec<Space>>,
    pub(crate) phases: Phases,
    /// What panicked programs have said.
    pub(crate) panics: Mutex<Vec<String>>,
}

/// An address space in which every CPU has an area now and then.
#[derive(Debug)]
pub(crate) struct SharedSpace {
    pub(crate) number: u64,
    pub(crate) mm: Space,
    /// By owner.
    pub(crate) areas: Vec<Published>,
}

/// What one owner says of its area in one address space.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Published {
    live: AtomicU64,
    dead: AtomicU64,
}

/// An area that is mapped now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Live {
    pub(crate) generation: u64,
    pub(crate) place: u64,
    pub(crate) nr_pages: u64,
}

impl Published {
    /// The owner has mapped this, or put something new there.
    pub(crate) fn publish(&self, live: Live) {
        let Live { generation, place, nr_pages } = live;
        // ORDERING: release, pairs with `live`.
        self.live.store((generation & GENERATION_MASK) << 16 | place << 8 | nr_pages, Ordering::Release);
    }

    /// The call that ended this generation has returned (F4).
    pub(crate) fn publish_dead(&self, generation: u64) {
        // ORDERING: release, pairs with `dead`: who reads this loads later than the call returned.
        self.dead.store(generation, Ordering::Release);
    }

    /// What was mapped last, and may be gone.
    pub(crate) fn live(&self) -> Option<Live> {
        let word = self.live.load(Ordering::Acquire);
        (word != 0).then_some(Live { generation: word >> 16, place: word >> 8 & 255, nr_pages: word & 255 })
    }

    /// Every generation up to this one is dead.
    pub(crate) fn dead(&self) -> u64 {
        self.dead.load(Ordering::Acquire)
    }
}

impl Board {
    /// New address spaces, for so many CPUs.
    pub(crate) fn new(kernel: &FreeKernel, nr_cpus: usize) -> Result<Self, Error> {
        let mut numbers = 1..;
        let mut number = || numbers.next().unwrap_or(0);
        let shared_space = |number| {
            let areas = (0..nr_cpus).map(|_| Published::default()).collect();
            Ok::<_, Error>(SharedSpace { number, mm: kernel.new_mm()?, areas })
        };
        let shared = (0..SHARED_SPACES).map(|_| shared_space(number())).collect::<Result<Vec<_>, _>>()?;
        let duel = shared_space(number())?;
        let mut own = Vec::new();
        for _ in 0..nr_cpus {
            let spaces: [_; OWN_SPACES] = core::array::from_fn(|_| (number(), kernel.new_mm()));
            let [first, second, third] = spaces.map(|(number, mm)| mm.map(|mm| (number, mm)));
            own.push([first?, second?, third?]);
        }
        Ok(Self {
            shared,
            duel,
            own,
            next_number: AtomicU64::new(0),
            orphans: Mutex::default(),
            phases: Phases::default(),
            panics: Mutex::default(),
        })
    }

    /// A number for a child, which it shares with few others.
    pub(crate) fn number_of_a_child(&self) -> u64 {
        // The last of the others is below 40; poison begins with 0x5a.
        40 + self.next_number.fetch_add(1, Ordering::Relaxed) % 32
    }

    /// Leaves an address space behind, which may be lazily loaded here. It comes back if there are
    /// many already.
    pub(crate) fn leave(&self, space: Space) -> Option<Space> {
        let mut orphans = self.orphans.lock().unwrap_or_else(PoisonError::into_inner);
        if orphans.len() >= MOST_ORPHANS {
            return Some(space);
        }
        orphans.push(space);
        None
    }

    /// Takes one that was left.
    pub(crate) fn take_orphan(&self) -> Option<Space> {
        // Without waiting: a CPU that waits here would answer nobody.
        self.orphans.try_lock().ok()?.pop()
    }

    /// Every address space there is, when no CPU runs any more.
    pub(crate) fn all_spaces(&self) -> Vec<Space> {
        let mut all: Vec<Space> = self.shared.iter().map(|space| Arc::clone(&space.mm)).collect();
        all.push(Arc::clone(&self.duel.mm));
        all.extend(self.own.iter().flatten().map(|(_, mm)| Arc::clone(mm)));
        all.append(&mut self.orphans.lock().unwrap_or_else(PoisonError::into_inner));
        all
    }
}

/// What the CPUs do at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Everything.
    Tour,
    /// CPU 0 unmaps one page again and again; the others come to it from another address space.
    SwitchDuel,
    /// The same; the others wake from laziness.
    LazyDuel,
    /// The same, with reclaim.
    ReclaimDuel,
    /// All discard and unmap small areas in one address space.
    Crossfire,
}

impl Phase {
    /// Their number is odd: with interrupts of one kind in every second phase, each comes both
    /// ways.
    const ALL: [Self; 5] = [Self::SwitchDuel, Self::Tour, Self::LazyDuel, Self::Crossfire, Self::ReclaimDuel];
    pub(crate) const NUMBER: usize = Self::ALL.len();

    /// The phase with this number.
    pub(crate) const fn with_number(number: usize) -> Self {
        Self::ALL[number % Self::NUMBER]
    }
}

/// Which phase it is: the watching thread leads, and the CPUs follow.
#[derive(Debug, Default)]
pub(crate) struct Phases {
    /// How many phases have begun.
    begun: AtomicUsize,
    /// How many have ended.
    ended: AtomicUsize,
    over: AtomicBool,
    /// How often a CPU has come to the end of a phase, all together.
    arrived: AtomicUsize,
    /// CPUs that have left every address space, or will not any more.
    left: AtomicUsize,
}

impl Phases {
    pub(crate) fn begin_next(&self) {
        self.begun.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn end(&self) {
        self.ended.store(self.begun.load(Ordering::Acquire), Ordering::Release);
    }

    pub(crate) fn end_all(&self) {
        self.over.store(true, Ordering::Release);
        self.end();
    }

    /// Whether phase `number` has begun.
    pub(crate) fn has_begun(&self, number: usize) -> bool {
        self.begun.load(Ordering::Acquire) > number
    }

    /// Whether phase `number` is still on.
    #[inline]
    pub(crate) fn is_on(&self, number: usize) -> bool {
        self.ended.load(Ordering::Relaxed) <= number
    }

    pub(crate) fn are_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    pub(crate) fn arrive(&self) {
        self.arrived.fetch_add(1, Ordering::AcqRel);
    }

    /// How often CPUs have come to the end of a phase, or to the first beginning.
    pub(crate) fn arrivals(&self) -> usize {
        self.arrived.load(Ordering::Acquire)
    }

    pub(crate) fn leave(&self) {
        self.left.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn nr_left(&self) -> usize {
        self.left.load(Ordering::Acquire)
    }
}
