//! The protocol of `mmu-tlb` under loom: in no execution that loom tries does a CPU use what was
//! freed.
//!
//! ```text
//! RUSTFLAGS="--cfg mmu_loom" cargo test -p mmu-tlb --release --test loom
//! tlb/tests/loom/run-corrected --package mmu-tlb
//! ```
//!
//! The atomics are the crate's own (`src/sync.rs` swaps them). loom tries interleavings, and values
//! that a read may return, but not all of them: `README.md` says what it passes over, what the
//! corrected loom of the second command adds, and what neither sees.
//!
//! Each test says how many executions there are, how long they take, with loom as it is and with
//! the corrected one (seconds on two cores that had other work, too), and with which faults put
//! into the crate it was seen to fail. There is no bound on preemptions where no bound is named.
//! `README.md` lists the faults one by one.
//!
//! No test here was seen to need two of the orderings, because a fence is always near: the acquire
//! of `tlb_gen`, and that `add_mm` notes its flush after raising the generation. The first is kept
//! for what a walker in software would need.
#![cfg(mmu_loom)]

mod machine;
mod mail;

use core::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Instant;

use loom::model::Builder;
use loom::thread::{self, JoinHandle};
use mmu_tlb::{CpuId, PcidSupport};

use machine::{CPU, Cpu, Machine};

const BOTH: [PcidSupport; 2] = [PcidSupport::Off, PcidSupport::On];

/// Runs `scenario` in every way that loom knows, and prints in how many.
fn explore(pcid: &[PcidSupport], scenario: impl Fn(Arc<Machine>) + Send + Sync + Copy + 'static) {
    explore_up_to(None, pcid, scenario);
}

/// As [`explore`], with at most so many preemptions in one execution.
fn explore_up_to(
    preemptions: Option<usize>,
    pcid: &[PcidSupport],
    scenario: impl Fn(Arc<Machine>) + Send + Sync + Copy + 'static,
) {
    let (begun, executions) = (Instant::now(), Arc::new(AtomicUsize::new(0)));
    for pcid in pcid.iter().copied() {
        let mut builder = Builder::new();
        builder.max_branches = 10_000;
        builder.preemption_bound = preemptions;
        let count = executions.clone();
        builder.check(move || {
            count.fetch_add(1, Ordering::Relaxed);
            scenario(Machine::new(pcid));
        });
    }
    let executions = executions.load(Ordering::Relaxed);
    println!("{executions} executions, {:.2} s", begun.elapsed().as_secs_f32());
}

/// Another CPU, which begins now.
fn meanwhile(
    machine: &Arc<Machine>,
    cpu: CpuId,
    work: impl FnOnce(Cpu<'_>) + Send + 'static,
) -> JoinHandle<()> {
    let machine = machine.clone();
    thread::spawn(move || work(machine.on(cpu)))
}

fn join(thread: JoinHandle<()>) {
    thread.join().expect("no panic in a thread");
}

/// CPU 1 was here before: it is in the cpumask, so joining writes nothing, and its tag keeps an old
/// translation. Either it sees the new generation, or the flusher sees it coming (CVE-2025-40174,
/// CVE-2025-37964).
///
/// 557 executions, 0.03 s; corrected: 18412, 1.5 s.
///
/// Seen to fail with: no fence in `switch_mm` or in `raise_tlb_gen`; SWITCHING announced after the
/// generation is read, or taken for elsewhere.
#[test]
fn a_cpu_that_comes_back_during_a_shootdown_never_uses_the_freed_page() {
    explore(&BOTH, |machine| {
        let cpu1 = machine.on(CPU[1]);
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        cpu1.run(&machine.other);
        let flusher = meanwhile(&machine, CPU[0], |cpu0| cpu0.unmap(0));
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        join(flusher);
        cpu1.use_page(0);
        machine.check_at_rest();
    });
}

/// CPU 1 was never here: it must join the cpumask before it loads CR3 (CVE-2016-2069).
///
/// 836 executions, 0.04 s; corrected: 7906, 0.6 s.
///
/// Seen to fail with: no fence in `raise_tlb_gen`; the cpumask joined after CR3; targets looked for
/// before the generation rises.
#[test]
fn a_cpu_that_comes_for_the_first_time_during_a_shootdown_never_uses_the_freed_page() {
    explore(&BOTH, |machine| {
        let flusher = meanwhile(&machine, CPU[0], |cpu0| cpu0.unmap(0));
        let cpu1 = machine.on(CPU[1]);
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        join(flusher);
        cpu1.use_page(0);
        machine.check_at_rest();
    });
}

/// CPU 1 leaves and comes back, twice switching, while the flusher looks.
///
/// 17369 executions, 0.9 s; corrected: 2726168, 414 s.
///
/// Seen to fail with: no fence in `switch_mm` or in `raise_tlb_gen`; no SWITCHING; no acquire in
/// `concern`.
#[test]
fn a_cpu_that_leaves_and_comes_back_during_a_shootdown_never_uses_the_freed_page() {
    explore(&BOTH, |machine| {
        let cpu1 = machine.on(CPU[1]);
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        let flusher = meanwhile(&machine, CPU[0], |cpu0| cpu0.unmap(0));
        cpu1.use_page(0);
        cpu1.stop();
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        join(flusher);
        cpu1.use_page(0);
        machine.check_at_rest();
    });
}

/// CPU 1 is lazy and wakes: either it is told, or it sees the new generation.
///
/// 92 executions, 0.01 s; corrected: 2062, 0.2 s.
///
/// Seen to fail with: no fence in `catch_up` or in `raise_tlb_gen`; a wake-up that does not look;
/// laziness ended after the switch.
#[test]
fn a_cpu_that_wakes_during_a_shootdown_never_uses_the_freed_page() {
    explore(&BOTH, |machine| {
        let cpu1 = machine.on(CPU[1]);
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        cpu1.go_lazy();
        let flusher = meanwhile(&machine, CPU[0], |cpu0| cpu0.unmap(0));
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        join(flusher);
        cpu1.use_page(0);
        machine.check_at_rest();
    });
}

/// CPU 1 goes lazy while the request is on its way, and wakes again.
///
/// 1642 executions, 0.08 s; corrected: 56390, 4.3 s.
///
/// Seen to fail with: the same; going lazy without release, or found lazy without acquire.
#[test]
fn a_cpu_that_goes_lazy_during_a_shootdown_never_uses_the_freed_page() {
    explore(&BOTH, |machine| {
        let cpu1 = machine.on(CPU[1]);
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        let flusher = meanwhile(&machine, CPU[0], |cpu0| cpu0.unmap(0));
        cpu1.use_page(0);
        cpu1.go_lazy();
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        join(flusher);
        cpu1.use_page(0);
        machine.check_at_rest();
    });
}

/// CPU 1 borrows another address space when it is switched to this one: it must not be taken for a
/// lazy CPU.
///
/// 970 executions, 0.05 s; corrected: 36613, 4.2 s.
///
/// Seen to fail with: no fence in `switch_mm`; laziness ended after the switch.
#[test]
fn a_lazy_cpu_on_its_way_in_is_not_taken_for_one_that_may_wait() {
    explore(&BOTH, |machine| {
        let cpu1 = machine.on(CPU[1]);
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        cpu1.run(&machine.other);
        cpu1.go_lazy();
        let flusher = meanwhile(&machine, CPU[0], |cpu0| cpu0.unmap(0));
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        join(flusher);
        cpu1.use_page(0);
        machine.check_at_rest();
    });
}

/// Each unmaps a page that the other uses. The generations cross: a ranged flush that skips a
/// generation loses a page.
///
/// 2156 executions, 0.2 s; corrected: with at most 5 preemptions 1233792, 178 s.
///
/// Seen to fail with: a ranged flush from any generation; a slot raised to a generation read after
/// its pages were invalidated.
#[test]
fn two_cpus_that_flush_at_once_both_get_on_and_lose_no_request() {
    explore(&BOTH, |machine| {
        for cpu in [CPU[0], CPU[1]] {
            machine.on(cpu).run(&machine.mm);
            machine.on(cpu).use_page(0);
            machine.on(cpu).use_page(1);
        }
        let other = meanwhile(&machine, CPU[1], |cpu1| {
            cpu1.unmap(1);
            cpu1.use_page(0);
            cpu1.use_page(1);
        });
        let cpu0 = machine.on(CPU[0]);
        cpu0.unmap(0);
        cpu0.use_page(1);
        cpu0.use_page(0);
        join(other);
        machine.check_at_rest();
    });
}

/// The same with a third CPU that only runs the program, and is told by both.
///
/// 39614 executions, 3 s; corrected: with at most 6 preemptions 763135, 135 s.
///
/// Seen to fail with: the same; the cpumask left by a CPU that has the address space loaded.
#[test]
fn a_cpu_told_by_two_at_once_forgets_both_pages() {
    explore(&[PcidSupport::On], |machine| {
        let cpu2 = machine.on(CPU[2]);
        cpu2.run(&machine.mm);
        cpu2.use_page(0);
        cpu2.use_page(1);
        let first = meanwhile(&machine, CPU[0], |cpu0| cpu0.unmap(0));
        let second = meanwhile(&machine, CPU[1], |cpu1| cpu1.unmap(1));
        cpu2.use_page(0);
        cpu2.use_page(1);
        join(first);
        join(second);
        cpu2.use_page(0);
        cpu2.use_page(1);
        machine.check_at_rest();
    });
}

/// CPU 1 is lazy and speculates, wakes, or leaves, while the table goes.
///
/// 3690 executions, 0.2 s; corrected: 210844, 17 s.
///
/// Seen to fail with: lazy CPUs not told of tables.
#[test]
fn no_speculation_on_a_lazy_cpu_walks_through_a_freed_table() {
    for wakes in [false, true] {
        explore(&BOTH, move |machine| {
            let cpu1 = machine.on(CPU[1]);
            cpu1.run(&machine.mm);
            cpu1.use_page(0);
            cpu1.go_lazy();
            let flusher = meanwhile(&machine, CPU[0], |cpu0| cpu0.free_table());
            cpu1.speculate();
            if wakes {
                cpu1.run(&machine.mm);
            } else {
                cpu1.leave();
            }
            cpu1.speculate();
            join(flusher);
            cpu1.speculate();
            machine.check_at_rest();
        });
    }
}

/// The flush of tables takes CPU 1, which is elsewhere, out of the cpumask while it comes back
/// (Linux on powerpc, 2020).
///
/// 1562 executions, 0.08 s; corrected: 49680, 4.1 s.
///
/// Seen to fail with: a slot kept although its generation is old.
#[test]
fn a_cpu_that_is_taken_out_of_the_cpumask_while_it_comes_back_never_walks_through_a_freed_table() {
    explore(&BOTH, |machine| {
        let cpu1 = machine.on(CPU[1]);
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        cpu1.run(&machine.other);
        let flusher = meanwhile(&machine, CPU[0], |cpu0| cpu0.free_table());
        cpu1.run(&machine.mm);
        cpu1.speculate();
        join(flusher);
        cpu1.speculate();
        machine.check_at_rest();
    });
}

/// The batch is flushed on those who were in the cpumask when the entry was cleared; who comes
/// later sees the generation.
///
/// 952 executions, 0.05 s; corrected: 27069, 2.3 s.
///
/// Seen to fail with: an `add_mm` that raises no generation.
#[test]
fn a_cpu_that_comes_back_during_the_flush_of_a_reclaim_batch_never_uses_the_freed_page() {
    explore(&BOTH, |machine| {
        let cpu1 = machine.on(CPU[1]);
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        cpu1.run(&machine.other);
        let reclaim = meanwhile(&machine, CPU[0], |cpu0| cpu0.reclaim(0));
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        join(reclaim);
        cpu1.use_page(0);
        machine.check_at_rest();
    });
}

/// The same for a CPU that was never here: it joins the cpumask before the batch copies it, or
/// walks after the clearing.
///
/// 836 executions, 0.04 s; corrected: 9598, 0.8 s.
///
/// Seen to fail with: an `add_mm` that copies the cpumask before it raises the generation.
#[test]
fn a_cpu_that_comes_for_the_first_time_while_a_page_is_reclaimed_never_uses_it_once_freed() {
    explore(&BOTH, |machine| {
        let reclaim = meanwhile(&machine, CPU[0], |cpu0| cpu0.reclaim(0));
        let cpu1 = machine.on(CPU[1]);
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        join(reclaim);
        cpu1.use_page(0);
        machine.check_at_rest();
    });
}

/// CPU 1 uses the page a last time and goes elsewhere, and a full flush takes it out of the
/// cpumask. A batch that does not find it there frees without asking it. Nothing but the cpumask
/// orders the two.
///
/// 3962 executions, 0.3 s; corrected: with at most 6 preemptions 228192, 33 s.
///
/// Seen to fail with: the cpumask copied without acquire, with the corrected loom only.
#[test]
fn reclaim_that_finds_no_cpu_in_the_cpumask_frees_after_the_last_use_of_the_cpu_that_was_there() {
    explore(&BOTH, |machine| {
        let cpu1 = machine.on(CPU[1]);
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        let reclaim = meanwhile(&machine, CPU[0], |cpu0| cpu0.reclaim(0));
        cpu1.use_page(0);
        cpu1.stop();
        machine.on(CPU[2]).flush_all();
        join(reclaim);
        machine.check_at_rest();
    });
}

/// Whoever finds no deferred flush outstanding may conclude that none is: a flush never marks a
/// later one as done.
///
/// 676 executions, 0.05 s; corrected: 8494, 0.6 s.
///
/// Seen to fail with: a `deferred_flushes_done` that overwrites; a slot raised to a generation read
/// after the flush.
#[test]
fn a_deferred_flush_noted_while_an_earlier_one_is_made_up_for_stays_outstanding() {
    explore(&BOTH, |machine| {
        let cpu1 = machine.on(CPU[1]);
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        cpu1.use_page(1);
        let _never_flushed = machine.on(CPU[0]).reclaim_without_flush(0);
        let reclaim = meanwhile(&machine, CPU[0], |cpu0| {
            let _never_flushed = cpu0.reclaim_without_flush(1);
        });
        cpu1.make_up_for_reclaim();
        join(reclaim);
        assert!(!cpu1.remembers(0), "the first was made up for");
        if cpu1.remembers(1) {
            assert!(machine.mm.has_deferred_flushes(), "the second was marked as done, and is not");
        }
        machine.check_at_rest();
    });
}

/// The address space ends while CPU 1, which borrows it, leaves by itself. Its root is used again
/// only when no walk of CPU 1 can follow, nor be still under way. Nothing else orders the two if
/// CPU 1 is found elsewhere.
///
/// 1316 executions, 0.09 s; corrected: 44978, 5.3 s.
///
/// Seen to fail with: `loaded_mm` stored without release, or read by `may_have_loaded` without
/// acquire.
#[test]
fn a_root_is_used_again_only_after_the_last_walk_of_a_cpu_that_leaves_by_itself() {
    explore(&BOTH, |machine| {
        let cpu1 = machine.on(CPU[1]);
        cpu1.run(&machine.mm);
        cpu1.go_lazy();
        let exit = meanwhile(&machine, CPU[0], |cpu0| cpu0.exit());
        cpu1.speculate();
        cpu1.leave();
        cpu1.speculate();
        join(exit);
        cpu1.speculate();
        machine.check_at_rest();
    });
}

/// CPU 1 goes elsewhere while the table goes: it is told as long as CR3 leads there.
///
/// 118 executions, 0.01 s; corrected: 1286, 0.2 s.
///
/// Seen to fail with: the cpumask left before CR3 changes.
#[test]
fn no_speculation_on_a_cpu_on_its_way_out_walks_through_a_freed_table() {
    explore(&BOTH, |machine| {
        let cpu1 = machine.on(CPU[1]);
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        let flusher = meanwhile(&machine, CPU[0], |cpu0| cpu0.free_table());
        cpu1.run(&machine.other);
        join(flusher);
        machine.check_at_rest();
    });
}

/// CPU 1 is switched off while the table goes: it is told as long as CR3 leads there, and not
/// waited for afterwards.
///
/// 896 executions, 0.06 s; corrected: 5240, 0.3 s.
///
/// Seen to fail with: the CPU taken for off before CR3 changes.
#[test]
fn a_cpu_that_is_switched_off_walks_through_no_table_that_is_free() {
    explore(&BOTH, |machine| {
        let cpu1 = machine.on(CPU[1]);
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        let flusher = meanwhile(&machine, CPU[0], |cpu0| cpu0.free_table());
        cpu1.speculate();
        cpu1.go_offline();
        join(flusher);
        machine.check_at_rest();
    });
}

/// CPU 1 was here, is off, and comes back to the same address space while a page goes: told or not,
/// it does not use the page once it is free.
///
/// 2518 executions, 0.2 s; corrected: 150 854, 8 s.
///
/// Seen to fail with: SWITCHING not announced. (The fence of `switch_mm` is not missed here: no
/// slot is believed after a start, so CR3 is loaded with a flush, which is serialising.)
#[test]
fn a_cpu_that_is_switched_on_again_uses_nothing_that_was_freed_while_it_was_off() {
    explore(&BOTH, |machine| {
        let cpu1 = machine.on(CPU[1]);
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        cpu1.go_offline();
        let flusher = meanwhile(&machine, CPU[0], |cpu0| cpu0.unmap(0));
        cpu1.start();
        cpu1.run(&machine.mm);
        cpu1.use_page(0);
        join(flusher);
        cpu1.use_page(0);
        machine.check_at_rest();
    });
}
