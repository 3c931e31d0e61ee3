//! The far corners: each is reached by a sequence of a few lines, and by sequences that are made
//! up.

use mmu_adapter::judge;
use mmu_hosted::{Boundaries, Boundary, Choices, Run, Sequence, Verdict, generate};

fn run(cpus: u32, mmu: &str, steps: &str) -> Run {
    let text = format!("mmu-gather sequence 1\ncpus {cpus}\nseed 1\nmmu {mmu}\n{steps}\nend\n");
    let sequence = Sequence::parse(&text).expect("a sequence");
    let run = judge(&sequence).expect("memory");
    assert!(run.verdict.is_clean(), "{:?}\n{text}", run.verdict);
    run
}

fn assert_reached(run: &Run, corners: &[Boundary]) {
    for corner in corners {
        assert!(run.reached.has(*corner), "{corner} was not reached");
    }
}

fn done(run: &Run, word: &str) -> u64 {
    match &run.verdict {
        Verdict::Ended(outcome) => outcome.calls.of(word).done,
        Verdict::Panicked(words) => panic!("{words}"),
    }
}

/// Pages on both sides of 2^48, which two tables of 512 GiB entries lead to.
const HIGH: &str = "0 map m0 fffffffff000+2 anon write\n0 switch m0\n0 sync\n0 touch fffffffff000+2 write\n\
                    0 sync\n0 unmap m0 fffffffff000+2\n0 sync";

#[test]
fn with_five_levels_programs_use_high_addresses_and_tables_of_512_gib_entries_go() {
    assert_reached(&run(2, "pcid intel keeper la57", HIGH), &[Boundary::HighAddress, Boundary::FifthLevel]);
}

#[test]
fn with_four_levels_the_same_addresses_are_refused() {
    let run = run(2, "pcid intel keeper", HIGH);
    assert!(!run.reached.has(Boundary::HighAddress) && !run.reached.has(Boundary::FifthLevel));
    assert_eq!((done(&run, "map"), done(&run, "touch"), done(&run, "unmap")), (0, 0, 0));
}

#[test]
fn pages_of_1_gib_are_split_by_calls_on_parts_copied_by_fork_and_cleared_whole() {
    let steps = "0 map m0 40000000+524288 giant write\n0 switch m0\n1 switch m0\n0 sync\n\
                 0 touch 40000000+1 write\n1 touch 7ffff000+2 read\n0 sync\n0 fork m0 m1\n0 sync\n\
                 0 unmap m0 40001000+1\n0 protect m0 40200000+512 read\n0 remap m0 40400000+3 20000000\n0 sync\n\
                 1 touch 40002000+2 write\n1 touch 40200000+1 read\n0 sync\n0 discard m0 80000000+262144\n0 sync\n\
                 1 touch 80000000+1 write\n0 sync\n0 discard m1 40000000+524288\n0 sync";
    let run = run(2, "pcid intel keeper", steps);
    assert_reached(&run, &[Boundary::GiantSplit, Boundary::GiantCleared]);
    assert_eq!((done(&run, "populate"), done(&run, "remap"), done(&run, "fork")), (1, 1, 1));
}

#[test]
fn more_large_pages_than_the_ceiling_are_flushed_for_at_both_strides() {
    let zeroes: String =
        (0..40).map(|page| format!("0 touch {:x}+1 read\n", 0x4000_0000 + (page << 21))).collect();
    let large = format!(
        "0 map m0 40000000+20480 zeroes write\n0 switch m0\n0 sync\n{zeroes}0 unmap m0 40000000+20480"
    );
    assert_reached(&run(1, "pcid intel keeper", &large), &[Boundary::LargeCeiling]);
    let giant = "0 map m0 40000000+9437184 giant write\n0 sync\n0 protect m0 40000000+9437184 none\n0 sync";
    assert_reached(&run(2, "pcid amd keeper", giant), &[Boundary::GiantCeiling]);
}

#[test]
fn more_tables_than_the_ceiling_go_at_once() {
    let touches: String =
        (0..40).map(|table| format!("0 touch {:x}+1 write\n", 0x4000_0000 + (table << 21))).collect();
    let steps = format!(
        "0 map m0 40000000+20480 anon write\n0 switch m0\n0 sync\n{touches}0 unmap m0 40000000+20480"
    );
    assert_reached(&run(1, "pcid intel keeper", &steps), &[Boundary::ManyTables]);
}

#[test]
fn a_read_finds_the_large_page_of_zeroes_and_a_write_replaces_it() {
    let steps = "0 map m0 200000+1024 zeroes write\n0 switch m0\n1 switch m0\n0 sync\n1 touch 200000+2 read\n\
                 0 sync\n0 touch 201000+1 write\n0 sync\n1 touch 201000+1 read\n0 touch 400000+1 write\n0 sync";
    assert_reached(&run(2, "pcid intel keeper", steps), &[Boundary::ZeroBlock, Boundary::ZeroBlockReplaced]);
}

#[test]
fn without_memory_for_a_large_page_the_one_of_zeroes_is_split() {
    let steps = "0 map m0 200000+512 zeroes write\n0 switch m0\n0 sync\n0 touch 200000+2 read\n0 sync\n\
                 0 touch 201000+1 write\n0 sync";
    let run = run(1, "pcid intel keeper frames=1100", steps);
    assert_reached(&run, &[Boundary::ZeroBlock, Boundary::Split]);
    assert!(!run.reached.has(Boundary::ZeroBlockReplaced));
}

#[test]
fn sixteen_pages_that_came_at_once_go_as_one_run() {
    let steps = "0 map m0 10000+40 folios write\n0 switch m0\n1 switch m0\n0 sync\n0 touch 10000+1 write\n\
                 1 touch 20000+1 write\n0 sync\n1 touch 10000+32 read\n0 sync\n0 discard m0 10000+16\n0 sync\n\
                 0 discard m0 21000+15\n0 sync\n1 touch 10000+32 write\n0 sync";
    assert_reached(&run(2, "pcid intel keeper", steps), &[Boundary::RunFreed]);
}

#[test]
fn more_address_spaces_than_pcids_take_them_from_one_another() {
    let steps: String = (0..8).map(|mm| format!("0 switch m{mm}\n")).collect();
    assert_reached(&run(1, "pcid intel keeper", steps.trim()), &[Boundary::SlotTaken]);
}

#[test]
fn a_flush_reaches_cpus_beyond_the_64th() {
    let steps = "0 map m0 10000+4 anon write\n0 switch m0\n129 switch m0\n64 switch m0\n0 sync\n\
                 129 touch 10000+4 write\n64 touch 10000+4 read\n0 sync\n0 unmap m0 10000+4\n0 sync\n129 lazy\n64 lazy";
    assert_reached(&run(130, "pcid intel keeper", steps), &[Boundary::ManyCpus]);
}

#[test]
fn few_frames_run_out_and_what_was_refused_can_be_tried_again() {
    let steps = "0 map m0 10000+320 anon write\n0 switch m0\n0 sync\n0 touch 10000+64 write\n\
                 0 touch 50000+64 write\n0 touch 90000+64 write\n0 touch d0000+64 write\n0 sync\n\
                 0 reclaim m0 m0 10000+320\n0 sync\n0 touch 10000+64 write\n0 sync\n0 discard m0 10000+320\n0 sync";
    let run = run(1, "pcid intel keeper frames=200", steps);
    assert_reached(&run, &[Boundary::FrameRefused, Boundary::SwappedIn]);
}

#[test]
fn exec_goes_on_with_a_new_stack_and_the_old_address_space_exits() {
    let steps = "0 map m0 10000+4 anon write\n0 switch m0\n1 switch m0\n0 sync\n0 touch 10000+4 write\n\
                 1 touch 10000+4 write\n1 lazy\n0 sync\n0 exec m0 20\n0 sync\n0 touch 7fffffdd0000+1 write\n\
                 1 wake\n0 sync\n0 unmap m0 10000+4\n0 exit m0\n0 sync";
    let run = run(2, "pcid intel keeper", steps);
    assert_eq!((done(&run, "exec"), done(&run, "exit")), (1, 1));
}

#[test]
fn sequences_that_are_made_up_reach_the_far_corners() {
    // A few more are reached by one sequence in some hundreds.
    const SOON: [Boundary; 12] = [
        Boundary::SlotTaken,
        Boundary::SlotTakenMidFlush,
        Boundary::ExitBesideReclaim,
        Boundary::FifthLevel,
        Boundary::HighAddress,
        Boundary::GiantCleared,
        Boundary::GiantSplit,
        Boundary::ZeroBlock,
        Boundary::ZeroBlockReplaced,
        Boundary::RunFreed,
        Boundary::FrameRefused,
        Boundary::AskedAgain,
    ];
    let mut reached = Boundaries::default();
    for number in 0..2000 {
        if SOON.into_iter().all(|corner| reached.has(corner)) {
            return;
        }
        let sequence = generate(Choices::new(number).bits(), 4, 160);
        let run = judge(&sequence).expect("memory");
        assert!(run.verdict.is_clean(), "{:?}\n{sequence}", run.verdict);
        reached = reached.or(run.reached);
    }
    let missed: Vec<_> = SOON.into_iter().filter(|corner| !reached.has(*corner)).collect();
    panic!("2000 sequences did not reach {missed:?}");
}
