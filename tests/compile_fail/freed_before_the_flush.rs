//! A gather has nothing to free with before it has flushed.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let gather = kernel.gather(&mm);
    gather.free(); // refused
}
