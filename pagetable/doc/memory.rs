use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicUsize, Ordering};

use mmu_pagetable::{TableLock, TableMemory};
use x86_64::PhysAddr;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PhysFrame};

/// Eight frames that may become tables, each with a lock. Frame n has the address n * 4096.
struct Memory {
    frames: [UnsafeCell<PageTable>; 8],
    locks: [TableLock<spin::Spin>; 8],
    taken: AtomicUsize,
}

impl Memory {
    fn new() -> Self {
        Self {
            frames: [const { UnsafeCell::new(PageTable::new()) }; 8],
            locks: [const { TableLock::new(()) }; 8],
            taken: AtomicUsize::new(0),
        }
    }
}

fn number(frame: PhysFrame) -> usize {
    frame.start_address().as_u64() as usize / 4096
}

// SAFETY: a frame is zeroed, given out once, and lives as long as the memory.
unsafe impl PageTableFrameMapping for Memory {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.frames[number(frame)].get()
    }
}

// SAFETY: as above; each frame has a lock of its own.
unsafe impl TableMemory for Memory {
    type Lock = TableLock<spin::Spin>;

    unsafe fn table_lock(&self, frame: PhysFrame) -> &TableLock<spin::Spin> {
        &self.locks[number(frame)]
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        let number = self.taken.fetch_add(1, Ordering::Relaxed);
        let address = PhysAddr::new(number as u64 * 4096);
        (number < self.frames.len()).then(|| PhysFrame::containing_address(address))
    }

    unsafe fn free_tables(&self, _tables: &[PhysFrame]) {
        // This memory gives no frame out a second time.
    }
}
