//! What is compared of any kernel while nothing is going on: caches against page tables, and page
//! tables against frames.
//!
//! Page tables are read with the software MMU's own eyes ([`decode`]).

use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

use crate::checker::checked::{Caches, Checked};
use crate::checker::kind::ViolationKind;
use crate::machine::HostedMachine;
use crate::mmu::arch::{Meaning, TableLevel, decode};
use crate::mmu::physical::PhysicalMemory;
use crate::mmu::watch::{CachedEntry, Tag, Use};
use crate::mutex::lock;

/// The bits of an entry that the comparison looks at.
const WRITABLE: u64 = 1 << 1;
const DIRTY: u64 = 1 << 6;
const NO_EXECUTE: u64 = 1 << 63;
/// The bit that hardware sets in each root's own copy of the kernel half.
const ACCESSED: u64 = 1 << 5;

/// Entries of a root that are not the kernel's.
const USER_ENTRIES: usize = 256;

impl HostedMachine {
    /// On every CPU that runs a program in the address space of one of these roots, what it has
    /// cached must be what page tables say: all flushes are done.
    ///
    /// A CPU that is lazy, or runs something else, may have to flush before it goes on; only the
    /// kernel knows.
    pub fn compare_caches_with_tables(&self, roots: &[PhysFrame]) {
        let Some(checked) = &self.checked else { return };
        for cpu in self.cpus.iter().filter(|cpu| self.is_in_user_mode(cpu.id)) {
            let caches = lock(&cpu.caches);
            let Some(Caches { mmu, .. }) = &*caches else { continue };
            let (root, pcid) = mmu.cr3();
            if !roots.contains(&root) {
                continue;
            }
            let is_usable =
                |entry: &CachedEntry| entry.held.tag == Tag::Global || entry.held.tag == Tag::Pcid(pcid);
            let wrong = mmu.entries().find(|entry| is_usable(entry) && !self.agrees(root, entry));
            drop(caches);
            if let Some(entry) = wrong {
                let kind = ViolationKind::StaleAtRest;
                self.report(checked, kind, cpu.id, entry.address.as_u64(), entry.frame, Some(entry));
            }
        }
    }

    /// Whether page tables say what the entry says, or more.
    pub(crate) fn agrees(&self, root: PhysFrame, entry: &CachedEntry) -> bool {
        let address = entry.address.as_u64();
        let (mut table, mut level) = (root, self.root_level());
        let (mut upper_rights, mut forbidden) = (WRITABLE, 0);
        loop {
            match entry.held.as_a {
                Use::Root => return true,
                Use::Table(wanted) if wanted == level => return table == entry.frame,
                Use::Table(_) | Use::Page(_) => {}
            }
            let index = address >> level.entry_shift() & 511;
            let bits = self.memory.read(PhysAddr::new_truncate(table.start_address().as_u64() + 8 * index));
            match decode(bits, level, self.options.features.physical_bits) {
                Meaning::NotPresent | Meaning::Reserved => return false,
                Meaning::Table(next) => {
                    upper_rights &= bits;
                    forbidden |= bits & NO_EXECUTE;
                    let Some(below) = level.below() else { return false };
                    (table, level) = (PhysFrame::containing_address(next), below);
                }
                Meaning::Page(size, page) => {
                    // A large page may be cached in parts.
                    let inside = address & ((1 << size.shift()) - 1) & !((1 << entry.span_shift) - 1);
                    return matches!(entry.held.as_a, Use::Page(_))
                        && page.as_u64() + inside == entry.frame.start_address().as_u64()
                        && (!entry.rights.writable() || upper_rights & bits & WRITABLE != 0)
                        && (entry.rights.no_execute() || (forbidden | bits) & NO_EXECUTE == 0)
                        && (!entry.dirty || bits & DIRTY != 0);
                }
            }
        }
    }

    /// No entry below these roots leads to a frame that is free.
    pub fn compare_tables_with_frames(&self, roots: &[PhysFrame]) {
        let Some(checked) = &self.checked else { return };
        let below = |root: &PhysFrame| self.find_free_below(checked, *root, self.root_level(), 0);
        let wrong = roots.iter().find_map(below);
        if let Some((frame, address)) = wrong {
            self.report(checked, ViolationKind::FreePageMapped, self.current(), address, frame, None);
        }
    }

    fn find_free_below(
        &self,
        checked: &Checked,
        table: PhysFrame,
        level: TableLevel,
        start: u64,
    ) -> Option<(PhysFrame, u64)> {
        if checked.ledger.when_freed(table).is_some() {
            return Some((table, start));
        }
        // The upper half is the kernel's, and the same in every address space.
        let nr_entries = if level == self.root_level() { USER_ENTRIES } else { 512 };
        self.entries_of(table).take(nr_entries).enumerate().find_map(|(index, entry)| {
            let address = start + ((index as u64) << level.entry_shift());
            match decode(entry, level, self.options.features.physical_bits) {
                Meaning::NotPresent => None,
                Meaning::Reserved => Some((table, address)),
                Meaning::Table(next) => {
                    let next = PhysFrame::containing_address(next);
                    self.find_free_below(checked, next, level.below()?, address)
                }
                Meaning::Page(_, page) => {
                    let frame = PhysFrame::containing_address(page);
                    checked.ledger.when_freed(frame).is_some().then_some((frame, address))
                }
            }
        })
    }

    /// A table is being freed: what is still in it is lost, or stays mapped for a CPU that walks
    /// it.
    ///
    /// A root may hold the kernel half, as the kernel's own root has it.
    pub(crate) fn check_freed_table(&self, checked: &Checked, table: PhysFrame) {
        let of_the_kernel = self.entries_of(self.kernel_root());
        let is_left = |(index, (entry, of_the_kernel)): (usize, (u64, u64))| {
            let is_shared = index >= USER_ENTRIES && (entry ^ of_the_kernel) & !ACCESSED == 0;
            entry != 0 && !is_shared
        };
        if self.entries_of(table).zip(of_the_kernel).enumerate().any(is_left) {
            let here = self.current();
            self.report(checked, ViolationKind::TableFreedInUse, here, 0, table, None);
        }
    }

    /// The 512 entries of the table in `table`, as they are now. Beyond the machine's memory they
    /// are 0.
    pub fn entries_of(&self, table: PhysFrame) -> impl Iterator<Item = u64> + '_ {
        let start = table.start_address().as_u64();
        (0..512).map(move |index| self.memory.read(PhysAddr::new_truncate(start + 8 * index)))
    }
}
