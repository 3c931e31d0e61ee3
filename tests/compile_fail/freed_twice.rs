//! What was flushed for is freed once.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let flushed = kernel.gather(&mm).flush();
    flushed.free();
    flushed.free(); // refused
}
