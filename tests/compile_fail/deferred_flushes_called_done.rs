//! A deferred flush is made up for by a flush, not by somebody's word.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let context = mm.context();
    context.deferred_flushes_done(context.deferred_flushes()); // refused
    let _ = context.has_deferred_flushes();
}
