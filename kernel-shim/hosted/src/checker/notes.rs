//! What the kernel says as it goes (`Note`), and what is checked at each.

use core::sync::atomic::Ordering;

use mmu_gather::GatherEvent;
use mmu_gather::pagetable::Level;
use mmu_gather::tlb::{CpuId, Laziness, TlbEvent};
use x86_64::structures::paging::PhysFrame;

use crate::boundary::Boundary;
use crate::checker::checked::{Caches, Checked};
use crate::checker::events::{Detail, What};
use crate::checker::kind::ViolationKind;
use crate::checker::ledger::{frame_numbered, frames_of, overlaps};
use crate::checker::promises::{Promise, Promised};
use crate::checker::violation::Violation;
use crate::machine::HostedMachine;
use crate::mmu::watch::{CachedEntry, Tag, Use};
use crate::mutex::lock;
use crate::vocabulary::{FrameRole, Note};

impl HostedMachine {
    pub(crate) fn report(
        &self,
        checked: &Checked,
        kind: ViolationKind,
        cpu: CpuId,
        address: u64,
        frame: PhysFrame,
        entry: Option<CachedEntry>,
    ) {
        checked.report(kind, || Violation {
            because: None,
            kind,
            cpu,
            address,
            frame,
            freed: checked.ledger.when_freed(frame),
            entry,
            story: checked.log.explaining(cpu, frame, address),
        });
    }

    /// As [`report`](Self::report), of this CPU, with what explains it.
    pub(crate) fn report_because(
        &self,
        checked: &Checked,
        kind: ViolationKind,
        (address, frame): (u64, PhysFrame),
        because: Option<String>,
    ) {
        let cpu = self.current();
        checked.report(kind, || Violation {
            kind,
            cpu,
            address,
            frame,
            because,
            freed: checked.ledger.when_freed(frame),
            entry: None,
            story: checked.log.explaining(cpu, frame, address),
        });
    }

    pub(crate) fn check_note(&self, checked: &Checked, note: Note) {
        if matches!(note, Note::Unmapped { .. } | Note::Discarded { .. } | Note::Protected { .. }) {
            self.note_last_flush();
        }
        self.note_cost(checked, note);
        match note {
            Note::Allocated(frame, role) => self.check_given_out(checked, frame, role),
            Note::Freed(frame, role) => {
                self.check_free_outside_locks(checked, frame);
                self.check_free_outside_map_locks(checked, frame);
                self.count_freed(checked, frame);
                if role == FrameRole::Table {
                    self.check_freed_table(checked, frame);
                }
                self.check_freed(checked, frame, role);
            }
            Note::MappedByNobody(frame, content) => {
                self.check_unwritable(checked, frame);
                self.check_written_back(checked, frame, content);
            }
            Note::Unmapped { root, range, caller } => {
                self.log(What::Unmapped(range.start(), range.end()));
                self.check_promise(checked, Promise { root, range, caller, what: Promised::Gone });
            }
            Note::Discarded { root, range, since, caller } => {
                self.check_nothing_left(checked, root, range, since);
                self.check_promise(
                    checked,
                    Promise { root, range, caller, what: Promised::Discarded(since) },
                );
            }
            Note::Protected { root, range, most, caller } => {
                self.check_promise(checked, Promise { root, range, caller, what: Promised::AtMost(most) });
            }
            Note::Mapped { root, address, frame } => {
                checked.ledger.note_mapped(frame);
                self.note_newly_mapped(root, address);
                self.log_detail(Detail::Mapped(root, address, frame));
            }
            Note::OwnedAlone { root, address, frame } => {
                self.check_owned_alone(checked, root, address, frame)
            }
            Note::Runs(laziness) => {
                self.cpu().is_active.store(laziness == Laziness::Active, Ordering::Relaxed);
                self.check_stale();
            }
            Note::Cleared { address, level, frame } => {
                self.count_leaf(checked, frame);
                match level {
                    Level::Pte => {}
                    Level::Pmd => self.note_reached(Boundary::LargeCleared),
                    Level::Pud | Level::P4d | Level::Pgd => self.note_reached(Boundary::GiantCleared),
                }
                self.log_detail(Detail::Cleared(address, level, frame));
            }
            Note::Restricted { address, level, frame } => {
                self.count_leaf(checked, frame);
                self.log_detail(Detail::Restricted(address, level));
            }
            Note::Split { frame, level, .. } => {
                if level == Level::Pud {
                    self.note_reached(Boundary::GiantSplit);
                }
                self.count_split(checked, frame);
            }
            Note::Asked(target) => self.asks(checked, target),
            Note::Tlb { event, slot } => {
                if matches!(event, TlbEvent::IpisSent(_)) {
                    self.has_answers();
                }
                self.reach_by_tlb(event);
                self.log_detail(Detail::Tlb(event, slot));
            }
            Note::Gather(event) => {
                if event == GatherEvent::DirtyFlush {
                    self.announce_dirty_flush();
                }
                self.reach_by_gather(event);
                self.note_early_free(event);
                self.log_detail(Detail::Gather(event));
            }
            Note::MapLocked { root, most } => self.map_locked(root, most),
            Note::MapUnlocked { root } => self.map_unlocked(root),
            Note::Contents(change) => self.note_contents(checked, change),
            Note::BatchTaken | Note::BatchRefused | Note::RmapDelayed | Note::Areas(_) => {}
        }
    }

    /// A frame is in use from now on.
    fn check_given_out(&self, checked: &Checked, frame: PhysFrame, role: FrameRole) {
        self.log(What::Allocated(frame, role));
        self.note_given_out(frame, role);
        if checked.ledger.is_cached(frame, role) {
            self.note_reached(Boundary::ReusedWhileCached);
        }
        let is_lent = checked.ledger.is_lent(frame);
        if checked.ledger.allocated(frame, role) {
            let kind = if is_lent { ViolationKind::LentPageGivenOut } else { ViolationKind::GivenOutTwice };
            self.report(checked, kind, self.current(), 0, frame, None);
        }
        if role == FrameRole::Table {
            self.note_new_table();
            self.note_own_table(frame);
        }
    }

    /// A frame is free from now on: looks for CPUs that may still reach it.
    fn check_freed(&self, checked: &Checked, frame: PhysFrame, role: FrameRole) {
        let step = self.log(What::Freed(frame, role));
        if role == FrameRole::Table {
            self.detach_device(frame);
            for cpu in &self.cpus {
                cpu.pcid_owners.forget(frame.start_address().as_u64());
            }
        }
        let frees = checked.ledger.double_frees();
        let may_be_cached = checked.ledger.freed(frame, role, step, self.current());
        if checked.ledger.double_frees() != frees {
            self.report(checked, ViolationKind::FreedTwice, self.current(), 0, frame, None);
        }
        if !may_be_cached {
            return;
        }
        let freed = frames_of(frame, role);
        self.check_device(checked, &freed);
        for cpu in &self.cpus {
            let id = cpu.id;
            let mut caches = lock(&cpu.caches);
            let Some(Caches { mmu, watch }) = &mut *caches else { continue };
            let pcid = mmu.cr3().1;
            let mut usable = None;
            let mut stale = Vec::new();
            for entry in mmu.entries().filter(|entry| overlaps(entry, &freed)) {
                let now = entry.held.tag == Tag::Global || entry.held.tag == Tag::Pcid(pcid);
                let at_any_time = !matches!(entry.held.as_a, Use::Page(_));
                if now && (at_any_time || self.may_use_addresses(id)) {
                    usable = Some(entry);
                } else {
                    stale.push(entry);
                }
            }
            if !stale.is_empty() {
                self.note_reached(Boundary::FreedWhileCached);
            }
            watch.mark_stale(stale);
            drop(caches);
            if let Some(entry) = usable {
                self.report_entry(checked, id, &freed, entry);
            }
        }
    }

    /// Nothing maps this page of a file any more: a CPU that has its D bit cached would write to it
    /// without setting any.
    fn check_unwritable(&self, checked: &Checked, frame: PhysFrame) {
        for cpu in self.cpus.iter().filter(|cpu| self.may_use_addresses(cpu.id)) {
            let caches = lock(&cpu.caches);
            let Some(Caches { mmu, .. }) = &*caches else { continue };
            let pcid = mmu.cr3().1;
            let found = mmu.entries_reaching(frame).find(|entry| {
                let is_usable = entry.held.tag == Tag::Global || entry.held.tag == Tag::Pcid(pcid);
                is_usable && entry.dirty && entry.rights.writable() && matches!(entry.held.as_a, Use::Page(_))
            });
            drop(caches);
            if let Some(entry) = found {
                let kind = ViolationKind::WritableThoughUnmapped;
                self.report(checked, kind, cpu.id, entry.address.as_u64(), frame, Some(entry));
            }
        }
    }

    /// A program must not use one page through two page sizes: SDM vol. 3A 4.10.2.3, 4.10.4.2. A
    /// split flushes before it maps the page in the other size.
    ///
    /// Where the sizes lead to different memory, the larger is a page that was discarded and whose
    /// flush is still to come: that it goes before the call returns and before the page is freed is
    /// checked elsewhere. A lazy CPU, or one that has not yet compared generations, may get there
    /// by speculation; it flushes before it runs a program.
    pub(crate) fn check_sizes(&self, checked: &Checked, index: usize) {
        let Some(cpu) = self.cpus.get(index).filter(|cpu| self.is_in_user_mode(cpu.id)) else { return };
        loop {
            let found = lock(&cpu.caches).as_mut().and_then(|Caches { mmu, .. }| mmu.mixed());
            let Some((address, large, small)) = found else { return };
            if large.translate(address) == small.translate(address) {
                let frame = PhysFrame::containing_address(small.start());
                self.report(checked, ViolationKind::TwoPageSizes, cpu.id, address.as_u64(), frame, None);
            }
        }
    }

    /// This CPU enters user mode, or the kernel on it may use addresses of the program from now on,
    /// or it has loaded CR3: a stale entry that it can use from now on is a violation.
    pub(crate) fn check_stale(&self) {
        let Some(checked) = &self.checked else { return };
        let here = self.current();
        self.check_sizes(checked, here.index());
        let mut caches = lock(&self.cpu().caches);
        let Some(Caches { mmu, watch }) = &mut *caches else { return };
        if watch.is_clean() {
            return;
        }
        let pcid = mmu.cr3().1;
        let user = self.may_use_addresses(here);
        let usable = watch
            .stale()
            .filter(|(_, held)| held.tag == Tag::Global || held.tag == Tag::Pcid(pcid))
            .filter(|(_, held)| user || !matches!(held.as_a, Use::Page(_)))
            .find_map(|(frame, held)| mmu.entries_reaching(frame).find(|entry| entry.held == held));
        if let Some(entry) = usable {
            watch.forget_stale();
            drop(caches);
            let number = frames_of(entry.frame, FrameRole::Page);
            self.report_entry(checked, here, &number, entry);
        }
    }

    fn report_entry(
        &self,
        checked: &Checked,
        cpu: CpuId,
        freed: &core::ops::Range<usize>,
        entry: CachedEntry,
    ) {
        let kind = match entry.held.as_a {
            Use::Page(_) => ViolationKind::PageReachableAfterFree,
            Use::Table(_) | Use::Root => ViolationKind::TableReachableAfterFree,
        };
        // Of a large page, the part that was freed.
        let first = frames_of(entry.frame, FrameRole::Page).start;
        let inside = freed.start.saturating_sub(first) as u64;
        let address = entry.address.as_u64() + (inside << 12);
        let frame = frame_numbered(first.max(freed.start));
        self.report(checked, kind, cpu, address, frame, Some(entry));
    }
}
