//! Where violations are looked for.

use mmu_gather::GatherEvent;
use mmu_gather::pagetable::TableView;
use mmu_gather::tlb::{CpuId, Laziness};
use x86_64::structures::paging::PhysFrame;

use crate::kernel::{PaperKernel, PaperMm};
use crate::ledger::Released;
use crate::log::Event;
use crate::violation::Violation;

impl PaperKernel {
    /// The violations seen so far; the kernel forgets them.
    pub fn take_violations(&self) -> Vec<Violation> {
        self.violations.take()
    }

    pub(crate) fn violation(&self, violation: Violation) {
        self.violations.borrow_mut().push(violation);
    }

    /// Takes note that this lock is about to be taken.
    pub(crate) fn note_lock(&self, table: PhysFrame) {
        self.note(Event::LockAsked(table));
        self.is_a_lock_held();
        self.locks_asked.borrow_mut().push(table);
    }

    /// Whether any table lock is held. The engine's guards cannot be seen, but the locks can.
    pub(crate) fn is_a_lock_held(&self) -> bool {
        let mut asked = self.locks_asked.borrow_mut();
        asked.retain(|table| self.lock_of(*table).is_locked());
        !asked.is_empty()
    }

    /// Whether any table lock is held now.
    #[must_use]
    pub fn is_locked_now(&self) -> bool {
        self.is_a_lock_held()
    }

    pub(crate) fn check_no_lock_is_held(&self, what: &'static str) {
        if self.is_a_lock_held() {
            self.violation(Violation::UnderALock(what));
        }
    }

    /// Before a batch of anything is freed.
    pub(crate) fn check_before_freeing(&self, what: &'static str) {
        self.check_no_lock_is_held(what);
        self.check_cpus();
    }

    /// G3: the flush of dirty pages is the one that may happen under a table lock.
    pub(crate) fn check_ipi_is_allowed(&self) {
        if !self.dirty_flush.get() {
            self.check_no_lock_is_held("flush_others");
        }
    }

    pub(crate) fn note_dirty_flush(&self, event: GatherEvent) {
        match event {
            GatherEvent::DirtyFlush => self.dirty_flush.set(true),
            GatherEvent::LockDropped { .. } => self.dirty_flush.set(false),
            _ => {}
        }
    }

    /// G1 and P2, for a table that is being freed.
    pub(crate) fn check_table_may_be_freed(&self, table: PhysFrame) {
        if !self.forget_table(table) {
            self.violation(Violation::TableFreedTwice(table));
        }
        if !self.table(table).is_empty() {
            self.violation(Violation::TableFreedFull(table));
        }
        if self.mms().any(|mm| self.is_linked(mm, table)) {
            self.violation(Violation::TableFreedWhileLinked(table));
        }
        for cpu in self.cpu_ids() {
            let tlb = self.cpu(cpu).tlb.borrow();
            if tlb.root() == table {
                self.violation(Violation::TableFreedTooEarly(table, cpu, 0));
            }
            if let Some((address, _)) = tlb.usable_tables().find(|(_, usable)| *usable == table) {
                self.violation(Violation::TableFreedTooEarly(table, cpu, address));
            }
        }
    }

    /// Drops `nr_pages` references, and frees each page that has no reference left. G1 and G5.
    pub fn release(&self, frame: PhysFrame, nr_pages: u32) {
        for frame in (0..u64::from(nr_pages)).map(|index| frame + index) {
            let released = self.ledger().release(frame);
            match released {
                Released::StillReferenced => {}
                Released::Twice => self.violation(Violation::PageReleasedTwice(frame)),
                Released::Unknown => self.violation(Violation::UnknownPageReleased(frame)),
                Released::Freed(page) => {
                    self.note(Event::PageFreed(frame));
                    if page.mappings != 0 {
                        self.violation(Violation::PageFreedWhileMapped(frame));
                    }
                    self.check_nobody_reaches(frame, page.len_bytes);
                }
            }
        }
    }

    /// What a driver does when no area maps its frames any more: it frees them without asking.
    pub fn driver_frees(&self, frame: PhysFrame) {
        self.check_nobody_reaches(frame, 4096);
    }

    fn check_nobody_reaches(&self, frame: PhysFrame, len_bytes: u64) {
        for cpu in self.active_cpus() {
            let start = frame.start_address().as_u64();
            let tlb = self.cpu(cpu).tlb.borrow();
            let reaches = tlb.usable_leaves().find(|leaf| {
                let mapped = leaf.frame.start_address().as_u64();
                mapped < start + len_bytes && start < mapped + leaf.len_bytes
            });
            if let Some(leaf) = reaches {
                self.violation(Violation::PageFreedTooEarly(frame, cpu, leaf.address));
            }
        }
    }

    /// The mapcount of a dirty page is dropped: from now on writeback may take the page for clean.
    pub(crate) fn check_nobody_writes(&self, frame: PhysFrame) {
        for cpu in self.active_cpus() {
            let tlb = self.cpu(cpu).tlb.borrow();
            if let Some(leaf) = tlb.usable_leaves().find(|leaf| leaf.frame == frame && leaf.writable) {
                self.violation(Violation::RmapRemovedTooEarly(frame, cpu, leaf.address));
            }
        }
    }

    /// A CPU goes on with what it has cached, after a CR3 load or a lazy stretch: nothing of that
    /// may be freed.
    pub(crate) fn check_what_was_kept(&self, cpu: CpuId) {
        let tlb = self.cpu(cpu).tlb.borrow();
        for leaf in tlb.usable_leaves().filter(|leaf| self.ledger().is_freed(leaf.frame, leaf.len_bytes)) {
            self.violation(Violation::FreedPageUsed(leaf.frame, cpu, leaf.address));
        }
        for (address, table) in tlb.usable_tables().filter(|(_, table)| !self.is_live_table(*table)) {
            self.violation(Violation::FreedTableWalked(table, cpu, address));
        }
    }

    /// A CPU that has an address space in CR3 is in its cpumask, and no slot is ahead of its mm.
    fn check_cpus(&self) {
        for mm in self.mms() {
            for cpu in self.cpu_ids() {
                if self.cpu(cpu).tlb.borrow().root() == mm.space().root()
                    && !mm.context().cpumask().contains(cpu)
                {
                    self.violation(Violation::LoadedButNotInCpumask(cpu));
                }
                let mut slots = self.cpu(cpu).state.slots();
                if slots.any(|(_, slot)| {
                    slot.ctx_id == Some(mm.context().ctx_id()) && slot.tlb_gen > mm.context().tlb_gen()
                }) {
                    self.violation(Violation::SlotAheadOfItsMm(cpu));
                }
            }
        }
    }

    fn active_cpus(&self) -> impl Iterator<Item = CpuId> {
        self.cpu_ids().filter(|cpu| self.cpu(*cpu).state.laziness() == Laziness::Active)
    }

    /// Whether `table` can be reached from the root of `mm`.
    fn is_linked(&self, mm: &PaperMm, table: PhysFrame) -> bool {
        let mut found = false;
        self.for_each_table(mm, &mut |view| found |= view.frame() == table);
        found
    }

    /// Visits every table of `mm` below the root.
    pub(crate) fn for_each_table(&self, mm: &PaperMm, visit: &mut dyn FnMut(TableView<'_>)) {
        self.visit_below(self.root_of(mm), visit);
    }

    fn visit_below(&self, view: TableView<'_>, visit: &mut dyn FnMut(TableView<'_>)) {
        // All of a table, but half of the root: the other half is the kernel's.
        let span = view.level().entry_span();
        for index in 0..512.min(self.options().mode.user_end() / span) {
            let address = index * span;
            if let Some(child) = self.child_of(view, address) {
                visit(child);
                self.visit_below(child, visit);
            }
        }
    }
}
