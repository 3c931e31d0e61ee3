//! What is checked of a page when it changes hands: it was discarded, it became one program's own,
//! or nothing maps it any more.

use mmu_gather::pagetable::VirtRange;
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

use crate::checker::checked::{Caches, Checked};
use crate::checker::kind::ViolationKind;
use crate::machine::HostedMachine;
use crate::mmu::arch::{LinearAddress, Meaning, TableLevel, decode};
use crate::mmu::physical::PhysicalMemory;
use crate::mmu::watch::{Tag, Use};
use crate::mutex::lock;
use crate::vocabulary::{Content, Moment};

impl HostedMachine {
    /// A page of a file is written back: whatever a program wrote to it must be known by now.
    pub(crate) fn check_written_back(&self, checked: &Checked, frame: PhysFrame, content: Content) {
        if content == Content::Clean && checked.ledger.was_written(frame) {
            self.report(checked, ViolationKind::WriteLost, self.current(), 0, frame, None);
        }
        checked.ledger.note_written_back(frame);
    }

    /// A program may write to `frame` because no other uses it: no CPU may be able to reach the
    /// frame by another address, or for another address space, without running more software.
    pub(crate) fn check_owned_alone(
        &self,
        checked: &Checked,
        root: PhysFrame,
        address: u64,
        frame: PhysFrame,
    ) {
        for cpu in self.cpus.iter().filter(|cpu| self.may_use_addresses(cpu.id)) {
            let caches = lock(&cpu.caches);
            let Some(Caches { mmu, .. }) = &*caches else { continue };
            let (loaded, pcid) = mmu.cr3();
            let found = mmu.entries_reaching(frame).find(|entry| {
                let is_usable = entry.held.tag == Tag::Global || entry.held.tag == Tag::Pcid(pcid);
                let is_owners = loaded == root
                    && entry.address.as_u64() >> entry.span_shift == address >> entry.span_shift;
                is_usable && !is_owners && matches!(entry.held.as_a, Use::Page(_))
            });
            drop(caches);
            if let Some(entry) = found {
                let kind = ViolationKind::OwnedThoughCached;
                self.report(checked, kind, cpu.id, entry.address.as_u64(), frame, Some(entry));
            }
        }
    }

    /// A call that discards is about to return: no entry of its range is from before `since`.
    pub(crate) fn check_nothing_left(
        &self,
        checked: &Checked,
        root: PhysFrame,
        range: VirtRange,
        since: Moment,
    ) {
        if let Some((address, frame)) = self.find_older(checked, root, self.root_level(), range, since) {
            self.report(checked, ViolationKind::PageLeftByDiscard, self.current(), address, frame, None);
        }
    }

    /// The first page in `range` below `table` that was mapped before `since`. All of the range is
    /// covered by the table.
    fn find_older(
        &self,
        checked: &Checked,
        table: PhysFrame,
        level: TableLevel,
        range: VirtRange,
        since: Moment,
    ) -> Option<(u64, PhysFrame)> {
        let table = table.start_address().as_u64();
        let span = 1 << level.entry_shift();
        let mut start = range.start();
        while start < range.end() {
            let end = (start & !(span - 1)).saturating_add(span).min(range.end());
            let index = level.index(LinearAddress::new(start));
            let bits = self.memory.read(PhysAddr::new_truncate(table + 8 * index));
            let found = match decode(bits, level, self.options.features.physical_bits) {
                Meaning::NotPresent | Meaning::Reserved => None,
                Meaning::Table(next) => {
                    let next = PhysFrame::containing_address(next);
                    let part = VirtRange::new(start, end).ok()?;
                    self.find_older(checked, next, level.below()?, part, since)
                }
                Meaning::Page(_, page) => {
                    let frame = PhysFrame::containing_address(page);
                    checked.ledger.was_mapped_before(frame, since).then_some((start, frame))
                }
            };
            if found.is_some() {
                return found;
            }
            start = end;
        }
        None
    }
}
