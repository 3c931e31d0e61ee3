//! An entry that anybody may read is not one that anybody may change.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let view = kernel.table(&mm);
    let entry = view.table().entry(1);
    let _ = entry.get_and_clear(); // refused
    let _ = entry.load();
}
