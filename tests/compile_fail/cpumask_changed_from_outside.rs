//! CPUs join and leave a cpumask by switching, not by somebody's word.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let mask = mm.context().cpumask();
    mask.clear(CpuId::new(0)); // refused
    let _ = mask.len();
}
