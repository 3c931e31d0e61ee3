//! Faults that come down from the root by locks, while another thread unhooks the tables that are
//! empty: no entry is lost with its table.
#![expect(unsafe_code, reason = "a memory for three threads")]

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use mmu_gather::pagetable::{
    AddressSpace, EntryValue, GuardOf, Level, LockedTable, PagingMode, TableLock, TableMemory, TableView,
    UnhookedTable, VirtRange,
};
use x86_64::PhysAddr;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PageTableFlags, PhysFrame};

const PAGE: u64 = 4096;
const NR_FRAMES: u64 = 64;
/// So many tables go before the threads stop; on a busy machine they may not meet for a while.
const ENOUGH: u64 = 1000;
const LONGEST: Duration = Duration::from_secs(20);

struct Memory {
    frames: Vec<UnsafeCell<PageTable>>,
    locks: Vec<TableLock<Yield>>,
    free: Mutex<Vec<PhysFrame>>,
    nr_freed: AtomicU64,
}

/// The threads may share a core.
struct Yield;

impl spin::RelaxStrategy for Yield {
    fn relax() {
        thread::yield_now();
    }
}

// SAFETY: frames are reached through atomics, but for one that is free.
unsafe impl Sync for Memory {}

fn number(frame: PhysFrame) -> usize {
    usize::try_from(frame.start_address().as_u64() / PAGE).expect("a small number")
}

// SAFETY: a frame lives as long as the memory.
unsafe impl PageTableFrameMapping for Memory {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.frames[number(frame)].get()
    }
}

// SAFETY: a frame is zeroed and given out once until it is freed; each has a lock of its own.
unsafe impl TableMemory for Memory {
    type Lock = TableLock<Yield>;

    unsafe fn table_lock(&self, frame: PhysFrame) -> &TableLock<Yield> {
        &self.locks[number(frame)]
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        let frame = self.free.lock().expect("no thread panics").pop()?;
        // SAFETY: the frame is free.
        unsafe { self.frame_to_pointer(frame).write(PageTable::new()) };
        Some(frame)
    }

    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        self.nr_freed.fetch_add(tables.len() as u64, Ordering::Relaxed);
        self.free.lock().expect("no thread panics").extend(tables);
    }
}

impl Memory {
    fn new() -> Self {
        let frame = |number| PhysFrame::containing_address(PhysAddr::new(number * PAGE));
        Self {
            frames: (0..NR_FRAMES).map(|_| UnsafeCell::new(PageTable::new())).collect(),
            locks: (0..NR_FRAMES).map(|_| TableLock::new(())).collect(),
            free: Mutex::new((0..NR_FRAMES).map(frame).collect()),
            nr_freed: AtomicU64::new(0),
        }
    }

    /// Locks the last-level table for `address`: each table's lock is taken before that of its
    /// parent is dropped. Tables that are missing are linked.
    fn come_down(&self, space: &AddressSpace, address: u64) -> LockedTable<'_, GuardOf<'_, Self>> {
        // SAFETY: the root stays; every other view is of a table whose parent's lock is held.
        let mut locked = unsafe { space.root_table(self) }.lock(self);
        while let (level, Some(below)) = (locked.view().level(), locked.view().level().below()) {
            let child = locked.entry(address).load().as_table(level).unwrap_or_else(|| {
                let new = self.allocate_table().expect("there are enough");
                // SAFETY: the entry is empty, its table locked, and the new one known to nobody.
                unsafe { locked.entry(address).store(EntryValue::table(new)) };
                space.note_linked(below, 1);
                new
            });
            // SAFETY: as above.
            locked = unsafe { TableView::new(self, child, below) }.lock(self);
        }
        locked
    }

    /// Maps and unmaps pages of its own, one at a time, and finds each where it was put.
    fn fault(&self, space: &AddressSpace, thread: u64) {
        let begun = Instant::now();
        for round in 0.. {
            if self.nr_freed.load(Ordering::Relaxed) >= ENOUGH || begun.elapsed() > LONGEST {
                return;
            }
            // Sometimes in the same table as the other thread, sometimes not.
            let address = (1 << 30) + thread * PAGE + (round / 7 % 3) * thread * (2 << 20);
            let page = PhysAddr::new((thread << 40) + round * PAGE);
            let leaf = EntryValue::leaf(Level::Pte, page, PageTableFlags::WRITABLE);
            // SAFETY: the entry is this thread's and empty; no program uses the page.
            unsafe { self.come_down(space, address).entry(address).store(leaf) };
            if round % 3 == 0 {
                thread::yield_now();
            }
            // SAFETY: no CPU has the page cached.
            let old = unsafe { self.come_down(space, address).entry(address).get_and_clear() };
            assert_eq!(old, leaf, "the page of round {round} at {address:#x}");
        }
    }
}

#[test]
fn an_entry_put_in_by_whoever_comes_down_by_locks_is_never_lost_with_its_table() {
    let memory = Memory::new();
    let root = memory.allocate_table().expect("there are enough");
    // SAFETY: the root is zeroed, belongs to no other address space, and is never freed.
    let space = unsafe { AddressSpace::new(root, PagingMode::FourLevel) };
    let done = AtomicBool::new(false);
    thread::scope(|threads| {
        let faults = [1, 2].map(|thread| {
            threads.spawn({
                let (memory, space) = (&memory, &space);
                move || memory.fault(space, thread)
            })
        });
        let done = &done;
        threads.spawn(move || {
            let results = faults.map(thread::ScopedJoinHandle::join);
            done.store(true, Ordering::Relaxed);
            assert!(results.into_iter().all(|result| result.is_ok()), "a page was lost");
        });
        let free = |table: UnhookedTable| {
            // SAFETY: it was unhooked, and no CPU has ever walked it.
            unsafe { memory.free_tables(&[table.frame()]) };
        };
        let range = VirtRange::new(1 << 30, 2 << 30).expect("a good range");
        while !done.load(Ordering::Relaxed) {
            // SAFETY: this thread alone unhooks; the others come down by locks.
            unsafe { space.unhook_empty_tables(&memory, range, |table| table.into_iter().for_each(free)) };
        }
        // SAFETY: as above, and the others are gone.
        unsafe { space.unhook_empty_tables(&memory, range, |table| table.into_iter().for_each(free)) };
    });
    assert!(memory.nr_freed.load(Ordering::Relaxed) > 100, "the threads hardly met");
    assert_eq!(Level::ALL[..3].iter().map(|level| space.nr_tables(*level)).sum::<u64>(), 0);
    assert_eq!(memory.free.lock().expect("no thread panics").len() as u64, NR_FRAMES - 1);
}
