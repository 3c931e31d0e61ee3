//! A receipt is used once.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let receipt = flush_tlb_mm(&kernel, mm.context());
    let again = receipt;
    drop(receipt); // refused
    drop(again);
}
