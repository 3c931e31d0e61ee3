//! Sequences on the small kernel: they do the same every time, and what the checker says of them.

use std::sync::Arc;

use mmu_adapter::{ShimKernel, Trial, execute, execute_with, judge_in, views};
use mmu_gather::pagetable::Level;
use mmu_hosted::{
    Calls, Detail, Event, HostedMachine, MachineFault, Op, Sequence, Supply, Telling, What, generate,
    with_cpus_going_off,
};
use mmu_kernel_shim::Config;

const LENGTH: usize = 160;

#[test]
fn random_sequences_are_clean() {
    for seed in 0..120 {
        for nr_cpus in [1, 2, 4] {
            let sequence = generate(seed, nr_cpus, LENGTH);
            let outcome = execute(&sequence).expect("memory");
            assert!(outcome.is_clean(), "seed {seed}, {nr_cpus} CPUs: {outcome:?}\n{sequence}");
        }
    }
}

#[test]
fn sequences_in_which_cpus_go_off_and_come_back_are_clean() {
    let mut calls = Calls::default();
    for (seed, nr_cpus) in (0..200).zip([2, 3, 4].into_iter().cycle()) {
        let sequence = with_cpus_going_off(generate(seed, nr_cpus, LENGTH));
        let outcome = execute(&sequence).expect("memory");
        assert!(outcome.is_clean(), "seed {seed}: {outcome:?}\n{sequence}");
        calls.add(&outcome.calls);
    }
    assert!(calls.of("offline").done > 1000 && calls.of("online").done > 700, "{calls}");
}

/// Calls of this kernel share the map lock, and one may return while another has still to flush.
#[test]
fn what_the_runner_says_of_calls_that_met_no_other_holds_for_calls_that_share_a_lock() {
    for seed in 0..1500 {
        let boot = |machine: &Arc<HostedMachine>| {
            Ok(ShimKernel::boot(machine, Config::default())?.with_promises_by_the_runner())
        };
        let sequence = generate(seed, 4, LENGTH);
        let outcome = mmu_hosted::execute(&sequence, mmu_hosted::Trial::default(), boot).expect("memory");
        assert!(outcome.is_clean(), "seed {seed}: {outcome:?}\n{sequence}");
    }
}

/// What moves to the addresses that another call takes down is there when that one returns.
#[test]
fn a_move_to_addresses_that_are_being_unmapped_is_no_failure_of_the_unmapping() {
    let boot = |machine: &Arc<HostedMachine>| {
        Ok(ShimKernel::boot(machine, Config::default())?.with_promises_by_the_runner())
    };
    for seed in 0..600 {
        let text = format!(
            "mmu-gather sequence 1\ncpus 4\nseed {seed}\nmmu pcid intel keeper\n\
             0 map m0 40000000+8 anon write\n1 map m0 50000000+8 anon write\n2 switch m0\n3 switch m0\nsync\n\
             2 touch 40000000+8 write\n2 touch 50000000+8 write\n3 sync\n0 preempt {}\n\
             0 unmap m0 50000000+8\n1 remap m0 40000000+8 50000000\n\
             2 touch 50000000+8 write\n3 touch 50000000+8 write\nend\n",
            seed % 40
        )
        .replace("\nsync", "\n3 sync");
        let sequence = Sequence::parse(&text).expect("a good text");
        let outcome = mmu_hosted::execute(&sequence, mmu_hosted::Trial::default(), boot).expect("memory");
        assert!(outcome.is_clean(), "seed {seed}: {outcome:?}\n{sequence}");
    }
}

/// A stack grows into what another call has just found empty, in the child of a fork, too.
#[test]
fn a_stack_that_grows_after_a_fork_is_no_failure_of_an_unmapping_below_it() {
    let boot = |machine: &Arc<HostedMachine>| {
        Ok(ShimKernel::boot(machine, Config::default())?.with_promises_by_the_runner())
    };
    for seed in 0..600 {
        let text = format!(
            "mmu-gather sequence 1\ncpus 4\nseed {seed}\nmmu pcid intel keeper\n\
             0 map m0 40010000+4 stack write\n3 sync\n0 fork m0 m1\n3 sync\n2 switch m1\n3 switch m1\n3 sync\n\
             0 preempt {}\n0 unmap m1 4000c000+4\n2 touch 4000c000+4 write\n3 touch 4000c000+4 write\nend\n",
            seed % 12
        );
        let sequence = Sequence::parse(&text).expect("a good text");
        let outcome = mmu_hosted::execute(&sequence, mmu_hosted::Trial::default(), boot).expect("memory");
        assert!(outcome.is_clean(), "seed {seed}: {outcome:?}\n{sequence}");
    }
}

/// Whether a call is preempted in time (rule G7) can only be told where one changes more than one
/// table has.
#[test]
fn every_call_that_changes_small_pages_is_made_up_with_more_of_them_than_a_table_has() {
    let calls = ["unmap", "discard", "protect", "fork", "reclaim"];
    let mut times = [0; 5];
    // A call that went on on another CPU is not counted to its end.
    for seed in 0..4000 {
        let mut sequence = generate(seed, 4, LENGTH);
        // That is how such a sequence begins; others come to such a place rarely.
        if !matches!(sequence.steps[0].op, Op::Map(_, range, ..) if range.nr_pages() > 512) {
            continue;
        }
        sequence.steps.truncate(32);
        let trial = Trial { telling: Telling::All, ..Trial::default() };
        let run = judge_in(&sequence, trial).expect("memory");
        assert!(run.verdict.is_clean(), "seed {seed}: {:?}\n{sequence}", run.verdict);
        for (number, step) in sequence.steps.iter().enumerate() {
            if let Some(call) = calls.iter().position(|call| *call == Op::WORDS[step.op.number()])
                && small_pages_changed(&run.events, number) > 512
            {
                times[call] += 1;
            }
        }
    }
    assert!(times.iter().all(|times| *times >= 2), "{calls:?} {times:?}");
}

/// How many 4 KiB leaves the call of step `number` cleared, or took rights from.
fn small_pages_changed(events: &[Event], number: usize) -> usize {
    let begun = events
        .iter()
        .skip_while(|event| !matches!(event.what, What::Detail(Detail::Began(index, _)) if index == number));
    let Some(cpu) = begun.clone().next().map(|event| event.cpu) else { return 0 };
    let done = |event: &&Event| matches!(event.what, What::Detail(Detail::Ended(index)) if index == number);
    let changed = |event: &Event| {
        let small = Level::Pte;
        matches!(event.what, What::Detail(Detail::Cleared(_, level, _) | Detail::Restricted(_, level)) if level == small)
    };
    begun.take_while(|event| !done(event)).filter(|event| event.cpu == cpu && changed(event)).count()
}

/// Reclaim once took a thousand pages and more without a preemption point, when huge ones had been
/// split (rule G7).
#[test]
fn reclaim_of_a_large_range_can_be_preempted() {
    let text = "mmu-gather sequence 1\ncpus 4\nseed 15541764258020549807\nmmu pcid intel keeper\n\
        2 map m2 7fffe00000+512 huge write\n0 remap m2 7fffe00000+512 401f8000\n2 touch 331000+3 write\n\
        0 map m0 40000000+1024 huge write\n0 touch c0015000+2 write\n3 touch 1d000+2 read\n\
        2 map m2 4000c000+5 anon write\n1 movestack m0 40004000+6 152\n1 reclaim m0 m2 40000000+1024\nend\n";
    let sequence = Sequence::parse(text).expect("a sequence");
    let outcome = execute(&sequence).expect("memory");
    assert!(outcome.is_clean(), "{outcome:?}");
}

#[test]
fn a_machine_that_skips_flushes_or_loses_interrupts_is_found_out() {
    for fault in [MachineFault::SkipFlush, MachineFault::DropIpi] {
        let found = (0..40).find(|seed| {
            let outcome = execute_with(&generate(*seed, 4, LENGTH), fault).expect("memory");
            outcome.found.count > 0
        });
        assert!(found.is_some(), "{fault:?} was not noticed in 40 sequences");
    }
}

#[test]
fn the_same_sequence_tells_the_same_story_every_time() {
    let failing = (0..40).map(|seed| generate(seed, 4, LENGTH)).find(|sequence| {
        let outcome = execute_with(sequence, MachineFault::DropIpi).expect("memory");
        outcome.found.count > 0
    });
    let failing = failing.expect("lost interrupts are noticed");
    let story = || {
        let found = execute_with(&failing, MachineFault::DropIpi).expect("memory").found;
        found.told.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let first = story();
    assert!(!first.is_empty());
    assert_eq!(first, story());
    assert_eq!(first, story());
}

/// Rule G4: what is refused to a gather changes when it flushes, and nothing that a program can
/// see.
#[test]
fn refused_batch_pages_are_invisible_in_the_result() {
    for seed in 0..60 {
        let sequence = generate(seed, 3, LENGTH);
        let (outcome, plenty) = views(&sequence, Supply::Always).expect("memory");
        assert!(outcome.is_clean(), "seed {seed}: {outcome:?}");
        assert!(plenty.iter().any(|view| !view.areas.is_empty()), "seed {seed}: nothing to be seen");
        for supply in [Supply::Never, Supply::ExceptEvery(2), Supply::ExceptEvery(3)] {
            let (outcome, short) = views(&sequence, supply).expect("memory");
            assert_eq!(short.len(), plenty.len());
            for (sync, (short, plenty)) in short.iter().zip(&plenty).enumerate() {
                assert_eq!(short, plenty, "seed {seed}, {supply:?}, sync {sync}\n{sequence}");
            }
            assert!(outcome.is_clean(), "seed {seed}, {supply:?}: {outcome:?}");
        }
    }
}
