//! A request that says too little makes a CPU count itself up to date.
#![allow(unused, reason = "what is used is left out, too")]

#[path = "kernel.rs"]
mod kernel;
use kernel::*;

fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let mm = mm.context();
    let kind = FlushKind::Mm { mm, tlb_gen: TlbGen::START };
    let request = FlushRequest { kind, tables: FreedTables::No, initiator: CpuId::new(0) }; // refused
    let _ = mm.ctx_id();
}
