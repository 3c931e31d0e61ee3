//! The map lock of an address space, of which the checker is told.

use core::ops::{Deref, DerefMut};
use std::sync::Arc;

use mmu_hosted::{GiveWay, HostedMachine, Note, Seam, UnderMapLock};
use spin::mutex::{SpinMutex, SpinMutexGuard};
use x86_64::structures::paging::PhysFrame;

use crate::hosted::{HostedMm, HostedPlatform};

/// A map lock. It lets other CPUs run while it waits, and when it has been dropped.
#[derive(Debug)]
pub struct MapLock<T> {
    machine: Arc<HostedMachine>,
    root: PhysFrame,
    areas: SpinMutex<T, GiveWay>,
}

/// Holds a map lock.
#[derive(Debug)]
pub struct MapGuard<'a, T> {
    lock: &'a MapLock<T>,
    areas: SpinMutexGuard<'a, T, GiveWay>,
    // Dropped last.
    _after: AfterDrop<'a>,
}

#[derive(Debug)]
struct AfterDrop<'a>(&'a HostedMachine);

impl<T> MapLock<T> {
    /// The map lock of `mm`.
    #[must_use]
    pub fn new(kernel: &HostedPlatform, mm: &HostedMm, areas: T) -> Self {
        let (machine, root) = (Arc::clone(kernel.machine()), mm.space().root());
        Self { machine, root, areas: SpinMutex::new(areas) }
    }

    /// Takes it, for a call that does no more than `most` under it.
    pub fn lock(&self, most: UnderMapLock) -> MapGuard<'_, T> {
        self.machine.seam(Seam::Lock);
        let areas = self.areas.lock();
        self.machine.note(Note::MapLocked { root: self.root, most });
        MapGuard { lock: self, areas, _after: AfterDrop(&self.machine) }
    }
}

impl<T> Deref for MapGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.areas
    }
}

impl<T> DerefMut for MapGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.areas
    }
}

impl<T> Drop for MapGuard<'_, T> {
    fn drop(&mut self) {
        self.lock.machine.note(Note::MapUnlocked { root: self.lock.root });
    }
}

impl Drop for AfterDrop<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.0.seam(Seam::Lock);
        }
    }
}
