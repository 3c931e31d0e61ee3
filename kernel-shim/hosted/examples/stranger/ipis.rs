//! Calls to other CPUs of the kernel's own, as a kernel has that overrides `Cpus::flush_others`:
//! a queue for each CPU, and a count of answers for each request.

use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;

use mmu_gather::tlb::{CpuId, CpuSet, FlushKind, FlushRequest, MmContext};
use mmu_hosted::{Bits, GiveWay, HostedMachine, Seam};
use spin::mutex::SpinMutex;

use crate::mistake::Mistake;

pub(crate) struct OwnIpis {
    mistake: Mistake,
    /// By CPU.
    queues: Box<[SpinMutex<Vec<Call>, GiveWay>]>,
    /// What all requests share if that is the mistake.
    shared: Arc<AtomicU32>,
}

/// A request as a message.
struct Call {
    from: CpuId,
    request: FlushRequest<'static, Bits>,
    answers: Arc<AtomicU32>,
}

impl OwnIpis {
    pub(crate) fn new(nr_cpus: u32, mistake: Mistake) -> Self {
        let queues = (0..nr_cpus).map(|_| SpinMutex::new(Vec::new())).collect();
        Self { mistake, queues, shared: Arc::default() }
    }

    /// As `Cpus::flush_others`. Interrupts are on: a CPU that waits here answers in its handler.
    pub(crate) fn flush_others(
        &self,
        machine: &HostedMachine,
        targets: &CpuSet<Bits>,
        request: &FlushRequest<'_, Bits>,
        meanwhile: impl FnOnce(),
    ) {
        let answers = match self.mistake {
            Mistake::OneCountOfAnswers => Arc::clone(&self.shared),
            _ => Arc::default(),
        };
        let enough = answers.load(Ordering::Relaxed) + targets.len();
        for target in targets.iter() {
            // SAFETY: this returns when all have answered; or else the kernel keeps what the request
            // names for ever.
            let request = unsafe { copy(request) };
            let call = Call { from: machine.current(), request, answers: Arc::clone(&answers) };
            machine.without_interrupts(|| self.queues[target.index()].lock().push(call));
        }
        machine.call_cpus(targets);
        if self.mistake != Mistake::MeanwhileForgotten {
            meanwhile();
        }
        while self.mistake != Mistake::ReturnsAtOnce && answers.load(Ordering::Acquire) < enough {
            machine.wait_for_calls();
        }
    }

    /// The handler: carries out what this CPU was called for, by `flush`, and answers.
    pub(crate) fn answer(&self, machine: &HostedMachine, flush: impl Fn(&FlushRequest<'_, Bits>)) {
        let calls = core::mem::take(&mut *self.queues[machine.current().index()].lock());
        for Call { from, request, answers } in calls {
            let acknowledge = || {
                answers.fetch_add(1, Ordering::Release);
                machine.answered(from);
            };
            if self.mistake == Mistake::AcknowledgedFirst {
                acknowledge();
                machine.seam(Seam::Lock);
                flush(&request);
            } else {
                flush(&request);
                acknowledge();
            }
        }
    }
}

/// The request as a message, which outlives it.
///
/// # Safety
/// The copy is dropped before the address space that the request names.
unsafe fn copy(request: &FlushRequest<'_, Bits>) -> FlushRequest<'static, Bits> {
    // SAFETY: passed on to our caller.
    let keep = |mm: &MmContext<Bits>| unsafe { &*ptr::from_ref(mm) };
    let kind = match *request.kind() {
        FlushKind::Range { mm, tlb_gen, span } => FlushKind::Range { mm: keep(mm), tlb_gen, span },
        FlushKind::Mm { mm, tlb_gen } => FlushKind::Mm { mm: keep(mm), tlb_gen },
        FlushKind::AllUpdated => FlushKind::AllUpdated,
    };
    // SAFETY: what it says is what the request says; it goes to handlers of this kernel's own.
    unsafe { FlushRequest::new(kind, request.tables(), request.initiator()) }
}
