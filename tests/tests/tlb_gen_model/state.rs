//! What there is: two address spaces, a few CPUs, and stores on their way to memory.

use arrayvec::ArrayVec;

/// An address space. The kernel's own, which maps nothing, has no name here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Space {
    A,
    B,
}

pub(crate) const SPACES: [Space; 2] = [Space::A, Space::B];

/// What can be unhooked, flushed and freed, once each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Item {
    Page0,
    Page1,
    /// A table: walks go through it, on lazy CPUs too.
    Table,
}

pub(crate) const ITEMS: [Item; 3] = [Item::Page0, Item::Page1, Item::Table];
pub(crate) const PAGES: [Item; 2] = [Item::Page0, Item::Page1];

/// A set of items of one space, a bit each.
pub(crate) const fn items(set: &[Item]) -> u8 {
    let mut bits = 0;
    let mut index = 0;
    while index < set.len() {
        bits |= 1 << set[index] as u8;
        index += 1;
    }
    bits
}

pub(crate) const fn item_bit(item: Item) -> u8 {
    1 << item as u8
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Fate {
    Mapped,
    /// Its entry was cleared before this generation.
    Unhooked(u8),
    /// The CPU that unhooked it has been told that nobody uses it.
    Freed(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Life {
    Alive,
    /// The last program has left; no CPU switches to the space any more.
    Exiting,
    RootFreed,
}

/// `MmContext`, and the page table in memory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SpaceState {
    pub(crate) tlb_gen: u8,
    /// The CPUs in the cpumask, a bit each.
    pub(crate) cpumask: u8,
    /// The items whose entries are in memory.
    pub(crate) present: u8,
    pub(crate) fates: [Fate; 3],
    pub(crate) life: Life,
}

/// `CpuTlb::loaded_mm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Loaded {
    Init,
    Switching,
    Space(Space),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SlotState {
    pub(crate) space: Option<Space>,
    pub(crate) tlb_gen: u8,
}

/// A store that its CPU has made and the others may not see yet. They leave in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Store {
    Lazy(bool),
    Loaded(Loaded),
    Join(Space),
    Leave(Space),
    Clear(Space, u8),
    TlbGen(Space, u8),
}

/// `FlushRequest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Request {
    pub(crate) what: What,
    /// The generation it goes up to; of a reclaim batch, that of the item in it.
    pub(crate) tlb_gen: u8,
    pub(crate) tables: bool,
    /// Whose items are freed afterwards.
    pub(crate) space: Space,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum What {
    Range(Item),
    Mm,
    /// The flush of a reclaim batch, with the item to be freed afterwards.
    AllUpdated(Item),
}

/// What `plan` said, and how far it has been carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Deed {
    /// The request has not been looked at.
    Unread,
    LeaveCpumask,
    LoadInit,
    /// The second half of it.
    LoadInitCr3,
    Pages(u8),
    All(u8),
    Done,
}

/// What a CPU does between two interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Main {
    /// A program, or, if lazy, something of the kernel's.
    Run,
    /// `switch_mm`, interrupts off.
    Switch(Switch),
    Shoot(Shoot),
    /// `UnmapBatch::add_mm`, after the generation was raised.
    AddMm(Space, Item, u8),
    /// `exit_mmap` of a space with nothing mapped: these CPUs are left to be asked whether they
    /// have it loaded.
    Survey(Space, Option<u8>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Switch {
    /// S1, S2 and, unless it needs a locked instruction that waits, S3 are on their way.
    Announced(Space),
    /// S3 is done or on its way.
    Joined(Space),
    /// S4 is done: what was read, and what follows from it.
    Chosen {
        to: Space,
        slot: u8,
        tlb_gen: u8,
        stale: bool,
    },
    ToInit,
    /// L1 is on its way.
    Woken(Space),
    /// L3 found a newer generation.
    Behind(Space, u8),
}

/// A shootdown under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Shoot {
    pub(crate) request: Request,
    /// Whether this CPU flushes too, for a batch: whether it was in the cpumask.
    pub(crate) here: bool,
    pub(crate) step: ShootStep,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum ShootStep {
    /// Planted: the cpumask was read first.
    NotRaised(u8),
    /// F2.
    Raised,
    /// F3: these members are left to be looked at, these are to be told.
    Looking {
        left: u8,
        targets: u8,
    },
    /// F4 of the lowest one left.
    LoadedRead {
        loaded: Loaded,
        left: u8,
        targets: u8,
    },
    /// Planted: whether the target's inbox has mail was read before this CPU adds its own.
    Peeked {
        targets: u8,
        had_mail: bool,
    },
    /// F6: requests were sent to the others; it is this CPU's turn.
    Here {
        targets: u8,
    },
    Flushing {
        targets: u8,
        deed: Deed,
    },
    Waiting {
        targets: u8,
    },
}

/// `flush_interrupt`, interrupts off: in the handler, or while the CPU waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Handler {
    pub(crate) initiator: u8,
    pub(crate) deed: Deed,
    /// Initiators whose mail was taken, too, and comes after this one's.
    pub(crate) rest: u8,
}

pub(crate) const MAX_SLOTS: usize = 2;

/// `CpuTlb`, the hardware behind it, and where the CPU is in its work.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct CpuState<const CPUS: usize> {
    /// What is in memory of `loaded_mm` and `is_lazy`.
    pub(crate) loaded: Loaded,
    pub(crate) lazy: bool,
    pub(crate) loaded_slot: u8,
    pub(crate) next_slot: u8,
    pub(crate) slots: [SlotState; MAX_SLOTS],
    pub(crate) cr3: Option<Space>,
    /// The tag in CR3.
    pub(crate) tag: u8,
    /// By tag and space, what is cached: as much as can be.
    pub(crate) tlb: [[u8; 2]; MAX_SLOTS],
    pub(crate) stores: ArrayVec<Store, 8>,
    pub(crate) main: Main,
    pub(crate) handler: Option<Handler>,
    /// Requests that this CPU has not answered, by initiator: the request and the bit for this CPU
    /// in the outbox of each.
    pub(crate) asked: [Option<Request>; CPUS],
    /// M3: the initiators whose request this CPU has not taken.
    pub(crate) inbox: u8,
    /// It has been interrupted, and has not run the handler yet.
    pub(crate) interrupted: bool,
}

impl<const CPUS: usize> CpuState<CPUS> {
    pub(crate) const fn new() -> Self {
        Self {
            loaded: Loaded::Init,
            lazy: false,
            loaded_slot: 0,
            next_slot: 0,
            slots: [SlotState { space: None, tlb_gen: 0 }; MAX_SLOTS],
            cr3: None,
            tag: 0,
            tlb: [[0; 2]; MAX_SLOTS],
            stores: ArrayVec::new_const(),
            main: Main::Run,
            handler: None,
            asked: [None; CPUS],
            inbox: 0,
            interrupted: false,
        }
    }

    /// `loaded_mm` as the CPU itself reads it.
    pub(crate) fn own_loaded(&self) -> Loaded {
        let newest = self.stores.iter().rev().find_map(|store| match store {
            Store::Loaded(loaded) => Some(*loaded),
            _ => None,
        });
        newest.unwrap_or(self.loaded)
    }

    /// `is_lazy` as the CPU itself reads it.
    pub(crate) fn own_lazy(&self) -> bool {
        let newest = self.stores.iter().rev().find_map(|store| match store {
            Store::Lazy(lazy) => Some(*lazy),
            _ => None,
        });
        newest.unwrap_or(self.lazy)
    }

    pub(crate) const fn interrupts_are_on(&self) -> bool {
        let off = matches!(
            self.main,
            Main::Switch(_) | Main::Shoot(Shoot { step: ShootStep::Flushing { .. }, .. })
        );
        self.handler.is_none() && !off
    }

    /// Whether a user address may be used: by a program, or by the kernel on its behalf.
    pub(crate) fn may_use_pages(&self) -> bool {
        self.interrupts_are_on() && !self.own_lazy()
    }

    /// The part of the state that names no CPU.
    fn without_names(&self) -> impl Ord + '_ {
        let Self { loaded, lazy, loaded_slot, next_slot, slots, cr3, tag, tlb, stores, .. } = self;
        ((loaded, lazy, loaded_slot, next_slot), (slots, cr3, tag, tlb, stores))
    }

    fn rename_slots(&mut self) {
        if self.slots[0].space == Some(Space::B) && self.slots[1].space == Some(Space::A) {
            self.slots.swap(0, 1);
            self.tlb.swap(0, 1);
            self.loaded_slot ^= 1;
            self.next_slot ^= 1;
            if self.cr3.is_some() {
                self.tag ^= 1;
            }
            if let Main::Switch(Switch::Chosen { slot, .. }) = &mut self.main {
                *slot ^= 1;
            }
        }
        if self.slots[0].space.is_some() && self.slots[1].space.is_some() {
            // Both are in use by the two spaces there are, so neither is taken over again.
            self.next_slot = 0;
        }
        if self.loaded == Loaded::Init && self.cr3.is_none() && self.stores.is_empty() {
            self.loaded_slot = 0;
        }
    }

    /// Whether it waits for answers.
    pub(crate) const fn waits(&self) -> bool {
        matches!(self.main, Main::Shoot(Shoot { step: ShootStep::Waiting { .. }, .. }))
    }

    pub(crate) const fn is_at_rest(&self) -> bool {
        matches!(self.main, Main::Run) && self.handler.is_none() && self.stores.is_empty()
    }
}

/// A reclaim batch that waits for its flush, on any CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Batch {
    pub(crate) space: Space,
    pub(crate) item: Item,
    pub(crate) tlb_gen: u8,
    pub(crate) cpumask: u8,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct State<const CPUS: usize> {
    pub(crate) spaces: [SpaceState; 2],
    pub(crate) cpus: [CpuState<CPUS>; CPUS],
    pub(crate) batch: Option<Batch>,
    /// Planted: the answers that came since a request was sent, whichever request they belong to.
    pub(crate) answers: u8,
    /// A generation went back: of a space, or of a slot that kept its context.
    pub(crate) went_back: bool,
}

impl<const CPUS: usize> State<CPUS> {
    pub(crate) const fn space(&self, space: Space) -> &SpaceState {
        &self.spaces[space as usize]
    }

    pub(crate) const fn space_mut(&mut self, space: Space) -> &mut SpaceState {
        &mut self.spaces[space as usize]
    }

    /// `tlb_gen` of `space` as `cpu` reads it: its own stores come first.
    pub(crate) fn gen_seen_by(&self, cpu: usize, space: Space) -> u8 {
        let own = self.cpus[cpu].stores.iter().rev().find_map(|store| match store {
            Store::TlbGen(of, tlb_gen) if *of == space => Some(*tlb_gen),
            _ => None,
        });
        own.unwrap_or(0).max(self.space(space).tlb_gen)
    }

    /// Whether `cpu` is in the cpumask of `space` as it reads it itself.
    pub(crate) fn is_member_to_itself(&self, cpu: usize, space: Space) -> bool {
        let own = self.cpus[cpu].stores.iter().rev().find_map(|store| match store {
            Store::Join(of) if *of == space => Some(true),
            Store::Leave(of) if *of == space => Some(false),
            _ => None,
        });
        own.unwrap_or(self.space(space).cpumask & (1 << cpu) != 0)
    }

    /// The oldest store of `cpu` reaches memory.
    pub(crate) fn drain(&mut self, cpu: usize) {
        let Some(store) = self.cpus[cpu].stores.pop_at(0) else { return };
        match store {
            Store::Lazy(lazy) => self.cpus[cpu].lazy = lazy,
            Store::Loaded(loaded) => self.cpus[cpu].loaded = loaded,
            Store::Join(space) => self.space_mut(space).cpumask |= 1 << cpu,
            Store::Leave(space) => self.space_mut(space).cpumask &= !(1 << cpu),
            Store::Clear(space, items) => self.space_mut(space).present &= !items,
            Store::TlbGen(space, tlb_gen) => {
                self.went_back |= tlb_gen <= self.space(space).tlb_gen;
                self.space_mut(space).tlb_gen = tlb_gen;
            }
        }
    }

    /// Raises a slot, or gives it to another context.
    pub(crate) fn set_slot(&mut self, cpu: usize, slot: u8, space: Space, tlb_gen: u8) {
        let cell = &mut self.cpus[cpu].slots[usize::from(slot)];
        self.went_back |= cell.space == Some(space) && tlb_gen < cell.tlb_gen;
        *cell = SlotState { space: Some(space), tlb_gen };
    }

    /// CR3 is written. Speculation fills in at once whatever can be cached: entries are only
    /// removed, so nothing can be filled in later.
    pub(crate) fn load_cr3(&mut self, cpu: usize, space: Option<Space>, tag: u8, flush: bool) {
        let state = &mut self.cpus[cpu];
        state.cr3 = space;
        state.tag = tag;
        if flush {
            state.tlb[usize::from(tag)] = [0; 2];
        }
        self.fill(cpu);
    }

    /// INVLPG of an address in `item`, in every space that the tag mixes up; it drops the links to
    /// tables as well.
    pub(crate) fn invlpg(&mut self, cpu: usize, item: Item) {
        let state = &mut self.cpus[cpu];
        for cached in &mut state.tlb[usize::from(state.tag)] {
            *cached &= !(item_bit(item) | item_bit(Item::Table));
        }
        self.fill(cpu);
    }

    fn fill(&mut self, cpu: usize) {
        let state = &mut self.cpus[cpu];
        if let Some(space) = state.cr3 {
            state.tlb[usize::from(state.tag)][space as usize] |= self.spaces[space as usize].present;
        }
    }

    /// States that differ only in names become one: in the names of the slots of a CPU, once both
    /// are in use, and in those of two CPUs.
    pub(crate) fn rename(&mut self, cpus_are_alike: bool) {
        for cpu in &mut self.cpus {
            cpu.rename_slots();
        }
        if CPUS == 2 && cpus_are_alike && self.cpus[0].without_names() > self.cpus[1].without_names() {
            self.swap_cpus();
        }
    }

    fn swap_cpus(&mut self) {
        self.cpus.swap(0, 1);
        for cpu in &mut self.cpus {
            cpu.asked.swap(0, 1);
            swap_bits(&mut cpu.inbox);
            if let Some(handler) = &mut cpu.handler {
                handler.initiator ^= 1;
                swap_bits(&mut handler.rest);
            }
            match &mut cpu.main {
                Main::Survey(_, Some(left)) => swap_bits(left),
                Main::Shoot(shoot) => match &mut shoot.step {
                    ShootStep::NotRaised(members) => swap_bits(members),
                    ShootStep::Raised => {}
                    ShootStep::Looking { left, targets } | ShootStep::LoadedRead { left, targets, .. } => {
                        swap_bits(left);
                        swap_bits(targets);
                    }
                    ShootStep::Peeked { targets, .. }
                    | ShootStep::Here { targets }
                    | ShootStep::Flushing { targets, .. }
                    | ShootStep::Waiting { targets } => swap_bits(targets),
                },
                _ => {}
            }
        }
        for space in &mut self.spaces {
            swap_bits(&mut space.cpumask);
        }
        if let Some(batch) = &mut self.batch {
            swap_bits(&mut batch.cpumask);
        }
    }
}

fn swap_bits(members: &mut u8) {
    *members = (*members & 1) << 1 | *members >> 1;
}
