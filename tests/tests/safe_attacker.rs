//! An attacker who may make every safe call, in any order, with any argument, and wants a page
//! freed that a CPU still uses.
//!
//! An honest kernel maps, runs programs, reclaims and unmaps; between its steps, and in the middle
//! of the engine's work, the attacker calls every safe function of the three crates that takes part
//! in state, on the gathers, contexts, batches, views and receipts that a kernel holds. The checker
//! of the paper kernel reports a page or a table that is freed while some CPU can reach it. This
//! file reports a CPU that still uses what a flush has promised to be gone, and a leak that was not
//! made on purpose.
#![forbid(unsafe_code)]

#[path = "attacker/moves.rs"]
mod moves;
#[path = "attacker/ops.rs"]
mod ops;
#[path = "attacker/world.rs"]
mod world;

use proptest::prelude::{ProptestConfig, Strategy, prop_assert, proptest};
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use ops::ops;
use world::{Reached, attack};

/// This many sequences, or more if PROPTEST_CASES asks for more.
fn config() -> ProptestConfig {
    let asked = ProptestConfig::default();
    ProptestConfig { failure_persistence: None, cases: asked.cases.max(12_000), ..asked }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn no_safe_call_in_any_order_frees_what_is_reachable_or_loses_a_flush(ops in ops(100)) {
        let found = attack(&ops);
        prop_assert!(found.is_ok(), "{}", found.unwrap_err());
    }
}

/// An attack that reaches nothing proves nothing: this is what the sequences must reach together.
#[test]
fn the_sequences_come_to_something() {
    let mut runner = TestRunner::deterministic();
    let sequences = ops(100);
    let all: Vec<Reached> = (0..400)
        .map(|_| {
            attack(&sequences.new_tree(&mut runner).expect("a sequence").current()).expect("nothing is found")
        })
        .collect();
    let of = |count: fn(&Reached) -> usize| all.iter().map(count).sum::<usize>();
    let counts = [
        ("pages freed", of(|reached| reached.pages_freed)),
        ("tables freed", of(|reached| reached.tables_freed)),
        ("interrupts", of(|reached| reached.interrupts)),
        ("nested flushes", of(|reached| reached.nested)),
        ("deferred flushes seen", of(|reached| reached.deferred)),
        ("forced flushes", of(|reached| reached.forced)),
        ("with nothing forgotten", of(|reached| usize::from(reached.nothing_forgotten))),
        ("panics as documented", of(|reached| reached.refused.len())),
    ];
    println!(
        "{counts:?} {:?}",
        all.iter().flat_map(|reached| &reached.refused).collect::<std::collections::BTreeSet<_>>()
    );
    for (what, count) in counts {
        assert!(count >= 10, "{what}: {count} of {counts:?}");
    }
}
