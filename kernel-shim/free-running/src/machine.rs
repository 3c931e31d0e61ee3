//! The machine: CPUs that are threads, as the small kernel wants them.
#![expect(unsafe_code, reason = "implements the machine's contract")]

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::Arc;

use mmu_gather::pagetable::TableLock;
use mmu_gather::tlb::{Answers, CachedTranslations, CpuId, CpuSet, EarlyAnswer, PcidSupport, TlbEvent};
use mmu_kernel_shim::{FrameRole, Kernel, Machine, Note, Seam, UserAccess};
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::access;
use crate::cpu::{Cpu, count};
use crate::doing::Doing;
use crate::here::{Interrupted, run_as, this_cpu, with_here};
use crate::memory::{Memory, PAGE};
use crate::options::{Delivery, PlantedFault};
use crate::ring::{Happened, now};
use crate::signals;
use crate::tlb::page_of;
use crate::violation::ViolationKind;
use crate::walk::{NoPage, walk};

/// The small kernel on this machine.
pub(crate) type FreeKernel = Kernel<Arc<FreeMachine>>;

/// Turns that a CPU spins before it gives its core to another thread. Long enough for a CPU that
/// runs to answer (which takes a few hundred cycles), and far shorter than a time slice.
const TURNS_BEFORE_YIELD: u32 = 256;
/// Accesses between two guesses of a CPU.
const ACCESSES_A_SPECULATION: u32 = 16;

/// CPUs, interrupts and physical memory.
#[derive(Debug)]
pub(crate) struct FreeMachine {
    memory: Memory,
    cpus: Box<[Cpu]>,
    fault: PlantedFault,
    /// Whether this phase's interrupts are signals.
    signals: AtomicBool,
    /// Nothing is noted any more.
    frozen: AtomicBool,
    /// Nobody waits for the CPUs any more: they stop where they wait.
    abandoned: AtomicBool,
    violations: AtomicU32,
}

/// A program's access that needs the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageFault;

impl FreeMachine {
    pub(crate) fn new(nr_cpus: usize, nr_frames: usize, fault: PlantedFault) -> Self {
        Self {
            memory: Memory::new(nr_frames),
            cpus: (0..nr_cpus).map(|_| Cpu::new()).collect(),
            fault,
            signals: AtomicBool::new(false),
            frozen: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            violations: AtomicU32::new(0),
        }
    }

    pub(crate) fn cpus(&self) -> &[Cpu] {
        &self.cpus
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The calling thread is CPU `number` while `f` runs.
    pub(crate) fn run_cpu<R>(
        &self,
        number: usize,
        interrupted: &dyn Interrupted,
        f: impl FnOnce(&Cpu) -> R,
    ) -> R {
        let cpu = &self.cpus[number];
        cpu.inbox.thread.store(signals::this_thread(), Ordering::Release);
        let result = run_as(interrupted, number, || f(cpu));
        cpu.inbox.thread.store(0, Ordering::Release);
        result
    }

    /// How interrupts reach CPUs from now on. Every CPU waits at the end of a phase.
    pub(crate) fn set_delivery(&self, delivery: Delivery) {
        self.signals.store(delivery == Delivery::Signals, Ordering::Release);
    }

    /// Whether interrupts are signals now.
    #[inline]
    pub(crate) fn takes_signals(&self) -> bool {
        self.signals.load(Ordering::Relaxed)
    }

    /// A signal has come to this CPU. Whether it was taken for an interrupt.
    pub(crate) fn on_signal(&self, number: usize, handler: &dyn Fn()) -> bool {
        if self.takes_signals() {
            count(&self.cpus[number].counts.signals);
            self.serve(number, handler);
        }
        self.takes_signals()
    }

    /// This CPU spins for a lock.
    pub(crate) fn spin(&self, number: usize, handler: &dyn Fn()) {
        let cpu = &self.cpus[number];
        cpu.status.spins.store(true, Ordering::Relaxed);
        if cpu.interrupts_are_on() {
            self.serve(number, handler);
        } else if cpu.has_interrupt() && !cpu.told.load(Ordering::Relaxed) {
            // The interrupt stays pending: in the middle of a switch no mail is taken.
            self.take_mail(cpu, handler);
        }
        self.wait(cpu);
    }

    /// Nobody waits for the CPUs any more.
    pub(crate) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }

    /// How many violations there are so far.
    pub(crate) fn nr_violations(&self) -> u32 {
        self.violations.load(Ordering::Relaxed)
    }

    /// What led here is kept from now on.
    pub(crate) fn freeze(&self) {
        self.frozen.store(true, Ordering::Relaxed);
    }

    /// A violation, `[address, value, against]`. May be called in a signal handler.
    pub(crate) fn violation(&self, cpu: &Cpu, kind: ViolationKind, numbers: [u64; 3]) {
        self.freeze();
        cpu.found.note(kind, numbers, now());
        self.violations.fetch_add(1, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn event(&self, cpu: &Cpu, what: Happened, numbers: [u64; 2]) {
        cpu.ring.push(&self.frozen, what, numbers);
    }

    /// The program on this CPU loads a word.
    pub(crate) fn load(&self, cpu: &Cpu, address: u64) -> Result<u64, PageFault> {
        self.access(cpu, address, UserAccess::Read, 0)
    }

    /// The program on this CPU stores a word.
    pub(crate) fn store(&self, cpu: &Cpu, address: u64, value: u64) -> Result<(), PageFault> {
        self.access(cpu, address, UserAccess::Write, value).map(|_| ())
    }

    fn access(&self, cpu: &Cpu, address: u64, access: UserAccess, value: u64) -> Result<u64, PageFault> {
        count(&cpu.counts.accesses);
        self.between_accesses(cpu);
        loop {
            if let Some(loaded) = self.cached_access(cpu, address, access, value) {
                return Ok(loaded);
            }
            self.fill(cpu, address, access)?;
        }
    }

    /// The access, if the TLB has what it needs.
    fn cached_access(&self, cpu: &Cpu, address: u64, access: UserAccess, value: u64) -> Option<u64> {
        let tlb = cpu.tlb();
        if self.takes_signals() {
            return match access {
                UserAccess::Read | UserAccess::Fetch => access::load(tlb, &self.memory, address),
                UserAccess::Write => access::store(tlb, &self.memory, address, value).map(|()| 0),
            };
        }
        // No interrupt comes in between: they are looked for before the access.
        let entry = tlb.entry(page_of(address)?);
        let needed = match access {
            UserAccess::Read | UserAccess::Fetch => crate::tlb::CACHED,
            UserAccess::Write => crate::tlb::WRITABLE,
        };
        if entry & needed == 0 {
            return None;
        }
        let word = &self.memory.words(entry & !(PAGE - 1))?[usize::try_from(address % PAGE / 8).ok()?];
        match access {
            UserAccess::Read | UserAccess::Fetch => Some(word.load(Ordering::Relaxed)),
            UserAccess::Write => {
                word.store(value, Ordering::Relaxed);
                Some(0)
            }
        }
    }

    /// The hardware walks, and caches what it finds.
    #[cold]
    fn fill(&self, cpu: &Cpu, address: u64, access: UserAccess) -> Result<(), PageFault> {
        let page = page_of(address).ok_or(PageFault)?;
        cpu.interrupts_off();
        let walked = self.walk_and_cache(cpu, page, access);
        if walked.is_ok() {
            cpu.tlb().note_recent(page);
            count(&cpu.counts.fills);
        }
        cpu.interrupts_back();
        serve_here();
        walked
    }

    fn walk_and_cache(&self, cpu: &Cpu, page: usize, access: UserAccess) -> Result<(), PageFault> {
        match walk(&self.memory, cpu, page, access) {
            Ok(entry) => {
                cpu.tlb().fill(page, entry);
                Ok(())
            }
            Err(NoPage::Fault) => Err(PageFault),
            Err(NoPage::Astray(kind, entry)) => {
                self.violation(cpu, kind, [page as u64 * PAGE, entry, 0]);
                Err(PageFault)
            }
        }
    }

    /// A processor may cache what it can walk to, at any moment: here one of the pages used of
    /// late.
    fn speculate(&self, cpu: &Cpu, page: usize) {
        if self.walk_and_cache(cpu, page, UserAccess::Read).is_ok() {
            count(&cpu.counts.speculative_fills);
        }
    }

    /// What a CPU does between two accesses, and while it waits: it takes interrupts, and guesses.
    #[inline]
    pub(crate) fn between_accesses(&self, cpu: &Cpu) {
        if cpu.has_interrupt() {
            serve_here();
        }
        let since = cpu.since_speculation.load(Ordering::Relaxed).wrapping_add(1);
        cpu.since_speculation.store(since, Ordering::Relaxed);
        if since.is_multiple_of(ACCESSES_A_SPECULATION)
            && cpu.interrupts_are_on()
            && let Some(page) = cpu.tlb().recent(since / ACCESSES_A_SPECULATION)
        {
            cpu.interrupts_off();
            self.speculate(cpu, page);
            cpu.interrupts_back();
            serve_here();
        }
    }

    /// Takes the interrupts of this CPU, if they are on.
    pub(crate) fn serve(&self, number: usize, handler: &dyn Fn()) {
        let cpu = &self.cpus[number];
        while cpu.interrupts_are_on() && cpu.take_interrupt() {
            cpu.interrupts_off();
            self.take_mail(cpu, handler);
            cpu.interrupts_back();
        }
    }

    fn take_mail(&self, cpu: &Cpu, handler: &dyn Fn()) {
        count(&cpu.counts.interrupts);
        self.event(cpu, Happened::Interrupted, [0; 2]);
        cpu.told.store(true, Ordering::Relaxed);
        cpu.nr_told.store(cpu.nr_told.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        handler();
        cpu.told.store(false, Ordering::Relaxed);
    }

    /// A turn of a wait that goes on: `turns` so far.
    fn wait(&self, cpu: &Cpu) {
        let turns = cpu.turns.load(Ordering::Relaxed).saturating_add(1);
        cpu.turns.store(turns, Ordering::Relaxed);
        while self.abandoned.load(Ordering::Relaxed) {
            // The run is over and has failed; what this CPU waits for never happens.
            std::thread::park();
        }
        if turns > TURNS_BEFORE_YIELD { std::thread::yield_now() } else { core::hint::spin_loop() }
    }

    /// Whether an instruction that flushes is to be left out, by the planted fault.
    fn leaves_out(&self, cpu: &Cpu) -> bool {
        let leaves_out = match self.fault {
            PlantedFault::Absent | PlantedFault::FreeBeforeFlush | PlantedFault::LoseInterrupt => false,
            PlantedFault::SkipFlush => true,
            PlantedFault::DropIpi => {
                cpu.told.load(Ordering::Relaxed) && cpu.nr_told.load(Ordering::Relaxed).is_multiple_of(4)
            }
            PlantedFault::LocalFlushOnly => cpu.told.load(Ordering::Relaxed),
        };
        if leaves_out {
            count(&cpu.counts.faults);
        }
        leaves_out
    }

    /// Whether an interrupt is to be lost, by the planted fault.
    fn loses_interrupt(&self, cpu: &Cpu) -> bool {
        let loses = self.fault == PlantedFault::LoseInterrupt
            && cpu.counts.shootdowns.load(Ordering::Relaxed) % 256 == 255;
        if loses {
            count(&cpu.counts.faults);
        }
        loses
    }

    /// The CPU that the calling thread is; the first, for the thread that starts and ends the run
    /// while there are no others.
    fn here(&self) -> &Cpu {
        &self.cpus[this_cpu().unwrap_or(0)]
    }

    fn freed(&self, frame: PhysFrame, role: FrameRole) {
        let cpu = self.here();
        let address = frame.start_address().as_u64();
        self.event(cpu, Happened::Freed, [address, u64::from(role == FrameRole::Table)]);
        match role {
            FrameRole::Table => {
                count(&cpu.counts.freed_tables);
                let in_use = |other: &Cpu| other.root.load(Ordering::Relaxed) == address;
                if let Some(user) = self.cpus.iter().position(in_use) {
                    self.violation(cpu, ViolationKind::RootFreedInUse, [address, user as u64, 0]);
                }
                self.memory.poison(frame);
            }
            FrameRole::Page => {
                count(&cpu.counts.freed_pages);
                self.memory.poison(frame);
            }
            FrameRole::Block => {
                count(&cpu.counts.freed_pages);
                PhysFrame::range(frame, frame + 512).for_each(|frame| self.memory.poison(frame));
            }
        }
    }

    fn allocated(&self, frame: PhysFrame, role: FrameRole) {
        let address = frame.start_address().as_u64();
        self.event(self.here(), Happened::Allocated, [address, u64::from(role == FrameRole::Table)]);
        match role {
            FrameRole::Page => self.memory.zero_used_words(frame),
            FrameRole::Block => {
                PhysFrame::range(frame, frame + 512).for_each(|frame| self.memory.zero_used_words(frame));
            }
            // The kernel zeroes it.
            FrameRole::Table => {}
        }
    }

    fn answers_are_in(&self, sent: u32) {
        let cpu = self.here();
        count(&cpu.counts.shootdowns);
        if cpu.turns.load(Ordering::Relaxed) <= TURNS_BEFORE_YIELD {
            count(&cpu.counts.met);
        }
        cpu.turns.store(0, Ordering::Relaxed);
        cpu.status.waits_for.store(0, Ordering::Relaxed);
        self.event(cpu, Happened::Answered, [u64::from(sent), 0]);
    }

    /// The program on `cpu` begins to do something, with `address`.
    pub(crate) fn begins(&self, cpu: &Cpu, doing: Doing, address: u64) {
        cpu.status.doing.store(doing as u64, Ordering::Relaxed);
        count(&cpu.status.progress);
        count(&cpu.counts.calls);
        if doing.is_an_unmapping() {
            count(&cpu.counts.unmappings);
        }
        self.event(cpu, Happened::Begins, [doing as u64, address]);
    }

    /// It is done.
    pub(crate) fn done(&self, cpu: &Cpu, doing: Doing, address: u64) {
        cpu.status.doing.store(Doing::Use as u64, Ordering::Relaxed);
        self.event(cpu, Happened::Done, [doing as u64, address]);
    }
}

/// Takes the interrupts of the CPU that this thread is, if they are on.
#[inline]
fn serve_here() {
    with_here(|interrupted, number| interrupted.serve(number));
}

/// What a CPU does while it spins for a lock.
#[derive(Debug)]
pub(crate) struct Spin;

impl spin::RelaxStrategy for Spin {
    fn relax() {
        with_here(|interrupted, number| interrupted.spin(number));
    }
}

// SAFETY: frames are parts of one allocation that lives as long as the machine. A thread is one CPU
// for good. Interrupts are off while the depth is not 0, polled or by signal;
// `send_flush_interrupt` marks every target, which finds that between two accesses, where it waits,
// when interrupts come on again, or by the signal. INVLPG and loads of CR3 drop what the SDM says,
// unless a fault was planted.
unsafe impl Machine for FreeMachine {
    type Relax = Spin;
    type Bits = [AtomicU64; 1];

    fn nr_cpus(&self) -> u32 {
        u32::try_from(self.cpus.len()).unwrap_or(u32::MAX)
    }

    fn nr_frames(&self) -> u64 {
        self.memory.nr_frames()
    }

    fn nr_reserved_frames(&self) -> u64 {
        // The page of zeroes.
        1
    }

    #[inline]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.memory.pointer(frame)
    }

    fn pointer_to_frame(&self, pointer: *const PageTable) -> PhysFrame {
        self.memory.frame_at(pointer)
    }

    #[inline]
    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(CpuId::new(u32::try_from(this_cpu().unwrap_or(0)).unwrap_or(0)))
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        struct Back<'c>(&'c Cpu);
        impl Drop for Back<'_> {
            fn drop(&mut self) {
                self.0.interrupts_back();
                if self.0.has_interrupt() && !std::thread::panicking() {
                    serve_here();
                }
            }
        }
        let cpu = self.here();
        cpu.interrupts_off();
        let _back = Back(cpu);
        f()
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Self::Bits>) {
        let cpu = self.here();
        let bits = targets.iter().fold(0, |bits, target| bits | 1 << (target.number() % 64));
        self.event(cpu, Happened::Asked, [bits, 0]);
        let as_signals = self.takes_signals();
        for target in targets.iter() {
            let target = &self.cpus[target.index()];
            if self.loses_interrupt(cpu) {
                continue;
            }
            target.interrupt();
            let thread = target.inbox.thread.load(Ordering::Acquire);
            if as_signals && thread != 0 {
                signals::send(thread);
            }
        }
        // What the wait counts starts here.
        cpu.turns.store(0, Ordering::Relaxed);
    }

    fn wait_for_answers(&self, answers: Answers<'_, Self::Bits>) {
        let cpu = self.here();
        if cpu.turns.load(Ordering::Relaxed) % 64 == 63 {
            let missing = answers.missing().fold(0, |bits, target| bits | 1 << (target.number() % 64));
            cpu.status.waits_for.store(missing, Ordering::Relaxed);
        }
        if cpu.has_interrupt() {
            serve_here();
        }
        self.wait(cpu);
    }

    fn answered_early(&self, early: &EarlyAnswer) {
        self.violation(self.here(), ViolationKind::AnsweredEarly, [u64::from(early.cpu.number()), 0, 0]);
    }

    fn cr3(&self) -> Option<PhysFrame> {
        None
    }

    fn invlpg(&self, address: u64) {
        let cpu = self.here();
        if self.leaves_out(cpu) {
            return;
        }
        count(&cpu.counts.invlpgs);
        self.event(cpu, Happened::Invlpg, [address, 0]);
        let page = page_of(address);
        cpu.interrupts_off();
        cpu.tlb().invalidate(page);
        if let Some(page) = page {
            self.speculate(cpu, page);
        }
        cpu.interrupts_back();
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        let cpu = self.here();
        let address = root.start_address().as_u64();
        cpu.interrupts_off();
        let tlb = cpu.load_root(address, pcid.value());
        match cached {
            CachedTranslations::Flush if !self.leaves_out(cpu) => {
                tlb.flush();
                count(&cpu.counts.flushes);
                self.event(cpu, Happened::LoadedAndFlushed, [address, u64::from(pcid.value())]);
            }
            CachedTranslations::Flush | CachedTranslations::Keep => {
                count(&cpu.counts.kept_loads);
                self.event(cpu, Happened::LoadedAndKept, [address, u64::from(pcid.value())]);
            }
        }
        for which in 0..4 {
            if let Some(page) = tlb.recent(which) {
                self.speculate(cpu, page);
            }
        }
        cpu.pause_now_and_then();
        cpu.interrupts_back();
    }

    fn pcid_support(&self) -> PcidSupport {
        PcidSupport::On
    }

    fn cond_resched(&self) {
        serve_here();
    }

    #[inline]
    fn seam(&self, seam: Seam) {
        if matches!(seam, Seam::Free | Seam::Entry | Seam::Cleared) {
            self.here().pause_now_and_then();
        }
    }

    #[inline]
    fn note(&self, note: Note) {
        match note {
            Note::Freed(frame, role) => self.freed(frame, role),
            Note::Allocated(frame, role) => self.allocated(frame, role),
            Note::Tlb { event: TlbEvent::IpisSent(sent), .. } => self.answers_are_in(sent),
            Note::Tlb { event: TlbEvent::Raised { .. }, .. } => self.here().pause_now_and_then(),
            Note::MapLocked { root, .. } => {
                let cpu = self.here();
                cpu.has_the_lock();
                cpu.status.map_lock.store(root.start_address().as_u64(), Ordering::Relaxed);
            }
            Note::MapUnlocked { .. } => self.here().status.map_lock.store(0, Ordering::Relaxed),
            // The programs check what they read; nothing is checked with the rest.
            _ => {}
        }
    }

    #[inline]
    fn about_to_lock(&self, frame: PhysFrame, _lock: &TableLock<Spin>) {
        let cpu = self.here();
        cpu.has_the_lock();
        cpu.status.table.store(frame.start_address().as_u64(), Ordering::Relaxed);
    }
}
