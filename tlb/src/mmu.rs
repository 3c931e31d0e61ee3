//! What a kernel supplies about its CPUs: which CPU runs, how to interrupt others, and the few
//! privileged instructions.
#![expect(unsafe_code, reason = "the one place of this crate with privileged instructions")]

use core::arch::asm;
use core::fmt;

use x86_64::PrivilegeLevel;
use x86_64::instructions::tlb::Pcid;
use x86_64::registers::control::{Cr3, Cr4, Cr4Flags};
use x86_64::registers::segmentation::{CS, Segment};
use x86_64::structures::paging::PhysFrame;

use crate::cpu_state::{CpuTlb, PcidSupport};
use crate::cpuset::{CpuBits, CpuId, CpuSet};
use crate::generation::{CtxId, TlbGen};
use crate::mailbox::{Answers, Unread};
use crate::request::{FlushRequest, FreedTables, PageSpan};

/// What a CR3 load does to the translations already cached under the PCID it loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CachedTranslations {
    /// Drops them (bit 63 clear).
    Flush,
    /// Keeps them (bit 63 set; needs PCIDs).
    Keep,
}

/// How many CPUs may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnlineCpus {
    /// Only this one. No other comes online while a gather is open.
    One,
    /// More than one, or not known.
    Many,
}

/// Something worth counting. Linux: the tlb:tlb_flush tracepoint and the nr_tlb_* counters of
/// /proc/vmstat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TlbEvent {
    /// A flush of one address space was asked for; `pages` is `None` for a full one.
    Requested {
        /// How many pages, in units of the request's stride.
        pages: Option<u64>,
        /// Whether page tables were freed.
        tables: FreedTables,
    },
    /// The generation was raised for a flush of one address space; which CPUs must be told was not
    /// looked up yet.
    Raised {
        /// The context.
        ctx_id: CtxId,
        /// Its new generation.
        tlb_gen: TlbGen,
        /// What was changed, if the caller knew. If these are more pages than the ceiling, the
        /// flush is a full one all the same.
        span: Option<PageSpan>,
    },
    /// Requests went to this many other CPUs, and all have answered.
    IpisSent(u32),
    /// CPUs in the cpumask that were not interrupted, by the reason.
    IpisSaved {
        /// They are lazy, and will look at the generation when they wake.
        lazy: u32,
        /// They have another address space loaded and will look at the generation when they come
        /// back; or they are off.
        elsewhere: u32,
    },
    /// This CPU carried out a request by invalidating this many pages one by one.
    FlushedPages(u64),
    /// This CPU carried out a request by dropping all of the context.
    FlushedAll,
    /// As [`FlushedAll`](Self::FlushedAll), though the request named pages: this CPU had missed an
    /// earlier generation, or a later one had followed (rule T3).
    FlushedAllForPages,
    /// This CPU was lazy, had missed flushes of the address space that it goes on with, and has
    /// dropped all of it.
    CaughtUp,
    /// This CPU was asked, and had nothing to do: its generation was high enough, or it runs
    /// something else.
    AlreadyCurrent,
    /// This CPU was lazy when asked, and went to the kernel's own address space instead of
    /// flushing.
    LeftLazyMm,
}

/// More pages than this are not invalidated one by one. Linux's default; about 227 cycles an INVLPG
/// against 2300 for a full flush and the refill after it.
pub const SINGLE_PAGE_FLUSH_CEILING: u64 = 33;

/// The CPUs of the machine: what a kernel supplies to this crate.
///
/// # How requests reach other CPUs
/// Through the mailbox in each [`CpuTlb`]: the kernel supplies
/// [`send_flush_interrupt`](Self::send_flush_interrupt), and calls
/// [`flush_interrupt`](crate::flush_interrupt) in the handler and wherever it spins with interrupts
/// off. A kernel with calls to other CPUs of its own may override
/// [`flush_others`](Self::flush_others) instead. Then it must see to it that a CPU which waits for
/// answers keeps answering, so that two CPUs that flush at once both get on, and that no two
/// requests share a count of answers. A kernel that only ever runs one CPU needs neither.
///
/// # Safety
/// - `cpu_state` returns the same state for the same CPU always, and a different one for each CPU;
/// - `pinned` and `without_interrupts` do what they say, and `pinned` names the CPU it runs on;
/// - `flush_others`, if it is overridden, returns only after every target has run
///   [`flush_tlb_func`](crate::flush_tlb_func) for this request, or is off
///   ([`CpuTlb::is_offline`]). If it calls that of another implementor, it passes on the very
///   request, once, `cpu_state` is that implementor's, too, and its return is not taken for the
///   answers, which the flush waits for;
/// - `online_cpus`, `pcid_support` and `init_root` tell the truth: a CPU that `online_cpus` denies
///   is told nothing;
/// - contexts of this machine are flushed with this machine. There is one; where a process has
///   several of one type (a simulator), whoever holds two keeps their contexts apart;
/// - `invlpg` and `load_cr3` drop what the instructions of the same names must drop (SDM 4.10.4.1);
/// - `between_flush_steps` does not unwind: what a batch has half noted would never be flushed for.
///
/// # Example
/// A machine of one CPU, in an ordinary process:
///
/// ```
#[doc = include_str!("../doc/machine.rs")]
/// ```
pub unsafe trait Cpus {
    /// Storage for a set of CPUs: `[AtomicU64; 1]` holds 64.
    type Bits: CpuBits;

    /// Runs `f` on one CPU without being moved to another, and passes it the number of that CPU.
    /// Interrupts stay as they are; nothing else that flushes runs on the CPU meanwhile (preemption
    /// is off). May be nested; debug builds call it in the handler of the flush interrupt, too.
    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R;

    /// The state of one CPU.
    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Self::Bits>;

    /// The top table of the kernel's own address space, which maps no user address.
    fn init_root(&self) -> PhysFrame;

    /// Interrupts every CPU in `targets`, which then calls
    /// [`flush_interrupt`](crate::flush_interrupt).
    ///
    /// `targets` never names the calling CPU and is not empty. A CPU that has mail already is sent
    /// no second interrupt; one that finds no mail does nothing.
    ///
    /// # Context
    /// Pinned. An interrupt that is lost keeps the caller of the flush waiting for ever. The mail
    /// must be visible before the interrupt arrives: a write to the ICR of an x2APIC does not order
    /// it (Linux: weak_wrmsr_fence).
    ///
    /// # Panics
    /// Unless overridden: a kernel with several CPUs overrides this or
    /// [`flush_others`](Self::flush_others).
    ///
    /// # Source
    /// Linux: native_send_call_func_ipi, arch/x86/kernel/apic/ipi.c.
    #[doc(alias = "native_send_call_func_ipi")]
    fn send_flush_interrupt(&self, targets: &CpuSet<Self::Bits>) {
        panic!("CPUs {targets:?} must flush, and this kernel has no send_flush_interrupt");
    }

    /// Has every CPU in `targets` run [`flush_tlb_func`](crate::flush_tlb_func) with `request`, and
    /// calls `meanwhile` on this CPU while they do.
    ///
    /// Puts the request into the mailboxes of `targets` and interrupts those that have no other
    /// mail; the flush that called it waits for the answers. Overridden, it waits itself. `targets`
    /// never names the calling CPU and is not empty.
    ///
    /// # Context
    /// Pinned. `request` lives on the caller's stack: no target uses it after it has answered.
    /// Interrupts are on or off; a kernel that overrides this may ask that they be on.
    ///
    /// # Source
    /// Linux: smp_call_function_many_cond, kernel/smp.c.
    #[doc(alias = "smp_call_function_many_cond")]
    fn flush_others(
        &self,
        targets: &CpuSet<Self::Bits>,
        request: &FlushRequest<'_, Self::Bits>,
        meanwhile: impl FnOnce(),
    ) {
        let here = request.initiator();
        // SAFETY: called by the flush that made the request (the contract of this trait), which
        // keeps it until this mailbox, found by the same `cpu_state`, says that all have answered.
        unsafe { self.cpu_state(here).mailbox().begin(targets, request) };
        let mut to_interrupt = CpuSet::empty();
        for target in targets.iter() {
            if self.cpu_state(target).mailbox().post(here) == Unread::First {
                to_interrupt.insert(target);
            }
        }
        if !to_interrupt.is_empty() {
            self.send_flush_interrupt(&to_interrupt);
        }
        meanwhile();
    }

    /// Called again and again while this CPU waits for the answers to its request, whose handlers
    /// run on other CPUs; between two calls it answers theirs.
    ///
    /// Where CPUs share a thread, as on a simulated machine in a test, this must let the others
    /// run: the default does not, and the wait has no end.
    ///
    /// It returns before all answers are there: waiting for them here would keep this CPU from
    /// answering. Unless overridden, a spin-loop hint (PAUSE). A kernel may sleep here, on a
    /// machine that has fewer cores than CPUs, until [`answered`](Self::answered) or a flush
    /// interrupt wakes it; for a short time, if CPUs may go off meanwhile, because whether one has
    /// gone is looked for every 128 calls only.
    ///
    /// # Context
    /// Pinned; interrupts as the caller of the flush has them.
    fn wait_for_answers(&self, _answers: Answers<'_, Self::Bits>) {
        core::hint::spin_loop();
    }

    /// This CPU has answered a request of `initiator`, which may be waiting for no other.
    ///
    /// # Context
    /// Interrupts are off; in the handler of the flush interrupt.
    fn answered(&self, _initiator: CpuId) {}

    /// Runs `f` with interrupts off on this CPU.
    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        x86_64::instructions::interrupts::without_interrupts(f)
    }

    /// Whether other CPUs may run at all.
    fn online_cpus(&self) -> OnlineCpus {
        OnlineCpus::Many
    }

    /// Whether PCIDs are on. The answer never changes.
    fn pcid_support(&self) -> PcidSupport {
        PcidSupport::Off
    }

    /// A flush of more pages than this drops the whole context instead. Zero is legal.
    ///
    /// Linux: tlb_single_page_flush_ceiling.
    #[doc(alias = "tlb_single_page_flush_ceiling")]
    fn single_page_flush_ceiling(&self) -> u64 {
        SINGLE_PAGE_FLUSH_CEILING
    }

    /// Drops this CPU's translation of the page at `address` under the current PCID, whatever the
    /// page's size, and the paging-structure entries that lead to it.
    fn invlpg(&self, address: u64) {
        // The x86_64 crate's `flush` will not do: its `VirtAddr` has 48 bits, and with five levels
        // of tables a user address has 56.
        // SAFETY: invalidating a translation is always legal; an address that is not canonical is a
        // no-op.
        unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) };
    }

    /// Makes `root` this CPU's top table under `pcid`.
    ///
    /// # Safety
    /// - `root` maps the code and data of the kernel as the present root does, and stays a table
    ///   while it is loaded.
    /// - `Keep` only with PCIDs on, and only if nothing stale is cached under `pcid`.
    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        debug_assert!(
            self.pcid_support() == PcidSupport::Off || Cr4::read().contains(Cr4Flags::PCID),
            "T6: pcid_support says On, and CR4.PCIDE is clear on this CPU: nothing keeps address spaces apart"
        );
        match cached {
            CachedTranslations::Flush => {
                // SAFETY: the caller answers for `root`; without PCIDs the number is 0 and the bits
                // are ignored flags.
                unsafe { Cr3::write_pcid(root, pcid) }
            }
            CachedTranslations::Keep => {
                // SAFETY: the caller answers for `root`, for CR4.PCIDE and for what is cached under
                // `pcid`.
                unsafe { Cr3::write_pcid_no_flush(root, pcid) }
            }
        }
    }

    /// Tells secondary TLBs (an IOMMU, a hypervisor's shadow tables) to forget `span` of the
    /// context, and waits.
    ///
    /// `None` is all of the context. Whatever leads to an address of the span goes, entries that
    /// link tables too. Called after the entries are changed and before the receipt of the flush is
    /// made. A device that is never told goes on using freed pages.
    ///
    /// # Context
    /// As for the flush that calls it, which may be under a table lock
    /// ([`UnmapBatch::add_mm`](crate::UnmapBatch::add_mm), the flush of dirty pages): it neither
    /// sleeps nor takes a table lock. Several CPUs may call it at once.
    ///
    /// A reclaim batch knows contexts by name. A context may have ended by the time of the call, so
    /// a name that is not known is no error.
    ///
    /// Linux: mmu_notifier_arch_invalidate_secondary_tlbs.
    fn invalidate_secondary(&self, _ctx_id: CtxId, _span: Option<PageSpan>) {}

    /// A flush was answered for a CPU that has not made it: rule T2 is broken, and that CPU may
    /// still use what is freed next. Debug builds of this crate look for this after every
    /// shootdown; release builds do not.
    ///
    /// # Panics
    /// Unless overridden, with all that is known.
    fn answered_early(&self, early: &EarlyAnswer) {
        panic!("{early}");
    }

    /// The top table in this CPU's CR3; `None` if that is not known. Debug builds compare it with
    /// what [`switch_mm`](crate::switch_mm) has loaded; release builds do not ask.
    ///
    /// Unless overridden it reads CR3, in ring 0, and does not know elsewhere. A kernel whose
    /// [`load_cr3`](Self::load_cr3) loads something else than `root` (the C-bit of memory
    /// encryption with it, or a copy for each CPU) overrides it, and answers the `root` that it was
    /// given. A kernel that loads another root for a while by means of its own (to call firmware,
    /// say) does that with interrupts off, and does not flush meanwhile.
    fn cr3(&self) -> Option<PhysFrame> {
        (CS::get_reg().rpl() == PrivilegeLevel::Ring0).then(|| Cr3::read().0)
    }

    /// After so many calls of [`wait_for_answers`](Self::wait_for_answers) for one request, debug
    /// builds panic and say which CPU does not answer; `None`: never. A release build waits for
    /// ever.
    ///
    /// Unless overridden 2^31: ten seconds to two minutes of PAUSE, which takes 10 to 140 cycles. A
    /// kernel that sleeps while it waits says fewer.
    fn most_turns(&self) -> Option<u64> {
        Some(1 << 31)
    }

    /// Called between two steps of a flush, of a batch or of a switch, where another CPU may see
    /// the first without the second. A kernel does nothing here; whoever tests one lets other CPUs
    /// run. It must not unwind.
    ///
    /// # Context
    /// A table lock may be held; interrupts as the caller has them: off in a switch, and where a
    /// CPU carries out what was asked of it. It takes no interrupt then, and no mail.
    #[inline(always)]
    fn between_flush_steps(&self) {}

    /// Counts an event. Not called per page.
    ///
    /// It is also called for requests that find nothing to do, so count on lines of this CPU's own.
    /// A counter that all CPUs share would be written by every flush.
    fn observe(&self, _event: TlbEvent) {}
}

/// A CPU that was to flush and has not, though it was answered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EarlyAnswer {
    /// That CPU.
    pub cpu: CpuId,
    /// The CPU that asked and waited. It is `cpu` itself if `meanwhile` was not called.
    pub initiator: CpuId,
    /// What `cpu` has loaded.
    pub ctx_id: CtxId,
    /// The generation of it that `cpu` has reached.
    pub reached: TlbGen,
    /// The generation that was asked for.
    pub asked: TlbGen,
}

impl fmt::Display for EarlyAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (reached, asked) = (self.reached.get(), self.asked.get());
        write!(
            f,
            "T2: {} runs context {} and is at generation {reached} of it, though a flush up to {asked} was answered for. ",
            self.cpu,
            self.ctx_id.get(),
        )?;
        if self.cpu == self.initiator {
            f.write_str(
                "flush_others has not called `meanwhile`, which flushes this CPU; or two CPUs share one CpuTlb",
            )
        } else {
            f.write_str(
                "Either flush_others returned, or the target acknowledged, before flush_tlb_func had run there: each \
                 request has a count of answers of its own, a target answers when it has flushed, and flush_others \
                 returns when all have answered (unless overridden it does all of that); or the handler named another \
                 CPU; or two CPUs share one CpuTlb",
            )
        }
    }
}
