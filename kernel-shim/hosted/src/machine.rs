//! The hosted machine: CPUs, interrupts and memory in an ordinary process.

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use mmu_gather::pagetable::PagingMode;
use mmu_gather::tlb::{CpuId, PcidSupport};
use x86_64::registers::control::Cr4Flags;
use x86_64::structures::paging::PhysFrame;

use crate::awaited::Awaited;
use crate::boundary::{Boundaries, Boundary, PcidOwners, Reached};
use crate::checker::checked::{Caches, Checked};
use crate::checker::cost::state::Cost;
use crate::checker::events::{Detail, Event, EventLog, What};
use crate::checker::kind::ViolationKind;
use crate::checker::ledger::Ledger;
use crate::checker::per_cpu::{MapLocks, StepSoFar, TableLocks, ThreadHere, WorkDone};
use crate::checker::violation::Found;
use crate::device::SharedSpaces;
use crate::memory::Memory;
use crate::mmu::Mmu;
use crate::mmu::arch::TableLevel;
use crate::mutex::lock;
use crate::options::{Checking, MachineFault, Options, Telling};
use crate::random::Choices;
use crate::schedule;
use crate::vocabulary::FrameRole;

/// For how many seams a table counts as new: it is linked after one or two, and its first entry is
/// set a few later.
const NEW_FOR_SEAMS: u32 = 6;

/// A machine of up to 192 CPUs.
pub struct HostedMachine {
    pub(crate) options: Options,
    pub(crate) memory: Memory,
    pub(crate) choices: Choices,
    pub(crate) cpus: Box<[VirtualCpu]>,
    current: AtomicU32,
    pub(crate) checked: Option<Checked>,
    /// What the device uses.
    pub(crate) shared: SharedSpaces,
    /// Addresses that something just happened at: where a speculating CPU is most likely to look.
    hot: [AtomicU64; 64],
    next_hot: AtomicU32,
    /// For how many seams more a table counts as new, since one was given out.
    new_table: AtomicU32,
    /// Corners that this machine has been to.
    pub(crate) reached: Reached,
    /// Whether threads move from one CPU to another in the schedule that runs.
    pub(crate) threads_move: AtomicBool,
    /// Threads that have been moved, and whose CPU has not switched to them yet.
    pub(crate) threads_on_their_way: AtomicU32,
    /// How often a CPU was chosen.
    turns: AtomicU64,
    /// The turn in which a CPU has sent flush interrupts, plus one, if it has not begun to wait.
    sent_in: AtomicU64,
    /// How often the planted fault has happened.
    faults: AtomicU64,
    /// A CPU goes on at a seam unless these bits of a choice are all 0.
    pub(crate) calm: u64,
    /// Whether the kernel keeps programs from executing what is no code.
    execution_is_a_right: AtomicBool,
    /// The kernel's handler of the flush interrupt.
    flush_handler: OnceLock<FlushHandler>,
    /// What the kernel has promised of its costs, and what is remembered of them.
    pub(crate) cost: OnceLock<Cost>,
    /// What CPU 0 had in CR3 when the kernel had booted: the kernel's own root.
    kernel_root: OnceLock<PhysFrame>,
}

/// What the kernel does in the flush interrupt, on the CPU that takes it, interrupts off.
pub type FlushHandler = Box<dyn Fn() + Send + Sync>;

/// One CPU.
#[derive(Debug)]
pub(crate) struct VirtualCpu {
    pub(crate) id: CpuId,
    pub(crate) caches: Mutex<Option<Caches>>,
    /// A flush interrupt was sent to it, which it has not taken.
    pub(crate) is_interrupted: AtomicBool,
    /// A flush interrupt was sent to it since it last answered.
    pub(crate) was_sent: AtomicBool,
    pub(crate) interrupts_off: AtomicU32,
    pub(crate) in_user_mode: AtomicBool,
    /// The kernel on it may use addresses of the program, as far as it has told.
    pub(crate) is_active: AtomicBool,
    /// It is in a flush interrupt that the planted fault has spoilt: it answers, and flushes
    /// nothing.
    pub(crate) flushes_nothing: AtomicBool,
    /// The CPUs that it waits for to answer.
    pub(crate) awaits: Awaited,
    /// It has asked others to flush, and they have not all answered.
    pub(crate) waits: AtomicBool,
    pub(crate) pcid_owners: PcidOwners,
    pub(crate) table_locks: TableLocks,
    pub(crate) map_locks: MapLocks,
    pub(crate) work: WorkDone,
    /// Seams that it has crossed.
    pub(crate) seams: AtomicU64,
    pub(crate) step: StepSoFar,
    /// Which operation of a sequence it is at, as far as the runner has told.
    pub(crate) doing: AtomicU8,
    /// The kind of seam at which it last gave way, counted from 1.
    pub(crate) last_seam: AtomicU8,
    /// At which seam from here it stays away for long; 0 for none.
    pub(crate) seams_to_preemption: AtomicU32,
    /// Whether it has a coroutine, which answers its mail when it is chosen.
    pub(crate) has_turns: AtomicBool,
    /// It is switched off: interrupts to it are lost.
    is_off: AtomicBool,
    /// How often it is pinned, one inside the other.
    pub(crate) pinned: AtomicU32,
    /// The thread that runs here.
    pub(crate) thread: ThreadHere,
}

impl HostedMachine {
    /// A machine whose CPUs have just been switched on.
    ///
    /// # Errors
    /// If the host refuses to reserve the address space for its memory.
    pub fn new(options: Options) -> std::io::Result<Self> {
        let memory = Memory::reserve(options.nr_frames)?;
        let checked = match options.checking {
            Checking::On => {
                let log = EventLog::new(options.telling);
                Some(Checked { ledger: Ledger::new(options.nr_frames), log, contents: OnceLock::new() })
            }
            Checking::Off => None,
        };
        let mut cr4 = Cr4Flags::PAGE_GLOBAL;
        cr4.set(Cr4Flags::PCID, options.pcid == PcidSupport::On);
        cr4.set(Cr4Flags::L5_PAGING, options.paging == PagingMode::FiveLevel);
        let nothing = PhysFrame::containing_address(x86_64::PhysAddr::zero());
        let cpus = (0..options.nr_cpus.clamp(1, Options::MOST_CPUS)).map(|number| {
            let caches = checked.as_ref().map(|checked| {
                let mut watch = checked.ledger.watch();
                if options.telling == Telling::All {
                    watch.remember_fills();
                }
                Caches { mmu: Mmu::new(options.features_of(number), cr4, nothing, &mut watch), watch }
            });
            VirtualCpu {
                id: CpuId::new(number),
                caches: Mutex::new(caches),
                is_interrupted: AtomicBool::new(false),
                was_sent: AtomicBool::new(false),
                interrupts_off: AtomicU32::new(0),
                in_user_mode: AtomicBool::new(false),
                is_active: AtomicBool::new(false),
                flushes_nothing: AtomicBool::new(false),
                awaits: Awaited::nobody(),
                waits: AtomicBool::new(false),
                pcid_owners: PcidOwners::default(),
                table_locks: TableLocks::default(),
                map_locks: MapLocks::default(),
                work: WorkDone::default(),
                seams: AtomicU64::new(0),
                step: StepSoFar::default(),
                doing: AtomicU8::new(u8::MAX),
                last_seam: AtomicU8::new(0),
                seams_to_preemption: AtomicU32::new(0),
                has_turns: AtomicBool::new(false),
                is_off: AtomicBool::new(false),
                pinned: AtomicU32::new(0),
                thread: ThreadHere::beginning_on(number),
            }
        });
        Ok(Self {
            options,
            memory,
            choices: Choices::new(options.seed),
            cpus: cpus.collect(),
            current: AtomicU32::new(0),
            checked,
            shared: SharedSpaces::default(),
            hot: [const { AtomicU64::new(0) }; 64],
            next_hot: AtomicU32::new(0),
            new_table: AtomicU32::new(0),
            reached: Reached::default(),
            threads_move: AtomicBool::new(false),
            threads_on_their_way: AtomicU32::new(0),
            turns: AtomicU64::new(0),
            sent_in: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            // One CPU in two gives way, one in eight, or one in 32: short interleavings, or long
            // ones.
            calm: [0b1, 0b111, 0b1_1111][Choices::new(!options.seed).pick(3)],
            execution_is_a_right: AtomicBool::new(false),
            flush_handler: OnceLock::new(),
            cost: OnceLock::new(),
            kernel_root: OnceLock::new(),
        })
    }

    /// How it was made.
    #[must_use]
    pub const fn options(&self) -> &Options {
        &self.options
    }

    /// The choices that depend on the seed.
    #[must_use]
    pub const fn choices(&self) -> &Choices {
        &self.choices
    }

    /// The CPU that runs now.
    #[must_use]
    #[inline]
    pub fn current(&self) -> CpuId {
        CpuId::new(self.current.load(Ordering::Relaxed))
    }

    /// The violations found so far; none if nothing is checked.
    #[must_use]
    pub fn violations(&self) -> Found {
        self.checked.as_ref().map(|checked| checked.ledger.found()).unwrap_or_default()
    }

    /// What the kernel has in use now it keeps: it has booted. What it takes from now on and does
    /// not free is lost.
    pub fn note_booted(&self) {
        if let Some(checked) = &self.checked {
            checked.ledger.note_booted();
        }
        if let Some(Caches { mmu, .. }) = &*lock(&self.cpus[0].caches) {
            // Told twice, it is the first that counts.
            let _ = self.kernel_root.set(mmu.cr3().0);
        }
    }

    /// The kernel's own root; a frame of zeroes, before it has booted.
    pub(crate) fn kernel_root(&self) -> PhysFrame {
        let nothing = || PhysFrame::containing_address(x86_64::PhysAddr::zero());
        self.kernel_root.get().copied().unwrap_or_else(nothing)
    }

    /// Frames that the kernel has told to be in use since it had booted, and not to be free again;
    /// with what they were taken for.
    #[must_use]
    pub fn not_freed(&self) -> Vec<(PhysFrame, FrameRole)> {
        self.checked.as_ref().map(|checked| checked.ledger.not_freed().collect()).unwrap_or_default()
    }

    /// When the frame was given out and freed, lately: oldest first.
    #[must_use]
    pub fn story_of(&self, frame: PhysFrame) -> Vec<Event> {
        self.checked.as_ref().map(|checked| checked.log.about(frame)).unwrap_or_default()
    }

    /// How often the kernel freed a frame that was not in use.
    #[must_use]
    pub fn double_frees(&self) -> u64 {
        self.checked.as_ref().map_or(0, |checked| checked.ledger.double_frees())
    }

    /// Whether the kernel has freed the frame, and not given it out again.
    #[must_use]
    pub fn is_free(&self, frame: PhysFrame) -> bool {
        self.checked.as_ref().is_some_and(|checked| checked.ledger.when_freed(frame).is_some())
    }

    /// Whether the frame is [lent](Self::lent) to a gather.
    #[must_use]
    pub fn is_lent(&self, frame: PhysFrame) -> bool {
        self.checked.as_ref().is_some_and(|checked| checked.ledger.is_lent(frame))
    }

    /// Whether a program has written to the frame since it was given out.
    #[must_use]
    pub fn was_written(&self, frame: PhysFrame) -> bool {
        self.checked.as_ref().is_some_and(|checked| checked.ledger.was_written(frame))
    }

    /// Notes a violation that the kernel itself has found, on this CPU; nothing if nothing is
    /// checked.
    pub fn report_violation(&self, kind: ViolationKind, address: u64, frame: PhysFrame) {
        if let Some(checked) = &self.checked {
            self.report(checked, kind, self.current(), address, frame, None);
        }
    }

    /// The corners that it has been to.
    #[must_use]
    pub fn reached(&self) -> Boundaries {
        self.reached.so_far()
    }

    /// This CPU is at a corner.
    pub(crate) fn note_reached(&self, boundary: Boundary) {
        self.reached.note(boundary, self.cpu().doing.load(Ordering::Relaxed));
    }

    /// How often the fault of its options has happened so far: requests lost, or invalidations left
    /// out.
    #[must_use]
    pub fn nr_faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// What is wrong on purpose has happened so often more.
    pub(crate) fn note_fault(&self, times: u64) {
        self.faults.fetch_add(times, Ordering::Relaxed);
    }

    /// How often a CPU was chosen so far.
    pub(crate) fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    /// This CPU has sent flush interrupts.
    pub(crate) fn has_sent(&self) {
        self.sent_in.store(self.turns() + 1, Ordering::Relaxed);
    }

    /// It waits for the answers, and lets the others run.
    pub(crate) fn begins_to_wait(&self) {
        self.sent_in.store(0, Ordering::Relaxed);
    }

    /// The turn that runs, if a CPU has sent flush interrupts in it and has not begun to wait.
    pub(crate) fn turn_of_sender(&self) -> Option<u64> {
        let turn = self.sent_in.load(Ordering::Relaxed).checked_sub(1)?;
        (turn == self.turns()).then_some(turn)
    }

    /// Runs `f` as if it were code on `cpu`.
    pub fn on_cpu<R>(&self, cpu: CpuId, f: impl FnOnce() -> R) -> R {
        let before = self.become_cpu(cpu);
        let result = f();
        self.current.store(before, Ordering::Relaxed);
        result
    }

    /// It is the turn of `cpu`.
    pub(crate) fn begin_turn(&self, cpu: CpuId) {
        self.turns.fetch_add(1, Ordering::Relaxed);
        self.become_cpu(cpu);
    }

    /// This thread of the host is `cpu` from now on; for a schedule.
    pub(crate) fn become_cpu(&self, cpu: CpuId) -> u32 {
        self.current.swap(cpu.number(), Ordering::Relaxed)
    }

    /// Logs what happened on this CPU, and returns its step.
    pub(crate) fn log(&self, what: What) -> u64 {
        self.checked.as_ref().map_or(0, |checked| checked.log.add(self.current(), what))
    }

    /// As [`log`](Self::log), for what only a timeline wants.
    pub(crate) fn log_detail(&self, detail: Detail) {
        if let Some(checked) = &self.checked {
            checked.log.detail(self.current(), detail);
        }
    }

    /// Notes a call of this CPU, or its return.
    pub(crate) fn mark(&self, what: What) {
        if let Some(checked) = &self.checked {
            checked.log.mark(self.current(), what);
        }
    }

    /// Level of the tables that CR3 points to.
    pub(crate) const fn root_level(&self) -> TableLevel {
        match self.options.paging {
            PagingMode::FourLevel => TableLevel::Pml4,
            PagingMode::FiveLevel => TableLevel::Pml5,
        }
    }

    /// What is remembered of what happened, oldest first; nothing if nothing is checked.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.checked.as_ref().map(|checked| checked.log.events()).unwrap_or_default()
    }

    pub(crate) fn cpu(&self) -> &VirtualCpu {
        &self.cpus[self.current().index()]
    }

    /// Remembers an address at which something happens: the adversary looks there.
    #[inline]
    pub fn point_at(&self, address: u64) {
        let place = self.next_hot.fetch_add(1, Ordering::Relaxed) as usize % self.hot.len();
        self.hot[place].store(address, Ordering::Relaxed);
    }

    pub(crate) fn hot_address(&self) -> u64 {
        self.hot[self.choices.pick(self.hot.len())].load(Ordering::Relaxed)
    }

    /// The kernel keeps programs from executing what is no code.
    pub(crate) fn note_execution_is_a_right(&self) {
        self.execution_is_a_right.store(true, Ordering::Relaxed);
    }

    pub(crate) fn execution_is_a_right(&self) -> bool {
        self.execution_is_a_right.load(Ordering::Relaxed)
    }

    /// The last address at which something happened.
    pub(crate) fn latest_address(&self) -> u64 {
        let place = self.next_hot.load(Ordering::Relaxed).wrapping_sub(1) as usize % self.hot.len();
        self.hot[place].load(Ordering::Relaxed)
    }

    /// A table was given out, and is about to be linked.
    pub(crate) fn note_new_table(&self) {
        self.new_table.store(NEW_FOR_SEAMS, Ordering::Relaxed);
    }

    /// Whether one was given out a few seams ago.
    pub(crate) fn table_is_new(&self) -> bool {
        let left = self.new_table.load(Ordering::Relaxed);
        self.new_table.store(left.saturating_sub(1), Ordering::Relaxed);
        left > 0
    }

    /// The kernel handles flush interrupts with `handler`. To be called once, before a second CPU
    /// runs.
    ///
    /// # Panics
    /// If called again: a machine runs one kernel.
    pub fn set_flush_handler(&self, handler: FlushHandler) {
        assert!(self.flush_handler.set(handler).is_ok(), "a machine runs one kernel");
    }

    /// This CPU is switched off: what is sent to it is lost, and it walks nothing.
    pub(crate) fn switch_off(&self) {
        self.leave_user_mode();
        self.cpu().is_off.store(true, Ordering::Relaxed);
        self.cpu().is_interrupted.store(false, Ordering::Relaxed);
    }

    /// This CPU is switched on again.
    pub(crate) fn switch_on(&self) {
        self.cpu().is_off.store(false, Ordering::Relaxed);
    }

    pub(crate) fn is_off(&self, cpu: CpuId) -> bool {
        self.cpus[cpu.index()].is_off.load(Ordering::Relaxed)
    }

    /// Takes the flush interrupt, if one was sent to this CPU and interrupts are on.
    ///
    /// # Panics
    /// If there is no handler.
    pub fn take_interrupt(&self) {
        let cpu = self.cpu();
        if !cpu.is_interrupted.load(Ordering::Acquire) || cpu.interrupts_off.load(Ordering::Relaxed) > 0 {
            return;
        }
        let was_user = cpu.in_user_mode.swap(false, Ordering::Relaxed);
        cpu.interrupts_off.fetch_add(1, Ordering::Relaxed);
        cpu.is_interrupted.store(false, Ordering::Relaxed);
        let flushes_nothing = match self.options.fault {
            MachineFault::Absent | MachineFault::SkipFlush => false,
            MachineFault::DropIpi => self.choices.one_in(4),
            MachineFault::LocalFlushOnly => true,
        };
        if flushes_nothing {
            cpu.flushes_nothing.store(true, Ordering::Relaxed);
        }
        let handler = self.flush_handler.get();
        let handler = handler.expect("a kernel that interrupts CPUs has a handler: `set_flush_handler`");
        schedule::without_unwinding(handler);
        cpu.flushes_nothing.store(false, Ordering::Relaxed);
        cpu.interrupts_off.fetch_sub(1, Ordering::Relaxed);
        if was_user {
            self.enter_user_mode();
        }
    }

    /// Which CPUs wait for the answers of which others, in words: a line for each that is missing.
    #[must_use]
    pub fn missing_answers(&self) -> Vec<String> {
        let pairs = self.cpus.iter().flat_map(|cpu| {
            self.cpus.iter().filter(|other| cpu.awaits.contains(other.id)).map(|other| (cpu.id, other))
        });
        let words = pairs.map(|(waits, other)| {
            let why = if other.is_off.load(Ordering::Relaxed) {
                "it is off, and offline_cpu was not the last that it ran: as long as it does not say that it is off, \
                 it counts as one that must flush"
            } else if !other.was_sent.load(Ordering::Relaxed) {
                "no interrupt was sent to it since it last answered: `send_flush_interrupt` sends one to each CPU in \
                 `targets`"
            } else if !other.is_interrupted.load(Ordering::Relaxed) {
                "it was sent the flush interrupt, has run its handler, and has answered nothing: the handler calls \
                 `flush_interrupt` for the CPU that it runs on"
            } else if other.interrupts_off.load(Ordering::Relaxed) > 0 {
                "it was interrupted, and has its interrupts off: a CPU that waits (for answers, for a lock) while \
                 others flush serves what they ask of it meanwhile, or waits with interrupts on"
            } else {
                "it was interrupted, and got no turn"
            };
            format!("{waits} waits for the answer of {}: {why}", other.id)
        });
        words.collect()
    }

    /// The call that this CPU made has returned: it waits for nobody.
    pub(crate) fn call_returned(&self) {
        self.cpu().awaits.clear();
        self.cpu().step.begin();
    }

    /// Whether the planted fault keeps this CPU from flushing just now.
    pub(crate) fn skips_flushes(&self) -> bool {
        self.options.fault == MachineFault::SkipFlush || self.cpu().flushes_nothing.load(Ordering::Relaxed)
    }

    /// This CPU asks `target` to flush.
    pub(crate) fn asks(&self, checked: &Checked, target: CpuId) {
        if !self.cpu().waits.swap(true, Ordering::Relaxed) {
            self.check_wait_outside_locks(checked);
            self.check_wait_outside_map_locks(checked);
        }
        self.log(What::Sent(target));
    }

    /// All have answered whom this CPU has asked.
    pub(crate) fn has_answers(&self) {
        self.cpu().waits.store(false, Ordering::Relaxed);
    }

    /// At the `seams`th seam from now this CPU stays away for long: others get whole operations
    /// done.
    pub(crate) fn preempt_after(&self, seams: u32) {
        self.cpu().seams_to_preemption.store(seams, Ordering::Relaxed);
    }

    /// This CPU runs a program from now on. The checker looks whether it could reach anything it
    /// must not.
    pub fn enter_user_mode(&self) {
        self.begin_work_anew();
        self.cpu().in_user_mode.store(true, Ordering::Relaxed);
        self.check_stale();
    }

    /// This CPU runs kernel code from now on.
    pub fn leave_user_mode(&self) {
        self.cpu().in_user_mode.store(false, Ordering::Relaxed);
    }

    /// Whether this CPU may use addresses of the program that it runs without more ado: in user
    /// mode, or in the kernel on the program's behalf (`copy_to_user`).
    pub(crate) fn may_use_addresses(&self, cpu: CpuId) -> bool {
        self.is_in_user_mode(cpu) || self.cpus[cpu.index()].is_active.load(Ordering::Relaxed)
    }

    pub(crate) fn is_in_user_mode(&self, cpu: CpuId) -> bool {
        self.cpus[cpu.index()].in_user_mode.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for HostedMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostedMachine")
            .field("options", &self.options)
            .field("current", &self.current())
            .finish_non_exhaustive()
    }
}
