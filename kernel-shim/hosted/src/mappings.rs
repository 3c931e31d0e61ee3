//! What page tables map must be there: no entry leads to a free frame, and counts are those of the entries. So are those of
//! places in swap and of guards: an engine that drops such an entry tells the kernel, once, and drops none that it must keep.
//!
//! Read with the software MMU's own eyes ([`decode`]), not the engine's.

use mmu_gather::pagetable::Level::Pte;
use mmu_gather::pagetable::{Decoded, EntryValue, Lines, Marker, NonPresent, TableMemory, UsedLines};
use mmu_kernel_shim::FrameKind;
use rustc_hash::{FxHashMap, FxHashSet};
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

use crate::arch::{Level, Meaning, decode};
use crate::checker::ViolationKind;
use crate::executor::World;
use crate::machine::{Checked, HostedMachine, lock};
use crate::physical::PhysicalMemory;

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

impl World {
    /// Looks through all page tables. Nothing else runs: no gather is open.
    pub(crate) fn compare_tables_with_frames(&self) {
        let machine = self.kernel.machine();
        let Some(checked) = &machine.checked else { return };
        let mut mapped = Mapped::default();
        for process in &self.processes {
            let root = lock(process).mm.root();
            self.look_through(checked, root, Level::Pml4, 0, &mut mapped);
        }
        if mapped.wrong.is_none() {
            let frames = self.kernel.frames();
            mapped.wrong = mapped.pages.iter().find_map(|(frame, (count, address))| {
                let meta = frames.get(*frame)?;
                let is_counted = matches!(meta.kind(), FrameKind::Page | FrameKind::Block);
                let disagrees = is_counted && meta.maps() != *count;
                disagrees.then_some((ViolationKind::CountsDisagree, *frame, *address))
            });
        }
        if mapped.wrong.is_none()
            && (mapped.swapped, mapped.guards) != (self.kernel.swap_slots(), self.kernel.guards())
        {
            let root = lock(&self.processes[0]).mm.root();
            mapped.wrong = Some((ViolationKind::MeaningsDisagree, root, 0));
        }
        if let Some((kind, frame, address)) = mapped.wrong {
            machine.report(checked, kind, machine.current(), address, frame, None);
        }
    }

    fn look_through(
        &self,
        checked: &Checked,
        table: PhysFrame,
        level: Level,
        start: u64,
        mapped: &mut Mapped,
    ) {
        let is_table = self.kernel.frames().get(table).is_some_and(|meta| meta.kind() == FrameKind::Table);
        if !is_table || checked.checker.when_freed(table).is_some() || !mapped.tables.insert(table) {
            mapped.wrong.get_or_insert((ViolationKind::FreePageMapped, table, start));
            return;
        }
        let machine = self.kernel.machine();
        #[expect(unsafe_code, reason = "looks at the notes of a table while nothing changes them")]
        // SAFETY: a table of this kernel, as was found just now, and nothing else runs.
        let used = unsafe { self.kernel.used_lines(table) };
        let noted = used.map_or(Lines::ALL, UsedLines::load);
        for (index, entry) in entries(machine, table).enumerate() {
            let address = start + ((index as u64) << level.entry_shift());
            if entry != 0 && noted.intersect(Lines::touched_by(&(index..index + 1))).is_empty() {
                mapped.wrong.get_or_insert((ViolationKind::EntryNotNoted, table, address));
            }
            match decode(entry, level, machine.options.features.physical_bits) {
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
                        self.look_through(
                            checked,
                            PhysFrame::containing_address(next),
                            below,
                            address,
                            mapped,
                        );
                    }
                }
                Meaning::Page(_, page) => {
                    let frame = PhysFrame::containing_address(page);
                    if checked.checker.when_freed(frame).is_some() {
                        mapped.wrong.get_or_insert((ViolationKind::FreePageMapped, frame, address));
                    }
                    mapped.pages.entry(frame).or_insert((0, address)).0 += 1;
                }
            }
        }
    }
}

impl HostedMachine {
    /// A table is being freed: whatever is still in it is lost, or mapped for ever by whoever walks it.
    pub(crate) fn check_freed_table(&self, checked: &Checked, table: PhysFrame) {
        if entries(self, table).any(|entry| entry != 0) {
            let here = self.current();
            self.report(checked, ViolationKind::TableFreedInUse, here, 0, table, None);
        }
    }
}

fn entries(machine: &HostedMachine, table: PhysFrame) -> impl Iterator<Item = u64> + '_ {
    let start = table.start_address().as_u64();
    (0..512).map(move |index| machine.memory.read(PhysAddr::new_truncate(start + 8 * index)))
}
