//! What each step of a sequence does.

use core::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use mmu_gather::pagetable::{Level, VirtRange};
use mmu_gather::tlb::{CpuId, Laziness};
use x86_64::structures::paging::PhysFrame;

use crate::kernel::{Execution, Kernel, NotDone, Promises};
use crate::mutex::lock;
use crate::schedule;
use crate::sequence::calls::{Effect, Met, POPULATE};
use crate::sequence::op::{MmId, Op};
use crate::sequence::world::{LiveMm, Program, World};
use crate::vocabulary::{Backing, Guarding, Note, Rights, UserAccess};

/// All addresses that programs may use.
const USER_SPACE: VirtRange = match VirtRange::new(0, 1 << 47) {
    Ok(range) => range,
    Err(_) => panic!("user space is not empty"),
};

impl<K: Kernel> World<K> {
    /// Does one step. What the kernel refuses is no error: sequences are made up.
    pub(crate) fn take(&self, cpu: CpuId, op: Op) {
        let kernel = &*self.kernel;
        if self.machine.is_off(cpu) && !is_for_all(op) && op != Op::Online {
            // It does nothing.
            self.count(op.number(), Err(NotDone::Refused));
            return;
        }
        let result = match op {
            Op::Map(mm, range, backing, rights) => self.map(cpu, (mm, range), backing, rights),
            Op::Unmap(mm, range) => self.promising(
                (cpu, mm, range, Effect::Changes),
                |mm| kernel.unmap(mm, range),
                |root, caller| Some(Note::Unmapped { root, range, caller }),
            ),
            Op::Discard(mm, range) => {
                let since = self.machine.moment();
                self.promising(
                    (cpu, mm, range, Effect::LeavesPromises),
                    |mm| kernel.discard(mm, range),
                    |root, caller| Some(Note::Discarded { root, range, since, caller }),
                )
            }
            Op::Guard(mm, range, guarding) => self.promising(
                (cpu, mm, range, Effect::Changes),
                |mm| kernel.guard(mm, range, guarding),
                |root, caller| match guarding {
                    Guarding::Install => Some(Note::Unmapped { root, range, caller }),
                    Guarding::Remove => None,
                },
            ),
            Op::Protect(mm, range, rights) => self.promising(
                (cpu, mm, range, Effect::Changes),
                |mm| kernel.protect(mm, range, rights),
                |root, caller| Some(Note::Protected { root, range, most: rights, caller }),
            ),
            Op::Remap(mm, range, to) => {
                let target = to.checked_add(range.len_bytes()).and_then(|end| VirtRange::new(to, end).ok());
                target.map_or(Err(NotDone::Refused), |target| {
                    // What another call has promised of the target does not hold any more.
                    self.using(mm, |process| {
                        let moves = || self.remap(cpu, mm, range, target);
                        process.running.call(target, Effect::Changes, moves).0
                    })
                })
            }
            Op::MoveStack(mm, range, pages) => self.using(mm, |process| {
                let call = || kernel.move_stack(&process.mm, range.start(), pages);
                process.running.call(USER_SPACE, Effect::Changes, call).0
            }),
            Op::Fork(parent, child) => self.fork(cpu, parent, child),
            Op::Exit(mm) => kernel.new_mm().map(|new| self.replace(cpu, mm, LiveMm::new(new, false))),
            Op::Reclaim(first, second, range) => self.using(first, |first| {
                self.using(second, |second| {
                    let call = || kernel.reclaim([(&first.mm, range), (&second.mm, range)]);
                    let calls = || second.running.call(range, Effect::Changes, call).0;
                    first.running.call(range, Effect::Changes, calls).0
                })
            }),
            Op::Touch(range, access) => {
                self.touch(cpu, range, access);
                Ok(())
            }
            Op::Switch(mm) => {
                self.switch(cpu, self.process(mm));
                Ok(())
            }
            Op::Lazy => self.go_lazy(cpu),
            Op::Wake => {
                let process = lock(&self.programs[cpu.index()]).process.clone();
                if let Some(process) = process {
                    self.switch(cpu, process);
                }
                Ok(())
            }
            Op::Offline => self.stop(cpu),
            Op::Online if self.machine.is_off(cpu) => {
                self.machine.switch_on();
                kernel.start_cpu();
                Ok(())
            }
            Op::Online => Err(NotDone::Refused),
            Op::Batches(supply) => kernel.set_batch_supply(supply),
            Op::Tables(supply) => kernel.set_table_supply(supply),
            Op::Preempt(seams) => {
                self.machine.preempt_after(seams);
                Ok(())
            }
            Op::Sync => {
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
    fn using<R>(&self, mm: MmId, call: impl FnOnce(&LiveMm<K::Mm>) -> R) -> R {
        let process = self.process(mm);
        process.users.fetch_add(1, Ordering::Relaxed);
        let result = call(&process);
        process.users.fetch_sub(1, Ordering::Relaxed);
        result
    }

    /// Makes a call of which the checker is told, when it has returned, what it has promised;
    /// unless the kernel says so itself, or the call met another.
    fn promising(
        &self,
        (cpu, mm, range, effect): (CpuId, MmId, VirtRange, Effect),
        call: impl FnOnce(&K::Mm) -> Result<(), NotDone>,
        promised: impl FnOnce(PhysFrame, Laziness) -> Option<Note>,
    ) -> Result<(), NotDone> {
        self.using(mm, |process| {
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
        let since = self.machine.moment();
        self.using(mm, |process| {
            if backing == Backing::Stack {
                process.has_stack.store(true, Ordering::Relaxed);
            }
            let map = || {
                kernel.map(&process.mm, range, backing, rights)?;
                if kernel.promises() == Promises::ByTheRunner {
                    let root = kernel.root(&process.mm);
                    self.machine.promise_new(root, range, since, self.laziness_of(cpu));
                }
                if matches!(backing, Backing::Huge | Backing::Clean)
                    && let Some(blocks) = whole_blocks(range)
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
            let fault = || self.kernel.fault(&process.mm, address, access);
            // What is refused was made up, too.
            let _signal = self.machine.touch(address, access, || {
                if process.has_stack.load(Ordering::Relaxed) {
                    // An area may grow to here.
                    let page = VirtRange::of_entry(Level::Pte, address);
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
        self.kernel.switch_to(Some(&process.mm));
    }

    pub(crate) fn go_lazy(&self, cpu: CpuId) -> Result<(), NotDone> {
        let went = self.kernel.go_lazy();
        if went.is_err() {
            self.kernel.switch_to(None);
        }
        lock(&self.programs[cpu.index()]).is_lazy = true;
        went
    }

    /// The CPU goes off, unless it is the first, which machines keep.
    fn stop(&self, cpu: CpuId) -> Result<(), NotDone> {
        if cpu.number() == 0 {
            return Err(NotDone::Refused);
        }
        self.kernel.stop_cpu()?;
        self.machine.switch_off();
        *lock(&self.programs[cpu.index()]) = Program { process: None, is_lazy: false };
        Ok(())
    }

    fn switch_away(&self, cpu: CpuId) {
        self.kernel.switch_to(None);
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
        let copy = self.using(parent, |process| {
            let fork = || self.kernel.fork(&process.mm);
            let copy = process.running.call(USER_SPACE, Effect::Changes, fork).0?;
            // Read after the copy was made: whatever it has was there before.
            Ok(LiveMm::new(copy, process.has_stack.load(Ordering::Relaxed)))
        })?;
        self.replace(cpu, child, copy);
        Ok(())
    }

    /// The process leaves, and another takes its place.
    fn replace(&self, cpu: CpuId, mm: MmId, new: Arc<LiveMm<K::Mm>>) {
        let old = self.put(mm, new);
        old.is_dying.store(true, Ordering::Relaxed);
        loop {
            self.leave_the_dying(cpu);
            let runs = |program: &Mutex<Program<K::Mm>>| {
                let program = lock(program);
                !program.is_lazy && program.process.as_ref().is_some_and(|process| Arc::ptr_eq(process, &old))
            };
            if old.users.load(Ordering::Relaxed) == 0 && !self.programs.iter().any(runs) {
                break;
            }
            schedule::wait();
        }
        // A CPU may still be on its way out.
        while self.kernel.exit(&old.mm).is_err() {
            schedule::wait();
        }
    }
}

/// Whether the step is not one of its CPU: the runner takes it.
const fn is_for_all(op: Op) -> bool {
    matches!(op, Op::Sync | Op::Preempt(_) | Op::Batches(_) | Op::Tables(_))
}

/// The part of a range that 2 MiB pages can fill.
fn whole_blocks(range: VirtRange) -> Option<VirtRange> {
    let span = Level::Pmd.entry_span();
    VirtRange::new(range.start().next_multiple_of(span), range.end() & !(span - 1)).ok()
}
