//! Waiting for the answers to a request, and answering those of others.
#![expect(unsafe_code, reason = "follows the requests of other CPUs")]

use crate::cpuset::{CpuId, CpuSet};
use crate::flush::flush_tlb_func;
use crate::mmu::Cpus;
use crate::request::FlushRequest;

/// Has `targets` carry out `request`, calls `meanwhile`, and returns when all have answered. Pinned
/// to the initiator.
pub(crate) fn ask<C: Cpus>(
    cpus: &C,
    targets: &CpuSet<C::Bits>,
    request: &FlushRequest<'_, C::Bits>,
    meanwhile: impl FnOnce(),
) {
    // Waits even if a call of the embedder unwinds: until then targets use `request`, on this
    // stack.
    let _until_answered = UntilAnswered { cpus, here: request.initiator() };
    cpus.flush_others(targets, request, meanwhile);
}

struct UntilAnswered<'a, C: Cpus> {
    cpus: &'a C,
    here: CpuId,
}

impl<C: Cpus> Drop for UntilAnswered<'_, C> {
    /// M4. Returns at once where `flush_others` does not use the mailbox.
    fn drop(&mut self) {
        let Self { cpus, here } = *self;
        let mailbox = cpus.cpu_state(here).mailbox();
        let mut turns: u32 = 0;
        while !mailbox.is_answered() {
            // SAFETY: pinned to `here`, interrupts off.
            cpus.without_interrupts(|| unsafe { flush_interrupt(cpus, here) });
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(TURNS_BETWEEN_LOOKS) {
                take_back_from_cpus_that_are_off(cpus, here);
            }
            cpus.wait_for_answers(mailbox.answers());
        }
    }
}

/// So seldom does a CPU that waits look whether a target has gone off: it reads a line of each.
const TURNS_BETWEEN_LOOKS: u32 = if cfg!(mmu_loom) { 1 } else { 128 };

/// Takes the request of `here` back from targets that went off after they were asked: they take no
/// mail before they are back. What one of them has taken it answers.
#[cold]
fn take_back_from_cpus_that_are_off<C: Cpus>(cpus: &C, here: CpuId) {
    let mailbox = cpus.cpu_state(here).mailbox();
    for target in mailbox.unanswered().iter() {
        let there = cpus.cpu_state(target);
        if there.is_offline() && there.mailbox().withdraw(here) {
            mailbox.answer(target);
        }
    }
}

/// Carries out what other CPUs have asked of this one, each request once, and answers.
///
/// A kernel calls this in the handler of its flush interrupt, and wherever it spins with interrupts
/// off: a CPU that neither takes interrupts nor calls this keeps whoever flushes waiting. Where
/// nothing was asked it reads one cache line and returns. Requests of several CPUs for one address
/// space are served by one flush.
///
/// A kernel that overrides [`flush_others`](Cpus::flush_others) does not need it.
///
/// # Context
/// Interrupts are off. Allocates nothing, takes no lock, never sleeps.
///
/// # Safety
/// It runs on `cpu` with interrupts off from before the call until after it.
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
    cpus.cpu_state(cpu).mailbox().take(|initiator| {
        let theirs = cpus.cpu_state(initiator).mailbox();
        // SAFETY: taken from this CPU's inbox just now, answered below, and not used after that.
        let request = unsafe { theirs.request() };
        // SAFETY: passed on to our caller.
        unsafe { flush_tlb_func(cpus, cpu, request) };
        theirs.answer(cpu);
        cpus.answered(initiator);
    });
}
