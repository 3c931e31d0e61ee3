//! The mailbox: requests that reach other CPUs through it, and the answers.
//!
//! Here each CPU takes its flush interrupts itself, between two steps of its story, as it takes
//! them on hardware between two instructions. An interrupt is a flag that the initiator sets. Who
//! waits looks at its mail without one, as the crate does.
#![expect(unsafe_code, reason = "plays the CPUs, which the crate's entry points take on trust")]

use loom::sync::{Condvar, Mutex};
use loom::thread;
use mmu_tlb::{
    Answers, CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, FreedTables, PcidSupport, UnmapBatch,
    flush_interrupt, flush_tlb_mm_range, init_cpu, offline_cpu,
};
use std::sync::Arc;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::PhysFrame;

use crate::machine::{Bits, CPU, Cpu, Machine, span_of};
use crate::{explore_up_to, join};

/// What interrupts each CPU, and how many have something to do.
struct Lines {
    state: Mutex<State>,
    changed: Condvar,
    waiting: Waiting,
}

/// How a CPU waits for answers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Waiting {
    Spins,
    /// Until somebody answers, or asks. loom cannot tell two CPUs that spin from two that never get
    /// on.
    Sleeps,
}

struct State {
    interrupt: [bool; 3],
    /// Somebody has answered since the CPU slept.
    answered: [bool; 3],
    sent: [u32; 3],
    busy: u32,
}

impl Lines {
    fn new(busy: u32, waiting: Waiting) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State { interrupt: [false; 3], answered: [false; 3], sent: [0; 3], busy }),
            changed: Condvar::new(),
            waiting,
        })
    }

    fn change<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let result = change(&mut self.state.lock().expect("no panic before"));
        self.changed.notify_all();
        result
    }

    /// How many interrupts `cpu` was sent.
    fn sent(&self, cpu: CpuId) -> u32 {
        self.change(|state| state.sent[cpu.index()])
    }

    /// Waits until somebody has answered `cpu`, or asks it.
    fn sleep(&self, cpu: CpuId) {
        let mut state = self.state.lock().expect("no panic before");
        while !state.interrupt[cpu.index()] && !state.answered[cpu.index()] {
            state = self.changed.wait(state).expect("no panic before");
        }
        state.interrupt[cpu.index()] = false;
        state.answered[cpu.index()] = false;
    }

    /// Waits for an interrupt of `cpu`, and takes it. False: everybody is done.
    fn wait(&self, cpu: CpuId) -> bool {
        let mut state = self.state.lock().expect("no panic before");
        while !state.interrupt[cpu.index()] && state.busy > 0 {
            state = self.changed.wait(state).expect("no panic before");
        }
        core::mem::take(&mut state.interrupt[cpu.index()])
    }
}

/// A CPU whose requests go by mail.
struct Mailed<'a> {
    cpu: Cpu<'a>,
    here: CpuId,
    lines: &'a Lines,
}

impl Mailed<'_> {
    /// Takes the flush interrupt, if there is one.
    fn take_interrupt(&self) {
        if self.lines.change(|state| core::mem::take(&mut state.interrupt[self.here.index()])) {
            self.handle();
        }
    }

    fn handle(&self) {
        // SAFETY: the interrupts of this CPU are off.
        self.cpu.with_interrupts_off(|| unsafe { flush_interrupt(self, self.here) });
    }

    fn unmap(&self, page: usize) {
        self.cpu.clear(page);
        let _flushed = flush_tlb_mm_range(self, self.cpu.mm(), span_of(page), FreedTables::No);
        self.cpu.free(page);
    }

    /// Clears the entry of `page`, notes it in a batch, flushes the batch, frees.
    fn reclaim(&self, page: usize) {
        let mut batch = UnmapBatch::new();
        self.cpu.clear(page);
        batch.add_mm(self, self.cpu.mm());
        let _flushed = batch.flush(self);
        self.cpu.free(page);
    }

    fn go_offline(&self) {
        // SAFETY: the interrupts of this CPU are off, and nothing runs here before `start`.
        self.cpu.with_interrupts_off(|| unsafe { offline_cpu(self, self.here) });
    }

    /// Its interrupt controller forgets what came while the CPU was off.
    fn start(&self) {
        self.lines.change(|state| state.interrupt[self.here.index()] = false);
        // SAFETY: the interrupts of this CPU are off, and nothing is loaded here.
        self.cpu.with_interrupts_off(|| unsafe { init_cpu(self, self.here) });
    }

    /// This CPU's story is over; it takes interrupts until everybody's is.
    fn rest(&self) {
        self.lines.change(|state| state.busy -= 1);
        while self.lines.wait(self.here) {
            self.handle();
        }
    }
}

// SAFETY: as for `Cpu`, which does the rest; requests go by mail.
unsafe impl Cpus for Mailed<'_> {
    type Bits = Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(self.here)
    }

    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        self.cpu.cpu_state(cpu)
    }

    fn init_root(&self) -> PhysFrame {
        self.cpu.init_root()
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Bits>) {
        self.lines.change(|state| {
            for target in targets.iter() {
                state.sent[target.index()] += 1;
                state.interrupt[target.index()] = true;
            }
        });
    }

    fn wait_for_answers(&self, _answers: Answers<'_, Bits>) {
        match self.lines.waiting {
            Waiting::Spins => thread::yield_now(),
            Waiting::Sleeps => self.lines.sleep(self.here),
        }
    }

    fn answered(&self, initiator: CpuId) {
        if self.lines.waiting == Waiting::Sleeps {
            self.lines.change(|state| state.answered[initiator.index()] = true);
        }
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        self.cpu.with_interrupts_off(f)
    }

    fn pcid_support(&self) -> PcidSupport {
        self.cpu.pcid_support()
    }

    fn invlpg(&self, address: u64) {
        self.cpu.invlpg(address);
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        // SAFETY: passed on to our caller.
        unsafe { self.cpu.load_cr3(root, pcid, cached) };
    }
}

/// Plays `story` on `cpu`, and has it take interrupts until all are done.
fn play(machine: &Machine, lines: &Lines, cpu: CpuId, story: impl FnOnce(&Mailed<'_>)) {
    let mailed = Mailed { cpu: machine.on(cpu), here: cpu, lines };
    story(&mailed);
    mailed.rest();
}

/// As [`play`], on a thread of its own.
fn beside(
    machine: &Arc<Machine>,
    lines: &Arc<Lines>,
    cpu: CpuId,
    story: impl FnOnce(&Mailed<'_>) + Send + 'static,
) -> thread::JoinHandle<()> {
    let (machine, lines) = (machine.clone(), lines.clone());
    thread::spawn(move || play(&machine, &lines, cpu, story))
}

/// The program of CPU 1 goes on while CPU 0 unmaps.
#[test]
fn a_page_is_freed_only_after_the_answer_by_mail() {
    explore_up_to(Some(3), &[PcidSupport::Off], |machine| {
        let lines = Lines::new(2, Waiting::Spins);
        machine.on(CPU[1]).run(&machine.mm);
        machine.on(CPU[1]).use_page(0);
        let flusher = beside(&machine, &lines, CPU[0], |cpu0| cpu0.unmap(0));
        play(&machine, &lines, CPU[1], |cpu1| {
            cpu1.cpu.use_page(0);
            cpu1.take_interrupt();
            cpu1.cpu.use_page(0);
        });
        join(flusher);
        machine.on(CPU[1]).use_page(0);
        assert_eq!(lines.sent(CPU[1]), 1);
        machine.check_at_rest();
    });
}

/// Neither takes an interrupt while it flushes: each takes its mail as it waits.
#[test]
fn two_cpus_that_flush_each_other_with_interrupts_off_both_get_on() {
    explore_up_to(Some(2), &[PcidSupport::Off], |machine| {
        let lines = Lines::new(2, Waiting::Spins);
        for cpu in [CPU[0], CPU[1]] {
            machine.on(cpu).run(&machine.mm);
            machine.on(cpu).use_page(0);
            machine.on(cpu).use_page(1);
        }
        let other = beside(&machine, &lines, CPU[0], |cpu0| cpu0.unmap(0));
        play(&machine, &lines, CPU[1], |cpu1| cpu1.unmap(1));
        join(other);
        for cpu in [CPU[0], CPU[1]] {
            machine.on(cpu).use_page(0);
            machine.on(cpu).use_page(1);
        }
        machine.check_at_rest();
    });
}

/// The second may find the first's mail unread, and sends no interrupt then; or late, while the
/// target is at the first's.
#[test]
fn a_cpu_asked_by_two_answers_both() {
    explore_up_to(Some(2), &[PcidSupport::Off], |machine| {
        let lines = Lines::new(3, Waiting::Sleeps);
        machine.on(CPU[1]).run(&machine.mm);
        machine.on(CPU[1]).use_page(0);
        machine.on(CPU[1]).use_page(1);
        let first = beside(&machine, &lines, CPU[0], |cpu0| cpu0.unmap(0));
        let second = beside(&machine, &lines, CPU[2], |cpu2| cpu2.unmap(1));
        play(&machine, &lines, CPU[1], |_| ());
        join(first);
        join(second);
        machine.on(CPU[1]).use_page(0);
        machine.on(CPU[1]).use_page(1);
        assert!(lines.sent(CPU[1]) <= 2);
        machine.check_at_rest();
    });
}

/// It is on its way to another address space and back when the request comes.
#[test]
fn a_cpu_that_switches_meanwhile_answers() {
    explore_up_to(Some(2), &[PcidSupport::On], |machine| {
        let lines = Lines::new(2, Waiting::Spins);
        machine.on(CPU[1]).run(&machine.mm);
        machine.on(CPU[1]).use_page(0);
        let flusher = beside(&machine, &lines, CPU[0], |cpu0| cpu0.unmap(0));
        play(&machine, &lines, CPU[1], |cpu1| {
            cpu1.cpu.run(cpu1.cpu.other());
            cpu1.take_interrupt();
            cpu1.cpu.run(cpu1.cpu.mm());
            cpu1.cpu.use_page(0);
        });
        join(flusher);
        machine.on(CPU[1]).use_page(0);
        machine.check_at_rest();
    });
}

/// It goes off without having taken the interrupt, and takes none until it is back.
#[test]
fn a_cpu_that_goes_off_keeps_nobody_waiting_and_comes_back_without_old_mail() {
    explore_up_to(Some(2), &[PcidSupport::Off], |machine| {
        let lines = Lines::new(2, Waiting::Spins);
        machine.on(CPU[1]).run(&machine.mm);
        machine.on(CPU[1]).use_page(0);
        let flusher = beside(&machine, &lines, CPU[0], |cpu0| {
            cpu0.unmap(0);
            // The same mail box is used again, for a request that the CPU must not take for the
            // first.
            cpu0.unmap(1);
        });
        play(&machine, &lines, CPU[1], |cpu1| {
            cpu1.go_offline();
            cpu1.start();
            cpu1.cpu.run(cpu1.cpu.mm());
            cpu1.cpu.use_page(1);
        });
        join(flusher);
        machine.on(CPU[1]).use_page(1);
        machine.check_at_rest();
    });
}

/// It goes off without having taken the interrupt, and stays away: the initiator takes its request
/// back.
#[test]
fn a_cpu_that_stays_off_keeps_nobody_waiting() {
    explore_up_to(Some(2), &[PcidSupport::Off], |machine| {
        let lines = Lines::new(2, Waiting::Spins);
        machine.on(CPU[1]).run(&machine.mm);
        machine.on(CPU[1]).use_page(0);
        let flusher = beside(&machine, &lines, CPU[0], |cpu0| cpu0.unmap(0));
        let cpu1 = Mailed { cpu: machine.on(CPU[1]), here: CPU[1], lines: &lines };
        cpu1.go_offline();
        lines.change(|state| state.busy -= 1);
        join(flusher);
        machine.check_at_rest();
    });
}

/// The flush of a reclaim batch waits for its answers as any other does.
#[test]
fn reclaim_frees_a_page_only_after_the_answers_by_mail() {
    explore_up_to(Some(3), &[PcidSupport::Off], |machine| {
        let lines = Lines::new(2, Waiting::Spins);
        machine.on(CPU[1]).run(&machine.mm);
        machine.on(CPU[1]).use_page(0);
        let reclaim = beside(&machine, &lines, CPU[0], |cpu0| cpu0.reclaim(0));
        play(&machine, &lines, CPU[1], |cpu1| {
            cpu1.take_interrupt();
            cpu1.cpu.use_page(0);
        });
        join(reclaim);
        machine.on(CPU[1]).use_page(0);
        machine.check_at_rest();
    });
}
