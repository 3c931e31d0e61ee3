//! What each step of a sequence does.

use core::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use mmu_gather::pagetable::{Level, VirtRange};
use mmu_gather::tlb::{CpuId, Laziness};
use x86_64::structures::paging::PhysFrame;

use crate::boundary::Boundary;
use crate::checker::cost::CallKind;
use crate::kernel::{Execution, Kernel, NotDone, Promises, ReclaimAndExit};
use crate::mutex::lock;
use crate::sequence::calls::{Effect, Met, POPULATE};
use crate::sequence::op::{MmId, Op, STACK_PAGES};
use crate::sequence::world::{LiveMm, Program, World};
use crate::vocabulary::{Backing, Guarding, Note, Rights, UserAccess};

/// Pages of an area that only a kernel with pages of 1 GiB is asked for.
const LONG: u64 = 1 << 16;

impl<K: Kernel> World<K> {
    /// Does one step, by the thread that has begun on `cpu`. What the kernel refuses is no error:
    /// sequences are made up.
    pub(crate) fn take(&self, cpu: CpuId, op: Op) {
        let kernel = &*self.kernel;
        if self.machine.is_off(self.machine.current()) && !is_for_all(op) && op != Op::Online {
            // It does nothing.
            self.count(op.number(), Err(NotDone::Refused));
            return;
        }
        if op.end() > self.user_space().end() {
            // It names addresses that only five levels reach.
            self.count(op.number(), Err(NotDone::Refused));
            return;
        }
        let result = match op {
            Op::Map(mm, range, backing, rights) => self.map(cpu, (mm, range), backing, rights),
            Op::Unmap(mm, range) => self.promising(
                CallKind::Unmap,
                (cpu, mm, range, Effect::Changes),
                |mm| kernel.unmap(mm, range),
                |root, caller| Some(Note::Unmapped { root, range, caller }),
            ),
            Op::Discard(mm, range) => {
                let since = self.machine.moment();
                self.promising(
                    CallKind::Discard,
                    (cpu, mm, range, Effect::LeavesPromises),
                    |mm| kernel.discard(mm, range),
                    |root, caller| Some(Note::Discarded { root, range, since, caller }),
                )
            }
            Op::Guard(mm, range, guarding) => self.promising(
                CallKind::Guard,
                (cpu, mm, range, Effect::Changes),
                |mm| kernel.guard(mm, range, guarding),
                |root, caller| match guarding {
                    Guarding::Install => Some(Note::Unmapped { root, range, caller }),
                    Guarding::Remove => None,
                },
            ),
            Op::Protect(mm, range, rights) => self.promising(
                CallKind::Protect,
                (cpu, mm, range, Effect::Changes),
                |mm| kernel.protect(mm, range, rights),
                |root, caller| Some(Note::Protected { root, range, most: rights, caller }),
            ),
            Op::Remap(mm, range, to) => {
                let target = to.checked_add(range.len_bytes()).and_then(|end| VirtRange::new(to, end).ok());
                target.map_or(Err(NotDone::Refused), |target| {
                    // What another call has promised of the target does not hold any more.
                    self.using((CallKind::Remap, range), mm, |process| {
                        let moves = || self.remap(cpu, mm, range, target);
                        process.running.call(target, Effect::Changes, moves).0
                    })
                })
            }
            Op::MoveStack(mm, range, pages) => {
                self.using((CallKind::MoveStack, self.user_space()), mm, |process| {
                    let call = || kernel.move_stack(&process.mm, range.start(), pages);
                    process.running.call(self.user_space(), Effect::Changes, call).0
                })
            }
            Op::Fork(parent, child) => self.fork(cpu, parent, child),
            Op::Exit(mm) => kernel.new_mm().map(|new| self.replace(cpu, mm, LiveMm::new(new, false))),
            Op::Exec(mm, pages) => self.exec(cpu, mm, pages),
            Op::Reclaim(first, second, range) => self.reclaim(first, second, range),
            Op::Touch(range, access) => {
                self.touch(cpu, range, access);
                Ok(())
            }
            Op::Switch(mm) => self.process(mm).map(|process| self.switch(cpu, process)),
            Op::Lazy => self.go_lazy(cpu),
            Op::Wake => {
                let process = lock(&self.programs[cpu.index()]).process.clone();
                if let Some(process) = process {
                    self.switch(cpu, process);
                }
                Ok(())
            }
            Op::Offline => self.stop(cpu),
            Op::Online if self.machine.is_off(self.machine.current()) => {
                self.machine.switch_on();
                self.machine.cost_of_start_begins();
                kernel.start_cpu();
                self.machine.cost_of_switch_ends(Laziness::Active);
                Ok(())
            }
            Op::Online => Err(NotDone::Refused),
            Op::Batches(supply) => kernel.set_batch_supply(supply),
            Op::Tables(supply) => kernel.set_table_supply(supply),
            Op::Frames(supply) => kernel.set_frame_supply(supply),
            Op::Preempt(seams) => {
                self.machine.preempt_after(seams);
                Ok(())
            }
            Op::Sync => {
                self.machine.wait_for_arrivals();
                self.check_at_rest();
                Ok(())
            }
        };
        self.count(op.number(), result);
    }

    fn count(&self, number: usize, result: Result<(), NotDone>) {
        lock(&self.calls).count(number, result);
    }

    /// Lets `call` work on an address space, which does not exit meanwhile.
    fn using<R>(
        &self,
        (kind, range): (CallKind, VirtRange),
        mm: MmId,
        call: impl FnOnce(&LiveMm<K::Mm>) -> Result<R, NotDone>,
    ) -> Result<R, NotDone> {
        self.staying(mm, |process| self.counted(kind, &process.mm, range, || call(process)))
    }

    /// As [`using`](Self::using), without a look at what it costs.
    fn staying<R>(
        &self,
        mm: MmId,
        call: impl FnOnce(&LiveMm<K::Mm>) -> Result<R, NotDone>,
    ) -> Result<R, NotDone> {
        let process = self.process(mm)?;
        process.users.fetch_add(1, Ordering::Relaxed);
        let result = call(&process);
        process.users.fetch_sub(1, Ordering::Relaxed);
        result
    }

    /// Makes a call whose costs are judged.
    fn counted<R>(&self, kind: CallKind, mm: &K::Mm, range: VirtRange, call: impl FnOnce() -> R) -> R {
        let Some(ctx_id) = self.kernel.ctx_id(mm).filter(|_| self.machine.cost().is_some()) else {
            return call();
        };
        self.machine.cost_of_call_begins(kind, ctx_id, range);
        let result = call();
        self.machine.cost_of_call_ends(kind, ctx_id);
        result
    }

    /// Makes a call of which the checker is told, when it has returned, what it has promised;
    /// unless the kernel says so itself, or the call met another.
    fn promising(
        &self,
        kind: CallKind,
        (cpu, mm, range, effect): (CpuId, MmId, VirtRange, Effect),
        call: impl FnOnce(&K::Mm) -> Result<(), NotDone>,
        promised: impl FnOnce(PhysFrame, Laziness) -> Option<Note>,
    ) -> Result<(), NotDone> {
        self.using((kind, range), mm, |process| {
            let (result, met) = process.running.call(range, effect, || call(&process.mm));
            if self.kernel.promises() == Promises::ByTheRunner && result.is_ok() && met == Met::Nobody {
                let caller = self.laziness_of(cpu);
                if let Some(note) = promised(self.kernel.root(&process.mm), caller) {
                    self.machine.note(note);
                }
            }
            result
        })
    }

    fn remap(&self, cpu: CpuId, mm: MmId, range: VirtRange, target: VirtRange) -> Result<(), NotDone> {
        self.promising(
            CallKind::Remap,
            (cpu, mm, range, Effect::Changes),
            |mm| self.kernel.remap(mm, range, target),
            |root, caller| {
                let leaves_all = target.intersect(range).is_none();
                leaves_all.then_some(Note::Unmapped { root, range, caller })
            },
        )
    }

    fn laziness_of(&self, cpu: CpuId) -> Laziness {
        let program = lock(&self.programs[cpu.index()]);
        if program.process.is_some() && !program.is_lazy { Laziness::Active } else { Laziness::Lazy }
    }

    fn map(
        &self,
        cpu: CpuId,
        (mm, range): (MmId, VirtRange),
        backing: Backing,
        rights: Rights,
    ) -> Result<(), NotDone> {
        let kernel = &*self.kernel;
        let is_too_long = range.nr_pages() > LONG && !kernel.has(Backing::Giant);
        if is_too_long || !kernel.has(backing) {
            return Err(NotDone::Refused);
        }
        let since = self.machine.moment();
        self.using((CallKind::Map, range), mm, |process| {
            if backing == Backing::Stack {
                process.has_stack.store(true, Ordering::Relaxed);
            }
            let map = || {
                kernel.map(&process.mm, range, backing, rights)?;
                if kernel.promises() == Promises::ByTheRunner {
                    let root = kernel.root(&process.mm);
                    self.machine.promise_new(root, range, since, self.laziness_of(cpu));
                }
                if let Some(size) = size_of_pages(backing)
                    && let Some(blocks) = whole_pages(range, size)
                {
                    self.count(POPULATE, kernel.populate(&process.mm, blocks, backing));
                }
                Ok(())
            };
            process.running.call(range, Effect::Changes, map).0
        })
    }

    fn touch(&self, cpu: CpuId, range: VirtRange, access: UserAccess) {
        let access = self.as_the_kernel_knows_it(access);
        for address in (range.start()..range.end()).step_by(4096) {
            self.leave_the_dying(cpu);
            let process = {
                let program = lock(&self.programs[cpu.index()]);
                program.process.clone().filter(|_| !program.is_lazy)
            };
            let Some(process) = process else { return };
            let kind = match access {
                UserAccess::Read | UserAccess::Fetch => CallKind::ReadFault,
                UserAccess::Write => CallKind::Fault,
            };
            let page = VirtRange::of_entry(Level::Pte, address);
            let fault =
                || self.counted(kind, &process.mm, page, || self.kernel.fault(&process.mm, address, access));
            // What is refused was made up, too.
            let _signal = self.machine.touch(address, access, || {
                if process.has_stack.load(Ordering::Relaxed) {
                    // An area may grow to here.
                    process.running.call(page, Effect::Changes, fault).0
                } else {
                    fault()
                }
            });
        }
    }

    /// To a kernel that does not tell code from other pages a fetch is a load: it would answer the
    /// fault as one, again and again where its entries forbid all execution.
    pub(crate) fn as_the_kernel_knows_it(&self, access: UserAccess) -> UserAccess {
        match (access, self.kernel.execution()) {
            (UserAccess::Fetch, Execution::Anywhere) => UserAccess::Read,
            (access, _) => access,
        }
    }

    fn switch(&self, cpu: CpuId, process: Arc<LiveMm<K::Mm>>) {
        if process.is_dying.load(Ordering::Relaxed) {
            self.switch_away(cpu);
            return;
        }
        // Noted before the switch: a CPU that waits for the last program to leave counts this one.
        *lock(&self.programs[cpu.index()]) = Program { process: Some(Arc::clone(&process)), is_lazy: false };
        self.machine.cost_of_switch_begins(self.kernel.ctx_id(&process.mm));
        self.kernel.switch_to(Some(&process.mm));
        self.machine.cost_of_switch_ends(Laziness::Active);
    }

    pub(crate) fn go_lazy(&self, cpu: CpuId) -> Result<(), NotDone> {
        self.machine.cost_of_switch_begins(None);
        let went = self.kernel.go_lazy();
        if went.is_err() {
            self.kernel.switch_to(None);
        }
        self.machine.cost_of_switch_ends(Laziness::Lazy);
        lock(&self.programs[cpu.index()]).is_lazy = true;
        went
    }

    /// The CPU goes off, unless it is the first, which machines keep.
    fn stop(&self, cpu: CpuId) -> Result<(), NotDone> {
        if self.machine.current().number() == 0 {
            return Err(NotDone::Refused);
        }
        self.machine.cost_of_switch_begins(None);
        let stopped = self.kernel.stop_cpu();
        if stopped.is_ok() {
            self.machine.switch_off();
        }
        self.machine.cost_of_switch_ends(Laziness::Active);
        stopped?;
        *lock(&self.programs[cpu.index()]) = Program { process: None, is_lazy: false };
        Ok(())
    }

    fn switch_away(&self, cpu: CpuId) {
        self.machine.cost_of_switch_begins(None);
        self.kernel.switch_to(None);
        self.machine.cost_of_switch_ends(Laziness::Active);
        *lock(&self.programs[cpu.index()]) = Program { process: None, is_lazy: false };
    }

    /// A program whose process is dying leaves the CPU: to another address space, or lazily.
    pub(crate) fn leave_the_dying(&self, cpu: CpuId) {
        let leaves = {
            let program = lock(&self.programs[cpu.index()]);
            !program.is_lazy
                && program.process.as_ref().is_some_and(|process| process.is_dying.load(Ordering::Relaxed))
        };
        if leaves {
            if self.machine.choices().one_in(2) {
                self.switch_away(cpu);
            } else {
                let _is_not_counted = self.go_lazy(cpu);
            }
        }
    }

    fn fork(&self, cpu: CpuId, parent: MmId, child: MmId) -> Result<(), NotDone> {
        if parent == child {
            return Err(NotDone::Refused);
        }
        let copy = self.using((CallKind::Fork, self.user_space()), parent, |process| {
            let fork = || self.kernel.fork(&process.mm);
            let copy = process.running.call(self.user_space(), Effect::Changes, fork).0?;
            // Read after the copy was made: whatever it has was there before.
            Ok(LiveMm::new(copy, process.has_stack.load(Ordering::Relaxed)))
        })?;
        self.replace(cpu, child, copy);
        Ok(())
    }

    /// All addresses that programs may use on this machine.
    fn user_space(&self) -> VirtRange {
        let end = self.machine.paging_mode().user_end();
        VirtRange::new(0, end).unwrap_or_else(|_| VirtRange::of_entry(Level::Pte, 0))
    }

    fn reclaim(&self, first: MmId, second: MmId, range: VirtRange) -> Result<(), NotDone> {
        let reclaim = |first: &LiveMm<K::Mm>, second: &LiveMm<K::Mm>| {
            let call = || self.kernel.reclaim([(&first.mm, range), (&second.mm, range)]);
            let calls = || second.running.call(range, Effect::Changes, call).0;
            let calls = || self.counted(CallKind::Reclaim, &second.mm, range, calls);
            let calls = || first.running.call(range, Effect::Changes, calls).0;
            self.counted(CallKind::Reclaim, &first.mm, range, calls)
        };
        match self.kernel.reclaim_and_exit() {
            ReclaimAndExit::OneAfterTheOther => {
                self.staying(first, |first| self.staying(second, |second| reclaim(first, second)))
            }
            ReclaimAndExit::AtOnce => {
                let (first, second) = (self.process(first)?, self.process(second)?);
                first.reclaimers.fetch_add(1, Ordering::Relaxed);
                let result = reclaim(&first, &second);
                first.reclaimers.fetch_sub(1, Ordering::Relaxed);
                result
            }
        }
    }

    /// A new program takes the place of the process, and this CPU goes on with it: on a new stack,
    /// which is moved to where the program wants it.
    fn exec(&self, cpu: CpuId, mm: MmId, pages: u64) -> Result<(), NotDone> {
        let new = LiveMm::new(self.kernel.new_mm()?, true);
        let top = self.user_space().end() - (1 << 21);
        let stack = VirtRange::new(top - STACK_PAGES * 4096, top).map_err(|_| NotDone::Refused)?;
        let map = || self.kernel.map(&new.mm, stack, Backing::Stack, Rights::Write);
        let mapped = new.running.call(stack, Effect::Changes, map).0;
        if mapped.is_ok() {
            // The arguments of the program, which the old one still has.
            for page in [stack.end() - 4096, stack.end() - 8192] {
                let _is_faulted_in_later = self.kernel.fault(&new.mm, page, UserAccess::Write);
            }
        }
        let old = self.put(mm, Arc::clone(&new));
        if let Some(old) = &old {
            old.is_dying.store(true, Ordering::Relaxed);
        }
        new.users.fetch_add(1, Ordering::Relaxed);
        self.switch(cpu, Arc::clone(&new));
        self.touch(cpu, stack, UserAccess::Write);
        let call = || self.kernel.move_stack(&new.mm, stack.start(), pages);
        let _is_counted_as_another_call = new.running.call(self.user_space(), Effect::Changes, call).0;
        new.users.fetch_sub(1, Ordering::Relaxed);
        if let Some(old) = old {
            self.bury(cpu, &old);
        }
        mapped
    }

    /// The process leaves, if there is one, and another takes its place.
    fn replace(&self, cpu: CpuId, mm: MmId, new: Arc<LiveMm<K::Mm>>) {
        if let Some(old) = self.put(mm, new) {
            self.bury(cpu, &old);
        }
    }

    /// Waits until the process is left by everybody, and takes it down.
    fn bury(&self, cpu: CpuId, old: &Arc<LiveMm<K::Mm>>) {
        old.is_dying.store(true, Ordering::Relaxed);
        loop {
            self.leave_the_dying(cpu);
            let runs = |program: &Mutex<Program<K::Mm>>| {
                let program = lock(program);
                !program.is_lazy && program.process.as_ref().is_some_and(|process| Arc::ptr_eq(process, old))
            };
            if old.users.load(Ordering::Relaxed) == 0 && !self.programs.iter().any(runs) {
                break;
            }
            self.machine.wait_at_rest();
        }
        if old.reclaimers.load(Ordering::Relaxed) > 0 {
            self.machine.note_reached(Boundary::ExitBesideReclaim);
        }
        // A CPU may still be on its way out.
        let exit = || self.counted(CallKind::Exit, &old.mm, self.user_space(), || self.kernel.exit(&old.mm));
        while exit().is_err() {
            self.machine.wait_at_rest();
        }
        if let Some(ctx_id) = self.kernel.ctx_id(&old.mm) {
            self.machine.cost_of_gone_space(ctx_id);
        }
    }
}

/// Whether the step is not one of its CPU: the runner takes it.
const fn is_for_all(op: Op) -> bool {
    matches!(op, Op::Sync | Op::Preempt(_) | Op::Batches(_) | Op::Tables(_) | Op::Frames(_))
}

/// The size of the pages that a new area is filled with, if it is.
const fn size_of_pages(backing: Backing) -> Option<u64> {
    match backing {
        Backing::Huge | Backing::Clean => Some(Level::Pmd.entry_span()),
        Backing::Giant => Some(Level::Pud.entry_span()),
        _ => None,
    }
}

/// The part of a range that pages of this size can fill.
fn whole_pages(range: VirtRange, size: u64) -> Option<VirtRange> {
    VirtRange::new(range.start().next_multiple_of(size), range.end() & !(size - 1)).ok()
}
