//! A page is queued by who answers for its entry and its reference.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let mut gather = kernel.gather(&mm);
    gather.remove_page(frame(), page(), Level::Pte); // refused
    gather.flush_mmu();
}
