//! What the machine does at seams and with notes: other CPUs get their chance, and the checker looks.

use core::cell::Cell;
use core::sync::atomic::Ordering;

use mmu_gather::GatherEvent;
use mmu_gather::tlb::CpuId;
use mmu_kernel_shim::{FrameRole, Note, Seam, UserAccess};
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

use crate::arch::{Level, LinearAddress, PageSize};
use crate::boundary::Boundary;
use crate::checker::{Checker, Violation, ViolationKind, frame_numbered, frames_of};
use crate::machine::{Caches, Checked, HostedMachine, lock};
use crate::memory::Memory;
use crate::mmu::{AccessKind, AccessMode, Fault};
use crate::options::Adversary;
use crate::physical::PhysicalMemory;
use crate::returns::{Promise, Promised};
use crate::schedule;
use crate::story::{Detail, Fill, What};
use crate::walk::Depth;
use crate::watch::{CachedEntry, Held, Tag, Use};

/// Memory as a walk reads it, with an eye on walks through tables that are free.
pub(crate) struct WatchedMemory<'a> {
    pub(crate) memory: &'a Memory,
    pub(crate) checker: &'a Checker,
    pub(crate) freed_table: Cell<Option<PhysFrame>>,
}

impl PhysicalMemory for WatchedMemory<'_> {
    fn read(&self, address: PhysAddr) -> u64 {
        let frame = PhysFrame::containing_address(address);
        if self.checker.when_freed(frame).is_some() {
            self.freed_table.set(Some(frame));
        }
        self.memory.read(address)
    }

    fn fetch_or(&self, address: PhysAddr, bits: u64, expected: u64) -> Result<(), u64> {
        self.memory.fetch_or(address, bits, expected)
    }
}

impl HostedMachine {
    /// Kernel code crosses a seam: other CPUs may run, and any CPU may speculate.
    pub(crate) fn cross(&self, seam: Seam) {
        schedule::progress();
        let choice = self.choices.bits();
        let here = self.cpu();
        // A CPU without turns of its own answers requests on another's: it would come back as that one.
        let has_turns = here.has_turns.load(Ordering::Relaxed);
        let left = here.seams_to_preemption.load(Ordering::Relaxed);
        if left > 0 && has_turns {
            here.seams_to_preemption.store(left - 1, Ordering::Relaxed);
            if left == 1 {
                return stay_away(PREEMPTED_TURNS);
            }
        }
        // A page cleared is the commonest seam by far: one in eight is enough there.
        let rarely = match seam {
            Seam::Cleared => choice & 0b111 != 0,
            Seam::Lock | Seam::Free | Seam::Allocate => false,
        };
        if rarely {
            return;
        }
        if choice >> 8 & 0b11 == 0 {
            self.speculate_on(self.choices.pick(self.cpus.len()));
        }
        if choice >> 32 & 0b11 == 0 {
            self.device_turn(choice >> 34);
        }
        if choice >> 16 & self.calm == 0 && has_turns {
            // Now and then this CPU is away for long: others get whole operations done inside what looks like a moment.
            stay_away(if choice >> 24 & 0b11_1111 == 0 { 1 + self.choices.below(64) } else { 1 });
        }
    }

    /// Code crosses a seam that protocols are made of: between two of their steps, each of which others may look at.
    pub(crate) fn cross_between_steps(&self) {
        if self.checked.is_none() {
            return;
        }
        self.cross(Seam::Lock);
        let choice = self.choices.bits();
        if choice & 0b111 == 0 && self.cpu().has_turns.load(Ordering::Relaxed) {
            stay_away(1 + (choice >> 8 & 0b1_1111));
        }
    }

    /// Lets a CPU fill its caches through whatever it has loaded, or forget something.
    fn speculate_on(&self, index: usize) {
        let Some(checked) = &self.checked else { return };
        let memory =
            WatchedMemory { memory: &self.memory, checker: &checked.checker, freed_table: Cell::new(None) };
        let near = self.choices.below(8) << 12;
        let address = LinearAddress::new(self.hot_address().wrapping_add(near));
        let depth = match self.choices.below(4) {
            0 => Depth::Structure(Level::Pdpt),
            1 => Depth::Structure(Level::Pd),
            _ => Depth::Page,
        };
        let Some(cpu) = self.cpus.get(index) else { return };
        if let Some(Caches { mmu, watch }) = &mut *lock(&cpu.caches) {
            mmu.speculate(address, depth, &memory, watch);
            tell_fills(checked, cpu.id, address.as_u64(), watch.take_fills(), Fill::Speculation);
            if self.options.adversary == Adversary::Forgetter && self.choices.one_in(8) {
                // Which one goes matters little; a capacity bound displaces the same way.
                mmu.forget_everything(watch);
            }
        }
        if let Some(frame) = memory.freed_table.get() {
            self.report_walk(checked, cpu.id, address.as_u64(), frame);
        }
        self.check_sizes(checked, index);
    }

    fn report_walk(&self, checked: &Checked, cpu: CpuId, address: u64, frame: PhysFrame) {
        self.report(checked, ViolationKind::TableReachableAfterFree, cpu, address, frame, None);
    }

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
            kind,
            cpu,
            address,
            frame,
            freed: checked.checker.when_freed(frame),
            entry,
            story: checked.story.about(cpu, frame, address),
        });
    }

    /// The program on this CPU uses an address. The frame it reaches, or the fault it takes.
    ///
    /// # Errors
    /// The fault; nothing was reached.
    pub fn user_access(&self, address: u64, access: UserAccess) -> Result<Option<PhysFrame>, Fault> {
        self.point_at(address);
        let Some(checked) = &self.checked else { return Ok(None) };
        let memory =
            WatchedMemory { memory: &self.memory, checker: &checked.checker, freed_table: Cell::new(None) };
        let kind = match access {
            UserAccess::Read => AccessKind::Read,
            UserAccess::Write => AccessKind::Write,
        };
        let result = match &mut *lock(&self.cpu().caches) {
            Some(Caches { mmu, watch }) => {
                let result = mmu.access(LinearAddress::new(address), kind, AccessMode::User, &memory, watch);
                tell_fills(checked, self.current(), address, watch.take_fills(), Fill::Access);
                result
            }
            None => return Ok(None),
        };
        let here = self.current();
        if let Some(frame) = memory.freed_table.get() {
            self.report_walk(checked, here, address, frame);
        }
        self.check_sizes(checked, here.index());
        let reached = result?;
        let frame = PhysFrame::containing_address(reached.address);
        self.tell(What::Accessed(address, frame));
        if access == UserAccess::Write {
            checked.checker.note_written(frame);
        }
        if checked.checker.when_freed(frame).is_some() {
            let kind = if reached.source.was_cached() {
                ViolationKind::PageReachableAfterFree
            } else {
                ViolationKind::FreePageMapped
            };
            self.report(checked, kind, here, address, frame, None);
        }
        Ok(Some(frame))
    }

    pub(crate) fn check_note(&self, checked: &Checked, note: Note) {
        if matches!(note, Note::Unmapped { .. } | Note::Discarded { .. } | Note::Protected { .. }) {
            self.note_last_flush();
        }
        match note {
            Note::Allocated(frame, role) => {
                self.tell(What::Allocated(frame, role));
                if checked.checker.is_cached(frame, role) {
                    self.reached.note(Boundary::ReusedWhileCached);
                }
                checked.checker.allocated(frame, role);
                if role == FrameRole::Table {
                    self.note_own_table(frame);
                }
            }
            Note::Freed(frame, role) => {
                self.check_free_outside_locks(checked, frame);
                self.check_free_outside_map_locks(checked, frame);
                self.count_freed(checked, frame);
                if role == FrameRole::Table {
                    self.check_freed_table(checked, frame);
                }
                self.check_freed(checked, frame, role);
            }
            Note::MappedByNobody(frame) => self.check_unwritable(checked, frame),
            Note::Unmapped { root, range, caller } => {
                self.tell(What::Unmapped(range.start(), range.end()));
                self.check_promise(checked, Promise { root, range, caller, what: Promised::Gone });
            }
            Note::Discarded { root, range, since, caller } => {
                self.check_promise(
                    checked,
                    Promise { root, range, caller, what: Promised::Discarded(since) },
                );
            }
            Note::Protected { root, range, most, caller } => {
                self.check_promise(checked, Promise { root, range, caller, what: Promised::AtMost(most) });
            }
            Note::Mapped { root, address, frame } => self.detail(Detail::Mapped(root, address, frame)),
            Note::Cleared { address, level, frame } => {
                self.count_leaf(checked, frame);
                if level != mmu_gather::pagetable::Level::Pte {
                    self.reached.note(Boundary::LargeCleared);
                }
                self.detail(Detail::Cleared(address, level, frame));
            }
            Note::Restricted { address, level, frame } => {
                self.count_leaf(checked, frame);
                self.detail(Detail::Restricted(address, level));
            }
            Note::Split { frame, .. } => self.count_split(checked, frame),
            Note::Tlb { event, slot } => self.detail(Detail::Tlb(event, slot)),
            Note::Gather(event) => {
                if event == GatherEvent::DirtyFlush {
                    self.announce_dirty_flush();
                }
                self.note_early_free(event);
                self.detail(Detail::Gather(event));
            }
            Note::MapLocked { root, most } => self.map_locked(root, most),
            Note::MapUnlocked { root } => self.map_unlocked(root),
        }
    }

    /// A frame is free from now on: looks for CPUs that may still reach it.
    fn check_freed(&self, checked: &Checked, frame: PhysFrame, role: FrameRole) {
        let step = self.tell(What::Freed(frame, role));
        if role == FrameRole::Table {
            self.detach_device(frame);
            for cpu in &self.cpus {
                cpu.pcid_owners.forget(frame.start_address().as_u64());
            }
        }
        if !checked.checker.freed(frame, role, step, self.current()) {
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
                if now && (at_any_time || self.is_in_user_mode(id)) {
                    usable = Some(entry);
                } else {
                    stale.push(entry);
                }
            }
            if !stale.is_empty() {
                self.reached.note(Boundary::FreedWhileCached);
            }
            watch.mark_stale(stale);
            drop(caches);
            if let Some(entry) = usable {
                self.report_entry(checked, id, &freed, entry);
            }
        }
    }

    /// Nothing maps this page of a file any more: a CPU that has its D bit cached would write to it without setting any.
    fn check_unwritable(&self, checked: &Checked, frame: PhysFrame) {
        for cpu in self.cpus.iter().filter(|cpu| self.is_in_user_mode(cpu.id)) {
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

    /// One page must not be met through two sizes: SDM vol. 3A 4.10.2.3, 4.10.4.2. Whoever splits it flushes in between.
    ///
    /// Where the sizes lead to different memory, the larger is a page that was discarded and whose flush is still to come: that
    /// it goes before the call returns and before the page is freed is checked elsewhere. A lazy CPU, or one that has not yet
    /// compared generations, may get there by speculation; it flushes before it runs a program.
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

    /// This CPU enters user mode, or has loaded CR3: what is stale here and now can be used is a violation.
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
        let user = self.is_in_user_mode(here);
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

/// Turns for which a CPU is away that was told to be.
const PREEMPTED_TURNS: u64 = 48;

fn stay_away(turns: u64) {
    for _ in 0..turns {
        schedule::give_way();
    }
}

/// Tells what entered the caches of a CPU on its way to `address`.
fn tell_fills(checked: &Checked, cpu: CpuId, address: u64, fills: Vec<(PhysFrame, Held)>, fill: Fill) {
    for (frame, held) in fills {
        checked.story.detail(cpu, Detail::Filled(address, frame, held, fill));
    }
}

/// Whether an entry names one of these frames.
pub(crate) fn overlaps(entry: &CachedEntry, frames: &core::ops::Range<usize>) -> bool {
    let first = frames_of(entry.frame, FrameRole::Page).start;
    let count = match entry.held.as_a {
        Use::Page(PageSize::Size2MiB) => 512,
        Use::Page(PageSize::Size1GiB) => 512 * 512,
        Use::Page(PageSize::Size4KiB) | Use::Table(_) | Use::Root => 1,
    };
    first < frames.end && frames.start < first + count
}
