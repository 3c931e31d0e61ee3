//! The map lock of an address space, and what each call may do while it holds it. Linux: mmap_lock.
//!
//! A flush must be complete before the map lock is dropped: after that another call may map
//! something else at the same addresses. A free can wait, and while it runs no other call gets the
//! lock. So this kernel frees after it has dropped the lock, with the exceptions named below. Each
//! call says what it does when it takes the lock, and a checker holds it to that:
//!
//! | call | map lock held for | waits for flushes under it | frees pages and tables under it |
//! |---|---|---|---|
//! | mmap, populate | writing | no | no |
//! | munmap | writing, while areas are detached | of a large page that an end cuts | no |
//! | | then reading | of all that it cleared | only early |
//! | mmap, MAP_FIXED | as munmap; dropped; as mmap | as munmap | as munmap |
//! | MADV_DONTNEED | writing, if an end cuts a large page | of that page | no |
//! | | then reading | of all that it cleared, area by area | yes, area by area |
//! | MADV_GUARD_INSTALL | reading; after three tries, writing | of all that it cleared | yes |
//! | MADV_GUARD_REMOVE | reading | no | no |
//! | mremap | writing, while it moves | of all that it moved | no; if that fails, early |
//! | | then reading | of what was left at the old place | only early |
//! | mprotect | writing | of all that lost rights | no |
//! | fork | writing, the parent's | of all that lost rights | no |
//! | exit | writing | of all that it cleared | only early; the root after all else |
//! | exec moves the stack | writing | of all that it moved | only early |
//! | reclaim | reading | no: once for all victims, after the last lock | no |
//! | a fault | reading | of a page that a write replaces | no |
//! | | writing, to split a large page | of that page | no |
//! | | writing, to grow a stack | no | no |
//!
//! - *Early*: before the call is done, because its gather has no room for more, or no page to queue
//!   a table in, or has cleared dirty pages of a file, which it flushes for before it drops the
//!   lock of their table. The gather frees what it has and goes on (rule G4). What it clears last
//!   is freed after the map lock.
//! - A table that a call takes and need not link after all, because another CPU was faster, it
//!   gives back at once: nobody has seen it.
//! - MADV_DONTNEED and MADV_GUARD_INSTALL go from area to area under one lock, so they free under
//!   it; it is held for reading nearly always, and keeps no fault out.
//!
//! Linux: munmap frees what it cleared last in tlb_finish_mmu too, but while it still holds the
//! lock for reading; exit_mmap clears pages with the lock held for reading and frees tables with it
//! held for writing; and mmap with MAP_FIXED replaces what was there without dropping the lock in
//! between.

use core::ops::{Deref, DerefMut};

use spin::rwlock::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use x86_64::structures::paging::PhysFrame;

use crate::machine::{Machine, Note, UnderMapLock};
use crate::vma::VmaTree;

/// The areas of an address space, and the lock around them.
pub(crate) struct MapLock<R>(RwLock<VmaTree, R>);

/// The map lock, held for reading: areas stay as they are.
pub(crate) struct MapRead<'m, M: Machine> {
    // Dropped first: the machine hears of it while the lock is still held.
    _held: Held<'m, M>,
    vmas: RwLockReadGuard<'m, VmaTree, M::Relax>,
}

/// The map lock, held for writing: nobody else looks at areas.
pub(crate) struct MapWrite<'m, M: Machine> {
    held: Held<'m, M>,
    vmas: RwLockWriteGuard<'m, VmaTree, M::Relax>,
}

impl<R: spin::RelaxStrategy> MapLock<R> {
    pub(crate) const fn new() -> Self {
        Self(RwLock::new(VmaTree::new()))
    }

    /// Takes the lock for reading. Under it the call does no more than `most`.
    pub(crate) fn read<'m, M: Machine<Relax = R>>(
        &'m self,
        machine: &'m M,
        root: PhysFrame,
        most: UnderMapLock,
    ) -> MapRead<'m, M> {
        let vmas = self.0.read();
        MapRead { _held: Held::new(machine, root, most), vmas }
    }

    /// Takes the lock for writing. Under it the call does no more than `most`.
    pub(crate) fn write<'m, M: Machine<Relax = R>>(
        &'m self,
        machine: &'m M,
        root: PhysFrame,
        most: UnderMapLock,
    ) -> MapWrite<'m, M> {
        let vmas = self.0.write();
        MapWrite { held: Held::new(machine, root, most), vmas }
    }

    /// Looks at the areas, for a moment too short for a checker to care.
    pub(crate) fn peek<T>(&self, look: impl FnOnce(&VmaTree) -> T) -> T {
        look(&self.0.read())
    }
}

impl<'m, M: Machine> MapWrite<'m, M> {
    /// Goes on with the lock held for reading: no area changes in between. From here the call does
    /// no more than `most`.
    pub(crate) fn downgrade(self, most: UnderMapLock) -> MapRead<'m, M> {
        let Self { held, vmas } = self;
        let vmas = vmas.downgrade();
        held.say(most);
        MapRead { _held: held, vmas }
    }
}

impl<M: Machine> Deref for MapRead<'_, M> {
    type Target = VmaTree;

    fn deref(&self) -> &VmaTree {
        &self.vmas
    }
}

impl<M: Machine> Deref for MapWrite<'_, M> {
    type Target = VmaTree;

    fn deref(&self) -> &VmaTree {
        &self.vmas
    }
}

impl<M: Machine> DerefMut for MapWrite<'_, M> {
    fn deref_mut(&mut self) -> &mut VmaTree {
        &mut self.vmas
    }
}

/// What the machine was told of a map lock that is held, and is told when it is dropped.
struct Held<'m, M: Machine> {
    machine: &'m M,
    root: PhysFrame,
}

impl<'m, M: Machine> Held<'m, M> {
    fn new(machine: &'m M, root: PhysFrame, most: UnderMapLock) -> Self {
        let held = Self { machine, root };
        held.say(most);
        held
    }

    fn say(&self, most: UnderMapLock) {
        self.machine.note(Note::MapLocked { root: self.root, most });
    }
}

impl<M: Machine> Drop for Held<'_, M> {
    fn drop(&mut self) {
        self.machine.note(Note::MapUnlocked { root: self.root });
    }
}
