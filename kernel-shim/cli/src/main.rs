//! The command `teardown`.

use std::process::ExitCode;

fn main() -> ExitCode {
    mmu_cli::commands::run_command_line()
}
