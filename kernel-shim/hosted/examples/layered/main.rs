//! How a real kernel is arranged for the kit: generic over a trait of its own, which the machine of
//! the kit implements in tests.

mod hardware;
mod hosted;
mod kernel;
mod kit;

use std::sync::Arc;

use kernel::Kernel;
use mmu_hosted::{FuzzOptions, fuzz};

fn main() {
    let report = fuzz(&FuzzOptions::default(), |machine| Ok(Kernel::new(Arc::clone(machine))));
    println!("{}", report.expect("memory for a machine"));
}
