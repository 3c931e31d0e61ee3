//! What happens: a shootdown, and the handler on the other side.
//!
//! The engine itself (`plan`) decides what a CPU does about a request.

use mmu_gather::tlb::{
    Action as Planned, Concern, Laziness, LoadedIs, Situation, TlbGen, Wanted, WhyNothing, plan,
};

use crate::model::{Bug, Model};
use crate::state::{
    CpuState, Deed, Fate, ITEMS, Life, Loaded, Main, Request, Shoot, ShootStep, Space, State, Store, What,
};
use crate::steps::concern;

impl<const CPUS: usize> Model<CPUS> {
    pub(crate) fn step_shoot(&self, s: &mut State<CPUS>, cpu: usize, shoot: Shoot) {
        let Shoot { mut request, here, step } = shoot;
        let me = 1 << cpu;
        let next = match step {
            ShootStep::NotRaised(members) => {
                let late = s.space(request.space).tlb_gen + 1;
                for fate in &mut s.space_mut(request.space).fates {
                    if *fate == Fate::Unhooked(request.tlb_gen) {
                        *fate = Fate::Unhooked(late);
                    }
                }
                request.tlb_gen = late;
                if members != 0 || !self.has(Bug::RaisedOnlyIfSomebodyMustBeTold) {
                    self.lock(s, cpu, Store::TlbGen(request.space, request.tlb_gen));
                }
                looking(members, request.tables)
            }
            ShootStep::Raised => {
                let members = s.space(request.space).cpumask & !me; // F3
                looking(members, request.tables && !self.has(Bug::LazySkippedWithTables))
            }
            ShootStep::Looking { left: 0, targets } if self.has(Bug::InterruptNotSentForOldMail) => {
                let had_mail = s.cpus[targets.trailing_zeros() as usize].inbox != 0;
                ShootStep::Peeked { targets, had_mail }
            }
            ShootStep::Looking { left: 0, targets } => {
                Self::post(s, cpu, request, targets, targets);
                self.turn_here(s, cpu, &shoot, targets)
            }
            ShootStep::Peeked { targets, had_mail } => {
                let lowest = targets & targets.wrapping_neg();
                let told = if had_mail { targets & !lowest } else { targets };
                Self::post(s, cpu, request, targets, told);
                self.turn_here(s, cpu, &shoot, targets)
            }
            ShootStep::Looking { left, targets } => {
                let loaded = s.cpus[left.trailing_zeros() as usize].loaded; // F4
                ShootStep::LoadedRead { loaded, left, targets }
            }
            ShootStep::LoadedRead { loaded, left, targets } => {
                let lowest = left & left.wrapping_neg();
                let CpuState { lazy, loaded: later, .. } = s.cpus[left.trailing_zeros() as usize]; // F5
                let ours = Loaded::Space(request.space);
                let twice = self.has(Bug::LoadedReadTwice) && loaded != ours && later != Loaded::Switching;
                let loaded = if twice { Loaded::Init } else { loaded };
                let space =
                    if matches!(request.what, What::AllUpdated(_)) { None } else { Some(request.space) };
                let told = match concern(loaded, lazy, space) {
                    Concern::MustFlush => true,
                    Concern::Elsewhere => matches!(request.what, What::AllUpdated(_)),
                    Concern::Lazy | Concern::Offline => false,
                };
                let targets = if told { targets | lowest } else { targets };
                let left = left & !lowest;
                if left | targets == 0 {
                    self.turn_here(s, cpu, &shoot, 0)
                } else {
                    ShootStep::Looking { left, targets }
                }
            }
            ShootStep::Here { targets } => {
                ShootStep::Flushing { targets, deed: self.decide(s, cpu, &request) }
            }
            ShootStep::Flushing { targets, deed: Deed::Done } => ShootStep::Waiting { targets },
            ShootStep::Flushing { targets, deed } => {
                ShootStep::Flushing { targets, deed: self.carry_out(s, cpu, deed, Some(&request)) }
            }
            ShootStep::Waiting { targets } => ShootStep::Waiting { targets },
        };
        let next = match next {
            ShootStep::Looking { left: 0, targets: 0 } => self.turn_here(s, cpu, &shoot, 0),
            ShootStep::Flushing { targets, deed: Deed::Done } => ShootStep::Waiting { targets },
            other => other,
        };
        let nobody_is_waited_for = matches!(next, ShootStep::Waiting { targets: 0 });
        if nobody_is_waited_for || matches!(step, ShootStep::Waiting { .. }) {
            self.free(s, &request); // F7
            s.cpus[cpu].main = Main::Run;
        } else {
            s.cpus[cpu].main = Main::Shoot(Shoot { request, here, step: next });
        }
    }

    /// M1 to M3: `cpu` has `request` for each of `targets`. Those of `told` that had no mail are
    /// interrupted. An interrupt arrives at any time later, so sending it needs no step of its own.
    fn post(s: &mut State<CPUS>, cpu: usize, request: Request, targets: u8, told: u8) {
        s.answers = 0;
        for target in (0..CPUS).filter(|target| targets & (1 << target) != 0) {
            let state = &mut s.cpus[target];
            state.asked[cpu] = Some(request);
            state.interrupted |= state.inbox == 0 && told & (1 << target) != 0;
            state.inbox |= 1 << cpu;
        }
    }

    /// The others have been told: does this CPU have to flush?
    fn turn_here(&self, s: &State<CPUS>, cpu: usize, shoot: &Shoot, targets: u8) -> ShootStep {
        let concerned = match shoot.request.what {
            What::AllUpdated(_) => shoot.here,
            _ => s.cpus[cpu].own_loaded() == Loaded::Space(shoot.request.space),
        };
        if concerned { ShootStep::Here { targets } } else { ShootStep::Waiting { targets } }
    }

    fn free(&self, s: &mut State<CPUS>, request: &Request) {
        let space = s.space_mut(request.space);
        for item in ITEMS {
            let fate = &mut space.fates[item as usize];
            let ours = match request.what {
                What::Range(one) | What::AllUpdated(one) => one == item,
                What::Mm => true,
            };
            if let (true, Fate::Unhooked(tlb_gen)) = (ours, *fate) {
                *fate = Fate::Freed(tlb_gen);
            }
        }
        if space.life == Life::Exiting && request.what == What::Mm {
            space.life = Life::RootFreed;
        }
    }

    /// `flush_tlb_func` up to its decision, which is the engine's.
    pub(crate) fn decide(&self, s: &State<CPUS>, cpu: usize, request: &Request) -> Deed {
        let state = &s.cpus[cpu];
        let target = if matches!(request.what, What::AllUpdated(_)) { None } else { Some(request.space) };
        let (loaded, mm_gen) = match (state.own_loaded(), target) {
            (Loaded::Space(space), None) => (LoadedIs::Requested, s.gen_seen_by(cpu, space)),
            (Loaded::Space(space), Some(target)) if space == target => {
                (LoadedIs::Requested, s.gen_seen_by(cpu, space))
            }
            (Loaded::Init, None) => (LoadedIs::Init, 0),
            _ => (LoadedIs::Other, 0),
        };
        let mut local_gen = state.slots[usize::from(state.loaded_slot)].tlb_gen;
        if self.has(Bug::RequestTakesOneBehindForThere) && loaded == LoadedIs::Requested {
            local_gen = mm_gen.min(local_gen + 1);
        }
        let wanted = match request.what {
            What::Range(_) => Wanted::Range(generation(request.tlb_gen)),
            What::Mm => Wanted::Mm(generation(request.tlb_gen)),
            What::AllUpdated(_) => Wanted::AllUpdated,
        };
        let situation = Situation {
            loaded,
            laziness: if state.own_lazy() { Laziness::Lazy } else { Laziness::Active },
            local_gen: generation(local_gen),
            mm_gen: generation(mm_gen),
        };
        match plan(wanted, situation) {
            Planned::Nothing(WhyNothing::Init | WhyNothing::AlreadyThere) => Deed::Done,
            Planned::LeaveCpumask if target.is_none() => Deed::Done,
            Planned::LeaveCpumask => Deed::LeaveCpumask,
            Planned::LoadInit => Deed::LoadInit,
            Planned::All(_) if self.has(Bug::PagesAfterGap) && matches!(request.what, What::Range(_)) => {
                Deed::Pages(mm_gen)
            }
            Planned::Pages(_) => Deed::Pages(mm_gen),
            Planned::All(_) => Deed::All(mm_gen),
        }
    }

    /// Carries the decision out. Without a request, because it was answered too early, everything
    /// that is asked for is flushed.
    pub(crate) fn carry_out(
        &self,
        s: &mut State<CPUS>,
        cpu: usize,
        deed: Deed,
        request: Option<&Request>,
    ) -> Deed {
        match deed {
            Deed::LeaveCpumask => {
                if let Some(request) = request {
                    self.lock(s, cpu, Store::Leave(request.space));
                }
            }
            Deed::LoadInit => {
                let main = s.cpus[cpu].main;
                self.announce_init(s, cpu, main);
                return Deed::LoadInitCr3;
            }
            Deed::LoadInitCr3 => {
                self.load_init(s, cpu);
                if request.is_some_and(|request| !matches!(request.what, What::AllUpdated(_))) {
                    return Deed::LeaveCpumask;
                }
            }
            Deed::Pages(tlb_gen) => {
                let Loaded::Space(space) = s.cpus[cpu].own_loaded() else { return Deed::Done };
                match request.map(|request| request.what) {
                    Some(What::Range(item)) => s.invlpg(cpu, item),
                    _ => return self.carry_out(s, cpu, Deed::All(tlb_gen), request),
                }
                let slot = s.cpus[cpu].loaded_slot;
                let tlb_gen = self.raise_to(s, cpu, space, tlb_gen);
                s.set_slot(cpu, slot, space, tlb_gen);
            }
            Deed::All(tlb_gen) => {
                let Loaded::Space(space) = s.cpus[cpu].own_loaded() else { return Deed::Done };
                self.flush_context(s, cpu, space, tlb_gen);
            }
            Deed::Unread | Deed::Done => {}
        }
        Deed::Done
    }

    fn raise_to(&self, s: &State<CPUS>, cpu: usize, space: Space, tlb_gen: u8) -> u8 {
        if self.has(Bug::SlotRaisedToLaterRead) { s.gen_seen_by(cpu, space) } else { tlb_gen }
    }
}

fn looking(members: u8, all_are_told: bool) -> ShootStep {
    if all_are_told {
        // T5: it does not matter what they have loaded.
        ShootStep::Looking { left: 0, targets: members }
    } else {
        ShootStep::Looking { left: members, targets: 0 }
    }
}

fn generation(number: u8) -> TlbGen {
    TlbGen::new(u64::from(number))
}
