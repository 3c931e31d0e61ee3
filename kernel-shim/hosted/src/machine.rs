//! The hosted machine: CPUs, interrupts and memory in an ordinary process.
#![expect(unsafe_code, reason = "implements the machine's contract; requests travel by pointer")]

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use mmu_gather::pagetable::TableLock;
use mmu_gather::tlb::{
    Answers, CachedTranslations, CpuId, CpuSet, CtxId, EarlyAnswer, OnlineCpus, PageSpan, PcidSupport,
};
use mmu_kernel_shim::{Machine, Moment, Note, Seam};
use x86_64::instructions::tlb::Pcid;
use x86_64::registers::control::Cr4Flags;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::boundary::{Boundary, PcidOwners, Reached};
use crate::checker::checked::{Caches, Checked};
use crate::checker::events::{Detail, Event, EventLog, Kept, What};
use crate::checker::ledger::Ledger;
use crate::checker::per_cpu::{MapLocks, TableLocks, WorkDone};
use crate::checker::violation::Found;
use crate::device::SharedSpaces;
use crate::memory::Memory;
use crate::mmu::Mmu;
use crate::mmu::arch::LinearAddress;
use crate::mmu::invalidate::Cr3Load;
use crate::mutex::lock;
use crate::options::{Checking, MachineFault, Options, Telling};
use crate::random::Choices;
use crate::schedule::{self, GiveWay, Schedule};

/// A machine of up to 64 CPUs.
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
    /// Corners that this machine has been to.
    pub(crate) reached: Reached,
    /// How often a CPU was chosen.
    turns: AtomicU64,
    /// How often the planted fault has happened.
    faults: AtomicU64,
    /// A CPU goes on at a seam unless these bits of a choice are all 0.
    pub(crate) calm: u64,
    /// The kernel's handler of the flush interrupt.
    flush_handler: OnceLock<FlushHandler>,
}

/// What the kernel does in the flush interrupt, on the CPU that takes it, interrupts off.
pub type FlushHandler = Box<dyn Fn() + Send + Sync>;

/// One CPU.
#[derive(Debug)]
pub(crate) struct VirtualCpu {
    pub(crate) id: CpuId,
    pub(crate) caches: Mutex<Option<Caches>>,
    /// A flush interrupt was sent to it, which it has not taken.
    is_interrupted: AtomicBool,
    interrupts_off: AtomicU32,
    in_user_mode: AtomicBool,
    /// It is in a flush interrupt that the planted fault has spoilt: it answers, and flushes
    /// nothing.
    flushes_nothing: AtomicBool,
    /// It has asked others to flush, and they have not all answered.
    waits: AtomicBool,
    pub(crate) pcid_owners: PcidOwners,
    pub(crate) table_locks: TableLocks,
    pub(crate) map_locks: MapLocks,
    pub(crate) work: WorkDone,
    /// At which seam from here it stays away for long; 0 for none.
    pub(crate) seams_to_preemption: AtomicU32,
    /// Whether it has a coroutine, which answers its mail when it is chosen.
    pub(crate) has_turns: AtomicBool,
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
                Some(Checked { ledger: Ledger::new(options.nr_frames), log })
            }
            Checking::Off => None,
        };
        let cr4 = match options.pcid {
            PcidSupport::On => Cr4Flags::PCID | Cr4Flags::PAGE_GLOBAL,
            PcidSupport::Off => Cr4Flags::PAGE_GLOBAL,
        };
        let nothing = PhysFrame::containing_address(x86_64::PhysAddr::zero());
        let cpus = (0..options.nr_cpus.clamp(1, 64)).map(|number| {
            let caches = checked.as_ref().map(|checked| {
                let mut watch = checked.ledger.watch();
                if options.telling == Telling::All {
                    watch.remember_fills();
                }
                Caches { mmu: Mmu::new(options.features, cr4, nothing, &mut watch), watch }
            });
            VirtualCpu {
                id: CpuId::new(number),
                caches: Mutex::new(caches),
                is_interrupted: AtomicBool::new(false),
                interrupts_off: AtomicU32::new(0),
                in_user_mode: AtomicBool::new(false),
                flushes_nothing: AtomicBool::new(false),
                waits: AtomicBool::new(false),
                pcid_owners: PcidOwners::default(),
                table_locks: TableLocks::default(),
                map_locks: MapLocks::default(),
                work: WorkDone::default(),
                seams_to_preemption: AtomicU32::new(0),
                has_turns: AtomicBool::new(false),
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
            reached: Reached::default(),
            turns: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            // One CPU in two gives way, one in eight, or one in 32: short interleavings, or long
            // ones.
            calm: [0b1, 0b111, 0b1_1111][Choices::new(!options.seed).pick(3)],
            flush_handler: OnceLock::new(),
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

    /// How often the fault of its options has happened so far: requests lost, or invalidations left
    /// out.
    #[must_use]
    pub fn nr_faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// Runs `f` as if it were code on `cpu`.
    pub fn on_cpu<R>(&self, cpu: CpuId, f: impl FnOnce() -> R) -> R {
        let before = self.become_cpu(cpu);
        let result = f();
        self.current.store(before, Ordering::Relaxed);
        result
    }

    /// This thread is `cpu` from now on; for a schedule.
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

    /// Runs what `schedule` holds until all of it is done.
    pub fn run(self: &Arc<Self>, schedule: Schedule) {
        for cpu in schedule.cpus() {
            self.cpus[cpu.index()].has_turns.store(true, Ordering::Relaxed);
        }
        let machine = Arc::clone(self);
        let on_return = move || machine.take_interrupt();
        let becomes = |cpu| {
            self.turns.fetch_add(1, Ordering::Relaxed);
            self.become_cpu(cpu);
        };
        let is_done = |cpu: CpuId| self.cpus[cpu.index()].has_turns.store(false, Ordering::Relaxed);
        let leaves = |cpu| self.settle_locks(cpu);
        schedule.run(&self.choices, becomes, leaves, is_done, &on_return);
        self.become_cpu(CpuId::new(0));
    }

    /// The kernel handles flush interrupts with `handler`. To be called once, before a second CPU
    /// runs.
    ///
    /// # Panics
    /// If called again: a machine runs one kernel.
    pub fn set_flush_handler(&self, handler: FlushHandler) {
        assert!(self.flush_handler.set(handler).is_ok(), "a machine runs one kernel");
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
        if self.options.fault == MachineFault::DropIpi && self.choices.one_in(4) {
            cpu.flushes_nothing.store(true, Ordering::Relaxed);
        }
        let handler = self.flush_handler.get();
        handler.expect("a kernel that interrupts CPUs has a handler: `set_flush_handler`")();
        cpu.flushes_nothing.store(false, Ordering::Relaxed);
        cpu.interrupts_off.fetch_sub(1, Ordering::Relaxed);
        if was_user {
            self.enter_user_mode();
        }
    }

    /// Whether the planted fault keeps this CPU from flushing just now.
    fn skips_flushes(&self) -> bool {
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

    pub(crate) fn is_in_user_mode(&self, cpu: CpuId) -> bool {
        self.cpus[cpu.index()].in_user_mode.load(Ordering::Relaxed)
    }
}

// SAFETY: frames are parts of one reservation that lives as long as the machine. Code runs as one
// CPU until it gives way, and comes back as the same one. A CPU that is interrupted runs the
// handler once its interrupts are on. INVLPG and CR3 loads do to the software MMU what the SDM
// says, unless a fault was planted.
unsafe impl Machine for HostedMachine {
    type Relax = GiveWay;
    type Bits = [AtomicU64; 1];

    fn nr_cpus(&self) -> u32 {
        self.options.nr_cpus.clamp(1, 64)
    }

    fn nr_frames(&self) -> u64 {
        self.memory.nr_frames()
    }

    fn nr_reserved_frames(&self) -> u64 {
        Options::RESERVED_FRAMES
    }

    #[inline]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.memory.pointer(frame)
    }

    fn pointer_to_frame(&self, pointer: *const PageTable) -> PhysFrame {
        self.memory.frame_at(pointer)
    }

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(self.current())
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        let cpu = self.cpu();
        cpu.interrupts_off.fetch_add(1, Ordering::Relaxed);
        let result = f();
        cpu.interrupts_off.fetch_sub(1, Ordering::Relaxed);
        self.take_interrupt();
        result
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Self::Bits>) {
        for target in targets.iter() {
            let cpu = &self.cpus[target.index()];
            if cpu.interrupts_off.load(Ordering::Relaxed) > 0 {
                self.reached.note(Boundary::HeldOff);
            }
            cpu.is_interrupted.store(true, Ordering::Release);
        }
    }

    fn wait_for_answers(&self, answers: Answers<'_, Self::Bits>) {
        // A CPU that has nothing else to do takes the interrupt at once.
        for target in answers.missing() {
            if !self.cpus[target.index()].has_turns.load(Ordering::Relaxed) {
                self.on_cpu(target, || self.take_interrupt());
            }
        }
        if !answers.are_complete() {
            schedule::wait();
        }
    }

    fn answered(&self, initiator: CpuId) {
        if self.cpu().waits.load(Ordering::Relaxed) {
            self.reached.note(Boundary::Crossing);
        }
        let is_lost = self.cpu().flushes_nothing.load(Ordering::Relaxed);
        self.log(if is_lost { What::Lost(initiator) } else { What::Answered(initiator) });
    }

    /// With a fault planted, the checker is to find the violation that follows, so the engine's own
    /// assertion must not come first.
    fn answered_early(&self, early: &EarlyAnswer) {
        assert!(self.options.fault != MachineFault::Absent, "{early}");
    }

    fn cr3(&self) -> Option<PhysFrame> {
        lock(&self.cpu().caches).as_ref().map(|caches| caches.mmu.cr3().0)
    }

    fn invlpg(&self, address: u64) {
        self.seam(Seam::Lock);
        if self.skips_flushes() {
            self.faults.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if let Some(Caches { mmu, watch }) = &mut *lock(&self.cpu().caches) {
            mmu.invlpg(LinearAddress::new(address), watch);
        }
        self.log(What::Invlpg(address));
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        let keep = cached == CachedTranslations::Keep;
        // Between the decision what to keep and the load.
        self.cross_between_steps();
        let mut is_switch = false;
        if let Some(Caches { mmu, watch }) = &mut *lock(&self.cpu().caches) {
            is_switch = mmu.cr3().0 != root;
            let has_pcids = self.options.pcid == PcidSupport::On;
            let skip = self.skips_flushes() && (has_pcids || !is_switch);
            self.faults.fetch_add(u64::from(skip && !keep), Ordering::Relaxed);
            let loaded = match cached {
                // Without PCIDs there is no load that keeps anything.
                CachedTranslations::Flush if skip && !has_pcids => Ok(()),
                CachedTranslations::Flush if !skip => mmu.load_cr3(root, pcid, Cr3Load::Flush, watch),
                CachedTranslations::Flush | CachedTranslations::Keep => {
                    mmu.load_cr3(root, pcid, Cr3Load::Keep, watch)
                }
            };
            // The root in CR3 is told below.
            watch.take_fills();
            debug_assert!(loaded.is_ok(), "the kernel loads PCID {} with PCIDs off", pcid.value());
        }
        if is_switch
            && let Some(boundary) =
                self.cpu().pcid_owners.loads(root.start_address().as_u64(), pcid.value(), keep)
        {
            self.reached.note(boundary);
        }
        self.log(What::LoadedCr3(root, pcid.value(), if keep { Kept::Yes } else { Kept::No }));
        self.check_stale();
        // Between the load and its announcement.
        self.cross_between_steps();
    }

    fn invalidate_secondary(&self, ctx_id: CtxId, span: Option<PageSpan>) {
        self.device_forgets(ctx_id, span);
    }

    fn online_cpus(&self) -> OnlineCpus {
        // A flusher asks after it has raised the generation and before it reads the cpumask.
        self.cross_between_steps();
        if self.nr_cpus() == 1 { OnlineCpus::One } else { OnlineCpus::Many }
    }

    fn pcid_support(&self) -> PcidSupport {
        // A switch asks after it has announced itself and read the generation.
        self.cross_between_steps();
        self.options.pcid
    }

    fn cond_resched(&self) {
        self.begin_work_anew();
        let turns = self.turns.load(Ordering::Relaxed);
        self.cross_between_steps();
        if self.turns.load(Ordering::Relaxed) != turns {
            self.reached.note(Boundary::Preempted);
        }
    }

    #[inline]
    fn seam(&self, seam: Seam) {
        if self.checked.is_some() {
            self.cross(seam);
        }
    }

    #[inline]
    fn note(&self, note: Note) {
        if let Some(checked) = &self.checked {
            self.check_note(checked, note);
        }
    }

    fn about_to_lock(&self, frame: PhysFrame, lock: &TableLock<GiveWay>) {
        if self.checked.is_some() {
            self.cross(Seam::Lock);
            self.ask_for_lock(frame, lock);
        }
    }

    fn moment(&self) -> Moment {
        self.checked.as_ref().map_or(Moment::START, |checked| checked.ledger.moment())
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
