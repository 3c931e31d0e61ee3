//! The machine as a kernel's hardware: what its implementations of the engine's traits call, and
//! what they tell.
//!
//! | what the engine asks of the kernel | what the kernel calls here |
//! |---|---|
//! | `frame_to_pointer` | the same name |
//! | `allocate_table`, `free_tables` | `allocated`, `freed` |
//! | `table_lock`, if other CPUs are to run there | `about_to_lock` |
//! | `pinned`, `without_interrupts`, `invlpg`, `load_cr3`, `cr3` | the same names |
//! | `send_flush_interrupt`, `wait_for_answers`, `answered` | the same names |
//! | `online_cpus`, `pcid_support`, `invalidate_secondary` | the same names |
//! | `between_look_and_change` | `seam` with [`Seam::Entry`] |
//! | `between_gather_steps`, `between_flush_steps` | `seam` with [`Seam::Step`] |
//! | the drop of a guard of `Lock`, once the lock is free | [`unlocked`](crate::unlocked) |
//! | `unmap_page` | `note` with [`Note::Cleared`], then `seam` |
//! | `flush_others`, overridden | `call_cpus`, `wait_for_calls`; `answered` in the handler |
//! | `allocate_batch` | `allocated`, then `lent` |
//! | `free_pages`, and whatever takes a page | `freed`, `allocated` |
//! | `cond_resched` | the same name |
//! | `observe`, `observe_gather` | `note` with [`Note::Tlb`], [`Note::Gather`] |
#![expect(unsafe_code, reason = "the place of a lock is taken on trust")]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use mmu_gather::pagetable::{PagingMode, TableLock};
use mmu_gather::tlb::{
    Answers, CachedTranslations, CpuBits, CpuId, CpuSet, CtxId, EarlyAnswer, OnlineCpus, PageSpan,
    PcidSupport,
};
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::awaited::Awaits;
use crate::boundary::Boundary;
use crate::checker::checked::Caches;
use crate::checker::events::{Kept, What};
use crate::machine::{HostedMachine, VirtualCpu};
use crate::mmu::arch::LinearAddress;
use crate::mmu::invalidate::Cr3Load;
use crate::mutex::lock;
use crate::options::{MachineFault, Options};
use crate::schedule::{self, GiveWay};
use crate::vocabulary::{FrameRole, Moment, Note, Seam};

/// Storage for a set of CPUs of this machine: `Cpus::Bits` of a kernel on it. One that says so
/// (`Kernel::MOST_CPUS`) may have room for fewer.
pub type Bits = [AtomicU64; Options::MOST_CPUS as usize / 64];

impl HostedMachine {
    /// How many CPUs there are.
    #[must_use]
    pub fn nr_cpus(&self) -> u32 {
        self.options.nr_cpus.clamp(1, Options::MOST_CPUS)
    }

    /// Frames of physical memory, numbered from 0.
    #[must_use]
    pub const fn nr_frames(&self) -> u64 {
        self.memory.nr_frames()
    }

    /// Frames at the bottom that a kernel may not give out: frame 0, and one that may be a page of
    /// zeroes.
    #[must_use]
    pub const fn nr_reserved_frames(&self) -> u64 {
        Options::RESERVED_FRAMES
    }

    /// The bytes of a frame.
    ///
    /// # Panics
    /// If there is no such frame.
    #[must_use]
    #[inline]
    pub fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.memory.pointer(frame)
    }

    /// The frame whose bytes start at `pointer`, which [`frame_to_pointer`](Self::frame_to_pointer)
    /// returned.
    #[must_use]
    pub fn pointer_to_frame(&self, pointer: *const PageTable) -> PhysFrame {
        self.memory.frame_at(pointer)
    }

    /// The frame is in use from now on, for this: to be told by whoever takes it from the kernel's
    /// allocator. Other CPUs may run.
    pub fn allocated(&self, frame: PhysFrame, role: FrameRole) {
        self.note(Note::Allocated(frame, role));
        self.seam(Seam::Allocate);
    }

    /// The frame is free from now on: to be told before the kernel's allocator can give it out
    /// again. Other CPUs may run before it is.
    pub fn freed(&self, frame: PhysFrame, role: FrameRole) {
        self.seam(Seam::Free);
        self.note(Note::Freed(frame, role));
    }

    /// The page is lent to a gather, until its frame is [freed](Self::freed): to be told in
    /// `allocate_batch` by a kernel that lends frames which it has taken as pages.
    ///
    /// # Panics
    /// If these 4096 bytes are not one such frame. The gather would write into what belongs to
    /// somebody else.
    pub fn lent(&self, page: NonNull<[u8; 4096]>) {
        let frame = self.pointer_to_frame(page.as_ptr().cast());
        let late = page.addr().get() % 4096;
        assert!(
            late == 0,
            "the batch page begins {late:#x} bytes into frame {:#x}, and its last {late:#x} bytes are those of the \
             next frame, which somebody else uses: `allocate_batch` lends all of a frame (`BatchPage::new`: 4096 \
             bytes used by nobody else)",
            frame.start_address()
        );
        if let Some(checked) = &self.checked {
            assert!(
                checked.ledger.lend(frame),
                "the batch page is frame {:#x}, which was not taken from the allocator as a page (`allocated`): \
                 somebody else may use it (`BatchPage::new`: 4096 bytes used by nobody else)",
                frame.start_address()
            );
        }
    }

    /// Runs `f` on the CPU it is called on: what is in it does not go on on another one.
    pub fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        let cpu = self.cpu();
        cpu.pinned.fetch_add(1, Ordering::Relaxed);
        let result = f(cpu.id);
        cpu.pinned.fetch_sub(1, Ordering::Relaxed);
        result
    }

    /// Runs `f` with interrupts off on this CPU.
    pub fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        let cpu = self.cpu();
        cpu.interrupts_off.fetch_add(1, Ordering::Relaxed);
        let result = schedule::without_unwinding(f);
        cpu.interrupts_off.fetch_sub(1, Ordering::Relaxed);
        self.take_interrupt();
        result
    }

    /// Interrupts every CPU in `targets`, which runs the kernel's handler when its interrupts are
    /// on.
    pub fn send_flush_interrupt<B: CpuBits>(&self, targets: &CpuSet<B>) {
        self.has_sent();
        for target in targets.iter() {
            let cpu = &self.cpus[target.index()];
            if self.is_off(target) {
                continue;
            }
            if cpu.interrupts_off.load(Ordering::Relaxed) > 0 {
                self.note_reached(Boundary::HeldOff);
            }
            self.judge_interrupt(target);
            cpu.was_sent.store(true, Ordering::Relaxed);
            cpu.is_interrupted.store(true, Ordering::Release);
            // A kernel that says whom it asks has said so.
            if !self.cpu().waits.load(Ordering::Relaxed) {
                self.log(What::Sent(target));
            }
        }
    }

    /// Lets other CPUs run while this one waits for them.
    pub fn wait_for_answers<B: CpuBits>(&self, answers: Answers<'_, B>) {
        self.begins_to_wait();
        // A CPU that has nothing else to do takes the interrupt at once.
        for target in answers.missing() {
            if !self.cpus[target.index()].has_turns.load(Ordering::Relaxed) {
                self.on_cpu(target, || self.take_interrupt());
            }
        }
        if answers.missing().any(|target| target.number() >= 64) {
            self.note_reached(Boundary::ManyCpus);
        }
        if self.cpu().awaits.set(answers.missing()) == Awaits::Somebody {
            schedule::wait();
        }
    }

    /// As [`send_flush_interrupt`](Self::send_flush_interrupt), for a kernel with calls to other
    /// CPUs of its own ([`Cpus::flush_others`](mmu_gather::tlb::Cpus::flush_others) overridden):
    /// this CPU then waits by [`wait_for_calls`](Self::wait_for_calls).
    ///
    /// The handler is the same, [`Kernel::flush_interrupt`](crate::Kernel::flush_interrupt), and
    /// does what the kernel likes: carries out what it was called for, then tells
    /// [`answered`](Self::answered).
    pub fn call_cpus<B: CpuBits>(&self, targets: &CpuSet<B>) {
        let _ = self.cpu().awaits.set(targets.iter());
        self.send_flush_interrupt(targets);
    }

    /// Lets other CPUs run while this one waits for those that it has called. It may come back
    /// before they have answered; interrupts are taken meanwhile if they are on.
    pub fn wait_for_calls(&self) {
        self.begins_to_wait();
        let here = self.cpu();
        for cpu in self.cpus.iter().filter(|cpu| here.awaits.contains(cpu.id)) {
            // One that has nothing else to do takes the interrupt at once.
            if !cpu.has_turns.load(Ordering::Relaxed) {
                self.on_cpu(cpu.id, || self.take_interrupt());
            }
        }
        schedule::wait();
    }

    /// This CPU has answered a request of `initiator`.
    pub fn answered(&self, initiator: CpuId) {
        if self.cpu().waits.load(Ordering::Relaxed) {
            self.note_reached(Boundary::Crossing);
        }
        self.cpu().was_sent.store(false, Ordering::Relaxed);
        self.cpus[initiator.index()].awaits.remove(self.current());
        self.cost_of_answer(initiator);
        let is_lost = self.cpu().flushes_nothing.load(Ordering::Relaxed);
        self.log(if is_lost { What::Lost(initiator) } else { What::Answered(initiator) });
    }

    /// As [`Cpus::answered_early`](mmu_gather::tlb::Cpus::answered_early): with a fault planted,
    /// the checker is to find the violation that follows, so the engine's own assertion must not
    /// come first.
    ///
    /// # Panics
    /// If no fault is planted.
    pub fn answered_early(&self, early: &EarlyAnswer) {
        assert!(self.options.fault != MachineFault::Absent, "{early}");
    }

    /// The frame in CR3 on this CPU, if its MMU is modelled.
    #[must_use]
    pub fn cr3(&self) -> Option<PhysFrame> {
        lock(&self.cpu().caches).as_ref().map(|caches| caches.mmu.cr3().0)
    }

    /// INVLPG on this CPU.
    pub fn invlpg(&self, address: u64) {
        self.seam(Seam::Lock);
        if self.skips_flushes() {
            self.note_fault(1);
            self.log(What::Skipped(Some(address)));
            return;
        }
        self.count_invlpg(address);
        if let Some(Caches { mmu, watch }) = &mut *lock(&self.cpu().caches) {
            mmu.invlpg(LinearAddress::new(address), watch);
        }
        self.log(What::Invlpg(address));
    }

    /// MOV to CR3 on this CPU: `root` is its top table from now on, under `pcid`.
    ///
    /// # Panics
    /// Where the instruction would trap: with PCIDs off, if `pcid` is not 0 or `cached` is `Keep`.
    pub fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        let keep = cached == CachedTranslations::Keep;
        self.cost_of_load_begins();
        // Between the decision what to keep and the load.
        self.cross_between_steps();
        self.judge_cr3(root, pcid.value(), cached);
        let mut is_switch = false;
        if let Some(Caches { mmu, watch }) = &mut *lock(&self.cpu().caches) {
            is_switch = mmu.cr3().0 != root;
            let has_pcids = self.options.pcid == PcidSupport::On;
            let skip = self.skips_flushes() && (has_pcids || !is_switch);
            if skip && !keep {
                self.note_fault(1);
                self.log(What::Skipped(None));
            }
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
            assert!(
                loaded.is_ok(),
                "T6: CR3 is loaded with PCID {}, or so that it keeps what is cached, and this CPU has PCIDs off \
                 (CR4.PCIDE is clear): `pcid_support` says On only where every CPU has them on",
                pcid.value()
            );
        }
        if is_switch
            && let Some(boundary) =
                self.cpu().pcid_owners.loads(root.start_address().as_u64(), pcid.value(), keep)
        {
            self.note_reached(boundary);
            // Another CPU may have asked this one to flush what it has of the other.
            let waits = |cpu: &VirtualCpu| cpu.waits.load(Ordering::Relaxed);
            if boundary == Boundary::SlotTaken && self.cpus.iter().any(waits) {
                self.note_reached(Boundary::SlotTakenMidFlush);
            }
        }
        self.log(What::LoadedCr3(root, pcid.value(), if keep { Kept::Yes } else { Kept::No }));
        self.check_stale();
        // Between the load and its announcement.
        self.cross_between_steps();
    }

    /// Secondary TLBs forget `span` of the context, or all of it.
    pub fn invalidate_secondary(&self, ctx_id: CtxId, span: Option<PageSpan>) {
        self.device_forgets(ctx_id, span);
    }

    /// Whether more than one CPU may run.
    pub fn online_cpus(&self) -> OnlineCpus {
        // A flusher asks after it has raised the generation and before it reads the cpumask.
        self.cross_between_steps();
        if self.nr_cpus() == 1 { OnlineCpus::One } else { OnlineCpus::Many }
    }

    /// How many levels page tables have.
    #[must_use]
    pub const fn paging_mode(&self) -> PagingMode {
        self.options.paging
    }

    /// Whether PCIDs are on.
    pub fn pcid_support(&self) -> PcidSupport {
        self.cost_of_load_begins();
        // A switch asks after it has announced itself and read the generation.
        self.cross_between_steps();
        self.options.pcid
    }

    /// A preemption point.
    pub fn cond_resched(&self) {
        self.begin_work_anew();
        let turns = self.turns();
        self.cross_between_steps();
        if self.turns() != turns {
            self.note_reached(Boundary::Preempted);
        }
    }

    /// Here other CPUs may run, and any CPU may speculate.
    ///
    /// A call on this machine that needs no seam of its own is one already: a lock that is taken, a
    /// frame that is given out or freed, an INVLPG, a CR3 load.
    #[inline]
    pub fn seam(&self, seam: Seam) {
        if self.checked.is_some() {
            self.cross(seam);
        }
    }

    /// Tells the checker.
    #[inline]
    pub fn note(&self, note: Note) {
        if let Some(checked) = &self.checked {
            self.check_note(checked, note);
        }
    }

    /// The lock of the table in `frame` is about to be taken: a [`Seam::Lock`], and the checker
    /// looks what is done under it.
    ///
    /// # Safety
    /// The lock stays where it is as long as code of the kernel runs on this machine: whether it is
    /// taken is looked at later, too.
    pub unsafe fn about_to_lock(&self, frame: PhysFrame, lock: &TableLock<GiveWay>) {
        if self.checked.is_some() {
            self.cross(Seam::Lock);
            self.cost_of_take(frame);
            self.ask_for_lock(frame, lock);
        }
    }

    /// Now, by the checker's clock: what a CPU caches later than this was cached after it.
    pub fn moment(&self) -> Moment {
        self.checked.as_ref().map_or(Moment::START, |checked| checked.ledger.moment())
    }
}
