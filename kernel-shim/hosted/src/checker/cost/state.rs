//! What is remembered of calls, of address spaces and of CPUs, so that their costs can be judged.

use std::sync::Mutex;

use arrayvec::ArrayVec;
use mmu_gather::Limits;
use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::{FreedTables, NR_DYN_ASIDS};
use x86_64::structures::paging::PhysFrame;

use crate::checker::cost::bounds::{CallKind, Changed, Done, Taken};

/// What a kernel says of itself that promises not to do more than its calls' sizes explain.
#[derive(Clone, Copy, Debug)]
pub struct CostPromise {
    /// The capacities of its gathers.
    pub limits: Limits,
    /// More pages than this are not invalidated one by one.
    pub flush_ceiling: u64,
}

/// The costs of one machine.
#[derive(Debug)]
pub(crate) struct Cost {
    pub(crate) promise: CostPromise,
    pub(crate) state: Mutex<State>,
}

/// All that is remembered.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) spaces: Vec<Space>,
    pub(crate) cpus: Vec<Cpu>,
}

/// An address space, by the name that the engine gives it.
#[derive(Debug)]
pub(crate) struct Space {
    pub(crate) ctx: u64,
    pub(crate) root: PhysFrame,
    /// Its generation, as flushes have told.
    pub(crate) generation: u64,
    /// Whether the flush that raised the generation to this was of everything, for the last few.
    whole: [(u64, Scope); 16],
    /// Calls that run on it; and those that may have gathers open.
    pub(crate) all_calls: u32,
    pub(crate) calls: u32,
    /// Calls of reclaim that run on it.
    pub(crate) reclaims: u32,
    /// Entries that reclaim cleared, and how many of them a flush of everything has made up for.
    pub(crate) owed: u64,
    pub(crate) made_up: u64,
}

/// What a flush was of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Pages of this part.
    Pages(Changed),
    /// Everything.
    Everything,
    /// What reclaim has cleared: it is flushed later.
    Deferred,
}

/// One PCID of a CPU.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Slot {
    /// Whose translations it tags; 0 is nobody.
    pub(crate) ctx: u64,
    /// They are at least as new as this.
    pub(crate) generation: u64,
}

/// A request that a CPU made last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) ctx: u64,
    /// In which turn.
    pub(crate) turn: u64,
    /// Whether CPUs must be asked that do not run programs there.
    pub(crate) tables: FreedTables,
    /// Whom it has asked: bit n is CPU n.
    pub(crate) asked: u64,
}

/// One CPU.
#[derive(Debug, Default)]
pub(crate) struct Cpu {
    pub(crate) slots: [Slot; NR_DYN_ASIDS as usize + 1],
    /// What it has in CR3; 0 is the kernel's own.
    pub(crate) loaded: u64,
    pub(crate) pcid: usize,
    pub(crate) is_lazy: bool,
    /// It is between two, or goes lazy: what it has loaded is anybody's guess.
    pub(crate) switches: bool,
    /// The generation, when that began, of where it goes: it reads this one or a later one.
    pub(crate) at_least: u64,
    pub(crate) starts: bool,
    /// It loads CR3 or is about to, and has not said yet what it has loaded.
    pub(crate) loads: bool,
    /// The turn in which that changed last.
    pub(crate) changed: u64,
    /// Spaces in whose cpumask it may be.
    pub(crate) member_of: Vec<u64>,
    /// INVLPGs since the last flush was told: how many, the first and the end.
    pub(crate) invalidated: Option<(u64, u64, u64)>,
    /// All of what it has loaded was dropped since then.
    pub(crate) dropped_all: bool,
    /// CPUs that it has asked and may interrupt: bit n is CPU n.
    pub(crate) may_interrupt: u64,
    /// A flush was asked for, and for pages, or everything.
    pub(crate) wanted: Option<(Option<u64>, FreedTables)>,
    pub(crate) request: Option<Request>,
    /// It flushes for a batch of reclaim.
    pub(crate) flushes_batch: bool,
    pub(crate) call: Option<Call>,
    pub(crate) hold: Option<Hold>,
}

/// A map lock that a CPU holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hold {
    pub(crate) root: PhysFrame,
    /// Leaves changed under it.
    pub(crate) leaves: u64,
    /// Seams that the CPU had crossed when it took it.
    pub(crate) since: u64,
}

/// A call that runs on a CPU.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) kind: CallKind,
    /// The spaces it works on: one, or two.
    pub(crate) spaces: ArrayVec<u64, 2>,
    pub(crate) range: VirtRange,
    pub(crate) done: Done,
    /// Changed since it last asked for a flush.
    pub(crate) changed: Changed,
    /// A large leaf that was split, and is still to be flushed for: that is a flush of its own.
    pub(crate) split: Option<Changed>,
    /// Tables unhooked since then.
    pub(crate) unhooked: u64,
    /// Another call that may have a gather open ran there since this began, or flushed everything.
    pub(crate) met_another: bool,
    /// Any other call ran there since this began.
    pub(crate) met_any: bool,
    /// Reclaim owed a flush there since then.
    pub(crate) saw_owed: bool,
    /// Reclaim has come to owe more since this call began, or flushed everything.
    pub(crate) owed_grew: bool,
    /// CPUs that may have had an address space loaded when reclaim cleared a page of it.
    pub(crate) batch: u64,
    /// The turn in which the first of them was noted.
    pub(crate) batch_since: u64,
    /// What it has done with each table; the lock of which it has taken last, by its place here.
    pub(crate) tables: Vec<(PhysFrame, Taken)>,
    pub(crate) last: usize,
    /// A last-level table was unhooked since it took that lock.
    pub(crate) unhooks: bool,
    /// Tables that it has unhooked, by its gather's account; and those it has freed.
    pub(crate) all_unhooked: u64,
    pub(crate) all_freed: u64,
}

impl State {
    pub(crate) fn space(&mut self, ctx: u64) -> Option<&mut Space> {
        self.spaces.iter_mut().rev().find(|space| space.ctx == ctx)
    }

    /// The name of the address space with this root; 0 if it is none that is known.
    pub(crate) fn ctx_of(&self, root: PhysFrame) -> u64 {
        self.spaces.iter().rev().find(|space| space.root == root).map_or(0, |space| space.ctx)
    }
}

impl Space {
    pub(crate) fn new(ctx: u64, root: PhysFrame) -> Self {
        let whole = [(0, Scope::Everything); 16];
        Self { ctx, root, generation: 0, whole, all_calls: 0, calls: 0, reclaims: 0, owed: 0, made_up: 0 }
    }

    pub(crate) fn note_raised(&mut self, generation: u64, scope: Scope) {
        self.generation = self.generation.max(generation);
        self.whole[place(generation)] = (generation, scope);
    }

    /// What the flush that raised the generation to this was of, if it is remembered.
    pub(crate) fn scope_of(&self, generation: u64) -> Option<Scope> {
        let (noted, scope) = self.whole[place(generation)];
        (noted == generation).then_some(scope)
    }

    pub(crate) const fn owes(&self) -> bool {
        self.owed != self.made_up
    }
}

const fn place(generation: u64) -> usize {
    (generation % 16) as usize
}

impl Call {
    /// It takes the lock of a table. It is most often one that it has taken lately.
    pub(crate) fn take(&mut self, table: PhysFrame) {
        self.unhooks = false;
        self.last = self.tables.iter().rposition(|(frame, _)| *frame == table).unwrap_or_else(|| {
            self.tables.push((table, Taken::default()));
            self.tables.len() - 1
        });
        self.tables[self.last].1.takes += 1;
    }

    /// The table whose lock it has taken last.
    pub(crate) fn last_table(&mut self) -> Option<&mut Taken> {
        self.tables.get_mut(self.last).map(|(_, table)| table)
    }

    pub(crate) fn new(kind: CallKind, ctx: u64, range: VirtRange) -> Self {
        Self {
            kind,
            spaces: [ctx].into_iter().collect(),
            range,
            done: Done::default(),
            changed: Changed::NOTHING,
            split: None,
            unhooked: 0,
            met_another: false,
            met_any: false,
            saw_owed: false,
            owed_grew: false,
            batch: 0,
            batch_since: 0,
            tables: Vec::new(),
            last: 0,
            unhooks: false,
            all_unhooked: 0,
            all_freed: 0,
        }
    }
}
