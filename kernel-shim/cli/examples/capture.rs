//! Writes the layout of a live process to standard output: `capture PID NAME COMMAND`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (Some(Ok(pid)), Some(name), Some(command)) =
        (arguments.next().map(|pid| pid.parse()), arguments.next(), arguments.next())
    else {
        eprintln!("usage: capture PID NAME COMMAND");
        return ExitCode::from(2);
    };
    match mmu_cli::capture::capture(pid) {
        Ok(layout) => {
            let layout = mmu_cli::layout::Layout { name, command, ..layout };
            eprintln!("{:?}", layout.totals());
            print!("{layout}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("capture: {error}");
            ExitCode::from(2)
        }
    }
}
