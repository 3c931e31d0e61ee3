//! What page tables map must be there: no entry leads to a free frame, each is what its area says,
//! and counts are those of the entries. So are those of places in swap, of guards and of tables: an
//! engine that drops such an entry tells the kernel, once, and drops none that it must keep.
//!
//! Read with the software MMU's own eyes ([`decode`]), not the engine's.

use std::sync::Arc;

use mmu_gather::pagetable::Level::Pte;
use mmu_gather::pagetable::{
    Decoded, EntryValue, Level, Lines, Marker, NonPresent, PagingMode, TableMemory, UsedLines, VirtRange,
};
use mmu_gather::tlb::Cpus;
use mmu_hosted::ViolationKind;
use mmu_hosted::arch::{Meaning, Rights, TableLevel, decode};
use mmu_kernel_shim::{FrameKind, SharedFrames};
use rustc_hash::{FxHashMap, FxHashSet};
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

use crate::leaves_against_areas::{Areas, Leaf, find_wrong};
use crate::program::{HostedKernel, HostedMm};

/// Frames of a large page.
const FRAMES_OF_A_BLOCK: u64 = 512;

/// A page that is mapped.
#[derive(Clone, Copy, Debug)]
struct MappedPage {
    /// How many entries map it, and where one of them is.
    entries: u32,
    address: u64,
    /// Whether one of them says that it was written to.
    is_dirty: bool,
}

/// What was found in the page tables of all address spaces.
#[derive(Debug, Default)]
struct Mapped {
    pages: FxHashMap<PhysFrame, MappedPage>,
    tables: FxHashSet<PhysFrame>,
    /// By place in swap: the entries that name it.
    swapped: FxHashMap<u64, u32>,
    guards: i64,
    wrong: Option<(ViolationKind, PhysFrame, u64)>,
}

impl Mapped {
    fn is_wrong(&mut self, kind: ViolationKind, frame: PhysFrame, address: u64) {
        self.wrong.get_or_insert((kind, frame, address));
    }
}

/// Looks through all page tables, while nothing else runs and no gather is open. `mms` are all
/// address spaces that have not exited.
pub(crate) fn compare_tables_with_frames(kernel: &HostedKernel, mms: &[Arc<HostedMm>]) {
    let shared = kernel.shared_frames();
    let mut mapped = Mapped::default();
    for mm in mms {
        let mut walk = Walk { kernel, shared, areas: Areas::of(mm), nr_tables: [0; 6], mapped: &mut mapped };
        let space = mm.engine().space();
        let (root, below_root) = match space.mode() {
            PagingMode::FourLevel => (TableLevel::Pml4, 0),
            PagingMode::FiveLevel => (TableLevel::Pml5, space.nr_tables(Level::P4d)),
        };
        walk.look_through(mm.root(), root, 0, Rights::ALL);
        let [_, pte, pmd, pud, pml4, _] = walk.nr_tables;
        let pml4 = if root == TableLevel::Pml4 { 0 } else { pml4 };
        if [pte, pmd, pud] != mm.nr_tables() || pml4 != below_root {
            mapped.is_wrong(ViolationKind::TablesMiscounted, mm.root(), 0);
        }
    }
    let wrong = mapped
        .wrong
        .or_else(|| mapped.pages.iter().find_map(|(frame, page)| find_wrong_counts(kernel, *frame, page)))
        .or_else(|| find_wrong_meanings(kernel, mms, &mapped))
        .or_else(|| find_unaccounted(kernel, &shared, &mapped));
    if let Some((kind, frame, address)) = wrong {
        kernel.machine().report_violation(kind, address, frame);
    }
}

/// What is wrong with the counts of a mapped page, or with what is known of its content.
fn find_wrong_counts(
    kernel: &HostedKernel,
    frame: PhysFrame,
    page: &MappedPage,
) -> Option<(ViolationKind, PhysFrame, u64)> {
    let meta = kernel.frames().get(frame)?;
    let nr_frames = match meta.kind() {
        FrameKind::Page => 1,
        FrameKind::Block => FRAMES_OF_A_BLOCK,
        _ => return None,
    };
    let kind = if meta.maps() != page.entries {
        ViolationKind::CountsDisagree
    } else if !meta.is_of_a_file() && meta.refs() != page.entries {
        ViolationKind::ReferencesDisagree
    } else if !page.is_dirty
        && !meta.is_dirty()
        && (0..nr_frames).any(|number| kernel.machine().was_written(frame + number))
    {
        ViolationKind::WriteLost
    } else {
        return None;
    };
    Some((kind, frame, page.address))
}

fn find_wrong_meanings(
    kernel: &HostedKernel,
    mms: &[Arc<HostedMm>],
    mapped: &Mapped,
) -> Option<(ViolationKind, PhysFrame, u64)> {
    let root = mms.first().map_or_else(|| kernel.init_root(), |mm| mm.root());
    let swapped: u32 = mapped.swapped.values().sum();
    let agree = (i64::from(swapped), mapped.guards) == (kernel.swap_slots(), kernel.guards())
        && mapped.swapped.len() as u64 == kernel.nr_swap_slots_in_use()
        && mapped.swapped.iter().all(|(slot, entries)| kernel.entries_of_swap_slot(*slot) == *entries);
    (!agree).then_some((ViolationKind::MeaningsDisagree, root, 0))
}

/// Frames in use are tables, mapped pages, pages in the page cache, and a few that are shared.
fn find_unaccounted(
    kernel: &HostedKernel,
    shared: &SharedFrames,
    mapped: &Mapped,
) -> Option<(ViolationKind, PhysFrame, u64)> {
    let frames = kernel.frames();
    let cached = kernel.cached_pages();
    let has_wrong_refs = |frame: &&PhysFrame| {
        let meta = frames.meta(**frame);
        meta.refs() != meta.maps() + 1
    };
    if let Some(frame) = cached.iter().find(has_wrong_refs) {
        return Some((ViolationKind::ReferencesDisagree, *frame, 0));
    }
    let is_only_cached = |frame: &&PhysFrame| !mapped.pages.contains_key(frame);
    let only_cached = cached.iter().filter(is_only_cached).count() as u64;
    let of_pages = mapped.pages.keys().map(|frame| match frames.get(*frame).map(|meta| meta.kind()) {
        Some(FrameKind::Page) => 1,
        Some(FrameKind::Block) => FRAMES_OF_A_BLOCK,
        _ => 0,
    });
    // The kernel's own root is no address space's.
    let tables = mapped.tables.len() as u64 + 1;
    let accounted = tables + of_pages.sum::<u64>() + only_cached + shared.nr_allocated();
    if accounted == kernel.nr_frames_in_use() {
        return None;
    }
    let is_accounted = |frame: &PhysFrame| {
        let first_of_block = || {
            let start = frame.start_address().as_u64() & !((FRAMES_OF_A_BLOCK << 12) - 1);
            PhysFrame::containing_address(x86_64::PhysAddr::new_truncate(start))
        };
        mapped.pages.contains_key(frame)
            || mapped.tables.contains(frame)
            || cached.contains(frame)
            || shared.are_zeroes(*frame)
            || shared.device == Some(*frame)
            || mapped.pages.contains_key(&first_of_block())
    };
    let lost = kernel.machine().not_freed().into_iter().map(|(frame, _)| frame);
    let frame = lost.into_iter().find(|frame| !is_accounted(frame)).unwrap_or_else(|| kernel.init_root());
    Some((ViolationKind::FrameUnaccounted, frame, 0))
}

/// The way through one address space.
struct Walk<'a> {
    kernel: &'a HostedKernel,
    shared: SharedFrames,
    areas: Areas,
    /// By the number of their level, as the SDM has it: page tables at 1.
    nr_tables: [u64; 6],
    mapped: &'a mut Mapped,
}

impl Walk<'_> {
    fn look_through(&mut self, table: PhysFrame, level: TableLevel, start: u64, rights: Rights) {
        let kernel = self.kernel;
        let is_table = kernel.frames().get(table).is_some_and(|meta| meta.kind() == FrameKind::Table);
        if !is_table || kernel.machine().is_free(table) || !self.mapped.tables.insert(table) {
            self.mapped.is_wrong(ViolationKind::FreePageMapped, table, start);
            return;
        }
        self.nr_tables[level as usize] += 1;
        let machine = kernel.machine();
        #[expect(unsafe_code, reason = "looks at the notes of a table while nothing changes them")]
        // SAFETY: a table of this kernel, as was found just now, and nothing else runs.
        let used = unsafe { kernel.used_lines(table) };
        let noted = used.map_or(Lines::ALL, UsedLines::load);
        for (index, entry) in machine.entries_of(table).enumerate() {
            if entry == 0 {
                continue;
            }
            let address = start + ((index as u64) << level.entry_shift());
            if noted.intersect(Lines::touched_by(&(index..index + 1))).is_empty() {
                self.mapped.is_wrong(ViolationKind::EntryNotNoted, table, address);
            }
            match decode(entry, level, machine.options().features.physical_bits) {
                Meaning::NotPresent => self.look_at_meaning(table, entry, address),
                Meaning::Reserved => self.mapped.is_wrong(ViolationKind::FreePageMapped, table, address),
                Meaning::Table(next) => {
                    if let Some(below) = level.below() {
                        let next = PhysFrame::containing_address(next);
                        self.look_through(next, below, address, rights.through(entry));
                    }
                }
                Meaning::Page(size, page) => {
                    let frame = PhysFrame::containing_address(page);
                    let rights = rights.through(entry);
                    self.look_at_leaf(&Leaf { address, size, frame, bits: entry, rights });
                }
            }
        }
    }

    /// What hardware does not look at is the kernel's own.
    fn look_at_meaning(&mut self, table: PhysFrame, entry: u64, address: u64) {
        match EntryValue::from_bits(entry).decode(Pte) {
            Decoded::NonPresent(NonPresent::Swap { slot, .. }) => {
                *self.mapped.swapped.entry(slot).or_default() += 1;
            }
            Decoded::NonPresent(NonPresent::Marker(Marker::Guard)) => self.mapped.guards += 1,
            _ => {}
        }
        if self.areas.covering(VirtRange::of_entry(Pte, address)).is_none() {
            self.mapped.is_wrong(ViolationKind::EntryOutsideAreas, table, address);
        }
    }

    fn look_at_leaf(&mut self, leaf: &Leaf) {
        let Leaf { address, frame, .. } = *leaf;
        if self.kernel.machine().is_free(frame) {
            self.mapped.is_wrong(ViolationKind::FreePageMapped, frame, address);
        }
        let area = leaf.range().and_then(|range| self.areas.covering(range));
        if let Some(kind) = find_wrong(self.kernel, &self.shared, area, leaf) {
            self.mapped.is_wrong(kind, frame, address);
        }
        let page =
            self.mapped.pages.entry(frame).or_insert(MappedPage { entries: 0, address, is_dirty: false });
        page.entries += 1;
        page.is_dirty |= leaf.bits & PageTableFlags::DIRTY.bits() != 0;
    }
}
