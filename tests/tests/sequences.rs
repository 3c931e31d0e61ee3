//! Properties of sequences on the hosted machine, of those made from any bytes and of those that
//! the generator makes.

use arbitrary::{Arbitrary, Unstructured};
use mmu_adapter::{Trial, judge, judge_in, shrink};
use mmu_hosted::{MachineFault, Op, Run, Sequence, Telling, Verdict, generate};
use proptest::collection::vec;
use proptest::prelude::{
    ProptestConfig, Strategy, any, prop_assert, prop_assert_eq, prop_assume, prop_oneof, proptest,
};

/// Sequences of either kind: from bytes, as a fuzzer would have them, and made up.
fn sequences(nr_steps: usize) -> impl Strategy<Value = Sequence> {
    let bytes = vec(any::<u8>(), 0..10 + 16 * nr_steps).prop_map(|bytes| of(&bytes));
    let made_up = (any::<u64>(), 1..5u32).prop_map(move |(seed, nr_cpus)| generate(seed, nr_cpus, nr_steps));
    prop_oneof![bytes, made_up]
}

fn of(bytes: &[u8]) -> Sequence {
    Sequence::arbitrary(&mut Unstructured::new(bytes)).expect("any bytes are a sequence")
}

/// The byte in the place of an operation that says that there is none, but quirks of the machine.
const NO_STEP: u8 = 255;

fn trial(fault: MachineFault) -> Trial {
    Trial { fault, ..Trial::default() }
}

/// All that a run reports.
fn told(run: &Run) -> String {
    match &run.verdict {
        Verdict::Panicked(words) => format!("panic: {words}"),
        Verdict::Ended(outcome) => {
            let violations: Vec<_> = outcome.found.told.iter().map(ToString::to_string).collect();
            let counts =
                (outcome.found.count, outcome.leaked_frames, outcome.leaked_tables, outcome.double_frees);
            format!("{counts:?}\n{}", violations.concat())
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn any_bytes_are_a_sequence_that_survives_its_text_and_its_bytes(bytes in vec(any::<u8>(), 0..3000)) {
        let sequence = of(&bytes);
        let text = sequence.to_string();
        prop_assert_eq!(Sequence::parse(&text), Ok(sequence.clone()), "{}", text);
        prop_assert_eq!(Sequence::from_bytes(&sequence.to_bytes()), sequence);
    }

    #[test]
    fn what_the_generator_makes_up_survives_as_bytes(seed in any::<u64>(), nr_cpus in 1..9u32) {
        let sequence = generate(seed, nr_cpus, 200);
        let text = sequence.to_string();
        prop_assert_eq!(Sequence::parse(&text), Ok(sequence.clone()), "{}", text);
        // A few name more CPUs, or more pages at once, than bytes can.
        let pages = text.split('+').skip(1).filter_map(|rest| rest.split([' ', '\n']).next()?.parse::<u64>().ok());
        prop_assume!(sequence.nr_cpus <= 8 && pages.max() <= Some(2048));
        prop_assert_eq!(Sequence::from_bytes(&sequence.to_bytes()), sequence);
    }

    #[test]
    fn a_step_changed_in_its_bytes_changes_no_other(
        seed in any::<u64>(), at in 0..40usize, byte in 0..16usize, value in any::<u8>()
    ) {
        let before = Sequence::from_bytes(&generate(seed, 4, 40).to_bytes());
        let mut bytes = before.to_bytes();
        // Before the steps are the quirks, if there are any.
        let first = bytes.len() - 16 * before.steps.len();
        bytes[first + 16 * at + byte] = value;
        let after = Sequence::from_bytes(&bytes);
        let mut expected = before.steps;
        if (byte, value) == (1, NO_STEP) {
            expected.remove(at);
        } else {
            expected[at] = after.steps[at];
        }
        prop_assert_eq!(after.steps, expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn no_sequence_violates_a_rule(sequence in sequences(100)) {
        let run = judge(&sequence).expect("memory");
        prop_assert!(run.verdict.is_clean(), "{}\n{}", told(&run), sequence);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]

    #[test]
    fn a_run_is_decided_by_its_sequence_alone(sequence in sequences(60)) {
        for fault in [MachineFault::Absent, MachineFault::SkipFlush, MachineFault::DropIpi] {
            let all = Trial { telling: Telling::All, ..trial(fault) };
            let (one, other) = (judge_in(&sequence, all).expect("memory"), judge_in(&sequence, all).expect("memory"));
            prop_assert_eq!(told(&one), told(&other));
            prop_assert!(one.events == other.events, "{:?}: two runs of one sequence differ\n{}", fault, sequence);
            prop_assert_eq!(one.reached, other.reached);
            // Recording more changes nothing.
            let last = judge_in(&sequence, trial(fault)).expect("memory");
            prop_assert_eq!(told(&one), told(&last));
        }
    }
}

#[test]
fn shrinking_keeps_the_sort_of_failure_and_leaves_no_step_that_can_go() {
    let mut sorts = Vec::new();
    for fault in [MachineFault::SkipFlush, MachineFault::DropIpi] {
        let trial = trial(fault);
        let failing = (0..60).map(|seed| generate(seed, 4, 80)).filter_map(|sequence| {
            let verdict = judge_in(&sequence, trial).expect("memory").verdict;
            (!verdict.is_clean()).then_some((sequence, verdict))
        });
        for (sequence, verdict) in failing.take(6) {
            let sort = verdict.sort();
            let (shrunk, shown) = shrink(&sequence, trial, verdict).expect("memory");
            assert_eq!(shown.sort(), sort, "{fault:?}\n{sequence}");
            assert!(shrunk.steps.len() < sequence.steps.len(), "{shrunk}");
            let again = judge_in(&shrunk, trial).expect("memory").verdict;
            assert_eq!(again.sort(), sort, "what was shrunk does not replay: {shrunk}");
            for at in 0..shrunk.steps.len() {
                let mut shorter = shrunk.clone();
                shorter.steps.remove(at);
                let verdict = judge_in(&shorter, trial).expect("memory").verdict;
                assert_ne!(verdict.sort(), sort, "step {at} could go: {shrunk}");
            }
            sorts.push(sort);
        }
    }
    assert!(sorts.len() >= 8, "few sequences fail: {sorts:?}");
}

/// Sequences that the fuzzer once found, each with the fault that was planted.
const REPRODUCERS: [(&str, MachineFault, &str); 2] = [
    ("flush-skipped", MachineFault::SkipFlush, include_str!("../reproducers/flush-skipped.sequence")),
    ("interrupt-lost", MachineFault::DropIpi, include_str!("../reproducers/interrupt-lost.sequence")),
];

#[test]
fn a_saved_reproducer_tells_the_same_story_three_times_and_nothing_without_its_fault() {
    for (name, fault, text) in REPRODUCERS {
        let sequence = Sequence::parse(text).unwrap_or_else(|error| panic!("{name}:{error}"));
        let story = || told(&judge_in(&sequence, trial(fault)).expect("memory"));
        let first = story();
        assert!(first.contains("violation: "), "{name} shows nothing: {first}");
        assert_eq!(first, story(), "{name}");
        assert_eq!(first, story(), "{name}");
        let clean = judge(&sequence).expect("memory");
        assert!(clean.verdict.is_clean(), "{name} without the fault: {}", told(&clean));
    }
}

/// Sequences of which the checker once said what was not so.
const ACCUSED: [(&str, &str); 1] =
    [("owed-beside-discard", include_str!("../reproducers/owed-beside-discard.sequence"))];

#[test]
fn a_sequence_that_was_accused_wrongly_is_clean() {
    for (name, text) in ACCUSED {
        let sequence = Sequence::parse(text).unwrap_or_else(|error| panic!("{name}:{error}"));
        let run = judge(&sequence).expect("memory");
        assert!(run.verdict.is_clean(), "{name}: {}", told(&run));
    }
}

#[test]
fn many_short_calls_in_a_row_are_not_one_long_one() {
    let bytes: Vec<u8> =
        [0; 10].into_iter().chain([0, 7].into_iter().chain([0; 14]).cycle().take(16 * 200)).collect();
    let sequence = of(&bytes);
    assert!(sequence.steps.iter().all(|step| matches!(step.op, Op::Exit(_))), "{sequence}");
    let run = judge(&sequence).expect("memory");
    assert!(run.verdict.is_clean(), "{}", told(&run));
}

#[test]
fn bytes_reach_every_operation() {
    let mut seen = [false; Op::WORDS.len()];
    for number in 0..NO_STEP {
        let mut bytes = [0; 26];
        bytes[11] = number;
        seen[of(&bytes).steps[0].op.number()] = true;
    }
    assert!(seen.iter().all(|seen| *seen), "{seen:?}");
}

/// As when there were three: saved bytes name others only by numbers that meant one of those.
#[test]
fn a_number_that_is_no_address_space_means_what_it_meant_when_there_were_3() {
    for number in 0..16u8 {
        let mut bytes = [0; 26];
        (bytes[11], bytes[12]) = (10, number);
        let meant = if number < mmu_hosted::NR_MMS { number } else { number % 3 };
        assert_eq!(of(&bytes).steps[0].op.mm(), Some(mmu_hosted::MmId(meant)), "{number}");
    }
}

/// Saved bytes keep their meaning when operations are added; 255, which was one more, is no step
/// now.
#[test]
fn a_byte_that_is_no_number_of_an_operation_means_what_it_meant_when_there_were_17() {
    assert_eq!(Op::WORDS.len(), 22);
    let mut bytes = [0; 26];
    bytes[11] = NO_STEP;
    assert!(of(&bytes).steps.is_empty());
    for number in 0..NO_STEP {
        bytes[11] = number;
        let meant = usize::from(number) % if usize::from(number) < Op::WORDS.len() { 256 } else { 17 };
        assert_eq!(of(&bytes).steps[0].op.number(), meant, "byte {number}");
    }
}
