//! The kit on a kernel that it does not know: the kernel as it is, and with each of its mistakes.

mod ipis;
mod kernel;
mod kit;
mod mistake;

use kernel::Stranger;
use mistake::Mistake;
use mmu_hosted::{FuzzOptions, fuzz};

fn main() {
    let options = FuzzOptions { sequences: 200, ..FuzzOptions::default() };
    for mistake in Mistake::ALL {
        let report = fuzz(&options, |machine| Ok(Stranger::with(machine, mistake))).expect("memory");
        println!("== {mistake:?}\n{report}\n");
    }
}
