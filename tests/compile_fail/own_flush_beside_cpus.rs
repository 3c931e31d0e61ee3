//! A kernel flushes by means of its own or has the engine do it, not both.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

unsafe impl FlushTlb for Kernel { // refused
    type Context = OwnContext<()>;

    fn flush_tlb(&self, _: &OwnContext<()>, _: Option<PageSpan>, _: FreedTables) {}
}

fn main() {}
