//! The threads of a log on virtual CPUs: calls in the order of the log, and memory used by all CPUs
//! meanwhile.
//!
//! Every thread is bound to one CPU, by turns. One call is made at a time, by its thread on its
//! CPU. Meanwhile the threads of the other CPUs use memory, so that the flushes of the call have
//! something to find. A CPU is lazy while none of its threads can run.

use core::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CpuId;
use mmu_hosted::{HostedMachine, Schedule, give_way};
use mmu_kernel_shim::{Error, Machine};

use crate::input::layout::PAGE_BYTES;
use crate::input::strace::{ChildMemory, MemoryCall, TraceEvent};
use crate::trace::kernel::{RANGE_TOUCHES, TraceKernel};
use crate::trace::space::TraceSpace;

/// Pages that a thread uses before each of its calls.
const OWN_TOUCHES: u64 = 8;
/// Pages that threads on other CPUs may use until the next call, all together.
const OTHER_TOUCHES: u32 = 128;
/// Chances that other CPUs get between a thread's touches and its call.
const CHANCES: u64 = 48;

/// Frames that the touches of one call may take, with their tables; most are long free again at the
/// next.
pub(crate) const FRAMES_PER_CALL: u64 = 256;

/// A log that is being run, shared by all CPUs. No borrow of its cells is held while a CPU may give
/// way.
pub(crate) struct LogRun {
    pub(crate) kernel: TraceKernel,
    events: Rc<[TraceEvent]>,
    /// The first event not yet begun.
    next: Cell<usize>,
    turn: Cell<Turn>,
    threads: RefCell<BTreeMap<u32, Thread>>,
    pub(crate) nr_threads: Cell<u32>,
    pub(crate) nr_spaces: Cell<u64>,
    /// By CPU: the address space whose programs run there. `None`: it is lazy.
    running: RefCell<Vec<Option<Rc<TraceSpace>>>>,
    /// What the call in progress is about; other threads look there.
    focus: RefCell<Option<(Rc<TraceSpace>, VirtRange)>>,
    touches_left: Cell<u32>,
    refused: Cell<Option<Refused>>,
}

/// Whether the call of an event is being made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Free,
    Taken,
}

#[derive(Clone)]
struct Thread {
    cpu: CpuId,
    space: Rc<TraceSpace>,
    /// The child that has borrowed its address space.
    waits_for: Option<u32>,
}

/// A call that the kernel refused although the log says that it succeeded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refused {
    /// Its place in the events; past the end for what follows the log.
    pub(crate) event: usize,
    pub(crate) error: Error,
}

/// What a CPU can do next.
enum NextStep {
    /// Make the call of this event.
    Event(usize),
    /// The log is over: end this thread.
    End(u32),
    /// Something else: it is another CPU's turn.
    Idle,
    /// Nothing any more.
    Done,
}

impl LogRun {
    /// The start of `events`: the first thread is there and has just executed its program.
    pub(crate) fn new(kernel: TraceKernel, events: Rc<[TraceEvent]>) -> Result<Self, Error> {
        let nr_cpus = kernel.hosted.machine().nr_cpus() as usize;
        let first = events.first().map_or(0, |event| event.thread);
        let has_executed = events.first().is_some_and(|event| event.call == MemoryCall::Exec);
        let space = TraceSpace::new(&kernel)?;
        let log_run = Self {
            kernel,
            events,
            next: Cell::new(usize::from(has_executed)),
            turn: Cell::new(Turn::Free),
            threads: RefCell::default(),
            nr_threads: Cell::new(0),
            nr_spaces: Cell::new(1),
            running: RefCell::new(vec![None; nr_cpus]),
            focus: RefCell::default(),
            touches_left: Cell::new(0),
            refused: Cell::new(None),
        };
        log_run.start_thread(first, Rc::new(space));
        Ok(log_run)
    }

    /// Makes all calls, with the CPUs interleaved at every seam.
    pub(crate) fn run_interleaved(self: &Rc<Self>) {
        let machine = Arc::clone(self.kernel.hosted.machine());
        let mut schedule = Schedule::new();
        for number in 0..machine.nr_cpus() {
            let log_run = Rc::clone(self);
            schedule.spawn(CpuId::new(number), move || {
                while log_run.step(CpuId::new(number)) {
                    give_way();
                }
                log_run.kernel.hosted.switch_to(None);
            });
        }
        machine.run(schedule);
    }

    /// Makes all calls one after the other, for timing.
    pub(crate) fn run_in_order(&self) {
        let machine = self.machine();
        let mut left = true;
        while left {
            left = false;
            for number in 0..machine.nr_cpus() {
                left |= machine.on_cpu(CpuId::new(number), || self.step(CpuId::new(number)));
            }
        }
        for number in 0..machine.nr_cpus() {
            machine.on_cpu(CpuId::new(number), || self.kernel.hosted.switch_to(None));
        }
    }

    /// The call that ended the run early.
    pub(crate) fn refused(&self) -> Option<Refused> {
        self.refused.get()
    }

    /// One turn of a CPU. Whether there is more to do.
    fn step(&self, cpu: CpuId) -> bool {
        match self.take_step(cpu) {
            NextStep::Done => return false,
            NextStep::Idle => self.use_memory(cpu),
            NextStep::Event(index) => {
                let result = self.make_call(cpu, index);
                self.turn_is_over(index, result);
            }
            NextStep::End(thread) => {
                let result = self.end_thread(cpu, thread);
                self.turn_is_over(self.events.len(), result);
            }
        }
        true
    }

    fn take_step(&self, cpu: CpuId) -> NextStep {
        let threads = self.threads.borrow();
        let index = self.next.get();
        let event = self.events.get(index);
        let thread = event.map(|event| event.thread).or_else(|| threads.keys().next().copied());
        let Some(thread) = thread.filter(|_| self.refused.get().is_none()) else {
            return if self.turn.get() == Turn::Free { NextStep::Done } else { NextStep::Idle };
        };
        // Any CPU may take an event of a thread that is gone.
        let is_ours = threads.get(&thread).is_none_or(|thread| thread.cpu == cpu);
        if self.turn.get() == Turn::Taken || !is_ours {
            return NextStep::Idle;
        }
        self.turn.set(Turn::Taken);
        if event.is_some() { NextStep::Event(index) } else { NextStep::End(thread) }
    }

    fn turn_is_over(&self, index: usize, result: Result<(), Error>) {
        if let Err(error) = result {
            self.refused.set(Some(Refused { event: index, error }));
        }
        self.next.set((index + 1).min(self.events.len()));
        self.turn.set(Turn::Free);
    }

    /// Makes the call of one event, on the CPU of its thread.
    fn make_call(&self, cpu: CpuId, index: usize) -> Result<(), Error> {
        let TraceEvent { thread: number, call, .. } = &self.events[index];
        if *call == MemoryCall::Appears {
            return self.appear(cpu, *number);
        }
        // Only a thread that was replaced by one of the same number is not there.
        let Some(thread) = self.threads.borrow().get(number).cloned() else { return Ok(()) };
        let space = thread.space;
        self.run_in(cpu, &space);
        self.touches_left.set(OTHER_TOUCHES);
        space.assume_for(&self.kernel, call)?;
        for _ in 0..OWN_TOUCHES {
            space.touch_warm(&self.kernel)?;
        }
        if let Some(range) = space.range_of(call) {
            *self.focus.borrow_mut() = Some((Rc::clone(&space), range));
            self.kernel.touch_start_of(&space.mm, range)?;
            self.kernel.hosted.machine().point_at(range.start());
        }
        for _ in 0..CHANCES {
            self.let_others_run(cpu);
        }
        let result = match call {
            MemoryCall::Clone { child, memory } => self.clone_thread(cpu, *number, *child, *memory, &space),
            MemoryCall::Exec => self.exec(cpu, *number, &space),
            MemoryCall::Exit | MemoryCall::ExitGroup => self.end_thread(cpu, *number),
            _ => space.apply(&self.kernel, call),
        };
        *self.focus.borrow_mut() = None;
        if let (Ok(()), MemoryCall::Mmap { range, .. }) = (result, call)
            && let Ok(range) = VirtRange::new(range.start, range.end)
        {
            self.kernel.touch_start_of(&space.mm, range)?;
        }
        result
    }

    fn clone_thread(
        &self,
        cpu: CpuId,
        parent: u32,
        child: u32,
        memory: ChildMemory,
        space: &Rc<TraceSpace>,
    ) -> Result<(), Error> {
        // A number that is in use again: the log lost the end of its thread.
        self.end_thread(cpu, child)?;
        match memory {
            ChildMemory::Copied => {
                let copy = Rc::new(space.fork(&self.kernel)?);
                self.nr_spaces.set(self.nr_spaces.get() + 1);
                self.start_thread(child, copy);
            }
            ChildMemory::Shared | ChildMemory::Borrowed => {
                space.users.set(space.users.get() + 1);
                self.start_thread(child, Rc::clone(space));
            }
        }
        if memory == ChildMemory::Borrowed
            && let Some(parent) = self.threads.borrow_mut().get_mut(&parent)
        {
            parent.waits_for = Some(child);
        }
        Ok(())
    }

    /// A thread is there that no other has started, in an address space of its own.
    fn appear(&self, cpu: CpuId, number: u32) -> Result<(), Error> {
        self.end_thread(cpu, number)?;
        let space = Rc::new(TraceSpace::new(&self.kernel)?);
        self.nr_spaces.set(self.nr_spaces.get() + 1);
        self.start_thread(number, space);
        Ok(())
    }

    /// The thread leaves its address space for the one of a new program.
    fn exec(&self, cpu: CpuId, number: u32, old: &Rc<TraceSpace>) -> Result<(), Error> {
        let new = Rc::new(TraceSpace::new(&self.kernel)?);
        self.nr_spaces.set(self.nr_spaces.get() + 1);
        if let Some(thread) = self.threads.borrow_mut().get_mut(&number) {
            thread.space = Rc::clone(&new);
        }
        self.release_parent(number);
        self.run_in(cpu, &new);
        self.leave_space(cpu, old)
    }

    fn start_thread(&self, number: u32, space: Rc<TraceSpace>) {
        let cpu = CpuId::new(self.nr_threads.get() % self.machine().nr_cpus());
        self.nr_threads.set(self.nr_threads.get() + 1);
        self.threads.borrow_mut().insert(number, Thread { cpu, space, waits_for: None });
    }

    /// Ends a thread, if it is there, and its address space if it was the last one in it.
    fn end_thread(&self, cpu: CpuId, number: u32) -> Result<(), Error> {
        let Some(thread) = self.threads.borrow_mut().remove(&number) else { return Ok(()) };
        self.release_parent(number);
        self.leave_space(cpu, &thread.space)
    }

    /// A child has given back the address space that it borrowed.
    fn release_parent(&self, child: u32) {
        for thread in self.threads.borrow_mut().values_mut().filter(|thread| thread.waits_for == Some(child))
        {
            thread.waits_for = None;
        }
    }

    /// One thread less runs in `space`; the last one takes it down.
    fn leave_space(&self, cpu: CpuId, space: &Rc<TraceSpace>) -> Result<(), Error> {
        space.users.set(space.users.get() - 1);
        if space.users.get() > 0 {
            return Ok(());
        }
        let here = self.running_on(cpu);
        if here.is_some_and(|running| Rc::ptr_eq(&running, space)) {
            self.go_lazy(cpu);
        }
        // The other CPUs notice that none of their threads can run there.
        while self.running.borrow().iter().flatten().any(|running| Rc::ptr_eq(running, space)) {
            self.let_others_run(cpu);
        }
        self.kernel.timed(|| self.kernel.hosted.exit(&space.mm))
    }

    /// What a CPU does that has no call to carry out.
    fn use_memory(&self, cpu: CpuId) {
        let choices = self.kernel.choices();
        let next = {
            let threads = self.threads.borrow();
            let able = |thread: &&Thread| thread.cpu == cpu && thread.waits_for.is_none();
            let nr_able = threads.values().filter(able).count();
            threads.values().filter(able).nth(choices.pick(nr_able)).map(|thread| Rc::clone(&thread.space))
        };
        let Some(space) = next else { return self.go_lazy(cpu) };
        if choices.one_in(24) {
            return self.go_lazy(cpu);
        }
        self.run_in(cpu, &space);
        let Some(left) = self.touches_left.get().checked_sub(1) else { return };
        self.touches_left.set(left);
        let focus = self.focus.borrow().clone();
        let result = match focus {
            Some((focused, range)) if Rc::ptr_eq(&focused, &space) && choices.one_in(2) => {
                let page = choices.below(range.nr_pages().min(RANGE_TOUCHES));
                self.kernel.touch(&space.mm, range.start() + page * PAGE_BYTES)
            }
            _ => space.touch_warm(&self.kernel),
        };
        if let Err(error) = result {
            self.refused.set(Some(Refused { event: self.next.get(), error }));
        }
    }

    /// Other CPUs get their chance; on a machine that runs one after the other, one turn each.
    fn let_others_run(&self, cpu: CpuId) {
        if mmu_hosted::is_scheduled() {
            return give_way();
        }
        for number in (0..self.machine().nr_cpus()).filter(|&number| number != cpu.number()) {
            self.machine().on_cpu(CpuId::new(number), || self.use_memory(CpuId::new(number)));
        }
    }

    fn running_on(&self, cpu: CpuId) -> Option<Rc<TraceSpace>> {
        self.running.borrow()[cpu.index()].clone()
    }

    /// Programs of `space` run on this CPU from now on.
    fn run_in(&self, cpu: CpuId, space: &Rc<TraceSpace>) {
        if self.running_on(cpu).is_some_and(|running| Rc::ptr_eq(&running, space)) {
            return;
        }
        // Before the switch: nobody may find the address space unused while this CPU is on its way
        // there.
        self.running.borrow_mut()[cpu.index()] = Some(Rc::clone(space));
        self.kernel.hosted.switch_to(Some(&space.mm));
    }

    fn go_lazy(&self, cpu: CpuId) {
        if self.running_on(cpu).is_some() {
            self.kernel.hosted.go_lazy();
            self.running.borrow_mut()[cpu.index()] = None;
        }
    }

    fn machine(&self) -> &HostedMachine {
        self.kernel.hosted.machine()
    }
}

impl core::fmt::Debug for LogRun {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("LogRun").field("next", &self.next.get()).finish_non_exhaustive()
    }
}
