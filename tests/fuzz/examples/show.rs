//! Prints the bytes of a file as the sequence that `teardown replay` reads.

use std::process::ExitCode;

use mmu_hosted::Sequence;

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: show FILE");
        return ExitCode::from(2);
    };
    match std::fs::read(&path) {
        Ok(bytes) => {
            print!("{}", Sequence::from_bytes(&bytes));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("cannot read {}: {error}", path.display());
            ExitCode::from(2)
        }
    }
}
