//! Whoever holds the kernel cannot free its tables.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    kernel.free_tables(&[mm.space().root()]); // refused
}
