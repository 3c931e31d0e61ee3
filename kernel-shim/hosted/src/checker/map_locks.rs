//! Which map locks a CPU holds, and what the call that holds one may do meanwhile.
//!
//! The kernel says when it takes a map lock, the most that the call does under it, and when it
//! drops the lock. Linux's munmap frees under the lock, held for reading. A kernel that is to free
//! after it has dropped the lock is held to that here.

use core::sync::atomic::Ordering;

use mmu_gather::GatherEvent;
use x86_64::structures::paging::PhysFrame;

use crate::checker::checked::Checked;
use crate::checker::kind::ViolationKind;
use crate::machine::HostedMachine;
use crate::mutex::lock;
use crate::vocabulary::UnderMapLock;

impl HostedMachine {
    /// This CPU holds the map lock of the address space of `root`, and does no more than `most`
    /// under it.
    pub(crate) fn map_locked(&self, root: PhysFrame, most: UnderMapLock) {
        let mut held = lock(&self.cpu().map_locks.held);
        held.retain(|(other, _)| *other != root);
        held.push((root, most));
    }

    /// This CPU drops the map lock of the address space of `root`.
    pub(crate) fn map_unlocked(&self, root: PhysFrame) {
        let locks = &self.cpu().map_locks;
        let mut held = lock(&locks.held);
        held.retain(|(other, _)| *other != root);
        if held.is_empty() {
            lock(&locks.own_tables).clear();
        }
    }

    /// A table is given out to this CPU.
    pub(crate) fn note_own_table(&self, table: PhysFrame) {
        let locks = &self.cpu().map_locks;
        if !lock(&locks.held).is_empty() {
            lock(&locks.own_tables).push(table);
        }
    }

    /// A gather on this CPU did something. One that has no room, or has flushed early for dirty
    /// pages, frees what it has before it goes on, and says so when it is done.
    pub(crate) fn note_early_free(&self, event: GatherEvent) {
        let frees_early = match event {
            GatherEvent::ForcedFlush | GatherEvent::TableFallback | GatherEvent::DirtyFlush => true,
            // These come between the announcement and the free.
            GatherEvent::NestedFlush | GatherEvent::LockDropped { .. } => return,
            _ => false,
        };
        self.cpu().map_locks.frees_early.store(frees_early, Ordering::Relaxed);
    }

    /// The call that this CPU makes has flushed for the last time: what it still frees is not freed
    /// early.
    pub(crate) fn note_last_flush(&self) {
        self.cpu().map_locks.frees_early.store(false, Ordering::Relaxed);
    }

    /// A frame is being freed on this CPU.
    pub(crate) fn check_free_outside_map_locks(&self, checked: &Checked, frame: PhysFrame) {
        let needed = if self.cpu().map_locks.frees_early.load(Ordering::Relaxed) {
            UnderMapLock::FreesEarly
        } else {
            UnderMapLock::Frees
        };
        let mut own_tables = lock(&self.cpu().map_locks.own_tables);
        if let Some(own) = own_tables.iter().position(|table| *table == frame) {
            own_tables.swap_remove(own);
        } else if self.holds_map_lock_for_less(needed).is_some() {
            self.report(checked, ViolationKind::FreedUnderMapLock, self.current(), 0, frame, None);
        }
    }

    /// This CPU is going to wait for others to answer.
    pub(crate) fn check_wait_outside_map_locks(&self, checked: &Checked) {
        if let Some(root) = self.holds_map_lock_for_less(UnderMapLock::Flushes) {
            self.report(checked, ViolationKind::WaitedUnderMapLock, self.current(), 0, root, None);
        }
    }

    /// The root of an address space whose map lock this CPU holds for a call that does less than
    /// `needed`.
    fn holds_map_lock_for_less(&self, needed: UnderMapLock) -> Option<PhysFrame> {
        let held = lock(&self.cpu().map_locks.held);
        held.iter().find(|(_, most)| *most < needed).map(|(root, _)| *root)
    }
}
