//! What the image does once the machine is up: `workload=NAME` on the command line.

use x86_64::instructions::interrupts;

use crate::exit::Verdict;
use crate::options::Options;
use crate::{println, self_test, watchdog};

/// Keys that the command line may hold.
const KNOWN_OPTIONS: [&str; 2] = ["workload", "watchdog"];

/// Runs the workload that `options` names; without a name, the self-test.
pub(crate) fn run(options: &Options<'_>) -> Verdict {
    if let Some(name) = options.unknown(&KNOWN_OPTIONS).next() {
        println!("workload: unknown option \"{name}\"; known are {KNOWN_OPTIONS:?}");
        return Verdict::Usage;
    }
    match options.get("workload").unwrap_or("self-test") {
        "self-test" => self_test::run(),
        "hang" => hang(),
        "panic" => panic!("asked for by the command line"),
        "overflow" => {
            println!("workload: the stack held {} calls and did not overflow", overflow(0));
            Verdict::Violation
        }
        name => {
            println!("workload: unknown workload \"{name}\"; known are self-test, hang, panic, overflow");
            Verdict::Usage
        }
    }
}

/// Shows that the watchdog ends a run whose CPU spins with interrupts off.
fn hang() -> ! {
    watchdog::note(&"hanging on purpose");
    interrupts::disable();
    loop {
        core::hint::spin_loop();
    }
}

/// Shows that a stack overflow ends in a report, not in a reset.
#[expect(unconditional_recursion, reason = "the point of it")]
fn overflow(depth: u64) -> u64 {
    let page = core::hint::black_box([depth; 128]);
    overflow(depth + 1) + page[0]
}
