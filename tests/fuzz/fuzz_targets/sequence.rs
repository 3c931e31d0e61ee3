//! Bytes as a sequence on the hosted machine: any violation, leak or panic is a crash.
//!
//! `MACHINE_FAULT=skip-flush` or `drop-ipi` plants one, to see it found.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mmu_adapter::execute_with;
use mmu_hosted::{MachineFault, Sequence};

static FAULT: LazyLock<MachineFault> = LazyLock::new(|| match std::env::var("MACHINE_FAULT").as_deref() {
    Err(_) => MachineFault::Absent,
    Ok("skip-flush") => MachineFault::SkipFlush,
    Ok("drop-ipi") => MachineFault::DropIpi,
    Ok("local-flush-only") => MachineFault::LocalFlushOnly,
    Ok(other) => panic!("MACHINE_FAULT is skip-flush, drop-ipi or local-flush-only, not {other}"),
});

fuzz_target!(|sequence: Sequence| {
    let outcome = execute_with(&sequence, *FAULT).expect("memory for a machine");
    if !outcome.is_clean() {
        for violation in &outcome.found.told {
            eprint!("{violation}");
        }
        panic!(
            "violations {}, leaked frames {}, leaked tables {}, double frees {}\n{sequence}",
            outcome.found.count, outcome.leaked_frames, outcome.leaked_tables, outcome.double_frees
        );
    }
});
