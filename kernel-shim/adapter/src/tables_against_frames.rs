//! What page tables map must be there: no entry leads to a free frame, and counts are those of the
//! entries. So are those of places in swap and of guards: an engine that drops such an entry tells
//! the kernel, once, and drops none that it must keep.
//!
//! Read with the software MMU's own eyes ([`decode`]), not the engine's.

use std::sync::Arc;

use mmu_gather::pagetable::Level::Pte;
use mmu_gather::pagetable::{Decoded, EntryValue, Lines, Marker, NonPresent, TableMemory, UsedLines};
use mmu_gather::tlb::Cpus;
use mmu_hosted::ViolationKind;
use mmu_hosted::arch::{Meaning, TableLevel, decode};
use mmu_kernel_shim::FrameKind;
use rustc_hash::{FxHashMap, FxHashSet};
use x86_64::structures::paging::PhysFrame;

use crate::program::{HostedKernel, HostedMm};

/// What was found in the page tables of all address spaces.
#[derive(Debug, Default)]
struct Mapped {
    /// How many entries map each frame, and where one of them is.
    pages: FxHashMap<PhysFrame, (u32, u64)>,
    tables: FxHashSet<PhysFrame>,
    swapped: i64,
    guards: i64,
    wrong: Option<(ViolationKind, PhysFrame, u64)>,
}

/// Looks through all page tables, while nothing else runs and no gather is open. `mms` are all
/// address spaces that have not exited.
pub(crate) fn compare_tables_with_frames(kernel: &HostedKernel, mms: &[Arc<HostedMm>]) {
    let machine = kernel.machine();
    let mut mapped = Mapped::default();
    for mm in mms {
        look_through(kernel, mm.root(), TableLevel::Pml4, 0, &mut mapped);
    }
    if mapped.wrong.is_none() {
        let frames = kernel.frames();
        mapped.wrong = mapped.pages.iter().find_map(|(frame, (count, address))| {
            let meta = frames.get(*frame)?;
            let is_counted = matches!(meta.kind(), FrameKind::Page | FrameKind::Block);
            let disagrees = is_counted && meta.maps() != *count;
            disagrees.then_some((ViolationKind::CountsDisagree, *frame, *address))
        });
    }
    if mapped.wrong.is_none() && (mapped.swapped, mapped.guards) != (kernel.swap_slots(), kernel.guards()) {
        let root = mms.first().map_or_else(|| kernel.init_root(), |mm| mm.root());
        mapped.wrong = Some((ViolationKind::MeaningsDisagree, root, 0));
    }
    if let Some((kind, frame, address)) = mapped.wrong {
        machine.report_violation(kind, address, frame);
    }
}

fn look_through(kernel: &HostedKernel, table: PhysFrame, level: TableLevel, start: u64, mapped: &mut Mapped) {
    let is_table = kernel.frames().get(table).is_some_and(|meta| meta.kind() == FrameKind::Table);
    if !is_table || kernel.machine().is_free(table) || !mapped.tables.insert(table) {
        mapped.wrong.get_or_insert((ViolationKind::FreePageMapped, table, start));
        return;
    }
    let machine = kernel.machine();
    #[expect(unsafe_code, reason = "looks at the notes of a table while nothing changes them")]
    // SAFETY: a table of this kernel, as was found just now, and nothing else runs.
    let used = unsafe { kernel.used_lines(table) };
    let noted = used.map_or(Lines::ALL, UsedLines::load);
    for (index, entry) in machine.entries_of(table).enumerate() {
        let address = start + ((index as u64) << level.entry_shift());
        if entry != 0 && noted.intersect(Lines::touched_by(&(index..index + 1))).is_empty() {
            mapped.wrong.get_or_insert((ViolationKind::EntryNotNoted, table, address));
        }
        match decode(entry, level, machine.options().features.physical_bits) {
            // What hardware does not look at is the kernel's own.
            Meaning::NotPresent => match EntryValue::from_bits(entry).decode(Pte) {
                Decoded::NonPresent(NonPresent::Swap { .. }) => mapped.swapped += 1,
                Decoded::NonPresent(NonPresent::Marker(Marker::Guard)) => mapped.guards += 1,
                _ => {}
            },
            Meaning::Reserved => {
                mapped.wrong.get_or_insert((ViolationKind::FreePageMapped, table, address));
            }
            Meaning::Table(next) => {
                if let Some(below) = level.below() {
                    look_through(kernel, PhysFrame::containing_address(next), below, address, mapped);
                }
            }
            Meaning::Page(_, page) => {
                let frame = PhysFrame::containing_address(page);
                if machine.is_free(frame) {
                    mapped.wrong.get_or_insert((ViolationKind::FreePageMapped, frame, address));
                }
                mapped.pages.entry(frame).or_insert((0, address)).0 += 1;
            }
        }
    }
}
