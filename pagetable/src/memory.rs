//! Where tables live: what a kernel supplies to this crate.
#![expect(unsafe_code, reason = "what is believed about frames")]

use x86_64::structures::paging::PhysFrame;
use x86_64::structures::paging::mapper::PageTableFrameMapping;

use crate::lock::Lock;
use crate::used_lines::UsedLines;

/// Where table pages live: what a kernel supplies to this crate.
///
/// The pointer to a frame comes from the `x86_64` crate's own [`PageTableFrameMapping`], so an
/// implementation that exists for `MappedPageTable` serves unchanged. Its `FrameAllocator` is not
/// used, because it takes `&mut self`, and several CPUs allocate at once.
///
/// # Safety
/// - `frame_to_pointer` of a frame that `allocate_table` returned, or of a root, points to that
///   frame's 4096 bytes, readable and writable, for as long as the frame is a table; no Rust
///   reference other than `&Table` to it exists.
/// - `allocate_table` returns a frame that nobody else uses and that reads as zero.
/// - `table_lock` returns the same lock for the same frame until the frame is freed. Tables may
///   share one.
/// - `used_lines` returns the same [`UsedLines`] for the same frame until the frame is freed, and
///   another one for every other frame. If it returns one, entries of linked tables are filled only
///   through [`LockedTable::entry`] (rule P4); the kernel half of a root, which the engine does not
///   look at, is exempt.
/// - Nobody combines a view of one memory with a reference to another of the same type. A machine
///   has one memory; where a process has several (a simulator), whoever holds two keeps their views
///   apart.
///
/// [`LockedTable::entry`]: crate::LockedTable::entry
///
/// # Example
/// Tables in an ordinary process:
///
/// ```
#[doc = include_str!("../doc/memory.rs")]
/// ```
pub unsafe trait TableMemory: PageTableFrameMapping {
    /// What kind of lock tables have: [`TableLock`](crate::TableLock), with what a CPU does while
    /// it waits; [`NoLock`](crate::NoLock); or a type of the kernel's own.
    type Lock: Lock;

    /// The lock of the table in `frame`. Only a caller that takes the lock next, or tries to, asks
    /// for it.
    ///
    /// It lies beside the used lines in what the kernel keeps for each frame, best of all. A kernel
    /// that keeps nothing has [`HashedLocks`](crate::HashedLocks).
    ///
    /// # Safety
    /// `frame` is a table of this memory, and is not freed while the lock is used.
    unsafe fn table_lock(&self, frame: PhysFrame) -> &Self::Lock;

    /// Where it is noted which cache lines of the table in `frame` may hold entries; best beside
    /// the lock.
    ///
    /// With these notes, tearing down sparse memory looks at the used lines only, not at all 64 of
    /// each table. A kernel that does not keep them, or that writes entries by means of its own,
    /// returns `None`: every line is then looked at.
    ///
    /// # Safety
    /// As for [`table_lock`](Self::table_lock).
    #[inline]
    unsafe fn used_lines(&self, _frame: PhysFrame) -> Option<&UsedLines> {
        None
    }

    /// Called between the look at an entry and the change of it, and before used lines are
    /// forgotten. A kernel does nothing here.
    ///
    /// Hardware may set bits of the entry in between, and other CPUs may do what needs no lock of
    /// this table. Whoever tests a kernel lets them.
    ///
    /// # Context
    /// The lock of the table is held.
    #[inline(always)]
    fn between_look_and_change(&self) {}

    /// A zeroed frame for a new table; `None` when memory is short.
    ///
    /// # Context
    /// No table lock is held. May sleep if the caller of the mapping function may.
    fn allocate_table(&self) -> Option<PhysFrame>;

    /// Takes back pages that were tables, or were meant to become tables.
    ///
    /// The engine calls this only for pages that no CPU can reach any more: never linked, or
    /// unhooked and flushed everywhere, lazy CPUs included. A kernel whose own software walks
    /// tables without a lock (Linux: gup_fast) must still wait for those walkers, for example by
    /// handing the pages to RCU here.
    ///
    /// # Context
    /// No table lock is held.
    ///
    /// # Safety
    /// - Each of `tables` came from [`allocate_table`](Self::allocate_table), or was a root, and is
    ///   given back once.
    /// - Each was never linked, or was unhooked and every CPU, lazy ones included, has flushed
    ///   since.
    /// - No CPU has one of them as its root.
    unsafe fn free_tables(&self, tables: &[PhysFrame]);
}
