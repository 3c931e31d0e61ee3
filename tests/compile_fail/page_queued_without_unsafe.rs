//! A page is queued by who answers for its entry and its reference, also where the gather is alone.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let mut gather = PageGather::new(&kernel, mm.context());
    let _ = gather.queue_page(frame(), 0x1000, Level::Pte); // refused
    gather.flush_mmu();
}
