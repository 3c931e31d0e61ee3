//! A run without the command line and without a test harness: for sanitizers, to which a standard
//! library that is not built for them makes the harness look wrong.
//!
//! The one argument is how many seconds it takes; 10 without it.

use core::time::Duration;
use std::process::ExitCode;

use mmu_free_running::{Options, Verdict, run};

fn main() -> ExitCode {
    let seconds = std::env::args().nth(1).and_then(|seconds| seconds.parse().ok()).unwrap_or(10);
    let options = Options { time: Duration::from_secs(seconds), ..Options::default() };
    match run(&options, |_, _| {}) {
        Ok(report) => {
            println!("{:?}: {:?}", report.verdict(), report.totals);
            if report.verdict() == Verdict::Violation {
                println!("{}", report.failure_file());
                return ExitCode::FAILURE;
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("cannot start the CPUs: {error}");
            ExitCode::from(2)
        }
    }
}
