//! This machine as the small kernel wants it: one file between the hardware half and the kernel.
//!
//! Most of its methods are one line. The rest is the ledger, which is told of every frame that is
//! given out or freed, and the three faults that the command line can plant.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mmu_gather::tlb::{Answers, CachedTranslations, CpuId, CpuSet, PcidSupport, TlbEvent};
use mmu_kernel_shim::{FrameRole, Machine, Note};
use x86_64::instructions::interrupts;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::{PageTable, PhysFrame};
use x86_64::{PhysAddr, VirtAddr};

use crate::arch::mmu::{self, Cached};
use crate::arch::paging::share_kernel_half;
use crate::arch::phys_map::{ADDRESS_BITS, PHYS_OFFSET, phys_to_ptr};
use crate::arch::{clock, frames};
use crate::checks::ledger::{Ledger, frame_words};
use crate::checks::violation;
use crate::cpu::index::{CpuIndex, MAX_CPUS};
use crate::cpu::ipi::{self, TakeMail};
use crate::cpu::percpu::{online, this_index};
use crate::cpu::watchdog;

/// Frames that the allocator below the kernel keeps.
const KEPT_FRAMES: u64 = 64;

/// The machine below the kernel.
#[derive(Debug)]
pub(crate) struct BareMachine {
    first_frame: u64,
    nr_frames: u64,
    fault: PlantedFault,
    pub(crate) ledger: Ledger,
    cpus: [CpuState; MAX_CPUS],
    nr_freed: AtomicU64,
}

/// What the machine does wrong on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PlantedFault {
    /// Nothing.
    Absent,
    /// A CPU that unmapped something does not flush itself, and reports that it has.
    SkipLocalFlush,
    /// A CPU that is interrupted to flush leaves out the instructions that flush, and answers.
    SkipRemoteFlush,
    /// A CPU that frees pages pauses now and then, as if its hypervisor ran something else. The
    /// pause is harmless; it makes a page that is freed too early visible. Without it, an emulator
    /// with fewer cores than CPUs would often run no other CPU between the free and the flush.
    Linger,
}

/// One freed page in this many is followed by a pause,
const LINGER_EVERY: u64 = 64;
/// which is longer than a time slice of the host.
const LINGER_US: u64 = 5_000;

/// What the machine keeps of one CPU; on a cache line of its own.
#[derive(Debug)]
#[repr(align(64))]
struct CpuState {
    /// The root it has loaded.
    root: AtomicU64,
    /// It is flushing because another CPU asked for it.
    is_told: AtomicBool,
    /// How often it told others to flush, and how many cycles it waited for them: in all, and at
    /// the least.
    nr_shootdowns: AtomicU64,
    waited: AtomicU64,
    least_waited: AtomicU64,
}

impl CpuState {
    const fn new() -> Self {
        Self {
            root: AtomicU64::new(0),
            is_told: AtomicBool::new(false),
            nr_shootdowns: AtomicU64::new(0),
            waited: AtomicU64::new(0),
            least_waited: AtomicU64::new(u64::MAX),
        }
    }

    fn count_shootdown(&self, cycles: u64) {
        self.nr_shootdowns.fetch_add(1, Ordering::Relaxed);
        self.waited.fetch_add(cycles, Ordering::Relaxed);
        self.least_waited.fetch_min(cycles, Ordering::Relaxed);
    }
}

/// How often CPUs told others to flush, and how long they waited.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shootdowns {
    pub(crate) count: u64,
    pub(crate) cycles: u64,
    /// `None` if there was none.
    pub(crate) least_cycles: Option<u64>,
}

impl BareMachine {
    /// The machine with all memory that is left. The frame below the first one that the kernel may
    /// give out is its page of zeroes.
    ///
    /// `None` if no memory is left.
    pub(crate) fn new(fault: PlantedFault) -> Option<Self> {
        let range = frames::hand_over(KEPT_FRAMES)?;
        let number = |frame: PhysFrame| frame.start_address().as_u64() >> 12;
        for word in frame_words(range.start) {
            word.store(0, Ordering::Relaxed);
        }
        Some(Self {
            first_frame: number(range.start) + 1,
            nr_frames: number(range.end),
            fault,
            ledger: Ledger::new(number(range.end)),
            cpus: [const { CpuState::new() }; MAX_CPUS],
            nr_freed: AtomicU64::new(0),
        })
    }

    /// The shootdowns of all CPUs so far.
    pub(crate) fn shootdowns(&self) -> Shootdowns {
        let sum = |of: fn(&CpuState) -> &AtomicU64| {
            self.cpus.iter().map(|cpu| of(cpu).load(Ordering::Relaxed)).sum()
        };
        let least = self.cpus.iter().map(|cpu| cpu.least_waited.load(Ordering::Relaxed)).min();
        Shootdowns {
            count: sum(|cpu| &cpu.nr_shootdowns),
            cycles: sum(|cpu| &cpu.waited),
            least_cycles: least.filter(|least| *least != u64::MAX),
        }
    }

    /// The planted fault.
    pub(crate) const fn fault(&self) -> PlantedFault {
        self.fault
    }

    /// Frames that the kernel may give out.
    pub(crate) const fn usable_frames(&self) -> core::ops::Range<u64> {
        self.first_frame..self.nr_frames
    }

    /// The frame that the tables below `root` map at `address` now, if that is a small page.
    pub(crate) fn frame_at(&self, root: PhysFrame, address: u64) -> Option<PhysFrame> {
        let address = VirtAddr::new_truncate(address);
        let mut frame = root;
        for index in [address.p4_index(), address.p3_index(), address.p2_index(), address.p1_index()] {
            let entry = frame_words(frame)[usize::from(index)].load(Ordering::Relaxed);
            let next = PhysFrame::containing_address(PhysAddr::new(entry & ADDRESS_BITS));
            // The tables may change meanwhile, so an entry can hold anything: only addresses of RAM
            // are followed.
            if entry & 1 == 0 || next.start_address().as_u64() >> 12 >= self.nr_frames {
                return None;
            }
            frame = next;
        }
        Some(frame)
    }

    fn this_cpu_state(&self) -> &CpuState {
        &self.cpus[this_index().get()]
    }

    /// Takes this CPU's mail: runs `flush`, which carries out what other CPUs have asked for.
    pub(crate) fn told(&self, flush: impl FnOnce()) {
        let is_told = &self.this_cpu_state().is_told;
        is_told.store(true, Ordering::Relaxed);
        flush();
        is_told.store(false, Ordering::Relaxed);
    }

    /// Whether an instruction that flushes this CPU is to be left out.
    fn skips_flush(&self) -> bool {
        match self.fault {
            PlantedFault::SkipLocalFlush => !self.is_told(),
            PlantedFault::SkipRemoteFlush => self.is_told(),
            PlantedFault::Absent | PlantedFault::Linger => false,
        }
    }

    fn is_told(&self) -> bool {
        self.this_cpu_state().is_told.load(Ordering::Relaxed)
    }

    fn check_freed(&self, frame: PhysFrame, role: FrameRole) {
        if role == FrameRole::Table {
            // Checked first: a CPU whose root is overwritten with poison crashes, and then nothing
            // can be printed.
            let loaded = |cpu: &CpuIndex| {
                self.cpus[cpu.get()].root.load(Ordering::Relaxed) == frame.start_address().as_u64()
            };
            if let Some(cpu) = online().iter().find(loaded) {
                violation::root_in_use(cpu, frame);
            }
        }
        if let Err((frame, wrong)) = self.ledger.freed(frame, role) {
            violation::bad_frame(&self.ledger, frame, wrong);
        }
        if self.fault == PlantedFault::Linger
            && self.nr_freed.fetch_add(1, Ordering::Relaxed).is_multiple_of(LINGER_EVERY)
        {
            clock::wait_us(LINGER_US);
        }
    }
}

// SAFETY: all RAM is mapped at `PHYS_OFFSET` for ever (B3). Code is never moved to another CPU
// here. The flush interrupt reaches every CPU that is online, and its handler is the kernel's
// (`workloads::program::boot`). INVLPG and MOV CR3 are the instructions, unless a fault was asked
// for, whose point is to break this contract.
unsafe impl Machine for BareMachine {
    type Relax = TakeMail;
    type Bits = [AtomicU64; 1];

    fn nr_cpus(&self) -> u32 {
        online().count()
    }

    fn nr_frames(&self) -> u64 {
        self.nr_frames
    }

    fn nr_reserved_frames(&self) -> u64 {
        self.first_frame
    }

    #[inline]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        phys_to_ptr(frame.start_address())
    }

    fn pointer_to_frame(&self, pointer: *const PageTable) -> PhysFrame {
        PhysFrame::containing_address(PhysAddr::new(VirtAddr::from_ptr(pointer) - PHYS_OFFSET))
    }

    #[inline]
    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(this_index().id())
    }

    #[inline]
    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        interrupts::without_interrupts(f)
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Self::Bits>) {
        ipi::send_flush_interrupt(targets.iter().collect());
    }

    fn wait_for_answers(&self, answers: Answers<'_, Self::Bits>) {
        ipi::wait_for_answers(|| answers.missing().collect());
    }

    fn answered(&self, initiator: CpuId) {
        ipi::answered(CpuIndex::new(initiator.number()));
    }

    #[inline]
    fn invlpg(&self, address: u64) {
        if !self.skips_flush() {
            mmu::invalidate_page(VirtAddr::new_truncate(address));
        }
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        // Loading the same root again is a flush, which may be left out. Another root is a switch,
        // which may not, unless another CPU has asked for it.
        let (loaded, root_address) = (&self.this_cpu_state().root, root.start_address().as_u64());
        let is_switch = loaded.load(Ordering::Relaxed) != root_address;
        if self.skips_flush() && (self.is_told() || !is_switch) {
            return;
        }
        loaded.store(root_address, Ordering::Relaxed);
        let cached = match cached {
            CachedTranslations::Flush => Cached::Flush,
            CachedTranslations::Keep => Cached::Keep,
        };
        // SAFETY: passed on to our caller; every root got the kernel half from `prepare_root`.
        unsafe { mmu::load_root(root, pcid, cached) };
    }

    fn prepare_root(&self, root: PhysFrame) {
        // SAFETY: the kernel has just allocated the root, and loads it afterwards.
        unsafe { share_kernel_half(root) };
    }

    fn pcid_support(&self) -> PcidSupport {
        if mmu::features().pcid { PcidSupport::On } else { PcidSupport::Off }
    }

    fn cond_resched(&self) {
        watchdog::progress();
    }

    fn note(&self, note: Note) {
        watchdog::progress();
        match note {
            Note::Allocated(frame, role) => {
                if let Err((frame, wrong)) = self.ledger.given_out(frame, role) {
                    violation::bad_frame(&self.ledger, frame, wrong);
                }
            }
            Note::Freed(frame, role) => self.check_freed(frame, role),
            // The programs of the image check what they read, not who may write to a page of a
            // file.
            Note::MappedByNobody(..) => {}
            Note::Unmapped { root, range, .. } => self.ledger.unmapped(root, range),
            Note::Asked(_) => ipi::begin_wait(),
            Note::Tlb { event: TlbEvent::IpisSent(_), .. } => {
                self.this_cpu_state().count_shootdown(ipi::end_wait())
            }
            // These serve to explain a failure; nothing is checked with them.
            Note::Mapped { .. }
            | Note::OwnedAlone { .. }
            | Note::Runs(_)
            | Note::Cleared { .. }
            | Note::Discarded { .. }
            | Note::Protected { .. }
            | Note::Restricted { .. }
            | Note::Split { .. }
            | Note::Contents(_)
            | Note::Tlb { .. }
            | Note::Gather(_)
            | Note::MapLocked { .. }
            | Note::MapUnlocked { .. }
            | Note::BatchTaken
            | Note::BatchRefused
            | Note::RmapDelayed
            | Note::Areas(_) => {}
        }
    }
}
