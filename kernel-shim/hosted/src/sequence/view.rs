//! What programs can see of a sequence: areas, the pages that hold what they wrote, and guards.
//!
//! Steps run one after the other here, so that nothing but the steps decides what is seen.
//! Programs' pages have no content in this model; a page that a program wrote to is told from one
//! that reads as zeroes, or as its file, by whose it is.

use std::io;
use std::sync::Mutex;

use mmu_gather::pagetable::{Decoded, Marker, NonPresent, VirtRange};
use mmu_kernel_shim::{FrameKind, Supply};
use rustc_hash::FxHashSet;
use x86_64::structures::paging::PhysFrame;

use crate::mutex::lock;
use crate::sequence::op::MmId;
use crate::sequence::pace::{Pace, View};
use crate::sequence::text::Sequence;
use crate::sequence::world::{Outcome, Trial, World};

/// What there is to see of a page, besides zeroes and files.
enum Seen {
    Written,
    Guard,
}

/// Runs `sequence` one step at a time while gathers get batch pages as `supply` says; what could be
/// seen at every sync, and at the end.
///
/// # Errors
/// If the host refuses memory for the machine.
pub fn views(sequence: &Sequence, supply: Supply) -> io::Result<(Outcome, Vec<View>)> {
    let pace = Pace::Serial(supply, Mutex::default());
    let world = World::with_pace(sequence, Trial::default(), pace)?;
    world.kernel.set_batch_supply(supply);
    world.run();
    world.note_view();
    let seen = match &world.pace {
        Pace::Serial(_, seen) => core::mem::take(&mut *lock(seen)),
        Pace::Overlapping => Vec::new(),
    };
    Ok((world.end(), seen))
}

impl World {
    /// Notes what can be seen, if anybody wants to know. Nothing else runs.
    pub(crate) fn note_view(&self) {
        let Pace::Serial(_, seen) = &self.pace else { return };
        let cached: FxHashSet<PhysFrame> = self.kernel.cached_pages().into_iter().collect();
        let mut view = View::default();
        for (number, process) in (0..).zip(&self.processes) {
            let process = lock(process);
            for vma in process.mm.vmas().iter() {
                view.areas.push((MmId(number), *vma));
                self.look_at(&process.mm, vma.range, &cached, |page, seen| match seen {
                    Seen::Written => view.written.push((MmId(number), page)),
                    Seen::Guard => view.guarded.push((MmId(number), page)),
                });
            }
        }
        lock(seen).push(view);
    }

    #[expect(unsafe_code, reason = "reads page tables while nothing changes them")]
    fn look_at(
        &self,
        mm: &mmu_kernel_shim::Mm<std::sync::Arc<crate::machine::HostedMachine>>,
        range: VirtRange,
        cached: &FxHashSet<PhysFrame>,
        mut add: impl FnMut(u64, Seen),
    ) {
        for page in (range.start()..range.end()).step_by(4096) {
            // SAFETY: nothing else runs, so no table is freed meanwhile.
            let found = unsafe { mm.engine().space().lookup(&*self.kernel, page) };
            let seen = match found.value.decode(found.level) {
                Decoded::Leaf(start) => {
                    let frame = PhysFrame::containing_address(start);
                    let kind = self.kernel.frames().meta(frame).kind();
                    let is_written =
                        matches!(kind, FrameKind::Page | FrameKind::Block) && !cached.contains(&frame);
                    is_written.then_some(Seen::Written)
                }
                Decoded::NonPresent(NonPresent::Swap { .. }) => Some(Seen::Written),
                Decoded::NonPresent(NonPresent::Marker(Marker::Guard)) => Some(Seen::Guard),
                Decoded::NonPresent(_) | Decoded::Empty | Decoded::Table(_) => None,
            };
            if let Some(seen) = seen {
                add(page, seen);
            }
        }
    }
}
