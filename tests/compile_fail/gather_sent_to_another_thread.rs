//! A gather stays on the stack, and the CPU's thread, where it was begun.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let gather = kernel.gather(&mm);
    std::thread::scope(|scope| {
        scope.spawn(move || drop(gather)); // refused
        let _ = scope;
    });
}
