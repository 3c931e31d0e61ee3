//! A receipt comes from a flush.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let receipt = Flushed { scope: Some((mm.context().ctx_id(), TlbGen::START)) }; // refused
}
