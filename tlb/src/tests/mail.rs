//! Mail where something goes wrong: a call of the kernel unwinds, or looks at its mail at a bad
//! time.
#![expect(unsafe_code, reason = "plays the CPUs")]

extern crate std;

use core::cell::Cell;
use core::panic::AssertUnwindSafe;
use core::pin::Pin;
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::panic::catch_unwind;
use std::thread;

use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::PhysFrame;

use crate::sync::AtomicU64;
use crate::{
    Answers, CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, CtxIds, FreedTables, MmContext, PageSpan,
    PcidSupport, TlbEvent, flush_interrupt, flush_tlb_mm_range, switch_mm,
};

type Bits = [AtomicU64; 1];

const PAGE: PageSpan = PageSpan { start: 0x1000, end: 0x2000, stride_shift: 12 };
const CPU: [CpuId; 3] = [CpuId::new(0), CpuId::new(1), CpuId::new(2)];

struct Machine {
    spaces: [MmContext<Bits>; 2],
    cpus: [CpuTlb<Bits>; 3],
}

impl Machine {
    fn new() -> Self {
        let (ids, root) = (CtxIds::new(), PhysFrame::containing_address(PhysAddr::zero()));
        Self {
            // SAFETY: one source of names; nothing is mapped below the root that they seem to
            // share.
            spaces: core::array::from_fn(|_| unsafe { MmContext::new(&ids, root) }),
            cpus: core::array::from_fn(|_| CpuTlb::new()),
        }
    }

    fn on(&self, here: CpuId, bad: Bad) -> Here<'_> {
        Here { machine: self, here, bad: Cell::new(bad), kept: Cell::new(None) }
    }

    fn load(&self, here: &Here<'_>, number: usize) {
        // SAFETY: the spaces live as long as the machine, which does not move while it is used.
        let next = unsafe { Pin::new_unchecked(&self.spaces[number]) };
        // SAFETY: this thread plays that CPU.
        unsafe { switch_mm(here, here.here, Some(next)) };
    }

    fn flush(&self, here: &Here<'_>) {
        let _flushed = flush_tlb_mm_range(here, &self.spaces[0], PAGE, FreedTables::No);
    }
}

/// What a call of the kernel does, once.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bad {
    Nothing,
    WaitUnwinds,
    SendUnwinds,
    ObserveUnwinds,
    /// Another CPU flushes while this one loads CR3, which looks at its mail there.
    LooksAtMailInLoadCr3,
}

struct Here<'a> {
    machine: &'a Machine,
    here: CpuId,
    bad: Cell<Bad>,
    /// What `load_cr3` was told last.
    kept: Cell<Option<CachedTranslations>>,
}

impl Here<'_> {
    fn is_now(&self, bad: Bad) -> bool {
        let is = self.bad.get() == bad;
        if is {
            self.bad.set(Bad::Nothing);
        }
        is
    }

    fn look(&self) {
        // SAFETY: this thread plays this CPU.
        unsafe { flush_interrupt(self, self.here) };
    }
}

// SAFETY: states are indexed; one thread at a time plays a CPU; there are no translations to drop.
unsafe impl Cpus for Here<'_> {
    type Bits = Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(self.here)
    }

    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        &self.machine.cpus[cpu.index()]
    }

    fn init_root(&self) -> PhysFrame {
        PhysFrame::containing_address(PhysAddr::zero())
    }

    fn send_flush_interrupt(&self, _targets: &CpuSet<Bits>) {
        assert!(!self.is_now(Bad::SendUnwinds), "as planned");
    }

    fn wait_for_answers(&self, _answers: Answers<'_, Bits>) {
        assert!(!self.is_now(Bad::WaitUnwinds), "as planned");
        thread::yield_now();
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }

    fn pcid_support(&self) -> PcidSupport {
        PcidSupport::On
    }

    fn invlpg(&self, _address: u64) {}

    fn observe(&self, _event: TlbEvent) {
        assert!(!self.is_now(Bad::ObserveUnwinds), "as planned");
    }

    unsafe fn load_cr3(&self, _root: PhysFrame, _pcid: Pcid, cached: CachedTranslations) {
        self.kept.set(Some(cached));
        if self.is_now(Bad::LooksAtMailInLoadCr3) {
            thread::scope(|scope| {
                scope.spawn(|| self.machine.flush(&self.machine.on(CPU[0], Bad::Nothing)));
                // As one that spins for a lock of the kernel does.
                for _ in 0..50 {
                    self.look();
                    thread::sleep(Duration::from_millis(1));
                }
                // The switch ends, interrupts come on, and the one that was sent arrives: played
                // here, because the initiator waits inside this scope.
                let state = self.cpu_state(self.here);
                let mail_is_left = state.mailbox().has_mail();
                state.mailbox().take(|initiator| self.cpu_state(initiator).mailbox().answer(self.here));
                assert!(mail_is_left, "mail was answered between the comparison and CR3");
            });
        }
    }
}

#[test]
fn a_request_outlives_a_wait_that_unwinds() {
    let machine = Machine::new();
    let [cpu0, cpu1] = [machine.on(CPU[0], Bad::WaitUnwinds), machine.on(CPU[1], Bad::Nothing)];
    machine.load(&cpu1, 0);
    let answered = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let cpu1 = machine.on(CPU[1], Bad::Nothing);
            thread::sleep(Duration::from_millis(50));
            answered.store(true, Ordering::SeqCst);
            while machine.cpus[1].mailbox().has_mail() {
                cpu1.look();
            }
        });
        let unwound = catch_unwind(AssertUnwindSafe(|| machine.flush(&cpu0)));
        assert!(unwound.is_err(), "the wait unwinds");
        assert!(answered.load(Ordering::SeqCst), "the request was gone before its answer");
    });
}

#[test]
fn nobody_waits_for_a_cpu_that_was_never_interrupted() {
    let machine = Machine::new();
    let cpu0 = machine.on(CPU[0], Bad::SendUnwinds);
    machine.load(&machine.on(CPU[1], Bad::Nothing), 0);
    let unwound = catch_unwind(AssertUnwindSafe(|| machine.flush(&cpu0)));
    assert!(unwound.is_err(), "sending unwinds");
    assert!(!machine.cpus[1].mailbox().has_mail(), "the request was taken back");
    assert!(machine.cpus[0].mailbox().is_answered());
}

#[test]
fn mail_that_a_handler_unwinds_over_is_still_there() {
    let machine = Machine::new();
    machine.load(&machine.on(CPU[1], Bad::Nothing), 0);
    let both = machine.spaces[0].tlb_gen().next().next();
    thread::scope(|scope| {
        for number in [0, 2] {
            let machine = &machine;
            scope.spawn(move || machine.flush(&machine.on(CPU[number], Bad::Nothing)));
        }
        let cpu1 = machine.on(CPU[1], Bad::ObserveUnwinds);
        let mut unwound = 0;
        // Until both initiators have their answers.
        while machine.spaces[0].tlb_gen() < both || !all_answered(&machine) {
            let looked = catch_unwind(AssertUnwindSafe(|| cpu1.look()));
            unwound += u32::from(looked.is_err());
            thread::yield_now();
        }
        assert_eq!(unwound, 1);
    });
}

fn all_answered(machine: &Machine) -> bool {
    [0, 2].iter().all(|cpu| machine.cpus[*cpu].mailbox().is_answered())
        && !machine.cpus[1].mailbox().has_mail()
}

#[test]
fn a_cpu_in_the_middle_of_a_switch_answers_nobody() {
    let machine = Machine::new();
    let cpu1 = machine.on(CPU[1], Bad::Nothing);
    // Back to a space it knows: the generation is compared, and its translations may be kept.
    machine.load(&cpu1, 0);
    machine.load(&cpu1, 1);
    cpu1.bad.set(Bad::LooksAtMailInLoadCr3);
    machine.load(&cpu1, 0);
    assert_eq!(cpu1.kept.get(), Some(CachedTranslations::Keep));
}
