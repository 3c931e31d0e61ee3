//! What a call does, and its bounds when it is done.

use core::sync::atomic::Ordering;

use mmu_gather::GatherEvent;
use mmu_gather::pagetable::{Level, VirtRange};
use mmu_gather::tlb::CtxId;
use x86_64::structures::paging::PhysFrame;

use crate::checker::checked::Checked;
use crate::checker::cost::bounds::{
    CallKind, Changed, Done, Taken, most_batches, most_seams, most_takes, most_unhookings,
};
use crate::checker::cost::flushes::{so_far, this};
use crate::checker::cost::slots::Waste;
use crate::checker::cost::state::{Call, Cost, CostPromise, Cpu, Hold, Space, State};
use crate::checker::kind::ViolationKind;
use crate::checker::violation::Violation;
use crate::machine::HostedMachine;
use crate::mutex::lock;

impl HostedMachine {
    /// From now on the kernel on this machine is held to what it has promised.
    pub(crate) fn hold_to(&self, promise: CostPromise) {
        let cpus = self.cpus.iter().map(|_| Cpu::default()).collect();
        let state = State { spaces: Vec::new(), cpus };
        // Told twice, it is the first that counts.
        let _ = self.cost.set(Cost { promise, state: std::sync::Mutex::new(state) });
    }

    pub(crate) fn cost(&self) -> Option<&Cost> {
        self.cost.get()
    }

    /// A new address space.
    pub(crate) fn cost_of_new_space(&self, ctx: CtxId, root: PhysFrame) {
        if let Some(cost) = self.cost() {
            lock(&cost.state).spaces.push(Space::new(ctx.get(), root));
        }
    }

    /// An address space is gone.
    pub(crate) fn cost_of_gone_space(&self, ctx: CtxId) {
        if let Some(cost) = self.cost() {
            let mut state = lock(&cost.state);
            state.spaces.retain(|space| space.ctx != ctx.get());
            for cpu in &mut state.cpus {
                cpu.member_of.retain(|member| *member != ctx.get());
            }
        }
    }

    /// This CPU begins a call; or its call goes on with another address space.
    pub(crate) fn cost_of_call_begins(&self, kind: CallKind, ctx: CtxId, range: VirtRange) {
        let Some(cost) = self.cost() else { return };
        let State { spaces, cpus } = &mut *lock(&cost.state);
        let ctx = ctx.get();
        let Some(space) = spaces.iter_mut().rev().find(|space| space.ctx == ctx) else { return };
        space.all_calls += 1;
        if kind.opens_gathers() {
            space.calls += 1;
        }
        space.reclaims += u32::from(kind == CallKind::Reclaim);
        let (met_any, met_another) = (space.all_calls > 1, space.calls > 1);
        let reclaims = space.reclaims > 0;
        if met_any {
            for call in cpus.iter_mut().filter_map(|cpu| cpu.call.as_mut()) {
                let is_there = call.spaces.contains(&ctx);
                call.met_any |= is_there;
                call.met_another |= is_there && met_another;
                // What it owes is known a little later than its generation.
                call.saw_owed |= is_there && reclaims;
            }
        }
        let cpu = &mut cpus[self.current().index()];
        cpu.loads = false;
        match &mut cpu.call {
            Some(call) if !call.spaces.is_full() => call.spaces.push(ctx),
            _ => cpu.call = Some(Call::new(kind, ctx, range)),
        }
        if let Some(call) = &mut cpu.call {
            call.met_any |= met_any;
            call.met_another |= met_another;
            call.saw_owed |= space.owes() || reclaims;
        }
    }

    /// The call of this CPU has returned, or is done with the address space.
    pub(crate) fn cost_of_call_ends(&self, kind: CallKind, ctx: CtxId) {
        let (Some(cost), Some(checked)) = (self.cost(), &self.checked) else { return };
        let (root, call) = {
            let mut state = lock(&cost.state);
            let root = state.space(ctx.get()).map(|space| {
                space.all_calls -= 1;
                if kind.opens_gathers() {
                    space.calls -= 1;
                }
                space.reclaims -= u32::from(kind == CallKind::Reclaim);
                space.root
            });
            let cpu = &mut state.cpus[self.current().index()];
            // A call that has begun on what was gone already has no entry.
            let Some(call) = cpu.call.as_mut().filter(|call| call.spaces.last() == Some(&ctx.get())) else {
                return;
            };
            if call.spaces.len() > 1 {
                call.spaces.pop();
                return;
            }
            cpu.wanted = None;
            cpu.flushes_batch = false;
            (root, cpu.call.take())
        };
        // What has exited meanwhile is not judged: what was known of it is gone.
        let (Some(root), Some(call)) = (root, call) else { return };
        if call.all_freed < call.all_unhooked {
            let words = format!(
                "{} says that it has unhooked {} tables, and has freed {}",
                this(&call, ctx.get()),
                call.all_unhooked,
                call.all_freed
            );
            self.report_waste(checked, root, (ViolationKind::TooManyFlushes, words));
        }
        self.judge_part(checked, cost, root, ctx.get(), &call);
    }

    /// The call of this CPU has said that a part of it is done: what follows is counted anew.
    pub(crate) fn cost_of_part_ends(&self, root: PhysFrame) {
        let (Some(cost), Some(checked)) = (self.cost(), &self.checked) else { return };
        let part = {
            let mut state = lock(&cost.state);
            let Some(call) = &mut state.cpus[self.current().index()].call else { return };
            let areas = call.done.areas;
            let part = Call {
                tables: core::mem::take(&mut call.tables),
                done: call.done,
                ..Call::new(call.kind, 0, call.range)
            };
            call.done = Done { areas, ..Done::default() };
            part
        };
        let ctx = lock(&cost.state).ctx_of(root);
        self.judge_part(checked, cost, root, ctx, &part);
    }

    fn judge_part(&self, checked: &Checked, cost: &Cost, root: PhysFrame, ctx: u64, call: &Call) {
        let most = most_batches(call.kind, &call.done, &cost.promise.limits);
        if call.done.batches > most {
            let words = format!(
                "{} has taken {} batch pages, and {most} are all that it can need: {}",
                this(call, ctx),
                call.done.batches,
                so_far(call)
            );
            self.report_waste(checked, root, (ViolationKind::TooManyBatchPages, words));
        }
        // A fault looks again as long as others change its entry.
        let is_fault = matches!(call.kind, CallKind::Fault | CallKind::ReadFault);
        let is_in_pieces = |table: &Taken| table.unhookings > most_unhookings(&call.done, table);
        if let Some((frame, table)) = call.tables.iter().find(|(_, table)| is_in_pieces(table)) {
            let words = format!(
                "{} has taken the lock of the table in frame {:#x} {} times to unhook {} tables there: {}",
                this(call, ctx),
                frame.start_address(),
                table.unhookings,
                table.children,
                so_far(call)
            );
            self.report_waste(checked, root, (ViolationKind::TooManyLocks, words));
        }
        let most = |table: &Taken| most_takes(call.kind, call.range, &call.done, table);
        if !(is_fault && call.met_any)
            && let Some((frame, table)) = call.tables.iter().find(|(_, table)| table.takes > most(table))
        {
            let words = format!(
                "{} has taken the lock of the table in frame {:#x} {} times, and {} are all that it can need; in this table it has changed {} leaves and unhooked {} tables: {}",
                this(call, ctx),
                frame.start_address(),
                table.takes,
                most(table),
                table.leaves,
                table.children + table.upper_children,
                so_far(call)
            );
            self.report_waste(checked, root, (ViolationKind::TooManyLocks, words));
        }
    }

    /// The call of this CPU, if there is one, and if costs are judged.
    fn in_call(&self, note: impl FnOnce(&mut Call)) {
        if let Some(cost) = self.cost()
            && let Some(call) = &mut lock(&cost.state).cpus[self.current().index()].call
        {
            note(call);
        }
    }

    /// A leaf was cleared, or lost rights.
    pub(crate) fn cost_of_leaf(&self, address: u64, level: Level) {
        let Some(cost) = self.cost() else { return };
        let cpu = &mut lock(&cost.state).cpus[self.current().index()];
        if let Some(call) = &mut cpu.call {
            call.done.leaves += 1;
            call.done.large += u64::from(level != Level::Pte);
            call.changed = call.changed.with(address, address + level.entry_span(), level.entry_shift());
            if let Some(table) = call.last_table() {
                table.leaves += 1;
            }
        }
        if let Some(hold) = &mut cpu.hold {
            hold.leaves += 1;
        }
    }

    /// A large leaf was split.
    pub(crate) fn cost_of_split(&self, address: u64, level: Level) {
        self.in_call(|call| {
            call.done.splits += 1;
            let (end, shift) = (address + level.entry_span(), level.entry_shift());
            call.split = Some(Changed::NOTHING.with(address, end, shift));
        });
    }

    /// A gather has done something.
    pub(crate) fn cost_of_gather(&self, event: GatherEvent) {
        if let GatherEvent::TableUnhooked(level) = event {
            self.in_call(|call| {
                call.done.tables += 1;
                call.unhooked += 1;
                call.all_unhooked += 1;
                let is_last = level == Level::Pte;
                let is_another = is_last && !core::mem::replace(&mut call.unhooks, is_last);
                if let Some(table) = call.last_table() {
                    table.unhookings += u64::from(is_another);
                    table.children += u64::from(is_last);
                    table.upper_children += u64::from(!is_last);
                }
                let shift = level.above().unwrap_or(level).entry_shift();
                call.changed = call.changed.with(call.range.start(), call.range.end(), shift);
            });
        }
    }

    /// A table was freed.
    pub(crate) fn cost_of_freed_table(&self) {
        self.in_call(|call| call.all_freed += 1);
    }

    /// A table was taken from the kernel.
    pub(crate) fn cost_of_new_table(&self) {
        self.in_call(|call| call.done.linked += 1);
    }

    /// A batch page was taken from the kernel.
    pub(crate) fn cost_of_batch(&self) {
        self.in_call(|call| call.done.batches += 1);
    }

    /// The kernel had no batch page.
    pub(crate) fn cost_of_no_batch(&self) {
        self.in_call(|call| call.done.refused += 1);
    }

    /// The kernel removes the reverse mapping of a page later, under the lock of its table.
    pub(crate) fn cost_of_delayed(&self) {
        self.in_call(|call| call.done.delayed += 1);
    }

    /// The call works on so many areas.
    pub(crate) fn cost_of_areas(&self, areas: usize) {
        self.in_call(|call| call.done.areas = areas as u64);
    }

    /// The lock of a table is about to be taken.
    pub(crate) fn cost_of_take(&self, table: PhysFrame) {
        let Some(cost) = self.cost() else { return };
        let cpu = &mut lock(&cost.state).cpus[self.current().index()];
        cpu.loads = false;
        if let Some(call) = &mut cpu.call {
            call.take(table);
        }
    }

    /// This CPU holds a map lock from now on, or has downgraded it.
    pub(crate) fn cost_of_hold_begins(&self, root: PhysFrame) {
        if let Some(cost) = self.cost() {
            let since = self.cpu().seams.load(Ordering::Relaxed);
            let cpu = &mut lock(&cost.state).cpus[self.current().index()];
            if cpu.hold.is_none_or(|hold| hold.root == root) {
                cpu.hold = Some(Hold { root, leaves: 0, since });
            }
        }
    }

    /// It drops it.
    pub(crate) fn judge_hold(&self, checked: &Checked, root: PhysFrame) {
        let Some(cost) = self.cost() else { return };
        let now = self.cpu().seams.load(Ordering::Relaxed);
        let waste = {
            let mut state = lock(&cost.state);
            let ctx = state.ctx_of(root);
            let cpu = &mut state.cpus[self.current().index()];
            let Some(hold) = cpu.hold.take_if(|hold| hold.root == root) else { return };
            let Some(call) = &cpu.call else { return };
            let CostPromise { limits, flush_ceiling } = &cost.promise;
            let (seams, pages) = (now - hold.since, call.range.nr_pages());
            let most = most_seams(call.kind, call.range, &call.done, limits, *flush_ceiling);
            // A guard is installed by pages cleared and guards put there, and again if a fault was
            // faster. mprotect looks again where hardware was faster.
            // Folios are discarded before other pages, and faults may bring more in between.
            let tries = match call.kind {
                CallKind::Guard | CallKind::Protect => 4,
                CallKind::Discard => 2,
                _ => 1,
            };
            if hold.leaves > tries * pages {
                format!("{} has changed {} leaves under one map lock", this(call, ctx), hold.leaves)
            } else if let Some(most) = most.filter(|most| seams > *most) {
                format!(
                    "{} has crossed {seams} seams under one map lock, and {most} are all that it can need: {}",
                    this(call, ctx),
                    so_far(call)
                )
            } else {
                return;
            }
        };
        self.report_waste(checked, root, (ViolationKind::TooMuchUnderMapLock, waste));
    }

    pub(crate) fn report_waste(&self, checked: &Checked, root: PhysFrame, (kind, words): Waste) {
        let cpu = self.current();
        checked.report(kind, || Violation {
            kind,
            cpu,
            address: 0,
            frame: root,
            freed: None,
            because: Some(words),
            entry: None,
            story: checked.log.last_of(cpu),
        });
    }
}
