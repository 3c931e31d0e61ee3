//! What waits to be freed stays with whoever flushed for it.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let flushed = kernel.gather(&mm).flush();
    std::thread::scope(|scope| {
        scope.spawn(move || flushed.free()); // refused
        let _ = scope;
    });
}
