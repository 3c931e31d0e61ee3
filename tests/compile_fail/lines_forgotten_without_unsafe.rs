//! A line with entries in it is not called empty.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let locked = kernel.table(&mm).lock(&kernel);
    locked.forget_cleared_lines(&(0..8)); // refused
    locked.forget_empty_lines(&(0..8));
}
