//! Runs a sequence: every CPU does its steps in order, several CPUs at once, interleaved at every
//! seam by the seed.
//!
//! A step may begin when all but the last few before it are done, so neighbours in the text
//! overlap, and what a step depends on (the area it touches, say) was made some lines earlier.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::io;
use std::sync::{Arc, Mutex};

use mmu_gather::pagetable::PagingMode;
use mmu_gather::tlb::{CpuId, CtxId, Laziness};
use x86_64::structures::paging::PhysFrame;

use crate::boundary::Boundaries;
use crate::checker::events::{Call, Detail, What};
use crate::kernel::{FiveLevels, Kernel, NotDone, Preemption, boot};
use crate::machine::HostedMachine;
use crate::mutex::lock;
use crate::options::{Device, Options, Stores};
use crate::random::Choices;
use crate::schedule::{self, Schedule};
use crate::sequence::calls::{Calls, Running};
use crate::sequence::features::{Features, Recorder};
use crate::sequence::op::{MmId, NR_MMS, Op, Step};
use crate::sequence::text::Sequence;
use crate::sequence::trial::{Lost, Outcome, Pace, Trial};
use crate::vocabulary::{FrameRole, Supply, UserAccess};

/// How many lost frames are told.
const LOST_TOLD: usize = 3;

/// The address spaces that are there from the beginning. The others are made when they are named.
const MADE_AT_FIRST: u8 = 3;

/// How many steps may overlap.
const WINDOW: usize = 6;

/// Runs `sequence` from power-on until every address space has exited, on the kernel that `make`
/// boots.
///
/// # Errors
/// If the host refuses memory, or the kernel does not boot.
///
/// # Panics
/// If the engine or the kernel does: an assertion of its own, or a deadlock.
pub fn execute<K: Kernel>(
    sequence: &Sequence,
    trial: Trial,
    make: impl FnOnce(&Arc<HostedMachine>) -> io::Result<K>,
) -> io::Result<Outcome> {
    let machine = machine_of::<K>(sequence, trial)?;
    let world = World::new(sequence, trial, machine, make)?;
    world.run();
    Ok(world.end())
}

/// The machine that a sequence runs on, as far as the kernel has room for it.
pub(crate) fn machine_of<K: Kernel>(sequence: &Sequence, trial: Trial) -> io::Result<Arc<HostedMachine>> {
    let Trial { fault, telling, most_work, pace } = trial;
    let mut options = Options { fault, telling, most_work, ..sequence.options() };
    options.nr_cpus = options.nr_cpus.min(K::MOST_CPUS);
    if K::FIVE_LEVELS == FiveLevels::Unknown {
        options.paging = PagingMode::FourLevel;
    }
    if pace == Pace::OneAtATime {
        // They write when they like: see `run_program`.
        options.device = Device::Absent;
        options.stores = Stores::WhenTold;
    }
    Ok(Arc::new(HostedMachine::new(options)?))
}

/// An address space of the sequence, until it exits.
#[derive(Debug)]
pub(crate) struct LiveMm<M> {
    pub(crate) mm: M,
    /// The calls that work on it now.
    pub(crate) running: Running,
    /// How many.
    pub(crate) users: AtomicU32,
    /// How many calls of reclaim take pages from it, which do not keep it from exiting.
    pub(crate) reclaimers: AtomicU32,
    /// Its last program is leaving: CPUs that run it go away.
    pub(crate) is_dying: AtomicBool,
    /// An area of it may have been a stack, which grows where programs touch.
    pub(crate) has_stack: AtomicBool,
}

/// What a thread runs, by the steps it took.
#[derive(Debug)]
pub(crate) struct Program<M> {
    pub(crate) process: Option<Arc<LiveMm<M>>>,
    pub(crate) is_lazy: bool,
}

/// The address space that has a number, as soon as a step has named it.
type Process<K> = Mutex<Option<Arc<LiveMm<<K as Kernel>::Mm>>>>;

pub(crate) struct World<K: Kernel> {
    pub(crate) machine: Arc<HostedMachine>,
    pub(crate) kernel: Arc<K>,
    processes: [Process<K>; NR_MMS as usize],
    /// By thread.
    pub(crate) programs: Box<[Mutex<Program<K::Mm>>]>,
    steps: Vec<Step>,
    is_done: Box<[AtomicBool]>,
    /// Number of the first step that is not done.
    frontier: AtomicUsize,
    pace: Pace,
    pub(crate) calls: Mutex<Calls>,
    features: Mutex<Recorder>,
}

impl<K: Kernel> World<K> {
    pub(crate) fn new(
        sequence: &Sequence,
        trial: Trial,
        machine: Arc<HostedMachine>,
        make: impl FnOnce(&Arc<HostedMachine>) -> io::Result<K>,
    ) -> io::Result<Arc<Self>> {
        let kernel = boot(&machine, make)?;
        // Costs are counted by CPU, and a call that moves to another has them on both. A set of
        // CPUs is one word there.
        if let Some(promise) = kernel.promises_cost()
            && machine.nr_cpus() <= u64::BITS
            && !threads_move(&machine, &*kernel, trial.pace)
        {
            machine.hold_to(promise);
        }
        let steps = sequence.steps.clone();
        let nothing = || Mutex::new(Program { process: None, is_lazy: false });
        let world = Self {
            processes: [const { Mutex::new(None) }; NR_MMS as usize],
            programs: (0..machine.nr_cpus()).map(|_| nothing()).collect(),
            is_done: steps.iter().map(|_| AtomicBool::new(false)).collect(),
            steps,
            frontier: AtomicUsize::new(0),
            pace: trial.pace,
            calls: Mutex::default(),
            features: Mutex::new(Recorder::new(machine.nr_cpus(), kernel.counters())),
            kernel,
            machine,
        };
        for number in 0..MADE_AT_FIRST {
            let made = world.process(MmId(number));
            made.map_err(|_| io::Error::other("the kernel has no memory for a new address space"))?;
        }
        Ok(Arc::new(world))
    }

    /// How often the machine or the kernel did what is wrong on purpose.
    pub(crate) fn faults(&self) -> u64 {
        self.machine.nr_faults() + self.kernel.nr_faults()
    }

    /// The corners it has been to.
    pub(crate) fn reached(&self) -> Boundaries {
        self.kernel.reached().or(self.machine.reached())
    }

    pub(crate) fn run(self: &Arc<Self>) {
        let mut schedule = Schedule::new();
        for number in 0..self.machine.nr_cpus() {
            let cpu = CpuId::new(number);
            schedule.spawn_on(cpu, self, move |world| world.work_as(cpu));
        }
        schedule::expect_steps_within(self.most_turns());
        let threads_move = threads_move(&self.machine, &*self.kernel, self.pace);
        self.machine.threads_move.store(threads_move, Ordering::Relaxed);
        let world = Arc::clone(self);
        self.machine.run_threads(schedule, move || world.arrive());
    }

    /// A thread goes on on this CPU, where another one was: the scheduler switches to its address
    /// space.
    fn arrive(&self) {
        let thread = self.machine.thread();
        let process = {
            let program = lock(&self.programs[thread.index()]);
            program.process.clone().filter(|_| !program.is_lazy)
        };
        match process {
            // Also if it is dying: the thread leaves when it has come to the end of what it does.
            Some(process) => self.kernel.switch_to(Some(&process.mm)),
            None if self.machine.choices().one_in(2) && self.kernel.go_lazy().is_ok() => {}
            None => self.kernel.switch_to(None),
        }
    }

    /// How many turns of all CPUs the steps can explain between one that begins or ends and the
    /// next.
    ///
    /// In 11,000 sequences the most was a twentieth of this, or less. What does not end takes a
    /// second or so to get here: pages of a step beyond some thousands, which are large ones or not
    /// there, explain no more.
    fn most_turns(&self) -> u64 {
        const TURNS_OF_A_CPU: u64 = 25_000;
        const TURNS_OF_A_PAGE: u64 = 25;
        const MOST_PAGES: u64 = 1 << 11;
        let longest = self.steps.iter().map(|step| step.op.nr_pages().min(MOST_PAGES)).max().unwrap_or(0);
        let turns = longest * WINDOW as u64 * TURNS_OF_A_PAGE + TURNS_OF_A_CPU;
        turns * u64::from(self.machine.nr_cpus())
    }

    /// Everything that the thread has to do which begins on `cpu`, and has its name.
    fn work_as(&self, cpu: CpuId) {
        let nr_cpus = self.machine.nr_cpus();
        for (index, step) in self.steps.iter().enumerate() {
            if u32::from(step.cpu) % nr_cpus != cpu.number() {
                continue;
            }
            while !self.may_begin(index) {
                self.leave_the_dying(cpu);
                self.run_program(cpu);
            }
            schedule::step_done();
            self.leave_the_dying(cpu);
            self.machine.log_detail(Detail::Began(index, self.names(step.op)));
            let call = step.op.changes().map(|(mm, range)| Call {
                step: index,
                word: step.op.word(),
                mm: mm.0,
                start: range.start(),
                end: range.end(),
            });
            if let Some(call) = call {
                self.machine.mark(What::Called(call));
            }
            lock(&self.features).begins(cpu.index(), step.op);
            self.machine.cpus[cpu.index()].doing.store(doing(step.op), Ordering::Relaxed);
            self.copy_for_program();
            self.take(cpu, step.op);
            self.copy_for_program();
            self.machine.cpus[cpu.index()].doing.store(u8::MAX, Ordering::Relaxed);
            self.note_features(cpu, index);
            if let Some(call) = call {
                self.machine.mark(What::Returned(call));
            }
            self.machine.log_detail(Detail::Ended(index));
            self.machine.call_returned();
            // The way back from a system call is a preemption point.
            self.machine.begin_work_anew();
            self.note_done(index);
        }
        // A CPU that has nothing left to do keeps its address space lazily.
        if !self.machine.is_off(self.machine.current()) {
            let _is_not_counted = self.go_lazy(cpu);
        }
    }

    /// Now and then the kernel copies something from or to its program as it enters or leaves a
    /// system call: it uses what the CPU has cached of the program's addresses, and was not in user
    /// mode in between.
    fn copy_for_program(&self) {
        let machine = &self.machine;
        if !machine.may_use_addresses(machine.current()) || !machine.choices().one_in(8) {
            return;
        }
        let access = if machine.choices().one_in(2) { UserAccess::Read } else { self.access_at_any_time() };
        // What faults is not tried again: the call that it belongs to is made up.
        let _ = machine.user_access(machine.hot_address(), access);
    }

    /// How programs use addresses that no step names.
    ///
    /// Where nothing but the steps may decide, none but theirs writes: what is clean decides what
    /// reclaim takes.
    const fn access_at_any_time(&self) -> UserAccess {
        match self.pace {
            Pace::Overlapping => UserAccess::Write,
            Pace::OneAtATime => UserAccess::Read,
        }
    }

    /// The step at `index` is done.
    fn note_features(&self, cpu: CpuId, index: usize) {
        let seams = |cpu: usize| self.machine.cpus[cpu].last_seam.load(Ordering::Relaxed);
        let count = |counts: &mut [u64]| self.kernel.counted(cpu, counts);
        lock(&self.features).ends(cpu.index(), self.steps[index].op, index, seams, count);
    }

    /// What it has done so far; to be asked once.
    pub(crate) fn features(&self) -> Features {
        let nothing = Recorder::new(0, &[]);
        let recorder = core::mem::replace(&mut *lock(&self.features), nothing);
        recorder.end(self.machine.reached.by_what_is_done())
    }

    /// A CPU that has nothing to do runs its program, if it has one, until it is chosen again.
    fn run_program(&self, cpu: CpuId) {
        let machine = &self.machine;
        let runs = {
            let program = lock(&self.programs[cpu.index()]);
            program.process.is_some() && !program.is_lazy
        };
        if runs {
            machine.enter_user_mode();
            if machine.choices().one_in(8) {
                let fetches = machine.choices().one_in(8);
                let access = self.access_at_any_time();
                let access = if fetches { self.as_the_kernel_knows_it(UserAccess::Fetch) } else { access };
                // What faults is tried again another time.
                let _ = machine.user_access(machine.hot_address(), access);
            }
        }
        machine.wait_at_rest();
        if runs {
            machine.leave_user_mode();
        }
    }

    fn may_begin(&self, index: usize) -> bool {
        let frontier = self.frontier.load(Ordering::Relaxed);
        let is_alone = self.steps[index].op == Op::Sync || self.pace == Pace::OneAtATime;
        if is_alone {
            return frontier == index;
        }
        let overlapping = &self.steps[frontier.min(index)..index];
        overlapping.len() < WINDOW && overlapping.iter().all(|step| step.op != Op::Sync)
    }

    fn note_done(&self, index: usize) {
        schedule::step_done();
        self.is_done[index].store(true, Ordering::Relaxed);
        let mut frontier = self.frontier.load(Ordering::Relaxed);
        while self.is_done.get(frontier).is_some_and(|done| done.load(Ordering::Relaxed)) {
            frontier += 1;
        }
        self.frontier.store(frontier, Ordering::Relaxed);
    }

    /// Nothing else runs: caches must agree with page tables, and page tables with frames.
    pub(crate) fn check_at_rest(&self) {
        let mms: Vec<K::Mm> = self.live().map(|process| process.mm.clone()).collect();
        self.kernel.check_at_rest(&self.machine, &mms);
    }

    /// The address space that a step works on or switches to, if it names one.
    fn names(&self, op: Op) -> Option<(PhysFrame, CtxId)> {
        let process = lock(&self.processes[usize::from(op.mm()?.0)]).clone()?;
        Some((self.kernel.root(&process.mm), self.kernel.ctx_id(&process.mm)?))
    }

    /// The processes there are now.
    fn live(&self) -> impl Iterator<Item = Arc<LiveMm<K::Mm>>> + '_ {
        self.processes.iter().filter_map(|process| lock(process).clone())
    }

    /// The process that has this number now; a new one, if none had it yet.
    ///
    /// # Errors
    /// [`NotDone::Refused`] if the kernel has no memory for a new one.
    pub(crate) fn process(&self, mm: MmId) -> Result<Arc<LiveMm<K::Mm>>, NotDone> {
        let place = &self.processes[usize::from(mm.0)];
        if let Some(process) = &*lock(place) {
            return Ok(Arc::clone(process));
        }
        let new = LiveMm::new(self.kernel.new_mm()?, false);
        // Another CPU may have been faster.
        let now = lock(place).clone();
        if let Some(process) = now {
            // No CPU has ever loaded it.
            let _ = self.kernel.exit(&new.mm);
            return Ok(process);
        }
        self.put(mm, Arc::clone(&new));
        Ok(new)
    }

    /// Another takes the place of the process that has this number now, if there is one.
    pub(crate) fn put(&self, mm: MmId, new: Arc<LiveMm<K::Mm>>) -> Option<Arc<LiveMm<K::Mm>>> {
        introduce(&self.machine, &*self.kernel, &new.mm);
        lock(&self.processes[usize::from(mm.0)]).replace(new)
    }

    /// All CPUs leave, all processes exit, and what is left was lost.
    pub(crate) fn end(self: &Arc<Self>) -> Outcome {
        schedule::run_alone(&**self, Self::end_alone)
    }

    fn end_alone(&self) -> Outcome {
        let (machine, kernel) = (&self.machine, &self.kernel);
        for number in 0..machine.nr_cpus() {
            machine.on_cpu(CpuId::new(number), || {
                if machine.is_off(machine.current()) {
                    machine.switch_on();
                    machine.cost_of_start_begins();
                    kernel.start_cpu();
                    machine.cost_of_switch_ends(Laziness::Active);
                }
            });
        }
        let _have_no_such_call = (
            kernel.set_batch_supply(Supply::Always),
            kernel.set_table_supply(Supply::Always),
            kernel.set_frame_supply(Supply::Always),
        );
        machine.on_cpu(CpuId::new(0), || self.check_at_rest());
        for process in self.live() {
            let exited = kernel.exit(&process.mm);
            assert!(exited.is_ok(), "every CPU has left, and the kernel refuses the exit");
        }
        for number in 0..machine.nr_cpus() {
            machine.on_cpu(CpuId::new(number), || kernel.switch_to(None));
        }
        kernel.drop_caches();
        let not_freed = machine.not_freed();
        let leaked_tables = not_freed.iter().filter(|(_, role)| *role == FrameRole::Table).count() as u64;
        let told = not_freed.iter().take(LOST_TOLD);
        let lost = told.map(|&(frame, role)| Lost {
            frame,
            role,
            is_lent: machine.is_lent(frame),
            story: machine.story_of(frame),
        });
        Outcome {
            lost: lost.collect(),
            found: machine.violations(),
            leaked_frames: not_freed.len() as u64 - leaked_tables,
            leaked_tables,
            double_frees: machine.double_frees().max(kernel.double_frees()),
            calls: lock(&self.calls).clone(),
        }
    }
}

impl<M> LiveMm<M> {
    pub(crate) fn new(mm: M, has_stack: bool) -> Arc<Self> {
        Arc::new(Self {
            mm,
            running: Running::default(),
            users: AtomicU32::new(0),
            reclaimers: AtomicU32::new(0),
            is_dying: AtomicBool::new(false),
            has_stack: AtomicBool::new(has_stack),
        })
    }
}

/// Whether threads move: in one sequence of four, as its seed says. Not among many CPUs, where some
/// thread would always be on its way, and a step that waits for rest would wait for ever.
fn threads_move<K: Kernel>(machine: &HostedMachine, kernel: &K, pace: Pace) -> bool {
    const MOVES: u64 = 0x6d6f_7665;
    const MOST_MOVED_AMONG: u32 = 16;
    kernel.preemption() == Preemption::Full
        && pace == Pace::Overlapping
        && (2..=MOST_MOVED_AMONG).contains(&machine.nr_cpus())
        && Choices::new(machine.options().seed ^ MOVES).one_in(4)
}

/// What a CPU is at that does this.
fn doing(op: Op) -> u8 {
    op.number().to_le_bytes()[0]
}

/// The checker hears of a new address space, and the device uses it, if there is one and the seed
/// says so.
fn introduce<K: Kernel>(machine: &HostedMachine, kernel: &K, mm: &K::Mm) {
    if let Some(ctx_id) = kernel.ctx_id(mm) {
        machine.cost_of_new_space(ctx_id, kernel.root(mm));
    }
    if machine.options().device == Device::Present
        && machine.choices().one_in(2)
        && let Some(ctx_id) = kernel.ctx_id(mm)
    {
        machine.attach_device(ctx_id, kernel.root(mm));
    }
}
