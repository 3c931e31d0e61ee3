//! What is to be freed goes back to a kernel that is still there.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let flushed = {
        let kernel = Kernel::new();
        kernel.gather(&mm).flush() // refused
    };
    drop(flushed);
}
