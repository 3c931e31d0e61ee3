//! Waiting for the answers to a request, and answering those of others.
#![expect(unsafe_code, reason = "follows the requests of other CPUs")]

use crate::cpu_state::LoadedMm;
use crate::cpuset::{CpuBits, CpuId, CpuSet};
use crate::flush::flush_tlb_func;
use crate::mailbox::Mailbox;
use crate::mistakes::{check_cr3, is_too_long, name_silent};
use crate::mmu::Cpus;
use crate::request::{FlushKind, FlushRequest};

/// Has `targets` carry out `request`, calls `meanwhile`, and returns when all have answered. Pinned
/// to the initiator.
pub(crate) fn ask<C: Cpus>(
    cpus: &C,
    targets: &CpuSet<C::Bits>,
    request: &FlushRequest<'_, C::Bits>,
    meanwhile: impl FnOnce(),
) {
    // Until all have answered, targets use `request`, on this stack: whatever unwinds, this waits.
    let mut until_answered = UntilAnswered { cpus, here: request.initiator(), asked: Asked::InPart };
    cpus.flush_others(targets, request, meanwhile);
    until_answered.asked = Asked::All;
}

struct UntilAnswered<'a, C: Cpus> {
    cpus: &'a C,
    here: CpuId,
    asked: Asked,
}

/// Whether all targets have been interrupted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// `flush_others` is under way, or has unwound: some may never hear of it.
    InPart,
    /// All.
    All,
}

impl<C: Cpus> Drop for UntilAnswered<'_, C> {
    /// M4. Returns at once where `flush_others` does not use the mailbox.
    fn drop(&mut self) {
        let Self { cpus, here, asked } = *self;
        let mailbox = cpus.cpu_state(here).mailbox();
        // If a call of the kernel unwinds below.
        let _without_its_help = SpinUntilAnswered(mailbox);
        let mut turns: u64 = 0;
        while !mailbox.is_answered() {
            if mailbox.has_mail() {
                // SAFETY: pinned to `here`, interrupts off.
                cpus.without_interrupts(|| unsafe { flush_interrupt(cpus, here) });
            }
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(TURNS_BETWEEN_LOOKS) || asked == Asked::InPart {
                take_back(cpus, here, asked);
            }
            if is_too_long(cpus, turns)
                && let Some(target) = take_back(cpus, here, Asked::InPart)
            {
                name_silent(cpus, here, target, turns);
            }
            cpus.wait_for_answers(mailbox.answers());
        }
    }
}

/// Waits for the answers to a request, and calls nothing of the kernel's.
struct SpinUntilAnswered<'a, B: CpuBits>(&'a Mailbox<B>);

impl<B: CpuBits> Drop for SpinUntilAnswered<'_, B> {
    fn drop(&mut self) {
        // Under loom what unwinds is a story that has failed, and nobody answers any more.
        while !cfg!(mmu_loom) && !self.0.is_answered() {
            core::hint::spin_loop();
        }
    }
}

/// A CPU that waits looks this rarely for targets that went off, because looking reads a line of
/// each.
const TURNS_BETWEEN_LOOKS: u64 = if cfg!(mmu_loom) { 1 } else { 128 };

/// Takes the request of `here` back from targets that will not take it: those that went off after
/// they were asked, which take no mail until they are back; and if asking unwound, whoever may not
/// have been interrupted. A target that has already taken it will answer.
///
/// One from which it was taken back, if there is any.
#[cold]
fn take_back<C: Cpus>(cpus: &C, here: CpuId, asked: Asked) -> Option<CpuId> {
    let mailbox = cpus.cpu_state(here).mailbox();
    let mut from = None;
    for target in mailbox.unanswered().iter() {
        let there = cpus.cpu_state(target);
        if (there.is_offline() || asked == Asked::InPart) && there.mailbox().withdraw(here) {
            mailbox.answer(target);
            from = Some(target);
        }
    }
    from
}

/// Carries out what other CPUs have asked of this one, each request once, and answers.
///
/// A kernel calls this in the handler of its flush interrupt, and wherever it spins with interrupts
/// off. A CPU that neither takes interrupts nor calls this keeps whoever flushes waiting. Where
/// nothing was asked it reads one cache line and returns. Requests of several CPUs for one address
/// space are served by one flush.
///
/// A kernel that overrides [`flush_others`](Cpus::flush_others) does not need it.
///
/// # Context
/// Interrupts are off. Allocates nothing, takes no lock, never sleeps.
///
/// # Safety
/// It runs on `cpu` with interrupts off from before the call until after it, and not in the handler
/// of an NMI or a machine check.
///
/// # Panics
/// In a debug build, if [`pinned`](Cpus::pinned) names another CPU than `cpu`.
///
/// # Source
/// Linux: flush_smp_call_function_queue, kernel/smp.c, and flush_tlb_func, arch/x86/mm/tlb.c.
#[doc(alias = "flush_smp_call_function_queue")]
pub unsafe fn flush_interrupt<C: Cpus>(cpus: &C, cpu: CpuId) {
    if cfg!(debug_assertions) {
        cpus.pinned(|here| {
            assert_eq!(here, cpu, "flush_interrupt was called for {cpu} on {here}: its mail waits for ever");
        });
    }
    let state = cpus.cpu_state(cpu);
    // SAFETY: on this CPU, interrupts off.
    if matches!(unsafe { state.loaded_mm() }, LoadedMm::Switching) {
        // A lock that the kernel takes in `load_cr3`, say. The switch has compared generations
        // already: an answer now would be believed of a CPU that may load what is stale. The
        // interrupt that came with the mail is still pending.
        return;
    }
    state.mailbox().take(|initiator| {
        let theirs = cpus.cpu_state(initiator).mailbox();
        // SAFETY: taken from this CPU's inbox just now, answered below, and not used after that.
        let request = unsafe { theirs.request() };
        if let FlushKind::Range { mm, .. } | FlushKind::Mm { mm, .. } = *request.kind() {
            check_cr3(cpus, cpu, mm);
        }
        // SAFETY: passed on to our caller.
        unsafe { flush_tlb_func(cpus, cpu, request) };
        cpus.between_flush_steps();
        theirs.answer(cpu);
        cpus.answered(initiator);
    });
}
