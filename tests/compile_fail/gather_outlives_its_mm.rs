//! A gather borrows the address space until it has flushed.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let gather = {
        let mm = kernel.new_mm();
        kernel.gather(&mm) // refused
    };
    drop(gather);
}
