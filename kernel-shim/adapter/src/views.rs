//! What programs can see of a sequence: areas, the pages that hold what they wrote, and guards.
//!
//! Steps run one after the other here, so that nothing but the steps decides what is seen.
//! What is in a page is checked as programs read it. Here, a page that a program wrote to is told
//! from one that reads as zeroes, or as its file, by whose it is.

use std::sync::Arc;

use mmu_gather::pagetable::{Decoded, Marker, NonPresent, VirtRange};
use mmu_hosted::MmId;
use mmu_kernel_shim::{AreaKind, FrameKind, Vma};
use rustc_hash::FxHashSet;
use x86_64::structures::paging::PhysFrame;

use crate::program::{HostedKernel, HostedMm};

/// What programs can see at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// The areas of every address space.
    pub areas: Vec<(MmId, Vma)>,
    /// Pages that hold what a program wrote: in memory or in swap, of its own.
    pub written: Vec<(MmId, u64)>,
    /// Guards: addresses that no program may use, whatever the area allows.
    pub guarded: Vec<(MmId, u64)>,
}

/// What there is to see of a page, besides zeroes and files.
enum Seen {
    Written,
    Guard,
}

/// What can be seen now. Nothing else runs.
pub(crate) fn look(kernel: &HostedKernel, mms: &[Arc<HostedMm>]) -> View {
    let cached: FxHashSet<PhysFrame> = kernel.cached_pages().into_iter().collect();
    let mut view = View::default();
    for (number, mm) in (0..).zip(mms) {
        for vma in mm.vmas().iter() {
            view.areas.push((MmId(number), *vma));
            if vma.area.kind == AreaKind::Pfn {
                // Frames of a device hold nothing that a program wrote, in this model.
                continue;
            }
            look_at(kernel, mm, vma.range, &cached, |page, seen| match seen {
                Seen::Written => view.written.push((MmId(number), page)),
                Seen::Guard => view.guarded.push((MmId(number), page)),
            });
        }
    }
    view
}

#[expect(unsafe_code, reason = "reads page tables while nothing changes them")]
fn look_at(
    kernel: &HostedKernel,
    mm: &HostedMm,
    range: VirtRange,
    cached: &FxHashSet<PhysFrame>,
    mut add: impl FnMut(u64, Seen),
) {
    for page in (range.start()..range.end()).step_by(4096) {
        // SAFETY: nothing else runs, so no table is freed meanwhile.
        let found = unsafe { mm.engine().space().lookup(kernel, page) };
        let seen = match found.value.decode(found.level) {
            Decoded::Leaf(start) => {
                let frame = PhysFrame::containing_address(start);
                let kind = kernel.frames().meta(frame).kind();
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
