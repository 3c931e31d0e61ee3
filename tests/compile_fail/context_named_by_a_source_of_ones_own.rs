//! Two sources of names would make receipts that pass for one another's.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let ids = CtxIds::new();
    let _forged = MmContext::<Bits>::new(&ids, mm.context().root()); // refused
    let _ = ids.allocate();
}
