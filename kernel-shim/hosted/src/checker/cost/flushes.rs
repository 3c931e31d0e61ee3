//! Each flush as it is asked for, and each CPU that is asked.

use mmu_gather::tlb::{CpuId, CtxId, FreedTables, PageSpan, TlbEvent, TlbGen};
use x86_64::structures::paging::PhysFrame;

use crate::checker::checked::Checked;
use crate::checker::cost::bounds::{CallKind, Changed, most_requests};
use crate::checker::cost::slots::Waste;
use crate::checker::cost::state::{Call, Cost, Cpu, Request, Scope, Space, State};
use crate::checker::kind::ViolationKind;
use crate::machine::HostedMachine;
use crate::mutex::lock;

impl HostedMachine {
    /// The shootdown core says that a flush begins on this CPU, or has ended.
    pub(crate) fn judge_request(&self, checked: &Checked, event: TlbEvent) {
        let Some(cost) = self.cost() else { return };
        let here = self.current().index();
        let (root, waste) = {
            let mut state = lock(&cost.state);
            match event {
                TlbEvent::Requested { pages, tables } => {
                    state.cpus[here].wanted = Some((pages, tables));
                    return;
                }
                TlbEvent::IpisSent(_) => {
                    state.cpus[here].flushes_batch = false;
                    state.cpus[here].may_interrupt = 0;
                    return;
                }
                TlbEvent::Raised { ctx_id, tlb_gen, span } => {
                    self.raised(cost, &mut state, ctx_id, tlb_gen, span)
                }
                _ => return,
            }
        };
        for waste in waste.into_iter().flatten() {
            self.report_waste(checked, root, waste);
        }
    }

    fn raised(
        &self,
        cost: &Cost,
        state: &mut State,
        ctx_id: CtxId,
        tlb_gen: TlbGen,
        span: Option<PageSpan>,
    ) -> (PhysFrame, [Option<Waste>; 2]) {
        let State { spaces, cpus } = state;
        let (ctx, generation) = (ctx_id.get(), tlb_gen.get());
        let here = self.current().index();
        let wanted = cpus[here].wanted.take();
        let nobody = (self.kernel_root(), [None, None]);
        let Some(space) = spaces.iter_mut().rev().find(|space| space.ctx == ctx) else {
            if let Some(call) = &mut cpus[here].call {
                call.done.of_others += 1;
            }
            return nobody;
        };
        let Some((pages, tables)) = wanted else {
            let turn = self.turns();
            return (space.root, [deferred(space, cpus, here, (generation, turn)), None]);
        };
        let turn = self.turns();
        let mut request = Request { ctx, turn, tables, asked: 0 };
        let Some(call) = cpus[here].call.as_mut().filter(|call| call.spaces.contains(&ctx)) else {
            space.note_raised(generation, Scope::Everything);
            cpus[here].request = Some(request);
            return nobody;
        };
        let root = space.root;
        let skipped = generation.saturating_sub(space.generation + 1);
        if skipped > 0 && space.reclaims == 0 {
            let words = format!("{} raises the generation by {} for one flush", this(call, ctx), skipped + 1);
            space.note_raised(generation, Scope::Everything);
            return (root, [Some((ViolationKind::TooManyFlushes, words)), None]);
        }
        if let Some(split) = call.split.filter(|split| split.is_span(span)) {
            let waste = pages.is_none().then(|| of_split(call, ctx));
            call.split = None;
            call.done.requests += 1;
            space.note_raised(generation, Scope::Pages(split));
            cpus[here].request = Some(Request { tables: FreedTables::No, ..request });
            return (root, [waste, None]);
        }
        let is_excused =
            call.met_another || call.saw_owed || space.reclaims > 0 || call.kind == CallKind::Exit;
        if call.unhooked == 0 && !is_excused {
            request.tables = FreedTables::No;
        }
        let waste = judge(cost, call, ctx, pages, span, is_excused);
        // One that makes up for others is explained by them.
        call.done.requests += u64::from(!call.changed.is_nothing() || call.kind.moves() || !is_excused);
        let most = most_requests(call.kind, call.range, &call.done, &cost.promise.limits);
        let too_many = (call.done.requests == most + 1).then(|| {
            let words = format!(
                "{} has asked for {} flushes, and {most} are all that it can need: {}",
                this(call, ctx),
                call.done.requests,
                so_far(call)
            );
            (ViolationKind::TooManyFlushes, words)
        });
        let scope = if pages.is_none() || is_of_others(call) {
            Scope::Everything
        } else {
            Scope::Pages(allowed(call))
        };
        space.note_raised(generation, scope);
        call.changed = Changed::NOTHING;
        call.unhooked = 0;
        if span.is_none() {
            // Reclaim may be between raising the generation and saying that it owes a flush. And
            // what it owes may have grown since this call has read what it makes up for.
            if space.reclaims == 0 && !call.owed_grew {
                space.made_up = space.owed;
            }
            call.owed_grew = false;
            call.met_another = space.calls > 1;
            call.saw_owed = space.owes();
        }
        cpus[here].request = Some(request);
        (root, [waste, too_many])
    }

    /// This CPU asks `target` to flush.
    pub(crate) fn judge_asked(&self, checked: &Checked, target: CpuId) {
        let Some(cost) = self.cost() else { return };
        let waste = {
            let mut state = lock(&cost.state);
            self.asked(&mut state, target)
        };
        if let Some((root, waste)) = waste {
            self.report_waste(checked, root, waste);
        }
    }

    /// This CPU interrupts `target` to flush.
    pub(crate) fn judge_interrupt(&self, target: CpuId) {
        let (Some(cost), Some(checked)) = (self.cost(), &self.checked) else { return };
        let cpu = &lock(&cost.state).cpus[self.current().index()];
        let (may, is_in_call) = (cpu.may_interrupt >> target.number() & 1 != 0, cpu.call.is_some());
        if !may && is_in_call {
            let words = format!("{target} is interrupted, which was asked for nothing");
            self.report_waste(checked, self.kernel_root(), (ViolationKind::AskedInVain, words));
        }
    }

    fn asked(&self, state: &mut State, target: CpuId) -> Option<(PhysFrame, Waste)> {
        let here = self.current();
        let bit = 1u64 << target.number();
        let is_off = self.is_off(target);
        let cpu = &mut state.cpus[here.index()];
        cpu.may_interrupt |= bit;
        let in_vain = |root, words: String| Some((root, (ViolationKind::AskedInVain, words)));
        if cpu.wanted.is_some() {
            // A batch of reclaim: its generations were raised long before.
            cpu.flushes_batch = true;
            let call = cpu.call.as_ref()?;
            let (ctx, batch_since) = (*call.spaces.first()?, call.batch_since);
            let other = &state.cpus[target.index()];
            // Whom it asks was read at moments that this does not know: whether a CPU is lazy, say.
            let has_changed = other.switches || other.loads || other.changed >= batch_since;
            if target != here && (!is_off || has_changed) {
                return None;
            }
            let root = state.space(ctx)?.root;
            return in_vain(
                root,
                format!("reclaim interrupts {target}, which is off, or the CPU that makes the call"),
            );
        }
        let request = cpu.request.as_mut()?;
        let (ctx, turn, tables) = (request.ctx, request.turn, request.tables);
        let is_asked_again = request.asked & bit != 0;
        request.asked |= bit;
        let name = cpu.call.as_ref().map_or_else(|| "a flush".to_owned(), |call| this(call, ctx));
        let other = &state.cpus[target.index()];
        let has_loaded = other.loaded == ctx;
        let why = if target == here {
            "which is the CPU that makes the call"
        } else if is_asked_again {
            "which was asked for the same flush already"
        } else if other.switches || other.loads || other.changed > turn {
            return None;
        } else if is_off {
            "which is off"
        } else if tables == FreedTables::Yes && !other.member_of.contains(&ctx) {
            "which has left the address space since it last had it loaded, or never had"
        } else if tables == FreedTables::No && has_loaded && other.is_lazy {
            "which is lazy, and no table is freed"
        } else if tables == FreedTables::No && !has_loaded {
            "which has something else loaded, and no table is freed"
        } else {
            return None;
        };
        let root = state.space(ctx)?.root;
        in_vain(root, format!("{name} interrupts {target}, {why}"))
    }
}

/// Reclaim has raised the generation, to flush later.
fn deferred(
    space: &mut Space,
    cpus: &mut [Cpu],
    here: usize,
    (generation, turn): (u64, u64),
) -> Option<Waste> {
    space.note_raised(generation, Scope::Deferred);
    space.owed += 1;
    for call in cpus.iter_mut().filter_map(|cpu| cpu.call.as_mut()) {
        let is_there = call.spaces.contains(&space.ctx);
        call.saw_owed |= is_there;
        call.owed_grew |= is_there;
    }
    let may_have_loaded = |cpu: &Cpu| cpu.switches || cpu.loads || cpu.member_of.contains(&space.ctx);
    let numbers = (0u32..).zip(&*cpus).filter(|(_, cpu)| may_have_loaded(cpu));
    let batch = numbers.fold(0, |mask, (number, _)| mask | 1 << number);
    let call = cpus[here].call.as_mut()?;
    if call.batch == 0 {
        call.batch_since = turn;
    }
    call.batch |= batch;
    let (cleared, kind) = (!call.changed.is_nothing(), call.kind);
    call.changed = Changed::NOTHING;
    (!cleared || kind != CallKind::Reclaim).then(|| {
        let words = format!(
            "{} raises the generation, and there is nothing that it is to flush for",
            this(call, space.ctx)
        );
        (ViolationKind::TooManyFlushes, words)
    })
}

/// The flush for a large page that was split was of everything.
fn of_split(call: &Call, ctx: u64) -> Waste {
    let words =
        format!("{} flushed the whole address space for one large page that it has split", this(call, ctx));
    (ViolationKind::WholeFlushForPages, words)
}

/// Whether a flush may be for more than the call has changed since its last: for what another call
/// has cleared there; for runs that found no room, each of which is flushed for before it is
/// queued, and once more with what comes next.
fn is_of_others(call: &Call) -> bool {
    let has_runs_without_room = call.kind == CallKind::Discard && call.done.refused > 0;
    has_runs_without_room || call.met_any && call.changed.is_nothing()
}

/// Judges one flush by what had changed.
fn judge(
    cost: &Cost,
    call: &Call,
    ctx: u64,
    pages: Option<u64>,
    span: Option<PageSpan>,
    is_excused: bool,
) -> Option<Waste> {
    let ceiling = cost.promise.flush_ceiling;
    if is_of_others(call) {
        return None;
    }
    let nothing = call.changed.is_nothing() && !call.kind.moves();
    if nothing && (!is_excused || span.is_some()) {
        let words = format!("{} flushes, and has changed nothing since its last flush", this(call, ctx));
        return Some((ViolationKind::FlushedInVain, words));
    }
    let (changed, strides) = (call.changed, most_strides(call));
    if pages.is_none() && !is_excused && strides <= ceiling {
        let words = format!(
            "{} flushed the whole address space: {} entries had changed, and {ceiling} are flushed one by one; no other call was open there, and reclaim owed nothing",
            this(call, ctx),
            strides
        );
        return Some((ViolationKind::WholeFlushForPages, words));
    }
    let span = span.filter(|_| pages.is_some())?;
    (span.nr_pages() > strides).then(|| {
        let words = format!(
            "{} flushes {} pages one by one, {:#x}..{:#x}; what had changed is {:#x}..{:#x}, {} entries",
            this(call, ctx),
            span.nr_pages(),
            span.start,
            span.end,
            changed.start,
            changed.end,
            strides
        );
        (ViolationKind::TooManyPagesFlushed, words)
    })
}

/// What a flush of the call may be of. Where entries move, the checker does not hear of each.
const fn allowed(call: &Call) -> Changed {
    if call.kind.moves() { Changed::ANYWHERE } else { call.changed }
}

/// Of how many entries.
fn most_strides(call: &Call) -> u64 {
    let moved = if call.kind.moves() { call.range.nr_pages().min(512) } else { 0 };
    call.changed.strides().max(moved)
}

/// The call, in words.
pub(crate) fn this(call: &Call, ctx: u64) -> String {
    let pages = call.range.nr_pages();
    let word = call.kind.word();
    match call.kind {
        CallKind::Fork | CallKind::Exit | CallKind::MoveStack => {
            format!("this {word} of address space {ctx}")
        }
        _ => {
            format!("this {word} of {pages} page{} in address space {ctx}", if pages == 1 { "" } else { "s" })
        }
    }
}

/// What it did, in words.
pub(crate) fn so_far(call: &Call) -> String {
    let done = &call.done;
    format!(
        "it has changed {} leaves, unhooked {} tables, split {} large pages, was refused {} batch pages, and has {} pages whose dirty bits cannot wait",
        done.leaves, done.tables, done.splits, done.refused, done.delayed
    )
}
