//! Runs a sequence: every CPU does its steps in order, several CPUs at once, interleaved at every
//! seam by the seed.
//!
//! A step may begin when all but the last few before it are done, so neighbours in the text
//! overlap, and what a step depends on (the area it touches, say) was made some lines earlier.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use mmu_gather::Limits;
use mmu_gather::pagetable::{Level, VirtRange};
use mmu_gather::tlb::{CpuId, CtxId};
use mmu_kernel_shim::{
    Area, AreaKind, Config, Error, Growth, Machine, Misbehaviour, Mm, PageContent, Protection, Supply,
    UserAccess, Vma,
};
use x86_64::structures::paging::PhysFrame;

use crate::boundary::Boundaries;
use crate::checker::caches_against_tables::compare_caches_with_tables;
use crate::checker::events::{Detail, Event};
use crate::checker::kind::ViolationKind;
use crate::checker::tables_against_frames::compare_tables_with_frames;
use crate::checker::violation::{Found, Violation};
use crate::machine::HostedMachine;
use crate::mutex::lock;
use crate::options::{Device, MachineFault, MostWork, Options, Telling};
use crate::program::{HostedKernel, HostedMm, boot, touch};
use crate::schedule::{self, Schedule};
use crate::sequence::op::{Backing, Guarding, MmId, NR_MMS, Op, Rights, Step};
use crate::sequence::pace::Pace;
use crate::sequence::text::Sequence;

/// What a sequence came to.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Violations.
    pub found: Found,
    /// Frames nobody uses and nobody freed.
    pub leaked_frames: u64,
    /// Tables among them.
    pub leaked_tables: u64,
    /// Frames freed twice, or while mapped.
    pub double_frees: u64,
}

impl Outcome {
    /// Whether nothing was wrong.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.found.count == 0 && self.leaked_frames == 0 && self.leaked_tables == 0 && self.double_frees == 0
    }
}

/// What is wrong, on purpose, with the machine and the kernel that a sequence runs on, and how much
/// is remembered.
#[derive(Clone, Copy, Debug)]
pub struct Trial {
    /// The machine.
    pub fault: MachineFault,
    /// The kernel.
    pub misbehaviour: Misbehaviour,
    /// How much of what happens is remembered.
    pub telling: Telling,
}

impl Default for Trial {
    /// Nothing is wrong, and little is remembered.
    fn default() -> Self {
        Self { fault: MachineFault::Absent, misbehaviour: Misbehaviour::Absent, telling: Telling::Last }
    }
}

/// Capacities small enough that every boundary is reached by a few pages.
const LIMITS: Limits = Limits::DEFAULT
    .with_bundle_slots(4)
    .with_batch_slots(16)
    .with_batch_pages(3)
    .with_table_slots(3)
    .with_free_chunk(8);

/// How many steps may overlap.
const WINDOW: usize = 6;

/// Runs `sequence` from power-on until every address space has exited.
///
/// # Errors
/// If the host refuses memory.
///
/// # Panics
/// If the engine does: an assertion of its own, or a deadlock.
pub fn execute(sequence: &Sequence) -> std::io::Result<Outcome> {
    execute_with(sequence, MachineFault::Absent)
}

/// As [`execute`], on a machine that does something wrong: to see the checker notice.
///
/// # Errors
/// As for [`execute`].
///
/// # Panics
/// As for [`execute`].
pub fn execute_with(sequence: &Sequence, fault: MachineFault) -> std::io::Result<Outcome> {
    let world = World::new(sequence, Trial { fault, ..Trial::default() })?;
    world.run();
    Ok(world.end())
}

/// An address space of the sequence, until it exits.
#[derive(Debug)]
pub(crate) struct LiveMm {
    pub(crate) mm: Arc<HostedMm>,
    /// Calls that work on it now.
    users: AtomicU32,
    /// Its last program is leaving: CPUs that run it go away.
    is_dying: AtomicBool,
}

/// What runs on a CPU, by the steps it took.
#[derive(Debug, Default)]
struct Running {
    process: Option<Arc<LiveMm>>,
    is_lazy: bool,
}

pub(crate) struct World {
    pub(crate) kernel: Arc<HostedKernel>,
    pub(crate) processes: [Mutex<Arc<LiveMm>>; NR_MMS as usize],
    programs: Box<[Mutex<Running>]>,
    steps: Vec<Step>,
    is_done: Box<[AtomicBool]>,
    /// Number of the first step that is not done.
    frontier: AtomicUsize,
    pub(crate) pace: Pace,
}

impl World {
    pub(crate) fn new(sequence: &Sequence, trial: Trial) -> std::io::Result<Arc<Self>> {
        Self::with_pace(sequence, trial, Pace::Overlapping)
    }

    pub(crate) fn with_pace(sequence: &Sequence, trial: Trial, pace: Pace) -> std::io::Result<Arc<Self>> {
        let Trial { fault, misbehaviour, telling } = trial;
        let most_work = MostWork::promised_by(&LIMITS);
        let mut options = Options { fault, telling, most_work, ..sequence.options() };
        if matches!(pace, Pace::Serial(..)) {
            // It writes when it likes: see `run_program`.
            options.device = Device::Absent;
        }
        let machine = Arc::new(HostedMachine::new(options)?);
        let config = Config { limits: LIMITS, misbehaviour, ..Config::default() };
        let short = |_| std::io::Error::from(std::io::ErrorKind::OutOfMemory);
        let kernel = boot(&machine, config).map_err(short)?;
        let process = || -> std::io::Result<_> {
            let mm = kernel.new_mm().map_err(short)?;
            share_with_device(&machine, &mm);
            Ok(Mutex::new(LiveMm::new(mm)))
        };
        let processes = [process()?, process()?, process()?];
        let steps = sequence.steps.clone();
        Ok(Arc::new(Self {
            processes,
            programs: (0..machine.nr_cpus()).map(|_| Mutex::default()).collect(),
            is_done: steps.iter().map(|_| AtomicBool::new(false)).collect(),
            steps,
            frontier: AtomicUsize::new(0),
            pace,
            kernel,
        }))
    }

    fn machine(&self) -> &Arc<HostedMachine> {
        self.kernel.machine()
    }

    /// Everything the run remembers.
    pub(crate) fn events(&self) -> Vec<Event> {
        self.machine().events()
    }

    /// How often the machine or the kernel did what is wrong on purpose.
    pub(crate) fn faults(&self) -> u64 {
        match self.kernel.config().misbehaviour {
            Misbehaviour::Absent => self.machine().nr_faults(),
            Misbehaviour::FreeBeforeFlush => self.kernel.counters().snapshot().leaves,
        }
    }

    /// The corners it has been to.
    pub(crate) fn reached(&self) -> Boundaries {
        let counted = self.kernel.counters().snapshot();
        Boundaries::counted(&counted, &LIMITS).or(self.machine().reached.so_far())
    }

    pub(crate) fn run(self: &Arc<Self>) {
        let mut schedule = Schedule::new();
        for number in 0..self.machine().nr_cpus() {
            let cpu = CpuId::new(number);
            schedule.spawn_on(cpu, self, move |world| world.work_as(cpu));
        }
        schedule::expect_steps_within(self.most_turns());
        self.machine().run(schedule);
    }

    /// How many turns of all CPUs the steps can explain between one that begins or ends and the
    /// next.
    ///
    /// In 11,000 sequences the most was a twentieth of this. What does not end takes a second or so
    /// to get here.
    fn most_turns(&self) -> u64 {
        const TURNS_OF_A_CPU: u64 = 25_000;
        const TURNS_OF_A_PAGE: u64 = 25;
        let pages = self.steps.iter().fold(0, |pages: u64, step| pages.saturating_add(step.op.nr_pages()));
        let turns = pages.saturating_mul(TURNS_OF_A_PAGE).saturating_add(TURNS_OF_A_CPU);
        turns.saturating_mul(u64::from(self.machine().nr_cpus()))
    }

    /// Everything a CPU has to do.
    fn work_as(&self, cpu: CpuId) {
        let nr_cpus = self.machine().nr_cpus();
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
            self.machine().log_detail(Detail::Began(index, self.names(step.op)));
            self.take(cpu, step.op);
            self.machine().log_detail(Detail::Ended(index));
            // The way back from a system call is a preemption point.
            self.machine().begin_work_anew();
            self.note_done(index);
        }
        // A CPU that has nothing left to do keeps its address space lazily.
        self.go_lazy(cpu);
    }

    /// A CPU that has nothing to do runs its program, if it has one, until it is chosen again.
    fn run_program(&self, cpu: CpuId) {
        let machine = self.machine();
        let runs = {
            let program = lock(&self.programs[cpu.index()]);
            program.process.is_some() && !program.is_lazy
        };
        if runs {
            machine.enter_user_mode();
            if machine.choices().one_in(8) {
                // Where nothing but the steps may decide, none but theirs writes: what is clean
                // decides what reclaim takes.
                let access = match self.pace {
                    Pace::Overlapping => UserAccess::Write,
                    Pace::Serial(..) => UserAccess::Read,
                };
                // What faults is tried again another time.
                let _ = machine.user_access(machine.hot_address(), access);
            }
        }
        schedule::wait();
        if runs {
            machine.leave_user_mode();
        }
    }

    fn may_begin(&self, index: usize) -> bool {
        let frontier = self.frontier.load(Ordering::Relaxed);
        let is_alone = self.steps[index].op == Op::Sync || matches!(self.pace, Pace::Serial(..));
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

    /// Does one step. What the kernel refuses is no error: sequences are made up.
    fn take(&self, cpu: CpuId, op: Op) {
        let kernel = &self.kernel;
        match op {
            Op::Map(mm, range, backing, rights) => {
                self.using(mm, |mm| {
                    let mapped = kernel.mmap(mm, Vma { range, area: area(backing, rights) });
                    let content = match backing {
                        Backing::Huge => Some(PageContent::AnonBlock),
                        Backing::Clean => Some(PageContent::CleanBlock),
                        _ => None,
                    };
                    if let Some(content) = content
                        && mapped.is_ok()
                        && let Some(blocks) = whole_blocks(range)
                    {
                        let _short = kernel.populate(mm, blocks, content);
                    }
                });
            }
            Op::Unmap(mm, range) => self.using(mm, |mm| ignore(kernel.munmap(mm, range))),
            Op::Discard(mm, range) => self.using(mm, |mm| ignore(kernel.madvise_dontneed(mm, range))),
            Op::Guard(mm, range, Guarding::Install) => {
                self.using(mm, |mm| ignore(kernel.guard_install(mm, range)));
            }
            Op::Guard(mm, range, Guarding::Remove) => {
                self.using(mm, |mm| ignore(kernel.guard_remove(mm, range)));
            }
            Op::Protect(mm, range, rights) => {
                self.using(mm, |mm| ignore(kernel.mprotect(mm, range, protection(rights))));
            }
            Op::Remap(mm, range, to) => {
                let target = to.checked_add(range.len_bytes()).and_then(|end| VirtRange::new(to, end).ok());
                if let Some(target) = target {
                    self.using(mm, |mm| ignore(kernel.mremap(mm, range, target)));
                }
            }
            Op::MoveStack(mm, range, pages) => self.using(mm, |mm| {
                let stack = mm.vmas().find(range.start()).map(|vma| vma.range);
                if let Some(stack) = stack {
                    ignore(kernel.move_stack(mm, stack, pages * 4096));
                }
            }),
            Op::Fork(parent, child) => self.fork(cpu, parent, child),
            Op::Exit(mm) => {
                if let Ok(new) = kernel.new_mm() {
                    self.replace(cpu, mm, new);
                }
            }
            Op::Reclaim(first, second, range) => {
                self.using(first, |first| {
                    self.using(second, |second| {
                        kernel.reclaim([(first, range), (second, range)]);
                    });
                });
            }
            Op::Touch(range, access) => self.touch(cpu, range, access),
            Op::Switch(mm) => {
                let process = Arc::clone(&lock(&self.processes[usize::from(mm.0)]));
                self.switch(cpu, process);
            }
            Op::Lazy => self.go_lazy(cpu),
            Op::Wake => {
                let process = lock(&self.programs[cpu.index()]).process.clone();
                if let Some(process) = process {
                    self.switch(cpu, process);
                }
            }
            Op::Batches(supply) => match self.pace {
                Pace::Overlapping => kernel.set_batch_supply(supply),
                Pace::Serial(supply, _) => kernel.set_batch_supply(supply),
            },
            Op::Tables(supply) => kernel.set_table_supply(supply),
            Op::Preempt(seams) => self.machine().preempt_after(seams),
            Op::Sync => {
                self.check_at_rest();
                self.note_view();
            }
        }
    }

    /// Nothing else runs: caches must agree with page tables, and page tables with frames.
    fn check_at_rest(&self) {
        let mms = self.processes.each_ref().map(|process| Arc::clone(&lock(process).mm));
        compare_caches_with_tables(&self.kernel, &mms);
        compare_tables_with_frames(&self.kernel, &mms);
    }

    /// The address space that a step works on or switches to, if it names one.
    fn names(&self, op: Op) -> Option<(PhysFrame, CtxId)> {
        let context = |mm: &Mm<_>| (mm.root(), mm.engine().context().ctx_id());
        op.mm().map(|mm| context(&lock(&self.processes[usize::from(mm.0)]).mm))
    }

    /// Lets `call` work on an address space, which does not exit meanwhile.
    fn using(&self, mm: MmId, call: impl FnOnce(&HostedMm)) {
        let process = Arc::clone(&lock(&self.processes[usize::from(mm.0)]));
        process.users.fetch_add(1, Ordering::Relaxed);
        call(&process.mm);
        process.users.fetch_sub(1, Ordering::Relaxed);
    }

    fn touch(&self, cpu: CpuId, range: VirtRange, access: UserAccess) {
        for address in (range.start()..range.end()).step_by(4096) {
            self.leave_the_dying(cpu);
            let process = {
                let program = lock(&self.programs[cpu.index()]);
                program.process.clone().filter(|_| !program.is_lazy)
            };
            let Some(process) = process else { return };
            touch(&self.kernel, &process.mm, address, access);
        }
    }

    fn switch(&self, cpu: CpuId, process: Arc<LiveMm>) {
        if process.is_dying.load(Ordering::Relaxed) {
            self.switch_away(cpu);
            return;
        }
        // Noted before the switch: a CPU that waits for the last program to leave counts this one.
        *lock(&self.programs[cpu.index()]) = Running { process: Some(Arc::clone(&process)), is_lazy: false };
        self.kernel.switch_to(Some(&process.mm));
    }

    fn go_lazy(&self, cpu: CpuId) {
        self.kernel.go_lazy();
        lock(&self.programs[cpu.index()]).is_lazy = true;
    }

    fn switch_away(&self, cpu: CpuId) {
        self.kernel.switch_to(None);
        *lock(&self.programs[cpu.index()]) = Running::default();
    }

    /// A program whose process is dying leaves the CPU: to another address space, or lazily.
    fn leave_the_dying(&self, cpu: CpuId) {
        let leaves = {
            let program = lock(&self.programs[cpu.index()]);
            !program.is_lazy
                && program.process.as_ref().is_some_and(|process| process.is_dying.load(Ordering::Relaxed))
        };
        if leaves {
            if self.machine().choices().one_in(2) {
                self.switch_away(cpu);
            } else {
                self.go_lazy(cpu);
            }
        }
    }

    fn fork(&self, cpu: CpuId, parent: MmId, child: MmId) {
        if parent == child {
            return;
        }
        let mut copy = None;
        self.using(parent, |parent| copy = self.kernel.fork(parent, []).ok());
        if let Some(copy) = copy {
            self.replace(cpu, child, copy);
        }
    }

    /// The process leaves, and another takes its place.
    fn replace(&self, cpu: CpuId, mm: MmId, new: Arc<HostedMm>) {
        share_with_device(self.machine(), &new);
        let old = core::mem::replace(&mut *lock(&self.processes[usize::from(mm.0)]), LiveMm::new(new));
        old.is_dying.store(true, Ordering::Relaxed);
        loop {
            self.leave_the_dying(cpu);
            let runs = |program: &Mutex<Running>| {
                let program = lock(program);
                !program.is_lazy && program.process.as_ref().is_some_and(|process| Arc::ptr_eq(process, &old))
            };
            if old.users.load(Ordering::Relaxed) == 0 && !self.programs.iter().any(runs) {
                break;
            }
            schedule::wait();
        }
        // A CPU may still be on its way out.
        while let Err(refused) = self.kernel.exit(&old.mm) {
            assert!(matches!(refused, Error::Busy(_)), "the last program has left: {refused}");
            schedule::wait();
        }
    }

    /// All CPUs leave, all processes exit, and what is left was lost.
    pub(crate) fn end(&self) -> Outcome {
        let machine = self.machine();
        self.kernel.set_batch_supply(Supply::Always);
        self.kernel.set_table_supply(Supply::Always);
        machine.on_cpu(CpuId::new(0), || {
            self.check_at_rest();
        });
        for process in &self.processes {
            let process = Arc::clone(&lock(process));
            let exited = self.kernel.exit(&process.mm);
            assert!(exited.is_ok(), "every CPU is lazy: {exited:?}");
        }
        self.look_for_lost_writes();
        for number in 0..machine.nr_cpus() {
            machine.on_cpu(CpuId::new(number), || self.kernel.switch_to(None));
        }
        self.kernel.drop_caches();
        let (leaked_frames, leaked_tables) = self.kernel.lost();
        Outcome {
            found: machine.violations(),
            leaked_frames,
            leaked_tables,
            double_frees: self.kernel.counters().snapshot().double_frees,
        }
    }

    /// A page of a file that a program wrote to must be known to be dirty once nothing maps it.
    fn look_for_lost_writes(&self) {
        let Some(checked) = &self.machine().checked else { return };
        for frame in self.kernel.cached_pages() {
            if checked.ledger.was_written(frame) && !self.kernel.frames().meta(frame).is_dirty() {
                let kind = ViolationKind::WriteLost;
                checked.report(kind, || Violation {
                    kind,
                    cpu: CpuId::new(0),
                    address: 0,
                    frame,
                    freed: None,
                    entry: None,
                    story: checked.log.explaining(CpuId::new(0), frame, 0),
                });
            }
        }
    }
}

impl LiveMm {
    fn new(mm: Arc<HostedMm>) -> Arc<Self> {
        Arc::new(Self { mm, users: AtomicU32::new(0), is_dying: AtomicBool::new(false) })
    }
}

/// Lets the device use the address space, if there is one and the seed says so.
fn share_with_device(machine: &HostedMachine, mm: &HostedMm) {
    if machine.options().device == Device::Present && machine.choices().one_in(2) {
        machine.attach_device(mm.engine().context().ctx_id(), mm.root());
    }
}

/// Sequences are made up: a call that the kernel refuses is as good as one that it does not.
const fn ignore(_refused: Result<(), Error>) {}

/// The part of a range that 2 MiB pages can fill.
fn whole_blocks(range: VirtRange) -> Option<VirtRange> {
    let span = Level::Pmd.entry_span();
    VirtRange::new(range.start().next_multiple_of(span), range.end() & !(span - 1)).ok()
}

const fn protection(rights: Rights) -> Protection {
    match rights {
        Rights::Nothing => Protection::Nothing,
        Rights::Read => Protection::Read,
        Rights::Write => Protection::Write,
    }
}

const fn area(backing: Backing, rights: Rights) -> Area {
    let kind = match backing {
        Backing::Anon | Backing::Huge | Backing::Clean | Backing::Stack => AreaKind::Anon,
        Backing::Private => AreaKind::FilePrivate(1),
        Backing::Shared => AreaKind::FileShared(2),
        Backing::Pfn => AreaKind::Pfn,
    };
    let growth = match backing {
        Backing::Stack => Growth::Down,
        _ => Growth::Fixed,
    };
    Area { kind, protection: protection(rights), growth, file_base: 0 }
}

#[cfg(test)]
mod tests {
    use core::panic::AssertUnwindSafe;
    use std::panic::catch_unwind;

    use super::*;
    use crate::sequence::generate::generate;

    #[test]
    fn a_run_that_panics_gives_its_machine_back() {
        let mut world = World::new(&generate(1, 4, 40), Trial::default()).expect("memory");
        let machine = Arc::downgrade(world.machine());
        // There is no place to note that step 20 is done; by then other CPUs are in the middle of
        // theirs.
        Arc::get_mut(&mut world).expect("nobody else has it yet").is_done =
            (0..20).map(|_| AtomicBool::new(false)).collect();
        let ended = catch_unwind(AssertUnwindSafe(|| world.run()));
        assert!(ended.is_err(), "it ended");
        drop(world);
        assert_eq!(machine.strong_count(), 0);
    }
}
