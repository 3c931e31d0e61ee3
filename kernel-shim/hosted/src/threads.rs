//! Threads: what runs on a CPU, and may go on on another.
//!
//! A thread is named by the CPU that it begins on, as in the text of a sequence. Where a kernel can
//! be preempted, two threads exchange their CPUs now and then: so a call goes on on another CPU
//! than it began on, and one CPU runs parts of two calls in turn. Each arrives as by a scheduler:
//! the first thing that the CPU does is to switch to the thread's address space.
#![expect(unsafe_code, reason = "finds the machine that runs by pointer")]

use core::cell::Cell;
use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;

use mmu_gather::tlb::CpuId;

use crate::boundary::Boundary;
use crate::machine::{HostedMachine, VirtualCpu};
use crate::mutex::lock;
use crate::schedule::{self, Schedule, is_scheduled};
use crate::vocabulary::Seam;

thread_local! {
    /// The machine whose schedule runs on this thread of the host; null if none does.
    static RUNS: Cell<*const HostedMachine> = const { Cell::new(ptr::null()) };
}

/// A table lock was dropped: a [`Seam::Unlock`].
///
/// For the guard of a kernel's own type of lock (`TableMemory::Lock`), which has no machine at
/// hand. Nothing happens where no schedule runs.
pub fn unlocked() {
    let machine = RUNS.get();
    // A lock may be dropped because its holder unwinds, and a coroutine that unwinds cannot give
    // way.
    if machine.is_null() || !is_scheduled() || std::thread::panicking() {
        return;
    }
    // SAFETY: whoever set the pointer is further up on this thread, and holds the machine.
    unsafe { &*machine }.seam(Seam::Unlock);
}

/// This thread of the host runs a machine until it is dropped.
struct Running;

impl Drop for Running {
    fn drop(&mut self) {
        RUNS.set(ptr::null());
    }
}

impl HostedMachine {
    /// Runs what `schedule` holds until all of it is done.
    pub fn run(self: &Arc<Self>, schedule: Schedule) {
        self.run_threads(schedule, || {});
    }

    /// As [`run`](Self::run). If threads move, `arrives` is called on the CPU that one of them has
    /// come to, before it goes on there.
    pub(crate) fn run_threads(self: &Arc<Self>, schedule: Schedule, arrives: impl Fn() + 'static) {
        for cpu in schedule.cpus() {
            self.cpus[cpu.index()].has_turns.store(true, Ordering::Relaxed);
        }
        RUNS.set(Arc::as_ptr(self));
        let _running = Running;
        let machine = Arc::clone(self);
        let on_return = move || {
            machine.take_interrupt();
            // Not within the handler of the interrupt that it took first.
            let takes_interrupts = machine.cpu().interrupts_off.load(Ordering::Relaxed) == 0;
            if takes_interrupts && machine.cpu().thread.arrives.swap(false, Ordering::Relaxed) {
                arrives();
                if machine.cpu().thread.was_in_user_mode.swap(false, Ordering::Relaxed) {
                    machine.enter_user_mode();
                }
                machine.threads_on_their_way.fetch_sub(1, Ordering::Relaxed);
            }
        };
        let becomes = |cpu| self.begin_turn(cpu);
        let is_done = |cpu: CpuId| self.cpus[cpu.index()].has_turns.store(false, Ordering::Relaxed);
        let leaves = |cpu| self.settle_locks(cpu);
        let exchange = |one, other| self.exchange_threads(one, other);
        let exchange: Option<&dyn Fn(CpuId, CpuId)> =
            if self.threads_move.load(Ordering::Relaxed) { Some(&exchange) } else { None };
        schedule.run(&self.choices, becomes, leaves, is_done, &on_return, exchange);
        self.become_cpu(CpuId::new(0));
    }

    /// The thread that runs now, by the CPU that it began on.
    pub(crate) fn thread(&self) -> CpuId {
        CpuId::new(self.cpu().thread.number.load(Ordering::Relaxed))
    }

    /// Whether the thread that runs now may go on on another CPU: it is not pinned, takes
    /// interrupts, and holds no table lock.
    pub(crate) fn may_move_from_here(&self) -> bool {
        let cpu = self.cpu();
        self.threads_move.load(Ordering::Relaxed)
            && cpu.pinned.load(Ordering::Relaxed) == 0
            && cpu.interrupts_off.load(Ordering::Relaxed) == 0
            && !cpu.waits.load(Ordering::Relaxed)
            && !self.is_off(cpu.id)
            && self.table_locked_here().is_none()
    }

    /// Waits until every thread has arrived where it moved to.
    pub(crate) fn wait_for_arrivals(&self) {
        while self.threads_on_their_way.load(Ordering::Relaxed) > 0 {
            schedule::wait();
        }
    }

    /// Waits for what other threads do, in no call.
    pub(crate) fn wait_at_rest(&self) {
        if self.may_move_from_here() {
            schedule::may_move_now();
        }
        schedule::wait();
    }

    /// The threads of two CPUs, which both were preempted, go on on each other's.
    fn exchange_threads(&self, one: CpuId, other: CpuId) {
        self.note_reached(Boundary::ThreadMoved);
        let [one, other] = [one, other].map(|cpu| &self.cpus[cpu.index()]);
        for cpu in [one, other] {
            // An interrupt has taken the CPU from a program, if it ran one.
            if cpu.in_user_mode.swap(false, Ordering::Relaxed) {
                cpu.thread.was_in_user_mode.store(true, Ordering::Relaxed);
            }
            if !cpu.thread.arrives.swap(true, Ordering::Relaxed) {
                self.threads_on_their_way.fetch_add(1, Ordering::Relaxed);
            }
        }
        exchange(&one.thread.number, &other.thread.number);
        exchange_flags(&one.thread.was_in_user_mode, &other.thread.was_in_user_mode);
        exchange(&one.seams_to_preemption, &other.seams_to_preemption);
        exchange_held(one, other);
    }
}

/// What a thread has locked, and has done since its last preemption point, goes with it.
fn exchange_held(one: &VirtualCpu, other: &VirtualCpu) {
    mem::swap(&mut *lock(&one.map_locks.held), &mut *lock(&other.map_locks.held));
    mem::swap(&mut *lock(&one.map_locks.own_tables), &mut *lock(&other.map_locks.own_tables));
    exchange_flags(&one.map_locks.frees_early, &other.map_locks.frees_early);
    exchange(&one.work.leaves, &other.work.leaves);
    exchange(&one.work.splits, &other.work.splits);
    exchange(&one.work.freed, &other.work.freed);
}

fn exchange(one: &AtomicU32, other: &AtomicU32) {
    one.store(other.swap(one.load(Ordering::Relaxed), Ordering::Relaxed), Ordering::Relaxed);
}

fn exchange_flags(one: &AtomicBool, other: &AtomicBool) {
    one.store(other.swap(one.load(Ordering::Relaxed), Ordering::Relaxed), Ordering::Relaxed);
}
