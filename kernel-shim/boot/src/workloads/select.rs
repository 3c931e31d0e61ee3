//! What the image does once the machine is up: `workload=NAME` on the command line.

use mmu_kernel_shim::{Config, Misbehaviour};
use x86_64::instructions::interrupts;

use crate::arch::exit::Verdict;
use crate::checks::self_test;
use crate::cpu::watchdog;
use crate::machine::{BareMachine, PlantedFault};
use crate::options::Options;
use crate::println;
use crate::workloads::phases::{Length, Phases};
use crate::workloads::program;

/// Keys that the command line may hold.
const KNOWN_OPTIONS: [&str; 3] = ["workload", "watchdog", "fault"];
const KNOWN_WORKLOADS: &str = "full, short, threads, churn, lazy, rivals, swap, drill, measure, layout, self-test, hang, panic, overflow";
const KNOWN_FAULTS: &str = "none, skip-local-flush, skip-remote-flush, free-before-flush";

/// Runs the workload that `options` names; without a name, the self-test. `module` is what was
/// loaded beside the image.
pub(crate) fn run_workload(options: &Options<'_>, module: Option<&'static [u8]>) -> Verdict {
    if let Some(name) = options.unknown(&KNOWN_OPTIONS).next() {
        println!("workload: unknown option \"{name}\"; known are {KNOWN_OPTIONS:?}");
        return Verdict::Usage;
    }
    let Some((fault, misbehaviour)) = parse_fault(options.get("fault").unwrap_or("none")) else {
        println!("workload: unknown fault; known are {KNOWN_FAULTS}");
        return Verdict::Usage;
    };
    let phases: fn(Phases<'_>) -> Phases<'_> = match options.get("workload").unwrap_or("self-test") {
        "self-test" => return self_test::run_self_test(),
        "hang" => hang(),
        "panic" => panic!("asked for by the command line"),
        "overflow" => {
            println!("workload: the stack held {} calls and did not overflow", overflow(0));
            return Verdict::Violation;
        }
        // The drill comes first, and is left out where a fault is planted: its programs check
        // nothing.
        "full" => |phases| {
            phases
                .drill()
                .threads(Length::FULL)
                .churn(Length::FULL)
                .lazy(Length::FULL)
                .rivals(Length::FULL)
                .swap(Length::FULL)
                .measure()
        },
        "short" => |phases| {
            phases
                .drill()
                .threads(Length::SHORT)
                .churn(Length::SHORT)
                .lazy(Length::SHORT)
                .rivals(Length::SHORT)
                .swap(Length::SHORT)
                .measure()
        },
        "threads" => |phases| phases.threads(Length::FULL),
        "churn" => |phases| phases.churn(Length::FULL),
        "lazy" => |phases| phases.lazy(Length::FULL),
        "rivals" => |phases| phases.rivals(Length::FULL),
        "swap" => |phases| phases.swap(Length::FULL),
        "drill" => |phases| phases.drill(),
        "measure" => |phases| phases.measure(),
        "layout" => |phases| phases.layout(),
        name => {
            println!("workload: unknown workload \"{name}\"; known are {KNOWN_WORKLOADS}");
            return Verdict::Usage;
        }
    };
    let Some(machine) = BareMachine::new(fault) else {
        println!("workload: no memory is left for the kernel");
        return Verdict::Usage;
    };
    match program::boot(machine, Config { misbehaviour, ..Config::default() }) {
        Ok(kernel) => phases(Phases::new(kernel, module)).verdict(),
        Err(error) => {
            println!("workload: the kernel does not boot: {error}");
            Verdict::Usage
        }
    }
}

/// What a name plants in the machine, and in the kernel.
fn parse_fault(name: &str) -> Option<(PlantedFault, Misbehaviour)> {
    Some(match name {
        "none" => (PlantedFault::Absent, Misbehaviour::Absent),
        "skip-local-flush" => (PlantedFault::SkipLocalFlush, Misbehaviour::Absent),
        "skip-remote-flush" => (PlantedFault::SkipRemoteFlush, Misbehaviour::Absent),
        "free-before-flush" => (PlantedFault::Linger, Misbehaviour::FreeBeforeFlush),
        _ => return None,
    })
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
