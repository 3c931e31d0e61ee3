//! A table in use cannot be passed off as one that was unhooked.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let mut gather = kernel.gather(&mm);
    gather.remove_table(
        UnhookedTable { frame: frame(), level: Level::Pte, span: page(), root: frame() },
        0x1000,
    ); // refused
    gather.flush_mmu();
}
