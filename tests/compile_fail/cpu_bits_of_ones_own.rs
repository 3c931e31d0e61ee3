//! The words of a cpumask are nobody else's: shared, they could be changed from outside.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

#[derive(Debug)]
struct Shared(std::sync::Arc<[std::sync::atomic::AtomicU64; 1]>);

impl CpuBits for Shared {} // refused

fn main() {}
