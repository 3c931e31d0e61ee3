//! Tables out of a frame allocator that a kernel wrote for the `x86_64` crate, with some locks for
//! all of them, or none.
#![expect(unsafe_code, reason = "a memory for one thread")]

use core::cell::UnsafeCell;

use mmu_gather::pagetable::adapters::{Frames, LockStorage, PhysOffset};
use mmu_gather::pagetable::{
    AddressSpace, Bounds, EntryValue, HashedLocks, Level, NoLock, PagingMode, TableMemory, VirtRange,
};
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{
    FrameAllocator, FrameDeallocator, PageTable, PageTableFlags, PhysFrame, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

const NR_FRAMES: u64 = 12;
const PAGE: u64 = 4096;

/// Frames from a free list, as they were left: nothing is zeroed.
struct FreeList(Vec<PhysFrame>);

// SAFETY: a frame is handed out once, until it comes back.
unsafe impl FrameAllocator<Size4KiB> for FreeList {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        self.0.pop()
    }
}

impl FrameDeallocator<Size4KiB> for FreeList {
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame) {
        assert!(!self.0.contains(&frame), "{frame:?} comes back twice");
        self.0.push(frame);
    }
}

/// Physical memory: frame n is element n, and all of it is dirty.
fn memory() -> Vec<UnsafeCell<PageTable>> {
    let frames: Vec<_> = (0..NR_FRAMES).map(|_| UnsafeCell::new(PageTable::new())).collect();
    for frame in &frames {
        // SAFETY: nobody else knows the frame yet, and any bytes are a table.
        unsafe { frame.get().write_bytes(0xff, 1) };
    }
    frames
}

/// Maps a page, unmaps it, and unhooks its tables; twice, as all frames have been used then.
fn map_and_unhook<L: LockStorage>(locks: L) {
    let memory = memory();
    let offset = VirtAddr::from_ptr(memory.as_ptr());
    // SAFETY: all frames are there.
    let mapping = unsafe { PhysOffset::new(offset) };
    let frame = |number: u64| PhysFrame::containing_address(PhysAddr::new(number * PAGE));
    let free = FreeList((0..NR_FRAMES).map(frame).collect());
    // SAFETY: the frames are in `memory`, which outlives this, and nobody else's.
    let frames = unsafe { Frames::<_, _, L>::with_locks(mapping, free, locks) };
    assert_eq!(frames.frame_to_pointer(frame(3)).cast_const(), memory[3].get().cast_const());
    let root = frames.allocate_table().expect("a frame is left");
    // SAFETY: the root is zeroed, belongs to no other address space, and is never freed.
    let space = unsafe { AddressSpace::new(root, PagingMode::FourLevel) };
    for start in [0x40_0000, 0x7000_0000_0000] {
        let leaf = EntryValue::leaf(Level::Pte, PhysAddr::new(0x5000), PageTableFlags::WRITABLE);
        for address in [start, start + (1 << 30)] {
            // SAFETY: nobody frees tables meanwhile, and no program uses the page.
            unsafe { space.map(&frames, address, Level::Pte, leaf) }.expect("room");
            // SAFETY: as above.
            let table = unsafe { space.find_table(&frames, address, Level::Pte) }.expect("linked above");
            // SAFETY: no CPU has the page cached.
            let old = unsafe { table.lock(&frames).entry(address).get_and_clear() };
            assert_eq!(old, leaf);
            assert!(table.table().is_empty(), "the rest is zero");
        }
        assert_eq!(frames.allocator().0.len(), 6);
        let range = VirtRange::new(start, start + PAGE).expect("a page");
        let far = VirtRange::new(start + (1 << 30), start + (1 << 30) + PAGE).expect("a page");
        let mut free = |table: mmu_gather::pagetable::UnhookedTable| {
            // SAFETY: it was unhooked, and no CPU has ever walked it.
            unsafe { frames.free_tables(&[table.frame()]) };
        };
        // SAFETY: one thread; nothing is mapped there any more.
        unsafe { space.unhook_empty_tables(&frames, range, |table| table.into_iter().for_each(&mut free)) };
        assert_eq!(frames.allocator().0.len(), 8, "the two that lead to the first page alone");
        // SAFETY: as above.
        unsafe { space.unhook_tables(&frames, far, Bounds::whole(), free) };
        assert_eq!(frames.allocator().0.len(), 11, "all but the root");
        assert_eq!(space.nr_tables(Level::Pud), 0);
    }
}

#[test]
fn frames_of_any_allocator_become_zeroed_tables_and_come_back_once() {
    map_and_unhook(HashedLocks::<64>::new());
}

#[test]
fn two_locks_for_all_tables_are_enough_and_so_is_none() {
    map_and_unhook(HashedLocks::<2>::new());
    map_and_unhook(HashedLocks::<1>::new());
    map_and_unhook(NoLock);
}
