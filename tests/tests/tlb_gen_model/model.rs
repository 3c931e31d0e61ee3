//! What programs and the kernel may do, on which machine, with which bug; and what can happen next.

use crate::state::{
    CpuState, Deed, Fate, ITEMS, Item, Life, Loaded, Main, SPACES, Shoot, ShootStep, Space, SpaceState,
    State, Store, Switch, item_bit,
};

/// Whether translations are tagged, and for how many spaces at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pcid {
    Off,
    /// Fewer slots than spaces make every switch take one over.
    On {
        slots: usize,
    },
}

/// What a locked instruction does to the stores before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Locked {
    /// Nothing: its own store joins the queue, and later loads may pass it. That is about what Rust
    /// promises of a read-modify-write.
    Queues,
    /// It waits until they are in memory, as on x86.
    IsBarrier,
}

/// When others see a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stores {
    /// Some time after, in order.
    Wait,
    /// At once: only interleavings are explored, for longer stories.
    AtOnce,
}

/// A bug of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    NoFenceInSwitch,
    NoFenceInRaise,
    NoFenceInWake,
    NoSwitchingMark,
    LazyEndedAfterSwitch,
    WakesWithoutLooking,
    MaskReadBeforeRaise,
    RaisedOnlyIfSomebodyMustBeTold,
    LazySkippedWithTables,
    LoadedReadTwice,
    SlotRaisedWithoutFlush,
    SlotRaisedToLaterRead,
    SwitchTakesOneBehindForCurrent,
    RequestTakesOneBehindForThere,
    /// `<=` for `<`: harmless.
    EqualIsStale,
    PagesAfterGap,
    AnsweredBeforeFlush,
    AnswersCountedTogether,
    TagTakenOverWithoutFlush,
    MaskLeftBeforeCr3,
    FreedWithoutWaiting,
    MailNotTakenWhileWaiting,
    InterruptNotSentForOldMail,
    BatchRaisesNothing,
}

/// Who has interrupts off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interrupts {
    /// A CPU that switches, or flushes itself.
    OnWhileWaiting,
    /// A CPU that flushes, from the beginning to the last answer.
    OffWhileWaiting,
}

/// What the scheduler does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheduler {
    /// Anything.
    Switches,
    /// Nothing: every CPU runs `Space::A` from the start.
    AllRunA,
}

/// What programs and the kernel may do, and on which machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Model<const CPUS: usize> {
    pub(crate) pcid: Pcid,
    pub(crate) locked: Locked,
    /// Whether a store may be seen by others later than the next load is made.
    pub(crate) stores: Stores,
    /// By space: what is mapped.
    pub(crate) mapped: [u8; 2],
    /// By space: which of it may be unhooked by a shootdown, once.
    pub(crate) unhooked: [u8; 2],
    /// By space: which of it may be unhooked by reclaim.
    pub(crate) reclaimed: [u8; 2],
    /// By space: whether it may come to its end.
    pub(crate) exits: [bool; 2],
    pub(crate) interrupts: Interrupts,
    pub(crate) scheduler: Scheduler,
    /// Whether the CPUs are interchangeable, so that it does not matter which one does what. Off
    /// where a story is printed.
    pub(crate) alike: bool,
    pub(crate) bug: Option<Bug>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Begin(usize, Op),
    /// The oldest store reaches memory.
    Drain(usize),
    /// The flush interrupt arrives.
    Interrupt(usize),
    /// M4: a CPU that waits takes its mail.
    TakeMail(usize),
    Handle(usize),
    Step(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Op {
    Run(Space),
    Stop,
    GoLazy,
    Unmap(Space, Item),
    Exit(Space),
    Reclaim(Space, Item),
    FlushBatch,
}

impl<const CPUS: usize> Model<CPUS> {
    pub(crate) fn start(&self) -> State<CPUS> {
        let mut state = State {
            spaces: self.mapped.map(|present| SpaceState {
                tlb_gen: 0,
                cpumask: 0,
                present,
                fates: [Fate::Mapped; 3],
                life: Life::Alive,
            }),
            cpus: core::array::from_fn(|_| CpuState::new()),
            batch: None,
            answers: 0,
            went_back: false,
        };
        if self.scheduler == Scheduler::AllRunA {
            for cpu in 0..CPUS {
                self.act(&mut state, Action::Begin(cpu, Op::Run(Space::A)));
                self.go_to_the_end(&mut state);
            }
        }
        state
    }

    /// Takes every step that is left: those of the first CPU that has something to do.
    pub(crate) fn go_to_the_end(&self, s: &mut State<CPUS>) {
        let mut actions = Vec::new();
        for _ in 0..300 {
            actions.clear();
            for cpu in 0..CPUS {
                self.steps_of(s, cpu, &mut actions);
                if !actions.is_empty() {
                    break;
                }
            }
            let Some(action) = actions.first() else { return };
            self.act(s, *action);
        }
    }

    /// What of `space` may be unhooked, one way or the other.
    pub(crate) fn can_go(&self, space: Space) -> u8 {
        let index = space as usize;
        let by_exit = if self.exits[index] { self.mapped[index] } else { 0 };
        self.unhooked[index] | self.reclaimed[index] | by_exit
    }

    pub(crate) fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    /// A fence waits until the stores of its CPU are in memory.
    pub(crate) fn fence(&self, s: &State<CPUS>, cpu: usize, missing: Bug) -> bool {
        s.cpus[cpu].stores.is_empty() || self.has(missing)
    }

    /// Whether a locked instruction on the generation of `space` can be carried out. It works on
    /// the newest value, so no store to the generation may be on its way.
    pub(crate) fn may_raise(&self, s: &State<CPUS>, cpu: usize, space: Space) -> bool {
        let on_its_way = |store: &Store| matches!(store, Store::TlbGen(of, _) if *of == space);
        self.may_lock(s, cpu) && !s.cpus.iter().any(|cpu| cpu.stores.iter().any(on_its_way))
    }

    pub(crate) fn may_lock(&self, s: &State<CPUS>, cpu: usize) -> bool {
        self.locked == Locked::Queues || s.cpus[cpu].stores.is_empty()
    }

    pub(crate) fn lock(&self, s: &mut State<CPUS>, cpu: usize, store: Store) {
        s.cpus[cpu].stores.push(store);
        if self.locked == Locked::IsBarrier {
            s.drain(cpu);
        }
    }

    /// F1 and F2: clears entries, raises the generation.
    pub(crate) fn unhook(&self, s: &mut State<CPUS>, cpu: usize, space: Space, gone: &[Item]) -> u8 {
        let tlb_gen = s.space(space).tlb_gen + 1;
        for item in gone {
            s.space_mut(space).fates[*item as usize] = Fate::Unhooked(tlb_gen);
        }
        let bits = gone.iter().fold(0, |bits, item| bits | item_bit(*item));
        self.lock(s, cpu, Store::Clear(space, bits));
        tlb_gen
    }

    /// Every action there is now.
    pub(crate) fn all_actions(&self, s: &State<CPUS>, actions: &mut Vec<Action>) {
        for cpu in 0..CPUS {
            self.steps_of(s, cpu, actions);
            // The queue of stores is bounded; an action begins only if enough places are free.
            let has_room = s.cpus[cpu].stores.remaining_capacity() >= 4;
            if s.cpus[cpu].main == Main::Run && s.cpus[cpu].interrupts_are_on() && has_room {
                self.beginnings(s, cpu, actions);
            }
        }
    }

    /// The actions by which `cpu` goes on with what it has begun.
    pub(crate) fn steps_of(&self, s: &State<CPUS>, cpu: usize, actions: &mut Vec<Action>) {
        let state = &s.cpus[cpu];
        if !state.stores.is_empty() {
            actions.push(Action::Drain(cpu));
        }
        if let Some(handler) = state.handler {
            if self.may_do(s, cpu, handler.deed) {
                actions.push(Action::Handle(cpu));
            }
            return;
        }
        if self.may_step(s, cpu) {
            actions.push(Action::Step(cpu));
        }
        let is_deaf = self.interrupts == Interrupts::OffWhileWaiting && matches!(state.main, Main::Shoot(_));
        if state.interrupted && state.interrupts_are_on() && !is_deaf {
            actions.push(Action::Interrupt(cpu));
        }
        if state.waits() && state.inbox != 0 && !self.has(Bug::MailNotTakenWhileWaiting) {
            actions.push(Action::TakeMail(cpu));
        }
    }

    fn beginnings(&self, s: &State<CPUS>, cpu: usize, actions: &mut Vec<Action>) {
        let state = &s.cpus[cpu];
        let loaded = state.own_loaded();
        let mut begin = |op| actions.push(Action::Begin(cpu, op));
        let switches = self.scheduler == Scheduler::Switches;
        if switches && loaded != Loaded::Init {
            begin(Op::Stop);
            if !state.own_lazy() {
                begin(Op::GoLazy);
            }
        }
        for space in SPACES {
            let life = s.space(space).life;
            let is_idle_here = loaded == Loaded::Space(space) && !state.own_lazy();
            if switches && life == Life::Alive && !is_idle_here {
                begin(Op::Run(space));
            }
            for item in ITEMS {
                let mapped = s.space(space).fates[item as usize] == Fate::Mapped;
                if !mapped || life != Life::Alive || !self.may_raise(s, cpu, space) {
                    continue;
                }
                if self.unhooked[space as usize] & item_bit(item) != 0 {
                    begin(Op::Unmap(space, item));
                }
                if self.reclaimed[space as usize] & item_bit(item) != 0 && s.batch.is_none() {
                    begin(Op::Reclaim(space, item));
                }
            }
            if self.exits[space as usize] && life == Life::Alive && self.may_exit(s, cpu, space) {
                begin(Op::Exit(space));
            }
        }
        if s.batch.is_some() {
            begin(Op::FlushBatch);
        }
    }

    /// Whether the last program has left `space`, no CPU is switching to it, and no other call
    /// works on it.
    fn may_exit(&self, s: &State<CPUS>, cpu: usize, space: Space) -> bool {
        let in_use = s.cpus.iter().any(|state| {
            let busy = match state.main {
                Main::Run | Main::Switch(Switch::ToInit) => false,
                Main::Switch(
                    Switch::Announced(to)
                    | Switch::Joined(to)
                    | Switch::Chosen { to, .. }
                    | Switch::Woken(to)
                    | Switch::Behind(to, _),
                ) => to == space,
                Main::Shoot(Shoot { request, .. }) => request.space == space,
                Main::AddMm(of, ..) | Main::Survey(of, _) => of == space,
            };
            busy || (state.own_loaded() == Loaded::Space(space) && !state.own_lazy())
        });
        !in_use
            && s.batch.is_none_or(|batch| batch.space != space)
            && s.cpus[cpu].main == Main::Run
            && self.may_raise(s, cpu, space)
    }

    pub(crate) fn may_step(&self, s: &State<CPUS>, cpu: usize) -> bool {
        let state = &s.cpus[cpu];
        let quiet = state.stores.is_empty();
        match state.main {
            Main::Run => false,
            Main::Switch(Switch::Announced(_)) => quiet,
            Main::Switch(Switch::Joined(_)) => self.fence(s, cpu, Bug::NoFenceInSwitch),
            Main::Switch(Switch::Woken(_)) => self.fence(s, cpu, Bug::NoFenceInWake),
            // Loading CR3 serialises.
            Main::Switch(Switch::Chosen { .. } | Switch::ToInit | Switch::Behind(..)) => quiet,
            Main::AddMm(..) => self.fence(s, cpu, Bug::NoFenceInRaise),
            Main::Survey(space, _) => self.may_raise(s, cpu, space),
            Main::Shoot(shoot) => match shoot.step {
                ShootStep::NotRaised(_) => self.may_raise(s, cpu, shoot.request.space),
                ShootStep::Raised => self.fence(s, cpu, Bug::NoFenceInRaise),
                ShootStep::Looking { left: 0, targets } => targets == 0 || quiet,
                ShootStep::Looking { .. }
                | ShootStep::LoadedRead { .. }
                | ShootStep::Peeked { .. }
                | ShootStep::Here { .. } => true,
                ShootStep::Flushing { deed, .. } => self.may_do(s, cpu, deed),
                ShootStep::Waiting { targets } if self.has(Bug::AnswersCountedTogether) => {
                    u32::from(s.answers) >= targets.count_ones()
                }
                ShootStep::Waiting { .. } => {
                    self.has(Bug::FreedWithoutWaiting)
                        || s.cpus.iter().all(|other| other.asked[cpu].is_none())
                }
            },
        }
    }

    pub(crate) fn may_do(&self, s: &State<CPUS>, cpu: usize, deed: Deed) -> bool {
        match deed {
            Deed::LeaveCpumask => self.may_lock(s, cpu),
            Deed::Unread | Deed::LoadInit => true,
            // CR3 and INVLPG serialise, and so does the answer.
            Deed::LoadInitCr3 | Deed::Pages(_) | Deed::All(_) | Deed::Done => s.cpus[cpu].stores.is_empty(),
        }
    }
}
