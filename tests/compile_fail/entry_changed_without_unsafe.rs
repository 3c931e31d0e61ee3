//! The lock of a table shows nothing about what is put in.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let locked = kernel.table(&mm).lock(&kernel);
    let entry = locked.entry(0x1000);
    entry.store(EntryValue::EMPTY); // refused
    let _ = entry.load();
}
