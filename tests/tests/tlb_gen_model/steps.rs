//! What happens: calls begin, and the steps of a switch.
//!
//! The protocol of the engine, cut wherever another CPU could read. The letters are those of the
//! tables in `tlb/src/lib.rs`.

use mmu_gather::tlb::Concern;

use crate::model::{Action, Bug, Locked, Model, Op, Pcid, Stores};
use crate::state::{
    Batch, Deed, Fate, Handler, ITEMS, Item, Life, Loaded, Main, Request, Shoot, ShootStep, SlotState, Space,
    State, Store, Switch, What, item_bit,
};

/// `CpuTlb::choose_new_asid`: which slot, whether it is stale, and which is taken over next.
pub(crate) fn choose_slot(slots: &[SlotState], next: u8, space: Space, tlb_gen: u8) -> (u8, bool, u8) {
    for (index, slot) in (0..).zip(slots) {
        if slot.space == Some(space) {
            return (index, slot.tlb_gen < tlb_gen, next);
        }
    }
    let after = if usize::from(next) + 1 == slots.len() { 0 } else { next + 1 };
    (next, true, after)
}

/// `CpuTlb::concern`.
pub(crate) fn concern(loaded: Loaded, lazy: bool, space: Option<Space>) -> Concern {
    match (loaded, space) {
        _ if lazy => Concern::Lazy,
        (Loaded::Init, Some(_)) => Concern::Elsewhere,
        (Loaded::Space(found), Some(wanted)) if found != wanted => Concern::Elsewhere,
        _ => Concern::MustFlush,
    }
}

/// `MmContext::may_be_loaded_somewhere`, of one CPU.
pub(crate) fn may_have_loaded(loaded: Loaded, space: Space) -> bool {
    loaded == Loaded::Space(space) || loaded == Loaded::Switching
}

/// The request that comes first of those of `initiators`, whose mail was taken.
fn unread(initiators: u8) -> Option<Handler> {
    let initiator = u8::try_from(initiators.trailing_zeros()).expect("a small number");
    let rest = initiators & initiators.wrapping_sub(1);
    (initiators != 0).then_some(Handler { initiator, deed: Deed::Unread, rest })
}

impl<const CPUS: usize> Model<CPUS> {
    /// `action`, which was among the actions, happens.
    pub(crate) fn act(&self, s: &mut State<CPUS>, action: Action) {
        self.happen(s, action);
        if self.stores == Stores::AtOnce {
            for cpu in 0..CPUS {
                while !s.cpus[cpu].stores.is_empty() {
                    s.drain(cpu);
                }
            }
        }
    }

    fn happen(&self, s: &mut State<CPUS>, action: Action) {
        match action {
            Action::Begin(cpu, op) => self.begin(s, cpu, op),
            Action::Drain(cpu) => s.drain(cpu),
            Action::Interrupt(cpu) | Action::TakeMail(cpu) => self.take_mail(s, cpu),
            Action::Handle(cpu) => {
                let Some(handler) = s.cpus[cpu].handler else { return };
                match handler.deed {
                    Deed::Unread => self.read_mail(s, cpu, handler),
                    deed => {
                        let request = s.cpus[cpu].asked[usize::from(handler.initiator)];
                        let deed = self.carry_out(s, cpu, deed, request.as_ref());
                        self.go_on(s, cpu, Handler { deed, ..handler });
                    }
                }
            }
            Action::Step(cpu) => self.step(s, cpu),
        }
    }

    /// M5, and the first request of those that are taken. Where a CPU that waits takes it, an
    /// interrupt is still on its way. Nobody can tell whether it comes, because it finds nothing or
    /// what another interrupt is sent for, so it does not.
    fn take_mail(&self, s: &mut State<CPUS>, cpu: usize) {
        s.cpus[cpu].interrupted = false;
        if let Some(handler) = unread(core::mem::take(&mut s.cpus[cpu].inbox)) {
            self.read_mail(s, cpu, handler);
        }
    }

    /// M6.
    fn read_mail(&self, s: &mut State<CPUS>, cpu: usize, handler: Handler) {
        let initiator = usize::from(handler.initiator);
        let Some(request) = s.cpus[cpu].asked[initiator] else { return };
        if self.has(Bug::AnsweredBeforeFlush) {
            s.cpus[cpu].asked[initiator] = None;
        }
        let deed = self.decide(s, cpu, &request);
        self.go_on(s, cpu, Handler { deed, ..handler });
    }

    /// M7: the handler has a deed to do. When nothing is left, it answers as soon as its stores are
    /// in memory. Nobody can tell whether an answer comes with the last step or later, so it comes
    /// with that step.
    fn go_on(&self, s: &mut State<CPUS>, cpu: usize, handler: Handler) {
        let state = &mut s.cpus[cpu];
        if handler.deed == Deed::Done && state.stores.is_empty() {
            if !self.has(Bug::AnsweredBeforeFlush) {
                state.asked[usize::from(handler.initiator)] = None;
            }
            state.handler = unread(handler.rest);
            s.answers += u8::from(self.has(Bug::AnswersCountedTogether));
        } else {
            state.handler = Some(handler);
        }
    }

    fn begin(&self, s: &mut State<CPUS>, cpu: usize, op: Op) {
        let was_lazy = s.cpus[cpu].own_lazy();
        let was = s.cpus[cpu].own_loaded();
        let late = self.has(Bug::LazyEndedAfterSwitch);
        match op {
            Op::Run(space) => {
                if was_lazy && !late {
                    s.cpus[cpu].stores.push(Store::Lazy(false)); // S1, L1
                }
                if was == Loaded::Space(space) {
                    s.cpus[cpu].main = Main::Switch(Switch::Woken(space));
                    return;
                }
                if !self.has(Bug::NoSwitchingMark) {
                    s.cpus[cpu].stores.push(Store::Loaded(Loaded::Switching)); // S2
                }
                if let (Loaded::Space(left), true) = (was, self.has(Bug::MaskLeftBeforeCr3)) {
                    self.lock(s, cpu, Store::Leave(left));
                }
                // S3 writes only if the bit is not there; nobody but this CPU changes it.
                let mut next = Switch::Joined(space);
                if !s.is_member_to_itself(cpu, space) {
                    match self.locked {
                        Locked::Queues => s.cpus[cpu].stores.push(Store::Join(space)),
                        Locked::IsBarrier => next = Switch::Announced(space),
                    }
                }
                s.cpus[cpu].main = Main::Switch(next);
            }
            Op::Stop => self.announce_init(s, cpu, Main::Switch(Switch::ToInit)),
            Op::GoLazy => s.cpus[cpu].stores.push(Store::Lazy(true)),
            Op::Unmap(space, item) => {
                let tables = item == Item::Table;
                let request = Request { what: What::Range(item), tlb_gen: 0, tables, space };
                self.begin_shoot(s, cpu, request, &[item]);
            }
            Op::Exit(space) => {
                s.space_mut(space).life = Life::Exiting;
                let mapped: Vec<Item> = self.still_mapped(s, space);
                if mapped.is_empty() {
                    s.cpus[cpu].main = Main::Survey(space, None);
                } else {
                    let request = Request { what: What::Mm, tlb_gen: 0, tables: true, space };
                    self.begin_shoot(s, cpu, request, &mapped);
                }
            }
            Op::Reclaim(space, item) => {
                let tlb_gen = self.unhook(s, cpu, space, &[item]);
                if !self.has(Bug::BatchRaisesNothing) {
                    self.lock(s, cpu, Store::TlbGen(space, tlb_gen));
                }
                s.cpus[cpu].main = Main::AddMm(space, item, tlb_gen);
            }
            Op::FlushBatch => {
                let Some(Batch { space, item, tlb_gen, cpumask }) = s.batch.take() else { return };
                let request = Request { what: What::AllUpdated(item), tlb_gen, tables: false, space };
                let me = 1 << cpu;
                let step = ShootStep::Looking { left: cpumask & !me, targets: 0 };
                s.cpus[cpu].main = Main::Shoot(Shoot { request, here: cpumask & me != 0, step });
            }
        }
    }

    fn still_mapped(&self, s: &State<CPUS>, space: Space) -> Vec<Item> {
        let mapped = |item: &Item| {
            self.mapped[space as usize] & item_bit(*item) != 0
                && s.space(space).fates[*item as usize] == Fate::Mapped
        };
        ITEMS.into_iter().filter(mapped).collect()
    }

    pub(crate) fn begin_shoot(&self, s: &mut State<CPUS>, cpu: usize, mut request: Request, gone: &[Item]) {
        let space = request.space;
        request.tlb_gen = self.unhook(s, cpu, space, gone);
        let cpumask = s.space(space).cpumask & !(1 << cpu);
        let early = self.has(Bug::MaskReadBeforeRaise);
        let nobody = self.has(Bug::RaisedOnlyIfSomebodyMustBeTold) && cpumask == 0;
        let step = if early || nobody { ShootStep::NotRaised(cpumask) } else { ShootStep::Raised };
        if step == ShootStep::Raised {
            self.lock(s, cpu, Store::TlbGen(space, request.tlb_gen));
        }
        s.cpus[cpu].main = Main::Shoot(Shoot { request, here: false, step });
    }

    pub(crate) fn announce_init(&self, s: &mut State<CPUS>, cpu: usize, then: Main) {
        if s.cpus[cpu].own_lazy() {
            s.cpus[cpu].stores.push(Store::Lazy(false));
        }
        s.cpus[cpu].stores.push(Store::Loaded(Loaded::Switching));
        s.cpus[cpu].main = then;
    }

    pub(crate) fn load_init(&self, s: &mut State<CPUS>, cpu: usize) {
        // With PCIDs on, the kernel's own space has a tag of its own, under which no user page is
        // cached.
        s.load_cr3(cpu, None, 0, self.pcid == Pcid::Off);
        s.cpus[cpu].stores.push(Store::Loaded(Loaded::Init));
    }

    fn slots<'a>(&self, s: &'a State<CPUS>, cpu: usize) -> &'a [SlotState] {
        match self.pcid {
            Pcid::Off => &[],
            Pcid::On { slots } => &s.cpus[cpu].slots[..slots],
        }
    }

    fn step(&self, s: &mut State<CPUS>, cpu: usize) {
        match s.cpus[cpu].main {
            Main::Run => {}
            Main::Switch(switch) => self.step_switch(s, cpu, switch),
            Main::Shoot(shoot) => self.step_shoot(s, cpu, shoot),
            Main::AddMm(space, item, tlb_gen) => {
                let cpumask = s.space(space).cpumask;
                s.batch = Some(Batch { space, item, tlb_gen, cpumask });
                s.cpus[cpu].main = Main::Run;
            }
            Main::Survey(space, None) => {
                s.cpus[cpu].main = Main::Survey(space, Some(s.space(space).cpumask));
            }
            Main::Survey(space, Some(left)) => {
                let asked = left.trailing_zeros() as usize;
                if left == 0 {
                    s.space_mut(space).life = Life::RootFreed;
                    s.cpus[cpu].main = Main::Run;
                } else if may_have_loaded(self.loaded_read_by(s, cpu, asked), space) {
                    let request = Request { what: What::Mm, tlb_gen: 0, tables: true, space };
                    self.begin_shoot(s, cpu, request, &[]);
                } else {
                    s.cpus[cpu].main = Main::Survey(space, Some(left & (left - 1)));
                }
            }
        }
    }

    /// `loaded_mm` of `of`, read by `cpu`.
    fn loaded_read_by(&self, s: &State<CPUS>, cpu: usize, of: usize) -> Loaded {
        if cpu == of { s.cpus[of].own_loaded() } else { s.cpus[of].loaded }
    }

    fn step_switch(&self, s: &mut State<CPUS>, cpu: usize, switch: Switch) {
        s.cpus[cpu].main = match switch {
            Switch::Announced(to) => {
                self.lock(s, cpu, Store::Join(to)); // S3
                Main::Switch(Switch::Joined(to))
            }
            Switch::Joined(to) => {
                let tlb_gen = s.gen_seen_by(cpu, to); // S4
                let (slot, mut stale, next) = match self.pcid {
                    Pcid::Off => (0, true, 0),
                    Pcid::On { .. } => choose_slot(self.slots(s, cpu), s.cpus[cpu].next_slot, to, tlb_gen),
                };
                let found = s.cpus[cpu].slots[usize::from(slot)];
                let same = found.space == Some(to) && self.pcid != Pcid::Off;
                stale |= self.has(Bug::EqualIsStale);
                stale &=
                    !(self.has(Bug::SwitchTakesOneBehindForCurrent) && same && found.tlb_gen + 1 >= tlb_gen);
                s.cpus[cpu].next_slot = next;
                Main::Switch(Switch::Chosen { to, slot, tlb_gen, stale })
            }
            Switch::Chosen { to, slot, tlb_gen, stale } => {
                let taken_over = s.cpus[cpu].slots[usize::from(slot)].space != Some(to);
                if stale {
                    s.set_slot(cpu, slot, to, tlb_gen); // S5
                }
                let flush = stale && !(taken_over && self.has(Bug::TagTakenOverWithoutFlush));
                s.load_cr3(cpu, Some(to), slot, flush); // S6
                s.cpus[cpu].loaded_slot = slot;
                s.cpus[cpu].stores.push(Store::Loaded(Loaded::Space(to))); // S7
                self.end_laziness_late(s, cpu);
                Main::Run
            }
            Switch::ToInit => {
                self.load_init(s, cpu);
                Main::Run
            }
            Switch::Woken(space) => {
                self.end_laziness_late(s, cpu);
                let tlb_gen = s.gen_seen_by(cpu, space); // L3
                let slot = s.cpus[cpu].slots[usize::from(s.cpus[cpu].loaded_slot)];
                if slot.tlb_gen == tlb_gen || self.has(Bug::WakesWithoutLooking) {
                    Main::Run
                } else {
                    Main::Switch(Switch::Behind(space, tlb_gen))
                }
            }
            Switch::Behind(space, tlb_gen) => {
                self.flush_context(s, cpu, space, tlb_gen); // L4
                Main::Run
            }
        };
    }

    fn end_laziness_late(&self, s: &mut State<CPUS>, cpu: usize) {
        if self.has(Bug::LazyEndedAfterSwitch) && s.cpus[cpu].own_lazy() {
            s.cpus[cpu].stores.push(Store::Lazy(false));
        }
    }

    pub(crate) fn flush_context(&self, s: &mut State<CPUS>, cpu: usize, space: Space, tlb_gen: u8) {
        let slot = s.cpus[cpu].loaded_slot;
        if !self.has(Bug::SlotRaisedWithoutFlush) {
            s.load_cr3(cpu, Some(space), slot, true);
        }
        s.set_slot(cpu, slot, space, tlb_gen);
    }
}
