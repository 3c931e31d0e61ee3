//! A CPU knows an address space by its address: one in a `Vec` may move.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let mms = vec![kernel.unpinned_mm()];
    kernel.run(std::pin::Pin::new(&mms[0])); // refused
    let _ = mms.len();
}
