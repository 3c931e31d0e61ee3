//! Of two tables with one lock, the second is not taken for locked when the first is let go.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let table = kernel.table(&mm);
    let both = table.lock_both(&kernel, table);
    let second = both.second();
    drop(both); // refused
    second.forget_empty_lines(&(0..8));
}
