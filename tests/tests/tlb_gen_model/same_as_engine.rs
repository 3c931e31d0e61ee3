//! The model and the engine, given the same calls one after another, reach the same states.
//!
//! Whole calls only: what happens between two steps is left to the model. Compared after each call:
//! both generations and cpumasks; of each CPU what it has loaded, whether it is lazy, its slots,
//! CR3 with its tag, and what its TLB holds. While CR3 changes, the answer of `CpuTlb::concern`
//! about every CPU is compared, too: at that moment a CPU is SWITCHING.

#![expect(unsafe_code, reason = "plays the CPUs, which the engine takes on trust")]

use core::cell::{Cell, RefCell};
use core::pin::Pin;
use core::sync::atomic::AtomicU64;

use mmu_gather::tlb::{
    CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, CtxIds, FreedTables, Laziness, LoadedMm, MmContext,
    NR_DYN_ASIDS, PageSpan, PcidSupport, TlbGen, UnmapBatch, enter_lazy_tlb, flush_interrupt, flush_tlb_mm,
    flush_tlb_mm_range, switch_mm,
};
use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::PhysFrame;

use crate::model::{Action, Model, Op, Pcid as ModelPcid};
use crate::state::{Fate, ITEMS, Item, Life, Loaded, SPACES, SlotState, Space, State, item_bit};
use crate::steps::{choose_slot, concern, may_have_loaded};
use crate::{A_PAGE, ALL, STILL};

type Bits = [AtomicU64; 1];

const PAGE: u64 = 4096;
/// Where the items of a space are.
const ADDRESS: [u64; 3] = [0, PAGE, 1 << 30];

fn root(number: u64) -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new(number * PAGE))
}

/// What one CPU's hardware holds, by tag and space.
#[derive(Clone, Default)]
struct Hardware {
    root: u64,
    tag: usize,
    tlb: [[u8; 2]; 1 + NR_DYN_ASIDS as usize],
}

/// The machine that the engine runs on.
struct Rig {
    pcid: PcidSupport,
    here: Cell<CpuId>,
    states: [CpuTlb<Bits>; 2],
    hardware: RefCell<[Hardware; 2]>,
    spaces: [MmContext<Bits>; 2],
    present: [Cell<u8>; 2],
    batch: RefCell<UnmapBatch<Self>>,
    /// What CR3 loads and flushes did, for tests with many spaces.
    last_load: Cell<Option<(u64, u16, CachedTranslations)>>,
}

/// The context, which its rig does not move while it is used.
fn pinned(context: &MmContext<Bits>) -> Pin<&MmContext<Bits>> {
    // SAFETY: the test owns the contexts and only lends them out, so they do not move.
    unsafe { Pin::new_unchecked(context) }
}

impl Rig {
    fn new(pcid: PcidSupport) -> Self {
        let ids = CtxIds::new();
        Self {
            pcid,
            here: Cell::new(CpuId::new(0)),
            states: [CpuTlb::new(), CpuTlb::new()],
            hardware: RefCell::default(),
            // SAFETY: one source of names; each has a root of its own.
            spaces: [1, 2].map(|number| unsafe { MmContext::new(&ids, root(number)) }),
            present: [Cell::new(ALL), Cell::new(ALL)],
            batch: RefCell::new(UnmapBatch::new()),
            last_load: Cell::new(None),
        }
    }

    fn context(&self, space: Space) -> &MmContext<Bits> {
        &self.spaces[space as usize]
    }

    fn loaded(&self, cpu: usize) -> Loaded {
        let found = SPACES.into_iter().find(|space| self.states[cpu].has_loaded(self.context(*space)));
        found.map_or(Loaded::Init, Loaded::Space)
    }

    fn clear(&self, space: Space, bits: u8) {
        let present = &self.present[space as usize];
        present.set(present.get() & !bits);
    }

    fn do_it(&self, cpu: usize, op: Op) {
        let here = CpuId::new(u32::try_from(cpu).expect("few CPUs"));
        self.here.set(here);
        match op {
            // SAFETY: one thread is all CPUs, and is `here` now; the contexts live as long as the
            // rig.
            Op::Run(space) => unsafe { switch_mm(self, here, Some(pinned(self.context(space)))) },
            // SAFETY: as above.
            Op::Stop => unsafe { switch_mm(self, here, None) },
            // SAFETY: as above.
            Op::GoLazy => unsafe { enter_lazy_tlb(self, here) },
            Op::Unmap(space, item) => {
                self.clear(space, item_bit(item));
                let (stride_shift, tables) = match item {
                    Item::Table => (21, FreedTables::Yes),
                    Item::Page0 | Item::Page1 => (12, FreedTables::No),
                };
                let start = ADDRESS[item as usize];
                let span = PageSpan { start, end: start + (1 << stride_shift), stride_shift };
                let _flushed = flush_tlb_mm_range(self, self.context(space), span, tables);
            }
            Op::Exit(space) => {
                let mapped = self.present[space as usize].get() != 0;
                self.clear(space, ALL);
                if mapped || self.context(space).may_be_loaded_somewhere(self) {
                    let _flushed = flush_tlb_mm(self, self.context(space));
                }
            }
            Op::Reclaim(space, item) => {
                self.clear(space, item_bit(item));
                self.batch.borrow_mut().add_mm(self, self.context(space));
            }
            Op::FlushBatch => {
                let _flushed = self.batch.borrow_mut().flush(self);
            }
        }
    }

    fn fill(&self, cpu: usize) {
        let hardware = &mut self.hardware.borrow_mut()[cpu];
        if let Some(space) = SPACES.into_iter().find(|space| hardware.root == *space as u64 + 1) {
            hardware.tlb[hardware.tag][space as usize] |= self.present[space as usize].get();
        }
    }

    /// Compares what the engine says of a CPU with what the model says of a CPU in the same state.
    fn compare_concern(&self, switching: usize) {
        for cpu in 0..2 {
            let loaded = if cpu == switching { Loaded::Switching } else { self.loaded(cpu) };
            let lazy = self.states[cpu].laziness() == Laziness::Lazy;
            let of_all = self.states[cpu].concern(None);
            assert_eq!(of_all, concern(loaded, lazy, None), "{loaded:?} {lazy}");
            for space in SPACES {
                let found = self.states[cpu].concern(Some(self.context(space)));
                assert_eq!(found, concern(loaded, lazy, Some(space)), "{loaded:?} {lazy} {space:?}");
            }
        }
        for space in SPACES {
            let members = (0..2).filter(|cpu| self.context(space).cpumask().contains(CpuId::new(*cpu)));
            let found = members.map(|cpu| cpu as usize).any(|cpu| {
                may_have_loaded(if cpu == switching { Loaded::Switching } else { self.loaded(cpu) }, space)
            });
            assert_eq!(self.context(space).may_be_loaded_somewhere(self), found);
        }
    }

    fn compare(&self, state: &State<2>, told: &str) {
        for space in SPACES {
            let (context, expected) = (self.context(space), state.space(space));
            assert_eq!(
                context.tlb_gen().get(),
                u64::from(expected.tlb_gen),
                "{told}: generation of {space:?}"
            );
            let members = context.cpumask().iter().fold(0, |members, cpu| members | 1 << cpu.number());
            assert_eq!(members, expected.cpumask, "{told}: cpumask of {space:?}");
        }
        for (cpu, expected) in state.cpus.iter().enumerate() {
            let (state, hardware) = (&self.states[cpu], &self.hardware.borrow()[cpu]);
            assert_eq!(self.loaded(cpu), expected.loaded, "{told}: loaded on {cpu}");
            assert_eq!(state.laziness() == Laziness::Lazy, expected.lazy, "{told}: laziness of {cpu}");
            assert_eq!(
                hardware.root,
                expected.cr3.map_or(0, |space| space as u64 + 1),
                "{told}: CR3 of {cpu}"
            );
            let slots = state.slots().zip(&expected.slots).zip(&expected.tlb).enumerate();
            for (number, (((asid, slot), expected_slot), cached)) in slots {
                let of = |space: &Space| slot.ctx_id == Some(self.context(*space).ctx_id());
                let found = SlotState {
                    space: SPACES.into_iter().find(of),
                    tlb_gen: u8::try_from(slot.tlb_gen.get()).expect("few generations"),
                };
                assert_eq!(found, *expected_slot, "{told}: slot {number} of {cpu}");
                let tag = usize::from(asid.pcid(self.pcid).value());
                let is_used = number == 0 || self.pcid == PcidSupport::On;
                assert!(!is_used || hardware.tlb[tag] == *cached, "{told}: slot {number} of {cpu}, its TLB");
            }
            if let Loaded::Space(_) = expected.loaded {
                assert_eq!(
                    state.loaded_asid().index(),
                    usize::from(expected.loaded_slot),
                    "{told}: slot of {cpu}"
                );
            }
        }
    }
}

// SAFETY: one thread plays all CPUs: whoever calls is on `here`, and nothing interrupts but what is
// sent, at once. The pretend TLB drops what is named.
unsafe impl Cpus for Rig {
    type Bits = Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(self.here.get())
    }

    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        &self.states[cpu.index()]
    }

    fn init_root(&self) -> PhysFrame {
        root(0)
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Bits>) {
        let initiator = self.here.get();
        for cpu in targets.iter() {
            self.here.set(cpu);
            // SAFETY: this thread is `cpu` now, and nothing interrupts it.
            unsafe { flush_interrupt(self, cpu) };
        }
        self.here.set(initiator);
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }

    fn pcid_support(&self) -> PcidSupport {
        self.pcid
    }

    fn invlpg(&self, address: u64) {
        let cpu = self.here.get().index();
        let hit = ITEMS.into_iter().filter(|item| ADDRESS[*item as usize] == address);
        let dropped = hit.fold(item_bit(Item::Table), |bits, item| bits | item_bit(item));
        {
            let hardware = &mut self.hardware.borrow_mut()[cpu];
            for cached in &mut hardware.tlb[hardware.tag] {
                *cached &= !dropped;
            }
        }
        self.fill(cpu);
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        let cpu = self.here.get().index();
        self.last_load.set(Some((root.start_address().as_u64() / PAGE, pcid.value(), cached)));
        // SAFETY: one thread is all CPUs, so this one does not switch meanwhile.
        if matches!(unsafe { self.states[cpu].loaded_mm() }, LoadedMm::Switching) {
            self.compare_concern(cpu);
        }
        {
            let hardware = &mut self.hardware.borrow_mut()[cpu];
            hardware.root = root.start_address().as_u64() / PAGE;
            hardware.tag = usize::from(pcid.value());
            if cached == CachedTranslations::Flush {
                hardware.tlb[hardware.tag] = [0; 2];
            }
        }
        self.fill(cpu);
    }
}

/// Numbers that look random (Knuth's).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from((self.0 >> 33) % bound as u64).expect("below a usize")
    }
}

#[test]
fn every_call_leaves_the_machine_and_the_engine_in_the_same_state() {
    let mut numbers = Numbers(1);
    let mut seen = [0u32; 7];
    for story in 0..6000 {
        let (pcid, support) = match story % 3 {
            0 => (ModelPcid::Off, PcidSupport::Off),
            _ => (ModelPcid::On { slots: 2 }, PcidSupport::On),
        };
        let model = Model {
            pcid,
            unhooked: [ALL; 2],
            reclaimed: [A_PAGE; 2],
            exits: [true; 2],
            alike: false,
            ..STILL
        };
        let (rig, mut state) = (Rig::new(support), model.start());
        rig.compare(&state, "at the start");
        for number in 0..40 {
            let mut actions = Vec::new();
            model.all_actions(&state, &mut actions);
            // Ends of address spaces are rare, so that there is something to end.
            actions
                .retain(|action| !matches!(action, Action::Begin(_, Op::Exit(_))) || numbers.below(10) == 0);
            if actions.is_empty() {
                break;
            }
            let action = actions[numbers.below(actions.len())];
            let Action::Begin(cpu, op) = action else { panic!("at rest nothing is under way: {action:?}") };
            seen[match op {
                Op::Run(_) => 0,
                Op::Stop => 1,
                Op::GoLazy => 2,
                Op::Unmap(..) => 3,
                Op::Exit(_) => 4,
                Op::Reclaim(..) => 5,
                Op::FlushBatch => 6,
            }] += 1;
            model.act(&mut state, action);
            model.go_to_the_end(&mut state);
            rig.do_it(cpu, op);
            rig.compare(&state, &format!("story {story}, call {number}, {op:?} on {cpu}"));
        }
    }
    assert!(seen.iter().all(|calls| *calls > 1000), "calls of each kind: {seen:?}");
}

/// With more spaces than slots. The model has two spaces, so it needs to have one slot here.
#[test]
fn the_slot_chosen_is_the_one_the_engine_chooses() {
    let mut numbers = Numbers(2);
    let rig = Rig::new(PcidSupport::On);
    let ids = CtxIds::new();
    let spaces: [MmContext<Bits>; 9] =
        // SAFETY: these CPUs load none of the others.
        core::array::from_fn(|number| unsafe { MmContext::new(&ids, root(3 + number as u64)) });
    // The model has names for two spaces only; here the index in this list names the space.
    let mut named: Vec<Option<usize>> = vec![None; usize::from(NR_DYN_ASIDS)];
    let mut gens = vec![0u8; usize::from(NR_DYN_ASIDS)];
    let mut next = 0;
    let mut kept = 0;
    for _ in 0..5000 {
        let index = numbers.below(spaces.len());
        let space = &spaces[index];
        // SAFETY: one thread is all CPUs; the contexts live to the end of the test.
        unsafe { switch_mm(&rig, CpuId::new(0), None) };
        if space.tlb_gen() < TlbGen::new(250) && numbers.below(4) == 0 {
            let _flushed = flush_tlb_mm(&rig, space);
        }
        let tlb_gen = u8::try_from(space.tlb_gen().get()).expect("at most 250");
        let slots: Vec<SlotState> = (named.iter().zip(&gens))
            .map(|(name, tlb_gen)| SlotState {
                space: name.map(|name| if name == index { Space::A } else { Space::B }),
                tlb_gen: *tlb_gen,
            })
            .collect();
        let (slot, stale, after) = choose_slot(&slots, next, Space::A, tlb_gen);
        rig.last_load.set(None);
        // SAFETY: as above.
        unsafe { switch_mm(&rig, CpuId::new(0), Some(pinned(space))) };
        let cached = if stale { CachedTranslations::Flush } else { CachedTranslations::Keep };
        assert_eq!(rig.last_load.get(), Some((3 + index as u64, u16::from(slot) + 1, cached)));
        kept += u32::from(!stale);
        next = after;
        if stale {
            named[usize::from(slot)] = Some(index);
            gens[usize::from(slot)] = tlb_gen;
        }
    }
    assert!((500..4500).contains(&kept), "slots used again {kept} times of 5000");
}

#[test]
fn what_was_freed_in_a_story_was_freed_by_its_end() {
    let model = Model { exits: [true, false], ..STILL };
    let mut state = model.start();
    model.act(&mut state, Action::Begin(0, Op::Exit(Space::A)));
    model.go_to_the_end(&mut state);
    assert_eq!(state.space(Space::A).fates, [Fate::Freed(1); 3]);
    assert_eq!(state.space(Space::A).life, Life::RootFreed);
}
