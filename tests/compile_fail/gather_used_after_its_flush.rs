//! A flush takes the gather: nothing is queued behind its back.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let mut gather = kernel.gather(&mm);
    let flushed = gather.flush();
    gather.changed(page(), Level::Pte); // refused
    flushed.free();
}
