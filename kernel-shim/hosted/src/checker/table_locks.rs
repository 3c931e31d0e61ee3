//! Which table locks a CPU holds: rule G3, nothing is freed and no answer awaited under one.
//!
//! A table lock is one byte and does not say which CPU holds it. But it changes hands only while a
//! CPU runs, and one runs at a time. So if a CPU has asked for a lock, the lock is taken, and no
//! other CPU was seen to hold it when that CPU last stopped running, then it is this CPU's.

use core::sync::atomic::Ordering;

use mmu_gather::pagetable::TableLock;
use mmu_gather::tlb::CpuId;
use x86_64::structures::paging::PhysFrame;

use crate::checker::checked::Checked;
use crate::checker::kind::ViolationKind;
use crate::checker::per_cpu::Asked;
use crate::machine::HostedMachine;
use crate::mutex::lock;
use crate::schedule::GiveWay;

impl HostedMachine {
    /// This CPU is going to take the lock of the table in `table`, at once or after others.
    pub(crate) fn ask_for_lock(&self, table: PhysFrame, wanted: &TableLock<GiveWay>) {
        let here = self.current();
        self.settle_locks(here);
        let mut asked = lock(&self.cpu().table_locks.asked);
        // It is not waiting for those any more.
        asked.retain(Asked::is_locked);
        asked.push(Asked { table, lock: wanted, is_held: false });
    }

    /// Finds out which of the locks that `cpu` asked for it has. Called before another CPU runs,
    /// and whenever it matters.
    pub(crate) fn settle_locks(&self, cpu: CpuId) {
        let mine = &self.cpus[cpu.index()].table_locks;
        let mut asked = lock(&mine.asked);
        if asked.is_empty() {
            return;
        }
        let mut holds_any = false;
        for wanted in asked.iter_mut() {
            if !wanted.is_held && wanted.is_locked() {
                wanted.is_held = !self.is_held_by_another(cpu, wanted.table);
            }
            holds_any |= wanted.is_held;
        }
        // Most turns end with no lock held.
        if holds_any {
            asked.retain(|wanted| !wanted.is_held || wanted.is_locked());
        }
        if !asked.iter().any(|wanted| wanted.is_held) {
            mine.flushes_dirty_pages.store(false, Ordering::Relaxed);
        }
    }

    /// This CPU is going to flush under the lock it holds, for the sake of dirty pages.
    pub(crate) fn announce_dirty_flush(&self) {
        self.settle_locks(self.current());
        self.cpu().table_locks.flushes_dirty_pages.store(true, Ordering::Relaxed);
    }

    /// A frame is being freed on this CPU.
    pub(crate) fn check_free_outside_locks(&self, checked: &Checked, frame: PhysFrame) {
        if self.table_locked_here().is_some() {
            let here = self.current();
            self.report(checked, ViolationKind::FreedUnderTableLock, here, 0, frame, None);
        }
    }

    /// This CPU is going to wait for others to answer.
    pub(crate) fn check_wait_outside_locks(&self, checked: &Checked) {
        if let Some(table) = self.table_locked_here()
            && !self.cpu().table_locks.flushes_dirty_pages.load(Ordering::Relaxed)
        {
            let here = self.current();
            self.report(checked, ViolationKind::WaitedUnderTableLock, here, 0, table, None);
        }
    }

    /// Which CPUs have tried to take a table lock that they hold, in words: a line for each.
    pub(crate) fn locks_taken_twice(&self) -> Vec<String> {
        let mut words = Vec::new();
        for cpu in &self.cpus {
            let asked = lock(&cpu.table_locks.asked);
            let Some((last, before)) = asked.split_last() else { continue };
            if before.iter().any(|held| held.table == last.table && held.is_held && held.is_locked()) {
                words.push(format!(
                    "{} holds the lock of the table in frame {:#x}, and has tried to take it again: a fault maps, and \
                     allocates, before it locks a table (rule G3: nothing that waits is done under a table lock)",
                    cpu.id,
                    last.table.start_address()
                ));
            }
        }
        words
    }

    pub(crate) fn table_locked_here(&self) -> Option<PhysFrame> {
        self.settle_locks(self.current());
        let asked = lock(&self.cpu().table_locks.asked);
        asked.iter().find(|wanted| wanted.is_held).map(|held| held.table)
    }

    fn is_held_by_another(&self, cpu: CpuId, table: PhysFrame) -> bool {
        self.cpus.iter().filter(|other| other.id != cpu).any(|other| {
            lock(&other.table_locks.asked).iter().any(|wanted| wanted.table == table && wanted.is_held)
        })
    }
}
