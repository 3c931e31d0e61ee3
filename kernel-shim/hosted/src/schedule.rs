//! Which CPU runs: one coroutine a CPU, all on one thread, the next one chosen by the seed.
#![expect(unsafe_code, reason = "a coroutine finds its way out, and what it works on, by pointer")]

use core::any::Any;
use core::cell::Cell;
use core::fmt;
use core::panic::AssertUnwindSafe;
use core::ptr;
use std::panic::{catch_unwind, resume_unwind};
use std::sync::Arc;

use corosensei::{Coroutine, CoroutineResult, Yielder};
use mmu_gather::tlb::CpuId;
use spin::RelaxStrategy;

use crate::random::Choices;

type Way = Yielder<(), ()>;

thread_local! {
    /// The way out of the coroutine that runs on this thread now; null outside of any.
    static WAY_OUT: Cell<*const Way> = const { Cell::new(ptr::null()) };
    /// What a CPU does first when it is chosen again: answer interrupts. Set while a schedule runs.
    static ON_RETURN: Cell<Option<*const dyn Fn()>> = const { Cell::new(None) };
    /// Times in a row that a CPU gave way because it waits for another.
    static WAITS: Cell<u64> = const { Cell::new(0) };
    /// Times that a CPU gave way, for whatever reason, since a step was done.
    static TURNS: Cell<u64> = const { Cell::new(0) };
    /// Times of those that it gave way because a lock was taken.
    static TRIES: Cell<u64> = const { Cell::new(0) };
    /// The coroutine that is about to give way may go on on another CPU.
    static MAY_MOVE: Cell<bool> = const { Cell::new(false) };
    /// What a CPU panicked with that must not be unwound.
    static GIVEN_UP: Cell<Option<Box<dyn Any + Send>>> = const { Cell::new(None) };
    /// How many of the turns the size of a step can explain. Set while a schedule runs that says
    /// when steps are done.
    static MOST_TURNS: Cell<u64> = const { Cell::new(u64::MAX) };
    /// Since the last schedule of this thread was given up, if it was: tries to take a lock outside
    /// of any.
    static TRIES_OUTSIDE: Cell<Option<u32>> = const { Cell::new(None) };
}

/// So many of those are for a lock that a CPU held which does not come back. Another thread would
/// have given it back by then.
const MOST_TRIES_OUTSIDE: u32 = 100_000;

/// So many waits in a row, while no CPU does anything else, are a deadlock.
const MOST_WAITS: u64 = 20_000_000;

/// The next time that it gives way, the coroutine may go on on another CPU.
pub(crate) fn may_move_now() {
    MAY_MOVE.set(true);
}

/// As [`give_way`], for a CPU that waits for another.
pub(crate) fn wait() {
    WAITS.set(WAITS.get() + 1);
    give_way();
}

/// Runs `f`, in which a panic ends the run of the schedule, if there is one, and unwinds nothing
/// above: the code there may be waiting for answers, and would then wait for them without end.
pub(crate) fn without_unwinding<R>(f: impl FnOnce() -> R) -> R {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(result) => result,
        Err(panic) if is_scheduled() => {
            GIVEN_UP.set(Some(panic));
            loop {
                // The schedule looks, and does not come back.
                give_way();
            }
        }
        Err(panic) => resume_unwind(panic),
    }
}

/// What went on for so long that it has no end, if anything did.
///
/// Asked between two turns and not by the code that waits: that may be in a place that cannot
/// unwind, such as the wait for answers of which some are missing.
fn endless() -> Option<String> {
    let turns = TURNS.get();
    if WAITS.get() >= MOST_WAITS {
        return Some("deadlock: every CPU waits for another".to_owned());
    }
    (turns > MOST_TURNS.get()).then(|| {
        let locks = if TRIES.get() > turns / 4 { "; in many of them a CPU tried to take a lock" } else { "" };
        format!(
            "a call does not end: it has waited for {turns} turns; something it waits for never happens{locks}"
        )
    })
}

/// Something was done: the CPUs are not deadlocked.
pub(crate) fn progress() {
    WAITS.set(0);
}

/// A step began or ended: no CPU repeats the same thing for ever, which a count of waits would
/// miss.
pub(crate) fn step_done() {
    progress();
    TURNS.set(0);
    TRIES.set(0);
}

/// The schedule that this thread runs next calls [`step_done`] at least once in so many turns.
pub(crate) fn expect_steps_within(turns: u64) {
    MOST_TURNS.set(turns);
}

/// Gives the other CPUs a chance, if this code runs in a schedule. Returns when this CPU is chosen
/// again; never, if no step was done for more turns than `expect_steps_within` allows.
#[inline]
pub fn give_way() {
    let way = WAY_OUT.get();
    if way.is_null() {
        return;
    }
    TURNS.set(TURNS.get() + 1);
    // SAFETY: `run` sets the pointer before it resumes a coroutine, to the yielder that coroutine
    // was given and that lives on its stack until it returns; and clears it when the coroutine is
    // suspended or done.
    unsafe { &*way }.suspend(());
    if let Some(on_return) = ON_RETURN.get() {
        // SAFETY: `run`, which is further up on this thread, set the pointer to a closure of its
        // caller's that outlives it, and clears it before it returns.
        let on_return = unsafe { &*on_return };
        on_return();
    }
}

/// How a CPU of this machine waits for a lock: it lets the others run.
#[derive(Debug)]
pub struct GiveWay;

impl RelaxStrategy for GiveWay {
    fn relax() {
        // Requests are answered when this CPU is chosen again: see `HostedMachine::run`.
        if is_scheduled() {
            TRIES.set(TRIES.get() + 1);
            wait();
        } else {
            if let Some(tries) = TRIES_OUTSIDE.get() {
                TRIES_OUTSIDE.set(Some(tries.saturating_add(1)));
                assert!(
                    tries < MOST_TRIES_OUTSIDE,
                    "a lock is waited for, and the CPU that holds it was given up"
                );
            }
            std::thread::yield_now();
        }
    }
}

/// Whether this code runs in a schedule.
#[must_use]
pub fn is_scheduled() -> bool {
    !WAY_OUT.get().is_null()
}

/// What a CPU does.
struct Task {
    cpu: CpuId,
    coroutine: Coroutine<(), (), ()>,
    way_out: *const Way,
    /// Whether it may go on on another CPU.
    may_move: bool,
    /// What the coroutine uses by pointer, dropped after it.
    kept: Option<Arc<dyn Any>>,
}

/// CPUs with something to do, interleaved until all are done.
#[derive(Default)]
pub struct Schedule {
    tasks: Vec<Task>,
}

impl Schedule {
    /// Nothing to do.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives `cpu` something to do.
    pub fn spawn(&mut self, cpu: CpuId, work: impl FnOnce() + 'static) {
        let coroutine = Coroutine::new(move |way: &Way, ()| {
            WAY_OUT.set(way);
            work();
        });
        self.tasks.push(Task { cpu, coroutine, way_out: ptr::null(), may_move: false, kept: None });
    }

    /// As [`spawn`](Self::spawn), with something to work on that is given back even if the
    /// coroutine never ends.
    pub(crate) fn spawn_on<T: 'static>(
        &mut self,
        cpu: CpuId,
        shared: &Arc<T>,
        work: impl FnOnce(&T) + 'static,
    ) {
        let pointer = Arc::as_ptr(shared);
        self.spawn(cpu, move || {
            // SAFETY: the task keeps what this points to as long as its coroutine may run.
            work(unsafe { &*pointer });
        });
        if let Some(task) = self.tasks.last_mut() {
            task.kept = Some(Arc::<T>::clone(shared));
        }
    }

    /// The CPUs that have something to do.
    pub(crate) fn cpus(&self) -> impl Iterator<Item = CpuId> + '_ {
        self.tasks.iter().map(|task| task.cpu)
    }

    /// Runs until all are done.
    ///
    /// `becomes` is told which CPU runs from now on, `leaves` which ran until now; `is_done` which
    /// has nothing left to do; `on_return` runs on a CPU whenever it is chosen again. `exchange`,
    /// if there is one, is told which two CPUs go on with each other's work from now on.
    pub(crate) fn run(
        mut self,
        choices: &Choices,
        becomes: impl Fn(CpuId),
        leaves: impl Fn(CpuId),
        is_done: impl Fn(CpuId),
        on_return: &(dyn Fn() + 'static),
        exchange: Option<&dyn Fn(CpuId, CpuId)>,
    ) {
        step_done();
        TRIES_OUTSIDE.set(None);
        ON_RETURN.set(Some(ptr::from_ref(on_return)));
        while !self.tasks.is_empty() {
            if let Some(exchange) = exchange {
                self.exchange_some(choices, exchange);
            }
            let place = choices.pick(self.tasks.len());
            let task = &mut self.tasks[place];
            becomes(task.cpu);
            WAY_OUT.set(task.way_out);
            let result = catch_unwind(AssertUnwindSafe(|| task.coroutine.resume(())));
            task.way_out = WAY_OUT.replace(ptr::null());
            task.may_move = MAY_MOVE.replace(false);
            leaves(task.cpu);
            let result = result.unwrap_or_else(|panic| {
                self.abandon();
                resume_unwind(panic)
            });
            if let Some(panic) = GIVEN_UP.take() {
                self.abandon();
                resume_unwind(panic)
            }
            if let Some(words) = endless() {
                self.abandon();
                panic!("{words}");
            }
            if matches!(result, CoroutineResult::Return(())) {
                let done = self.tasks.swap_remove(place);
                is_done(done.cpu);
            }
        }
        ON_RETURN.set(None);
        MOST_TURNS.set(u64::MAX);
    }
}

/// Once in so many turns two CPUs exchange their work, if both are where that is allowed.
const EXCHANGE_EVERY: u64 = 24;

impl Schedule {
    fn exchange_some(&mut self, choices: &Choices, exchange: &dyn Fn(CpuId, CpuId)) {
        if !choices.one_in(EXCHANGE_EVERY) {
            return;
        }
        let movable = self.tasks.iter_mut().filter(|task| task.may_move);
        let mut movable: Vec<&mut CpuId> = movable.map(|task| &mut task.cpu).collect();
        if movable.len() < 2 {
            return;
        }
        let one = movable.swap_remove(choices.pick(movable.len()));
        let other = movable.swap_remove(choices.pick(movable.len()));
        core::mem::swap(one, other);
        exchange(*one, *other);
    }

    /// Nothing of it runs any more.
    fn abandon(&mut self) {
        ON_RETURN.set(None);
        MOST_TURNS.set(u64::MAX);
        TRIES_OUTSIDE.set(Some(0));
        progress();
        // Unwinding the coroutines would run what they still have to do, and wait for those that do
        // nothing more. Their stacks are leaked instead, since mail may point into them.
        for task in self.tasks.drain(..) {
            core::mem::forget(task.coroutine);
        }
    }
}

/// Runs `work` by itself, from its beginning to its end; if it only waits, not for ever.
///
/// # Panics
/// If `work` does, or if it does not end.
pub(crate) fn run_alone<T: 'static, R: 'static>(shared: &T, work: impl FnOnce(&T) -> R + 'static) -> R {
    let pointer = ptr::from_ref(shared);
    let mut coroutine: Coroutine<(), (), R> = Coroutine::new(move |way: &Way, ()| {
        WAY_OUT.set(way);
        // SAFETY: `shared` outlives this call, and nothing resumes the coroutine after it.
        work(unsafe { &*pointer })
    });
    step_done();
    MOST_TURNS.set(MOST_TURNS_ALONE);
    let mut way_out = ptr::null();
    loop {
        WAY_OUT.set(way_out);
        let result = catch_unwind(AssertUnwindSafe(|| coroutine.resume(())));
        way_out = WAY_OUT.replace(ptr::null());
        if let Some(panic) = GIVEN_UP.take() {
            MOST_TURNS.set(u64::MAX);
            core::mem::forget(coroutine);
            resume_unwind(panic)
        }
        let words = match result {
            Ok(CoroutineResult::Return(value)) => {
                MOST_TURNS.set(u64::MAX);
                return value;
            }
            Ok(CoroutineResult::Yield(())) => endless(),
            Err(panic) => {
                MOST_TURNS.set(u64::MAX);
                resume_unwind(panic)
            }
        };
        if let Some(words) = words {
            MOST_TURNS.set(u64::MAX);
            progress();
            core::mem::forget(coroutine);
            panic!("{words}");
        }
    }
}

/// Turns of work that runs by itself, which waits for nobody for long.
const MOST_TURNS_ALONE: u64 = 1_000_000;

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.tasks.iter().map(|task| task.cpu)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_in_a_circle_is_stopped_although_nobody_waits() {
        let ended = catch_unwind(AssertUnwindSafe(|| {
            let mut schedule = Schedule::new();
            for number in 0..2 {
                schedule.spawn(CpuId::new(number), || {
                    loop {
                        // As a program does whose fault is answered without a change.
                        progress();
                        give_way();
                    }
                });
            }
            expect_steps_within(1000);
            schedule.run(&Choices::new(1), |_| {}, |_| {}, |_| {}, &|| {}, None);
        }));
        let words = ended.expect_err("it ended");
        let words = words.downcast_ref::<String>().expect("words with a number");
        assert!(words.contains("does not end") && words.contains("1001 turns"), "{words}");
    }

    #[test]
    fn steps_that_are_done_may_be_as_many_as_one_likes() {
        let mut schedule = Schedule::new();
        schedule.spawn(CpuId::new(0), || {
            for _ in 0..100 {
                (0..900).for_each(|_| give_way());
                step_done();
            }
        });
        expect_steps_within(1000);
        schedule.run(&Choices::new(1), |_| {}, |_| {}, |_| {}, &|| {}, None);
        // A schedule that follows on this thread is not counted.
        assert_eq!(MOST_TURNS.get(), u64::MAX);
    }

    #[test]
    fn a_lock_whose_holder_was_given_up_is_not_waited_for_without_end() {
        let lock: &'static spin::mutex::SpinMutex<(), GiveWay> =
            Box::leak(Box::new(spin::mutex::SpinMutex::new(())));
        let ended = catch_unwind(AssertUnwindSafe(|| {
            let mut schedule = Schedule::new();
            schedule.spawn(CpuId::new(0), || {
                let _held = lock.lock();
                loop {
                    give_way();
                }
            });
            schedule.spawn(CpuId::new(1), || {
                while !lock.is_locked() {
                    give_way();
                }
                panic!("an assertion of the kernel");
            });
            schedule.run(&Choices::new(1), |_| {}, |_| {}, |_| {}, &|| {}, None);
        }));
        ended.expect_err("it was given up");
        // As an address space does, say, that is dropped after the run.
        let waited = catch_unwind(AssertUnwindSafe(|| drop(lock.lock())));
        let words = waited.expect_err("nobody gives it back");
        assert!(words.downcast_ref::<&str>().expect("words").contains("was given up"));
    }
}
