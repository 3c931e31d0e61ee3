//! The kit on a kernel that it does not know: the kernel as it is, and with each of its mistakes.

mod kernel;
mod kit;

use kernel::{Mistake, Stranger};
use mmu_hosted::{FuzzOptions, fuzz};

fn main() {
    let options = FuzzOptions { sequences: 200, ..FuzzOptions::default() };
    for mistake in [
        Mistake::Absent,
        Mistake::ChangedForgotten,
        Mistake::FreedWhenUnmapped,
        Mistake::NeighboursForgotten,
        Mistake::HandlerDoesNothing,
        Mistake::SwitchOfItsOwn,
        Mistake::OneCpuState,
        Mistake::NeverFreed,
        Mistake::FreedTwice,
        Mistake::DirtyTables,
        Mistake::LockDroppedEarly,
        Mistake::HandlerNamesAnother,
        Mistake::PcidsSaidOn,
        Mistake::BatchPageNotAligned,
        Mistake::MapsUnderTableLock,
        Mistake::UnmapPanics,
    ] {
        let report = fuzz(&options, |machine| Ok(Stranger::with(machine, mistake))).expect("memory");
        println!("== {mistake:?}\n{report}\n");
    }
}
