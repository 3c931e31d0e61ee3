//! What must hold in every state, and what must happen in some.

use stateright::{Model as Checked, Property};

use crate::model::{Action, Model};
use crate::state::{
    Deed, Fate, ITEMS, Item, Life, Main, PAGES, SPACES, Shoot, ShootStep, Space, State, Switch, item_bit,
};

impl<const CPUS: usize> Checked for Model<CPUS> {
    type State = State<CPUS>;
    type Action = Action;

    fn init_states(&self) -> Vec<Self::State> {
        vec![self.start()]
    }

    fn actions(&self, state: &Self::State, actions: &mut Vec<Self::Action>) {
        self.all_actions(state, actions);
    }

    fn next_state(&self, last: &Self::State, action: Self::Action) -> Option<Self::State> {
        let mut next = last.clone();
        self.act(&mut next, action);
        next.rename(self.alike);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no program reaches a freed page", |_, s| !reaches_freed_page(s)),
            Property::always("no walk goes through a freed table", |_, s| !walks_freed_table(s)),
            Property::always("a tag names one context", |_, s| !mixes_contexts(s)),
            Property::always("a slot keeps its promise", |_, s| slots_are_honest(s)),
            Property::always("answered is flushed", |_, s| answered_is_flushed(s)),
            Property::always("generations only grow", |_, s| generations_grow(s)),
            Property::always("whoever has it loaded is in the cpumask", |_, s| cpumasks_are_true(s)),
            Property::always("everything begun can end", can_end),
            Property::sometimes("all is freed, the roots too", all_is_freed),
            Property::sometimes("a page is flushed alone", |_, s| {
                does(s, |deed| matches!(deed, Deed::Pages(_)))
            }),
            Property::sometimes("a whole context is flushed", |_, s| {
                does(s, |deed| matches!(deed, Deed::All(_)))
            }),
            Property::sometimes("a lazy CPU is made to leave", |_, s| does(s, |deed| deed == Deed::LoadInit)),
            Property::sometimes("a CPU elsewhere leaves the cpumask", |_, s| {
                does(s, |deed| deed == Deed::LeaveCpumask)
            }),
            Property::sometimes("a CPU keeps what it had before", |_, s: &State<CPUS>| {
                s.cpus.iter().any(|cpu| matches!(cpu.main, Main::Switch(Switch::Chosen { stale: false, .. })))
            }),
            Property::sometimes(
                "a space that ends with nothing mapped is in a cpumask",
                |_, s: &State<CPUS>| s.cpus.iter().any(|cpu| matches!(cpu.main, Main::Survey(_, Some(1..)))),
            ),
            Property::sometimes("mail of two CPUs is taken at once", |_, s: &State<CPUS>| {
                s.cpus.iter().any(|cpu| cpu.handler.is_some_and(|handler| handler.rest != 0))
            }),
            Property::sometimes("a CPU that waits takes its mail", |_, s: &State<CPUS>| {
                s.cpus.iter().any(|cpu| cpu.waits() && cpu.handler.is_some())
            }),
            Property::sometimes("a waking CPU is behind", |_, s: &State<CPUS>| {
                s.cpus.iter().any(|cpu| matches!(cpu.main, Main::Switch(Switch::Behind(..))))
            }),
        ]
    }
}

/// What `cpu` has cached under the tag it uses, of `space`.
fn usable<const CPUS: usize>(s: &State<CPUS>, cpu: usize, space: Space) -> u8 {
    let state = &s.cpus[cpu];
    if state.cr3.is_none() { 0 } else { state.tlb[usize::from(state.tag)][space as usize] }
}

fn is_freed<const CPUS: usize>(s: &State<CPUS>, space: Space, item: Item) -> bool {
    matches!(s.space(space).fates[item as usize], Fate::Freed(_))
}

/// G1, T5. A freed page may still be cached on a lazy CPU; where a program runs, it may not.
fn reaches_freed_page<const CPUS: usize>(s: &State<CPUS>) -> bool {
    (0..CPUS).filter(|cpu| s.cpus[*cpu].may_use_pages()).any(|cpu| {
        SPACES.iter().any(|space| {
            PAGES
                .iter()
                .any(|page| is_freed(s, *space, *page) && usable(s, cpu, *space) & item_bit(*page) != 0)
        })
    })
}

/// G1, P2. Speculation walks whenever CR3 leads there: lazy or not, interrupts on or off.
fn walks_freed_table<const CPUS: usize>(s: &State<CPUS>) -> bool {
    (0..CPUS).any(|cpu| {
        SPACES.iter().any(|space| {
            let table =
                is_freed(s, *space, Item::Table) && usable(s, cpu, *space) & item_bit(Item::Table) != 0;
            let root = s.cpus[cpu].cr3 == Some(*space) && s.space(*space).life == Life::RootFreed;
            table || root
        })
    })
}

/// T6.
fn mixes_contexts<const CPUS: usize>(s: &State<CPUS>) -> bool {
    (0..CPUS)
        .any(|cpu| SPACES.iter().any(|space| s.cpus[cpu].cr3 != Some(*space) && usable(s, cpu, *space) != 0))
}

/// T2: nothing unhooked before the slot's generation is cached under its tag.
fn slots_are_honest<const CPUS: usize>(s: &State<CPUS>) -> bool {
    s.cpus.iter().all(|cpu| {
        cpu.slots.iter().zip(&cpu.tlb).all(|(slot, cached)| {
            let Some(space) = slot.space else { return true };
            ITEMS.iter().all(|item| {
                let unhooked = match s.space(space).fates[*item as usize] {
                    Fate::Mapped => false,
                    Fate::Unhooked(tlb_gen) | Fate::Freed(tlb_gen) => tlb_gen <= slot.tlb_gen,
                };
                !unhooked || cached[space as usize] & item_bit(*item) == 0
            })
        })
    })
}

/// From a CPU's answer on, what it has loaded is as new as was asked.
fn answered_is_flushed<const CPUS: usize>(s: &State<CPUS>) -> bool {
    (0..CPUS).all(|initiator| {
        let Main::Shoot(Shoot { request, step, .. }) = s.cpus[initiator].main else { return true };
        let (ShootStep::Here { targets }
        | ShootStep::Flushing { targets, .. }
        | ShootStep::Waiting { targets }) = step
        else {
            return true;
        };
        (0..CPUS).filter(|cpu| targets & (1 << cpu) != 0).all(|cpu| {
            let state = &s.cpus[cpu];
            let has_answered = state.asked[initiator].is_none();
            let slot = state.slots[usize::from(state.loaded_slot)];
            !has_answered || state.cr3 != Some(request.space) || slot.tlb_gen >= request.tlb_gen
        })
    })
}

fn generations_grow<const CPUS: usize>(s: &State<CPUS>) -> bool {
    !s.went_back
        && s.cpus.iter().all(|cpu| {
            cpu.slots.iter().all(|slot| slot.space.is_none_or(|space| slot.tlb_gen <= s.space(space).tlb_gen))
        })
}

fn cpumasks_are_true<const CPUS: usize>(s: &State<CPUS>) -> bool {
    (0..CPUS).all(|cpu| s.cpus[cpu].cr3.is_none_or(|space| s.space(space).cpumask & (1 << cpu) != 0))
}

/// If nothing new is begun, all work ends: one order of the steps is followed to its end.
fn can_end<const CPUS: usize>(model: &Model<CPUS>, s: &State<CPUS>) -> bool {
    let mut s = s.clone();
    model.go_to_the_end(&mut s);
    s.cpus.iter().all(|cpu| cpu.is_at_rest() && cpu.asked.iter().all(Option::is_none) && cpu.inbox == 0)
}

fn does<const CPUS: usize>(s: &State<CPUS>, what: impl Fn(Deed) -> bool) -> bool {
    s.cpus.iter().any(|cpu| cpu.handler.is_some_and(|handler| what(handler.deed)))
}

fn all_is_freed<const CPUS: usize>(model: &Model<CPUS>, s: &State<CPUS>) -> bool {
    SPACES.iter().all(|space| {
        let all = ITEMS
            .iter()
            .all(|item| model.can_go(*space) & item_bit(*item) == 0 || is_freed(s, *space, *item));
        all && (!model.exits[*space as usize] || s.space(*space).life == Life::RootFreed)
    })
}
