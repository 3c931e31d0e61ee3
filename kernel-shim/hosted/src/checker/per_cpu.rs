//! What is remembered of each CPU: the thread that runs there, and what the rules about locks and
//! preemption points ask for.
#![expect(unsafe_code, reason = "looks at locks by pointer")]

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Mutex;

use mmu_gather::pagetable::TableLock;
use x86_64::structures::paging::PhysFrame;

use crate::schedule::GiveWay;
use crate::vocabulary::UnderMapLock;

/// The table locks that one CPU has asked for.
#[derive(Debug, Default)]
pub(crate) struct TableLocks {
    pub(crate) asked: Mutex<Vec<Asked>>,
    /// Whether a flush of dirty pages was announced, the stated exception of rule G3. It holds
    /// until the CPU holds no table lock.
    pub(crate) flushes_dirty_pages: AtomicBool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub(crate) table: PhysFrame,
    pub(crate) lock: *const TableLock<GiveWay>,
    pub(crate) is_held: bool,
}

// SAFETY: the pointer is to a lock, which is `Sync`.
unsafe impl Send for Asked {}

impl Asked {
    pub(crate) fn is_locked(&self) -> bool {
        // SAFETY: the kernel's metadata has a lock for every frame of the machine, and outlives the
        // calls that use them; it is looked at from within such calls and right after one gave way.
        unsafe { &*self.lock }.is_locked()
    }
}

/// The map locks that one CPU holds.
#[derive(Debug, Default)]
pub(crate) struct MapLocks {
    /// The root of each address space whose lock it is, and the most that may be done under it.
    pub(crate) held: Mutex<Vec<(PhysFrame, UnderMapLock)>>,
    /// Tables taken since the CPU last held no map lock. One that another CPU was faster to link is
    /// given back at once: nobody has seen it.
    pub(crate) own_tables: Mutex<Vec<PhysFrame>>,
    /// A gather frees what it has, to go on.
    pub(crate) frees_early: AtomicBool,
}

/// What a CPU did in the step that it takes, for the corners that are told of it.
#[derive(Debug, Default)]
pub(crate) struct StepSoFar {
    /// A gather was full, and flushed with no lock held.
    pub(crate) was_forced: AtomicBool,
    /// Tables unhooked.
    pub(crate) unhooked: AtomicU32,
}

impl StepSoFar {
    pub(crate) fn begin(&self) {
        self.was_forced.store(false, Ordering::Relaxed);
        self.unhooked.store(0, Ordering::Relaxed);
    }
}

/// What one CPU did since its last preemption point.
#[derive(Debug, Default)]
pub(crate) struct WorkDone {
    pub(crate) leaves: AtomicU32,
    pub(crate) splits: AtomicU32,
    pub(crate) freed: AtomicU32,
}

/// The thread that runs on a CPU.
#[derive(Debug)]
pub(crate) struct ThreadHere {
    /// The number of the CPU that it began on.
    pub(crate) number: AtomicU32,
    /// It comes from another CPU, and has not run here yet.
    pub(crate) arrives: AtomicBool,
    /// It ran a program when it was taken from its CPU.
    pub(crate) was_in_user_mode: AtomicBool,
}

impl ThreadHere {
    pub(crate) const fn beginning_on(number: u32) -> Self {
        Self {
            number: AtomicU32::new(number),
            arrives: AtomicBool::new(false),
            was_in_user_mode: AtomicBool::new(false),
        }
    }
}
