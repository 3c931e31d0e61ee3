//! A kernel that the conformance kit does not know: each mistake of an embedder is found.
//!
//! `cargo test -p mmu-hosted --test stranger` holds what the kit says of each to its words.

#[path = "../../kernel-shim/hosted/examples/stranger/ipis.rs"]
mod ipis;
#[path = "../../kernel-shim/hosted/examples/stranger/kernel.rs"]
mod kernel;
#[path = "../../kernel-shim/hosted/examples/stranger/kit.rs"]
mod kit;
#[path = "../../kernel-shim/hosted/examples/stranger/mistake.rs"]
mod mistake;

use mmu_hosted::{FuzzOptions, fuzz};

use kernel::Stranger;
use mistake::Mistake;

#[test]
fn every_mistake_of_a_stranger_is_found_and_a_kernel_without_one_is_clean() {
    let honest = [Mistake::Absent, Mistake::AbsentWithOwnIpis, Mistake::AbsentWithUsedLines];
    for mistake in Mistake::ALL {
        let options = FuzzOptions { sequences: 300, ..FuzzOptions::default() };
        let report = fuzz(&options, |machine| Ok(Stranger::with(machine, mistake))).expect("memory");
        assert_eq!(report.is_clean(), honest.contains(&mistake), "{mistake:?}: {report}");
    }
}
