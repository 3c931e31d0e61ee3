//! Which table locks a CPU holds: rule G3, nothing is freed and no answer awaited under one.
//!
//! A lock does not say who holds it. But it changes hands only while somebody runs: if a CPU has asked for a lock, the lock is
//! taken, and nobody else was seen to have it when they last stopped running, then it is this CPU's.
#![expect(unsafe_code, reason = "looks at locks by pointer")]

use core::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;

use mmu_gather::pagetable::TableLock;
use mmu_gather::tlb::CpuId;
use x86_64::structures::paging::PhysFrame;

use crate::checker::ViolationKind;
use crate::machine::{Checked, GiveWay, HostedMachine, lock};

/// The table locks that one CPU has asked for.
#[derive(Debug, Default)]
pub(crate) struct TableLocks {
    asked: Mutex<Vec<Asked>>,
    /// A flush of dirty pages was announced, the stated exception of rule G3. Until no lock is held any more.
    flushes_dirty_pages: AtomicBool,
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    table: PhysFrame,
    lock: *const TableLock<GiveWay>,
    is_held: bool,
}

// SAFETY: the pointer is to a lock, which is `Sync`.
unsafe impl Send for Asked {}

impl Asked {
    fn is_locked(&self) -> bool {
        // SAFETY: the kernel's metadata has a lock for every frame of the machine, and outlives the calls that use them; it is
        // looked at from within such calls and right after one gave way.
        unsafe { &*self.lock }.is_locked()
    }
}

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

    /// Finds out which of the locks that `cpu` asked for it has. Called before another CPU runs, and whenever it matters.
    pub(crate) fn settle_locks(&self, cpu: CpuId) {
        let mine = &self.cpus[cpu.index()].table_locks;
        let mut asked = lock(&mine.asked);
        if asked.is_empty() {
            return;
        }
        for wanted in asked.iter_mut().filter(|wanted| !wanted.is_held && wanted.is_locked()) {
            wanted.is_held = !self.is_held_by_another(cpu, wanted.table);
        }
        asked.retain(|wanted| !wanted.is_held || wanted.is_locked());
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

    fn table_locked_here(&self) -> Option<PhysFrame> {
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
