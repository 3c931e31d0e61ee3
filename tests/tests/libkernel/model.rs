//! Random calls, fork with copy-on-write among them, against a model that knows a word for each
//! page and nothing else. The kit looks whether programs reach what they must not; this looks
//! whether they reach what they should.

use mmu_hosted::Rights;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest};
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use proptest::{collection, sample};

use crate::world::{Op, PLACES, Reached, To, World};

fn op() -> impl Strategy<Value = Op> {
    let cpu = || 0..4usize;
    // Most of it happens around the border.
    let place = || prop_oneof![1 => 0..PLACES, 3 => 26..38u64];
    let part = || (place(), 1..24u64);
    let rights = || sample::select(vec![Rights::Read, Rights::Write, Rights::Write]);
    let to = prop_oneof![Just(To::Anywhere), place().prop_map(To::Place)];
    prop_oneof![
        4 => (part(), rights()).prop_map(|((from, len), rights)| Op::Mmap { from, len, rights }),
        // Also across the gap.
        1 => (0..PLACES, 1..PLACES).prop_map(|(from, len)| Op::Munmap { from, len }),
        2 => part().prop_map(|(from, len)| Op::Munmap { from, len }),
        2 => (place(), 1..6u64, rights()).prop_map(|(from, len, rights)| Op::Mprotect { from, len, rights }),
        3 => (place(), 1..6u64, 1..12u64, to)
            .prop_map(|(from, len, new_len, to)| Op::Mremap { from, len, new_len, to }),
        1 => Just(Op::Fork),
        1 => Just(Op::Exit),
        16 => (cpu(), place()).prop_map(|(cpu, place)| Op::Read { cpu, place }),
        24 => (cpu(), place(), 1..u64::MAX).prop_map(|(cpu, place, word)| Op::Write { cpu, place, word }),
    ]
}

fn config() -> ProptestConfig {
    let asked = ProptestConfig::default();
    ProptestConfig { failure_persistence: None, cases: asked.cases.max(200), ..asked }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn processes_of_libkernel_see_their_own_words(
        ops in collection::vec((0..4usize, op()), 1..160),
        seed in any::<u64>(),
        unmapped_first in collection::vec(0..4usize, 0..3),
    ) {
        let mut world = World::new(seed);
        for (which, op) in ops {
            world.take(which, op);
            world.compare();
        }
        for which in unmapped_first {
            world.unmap_all(which);
            world.compare();
        }
        world.end();
    }
}

/// Sequences that reach nothing prove nothing.
#[test]
fn the_sequences_come_to_something() {
    let mut runner = TestRunner::deterministic();
    let sequences = collection::vec((0..4usize, op()), 160);
    let mut all = Vec::new();
    for seed in 0..100 {
        let mut world = World::new(seed);
        for (which, op) in sequences.new_tree(&mut runner).expect("a sequence").current() {
            world.take(which, op);
        }
        all.push(world.reached);
        world.end();
    }
    let of = |count: fn(&Reached) -> usize| all.iter().map(count).sum::<usize>();
    let counts = [
        ("mprotect inside an area", of(|reached| reached.protected)),
        ("mremap in place", of(|reached| reached.resized)),
        ("mremap that moves", of(|reached| reached.moved)),
        ("fork", of(|reached| reached.forked)),
        ("shared pages copied", of(|reached| reached.copied)),
        ("pages no longer shared", of(|reached| reached.reused)),
    ];
    assert!(counts.iter().all(|(_, count)| *count >= 20), "{counts:?}");
}
