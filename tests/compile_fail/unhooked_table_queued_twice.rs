//! A table is queued once: its record is no copy.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let mut gather = kernel.gather(&mm);
    let table = kernel.unhook(&mm);
    gather.remove_table(table, 0x1000);
    gather.remove_table(table, 0x1000); // refused
}
