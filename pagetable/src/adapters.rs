//! Between this crate and the traits of the `x86_64` crate: [`Frames`] is a [`TableMemory`] out of
//! a frame allocator and a mapping of frames, [`MapperTables`] a frame allocator out of a
//! [`TableMemory`].
#![expect(unsafe_code, reason = "passes on what the traits on both sides believe")]

use core::fmt;

use spin::mutex::SpinMutex;
use spin::{RelaxStrategy, Spin};
use x86_64::VirtAddr;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{FrameAllocator, FrameDeallocator, PageTable, PhysFrame, Size4KiB};

use crate::lock::{HashedLocks, Lock, NoLock};
use crate::memory::TableMemory;
use crate::space::AddressSpace;

/// Where the locks of all tables are: what [`Frames`] has for them.
///
/// # Safety
/// As for [`TableMemory::table_lock`]: the same lock for the same frame, every time.
pub unsafe trait LockStorage {
    /// What kind of lock.
    type Lock: Lock;

    /// The lock of the table in `frame`.
    fn lock_of(&self, frame: PhysFrame) -> &Self::Lock;
}

// SAFETY: which lock it is depends on the frame alone.
unsafe impl<const N: usize, R: RelaxStrategy> LockStorage for HashedLocks<N, R> {
    type Lock = crate::lock::TableLock<R>;

    #[inline]
    fn lock_of(&self, frame: PhysFrame) -> &Self::Lock {
        Self::lock_of(self, frame)
    }
}

// SAFETY: there is no other.
unsafe impl LockStorage for NoLock {
    type Lock = Self;

    #[inline]
    fn lock_of(&self, _: PhysFrame) -> &Self {
        self
    }
}

/// A [`TableMemory`] out of what a kernel has for the `x86_64` crate: a mapping of frames to
/// pointers (`M`), and a frame allocator (`A`), which takes `&mut self` and is locked here.
///
/// `L` has the locks of the tables: [`HashedLocks`], or [`NoLock`]. `R` decides what a CPU does
/// while it waits for the allocator; that is not held while anybody waits for a flush.
///
/// A table is zeroed when it is allocated. A frame goes back to the allocator after every CPU has
/// flushed.
///
/// # Examples
/// ```
/// # use std::cell::UnsafeCell;
/// # use x86_64::{PhysAddr, structures::paging::PhysFrame};
/// use mmu_pagetable::adapters::Frames;
/// use mmu_pagetable::{AddressSpace, EntryValue, Level, PagingMode, TableMemory};
/// use x86_64::structures::paging::mapper::PageTableFrameMapping;
/// use x86_64::structures::paging::{FrameAllocator, FrameDeallocator, Size4KiB};
/// use x86_64::structures::paging::{PageTable, PageTableFlags};
///
/// # struct Mapping(Vec<UnsafeCell<PageTable>>);
/// # // SAFETY: a frame is an element, which is neither moved nor freed.
/// # unsafe impl PageTableFrameMapping for Mapping {
/// #     fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
/// #         self.0[frame.start_address().as_u64() as usize / 4096].get()
/// #     }
/// # }
/// # struct Allocator(Vec<PhysFrame>);
/// # // SAFETY: each frame is given out once until it comes back.
/// # unsafe impl FrameAllocator<Size4KiB> for Allocator {
/// #     fn allocate_frame(&mut self) -> Option<PhysFrame> {
/// #         self.0.pop()
/// #     }
/// # }
/// # impl FrameDeallocator<Size4KiB> for Allocator {
/// #     unsafe fn deallocate_frame(&mut self, frame: PhysFrame) {
/// #         self.0.push(frame);
/// #     }
/// # }
/// # let frame = |number: u64| PhysFrame::containing_address(PhysAddr::new(number * 4096));
/// # let mapping = Mapping((0..8).map(|_| UnsafeCell::new(PageTable::new())).collect());
/// # let allocator = Allocator((0..8).map(frame).collect());
/// // SAFETY: frames of the allocator are memory that the mapping leads to, and nobody else's.
/// let memory: Frames<_, _> = unsafe { Frames::new(mapping, allocator) };
/// let root = memory.allocate_table().expect("a frame is left");
/// // SAFETY: the root is zeroed, belongs to no other address space, and is never freed.
/// let space = unsafe { AddressSpace::new(root, PagingMode::FourLevel) };
/// let leaf = EntryValue::leaf(Level::Pte, PhysAddr::new(0x5000), PageTableFlags::WRITABLE);
/// // SAFETY: nobody frees tables meanwhile, and no program uses the page.
/// unsafe { space.map(&memory, 0x40_0000, Level::Pte, leaf) }.expect("frames for three tables");
/// assert_eq!(memory.allocator().0.len(), 4);
/// ```
pub struct Frames<M, A, L = HashedLocks<64>, R = Spin> {
    mapping: M,
    allocator: SpinMutex<A, R>,
    locks: L,
}

impl<M, A, const N: usize, R: RelaxStrategy> Frames<M, A, HashedLocks<N, R>, R> {
    /// Tables out of frames of `allocator`, with `N` locks for all of them.
    ///
    /// # Safety
    /// - `mapping` leads to the 4096 bytes of each frame that any allocator of type `A` hands out,
    ///   which are readable and writable as long as this exists: safe code may put another one in
    ///   its place ([`allocator`](Self::allocator));
    /// - nobody but the engine uses a frame that
    ///   [`allocate_table`](TableMemory::allocate_table) has taken, until it was given back.
    #[must_use]
    pub const unsafe fn new(mapping: M, allocator: A) -> Self {
        // SAFETY: passed on to our caller.
        unsafe { Self::with_locks(mapping, allocator, HashedLocks::new()) }
    }
}

impl<M, A, L, R: RelaxStrategy> Frames<M, A, L, R> {
    /// Tables out of frames of `allocator`, whose locks are in `locks`.
    ///
    /// # Safety
    /// As for [`new`](Frames::new); and with [`NoLock`], what that type asks for.
    #[must_use]
    pub const unsafe fn with_locks(mapping: M, allocator: A, locks: L) -> Self {
        Self { mapping, allocator: SpinMutex::new(allocator), locks }
    }

    /// Where the locks are.
    #[must_use]
    pub const fn locks(&self) -> &L {
        &self.locks
    }

    /// The allocator, locked: for frames that become pages.
    ///
    /// # Context
    /// Not to be kept while anybody maps or frees.
    pub fn allocator(&self) -> impl core::ops::DerefMut<Target = A> + '_ {
        self.allocator.lock()
    }
}

// SAFETY: passed on; the constructor's caller answers for the mapping.
unsafe impl<M: PageTableFrameMapping, A, L, R> PageTableFrameMapping for Frames<M, A, L, R> {
    #[inline]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.mapping.frame_to_pointer(frame)
    }
}

// SAFETY: the constructor's caller answers for mapping and allocator; a frame is zeroed when it is
// allocated; locks are those of the storage, which is believed to return the same for the same
// frame.
unsafe impl<M, A, L, R> TableMemory for Frames<M, A, L, R>
where
    M: PageTableFrameMapping,
    A: FrameAllocator<Size4KiB> + FrameDeallocator<Size4KiB>,
    L: LockStorage,
    R: RelaxStrategy,
{
    type Lock = L::Lock;

    #[inline]
    unsafe fn table_lock(&self, frame: PhysFrame) -> &L::Lock {
        self.locks.lock_of(frame)
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        let frame = self.allocator.lock().allocate_frame()?;
        // SAFETY: the constructor's caller promised that the pointer is good, and the frame ours.
        unsafe { self.mapping.frame_to_pointer(frame).write_bytes(0, 1) };
        Some(frame)
    }

    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        let mut allocator = self.allocator.lock();
        for table in tables {
            // SAFETY: by our caller's promise it came from `allocate_table`, or was a root, and no
            // CPU reaches it any more.
            unsafe { allocator.deallocate_frame(*table) };
        }
    }
}

impl<M, A, L, R> fmt::Debug for Frames<M, A, L, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frames").finish_non_exhaustive()
    }
}

/// The mapping of a kernel that has all of physical memory mapped at one offset, as
/// `OffsetPageTable` of the `x86_64` crate takes it.
#[derive(Clone, Copy, Debug)]
pub struct PhysOffset(VirtAddr);

impl PhysOffset {
    /// Physical address 0 is mapped at `offset`.
    ///
    /// # Safety
    /// Every frame that becomes a table is mapped there, readable and writable.
    #[must_use]
    pub const unsafe fn new(offset: VirtAddr) -> Self {
        Self(offset)
    }
}

// SAFETY: the constructor's caller answers for the mapping.
unsafe impl PageTableFrameMapping for PhysOffset {
    #[inline]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        (self.0 + frame.start_address().as_u64()).as_mut_ptr()
    }
}

/// A frame allocator for one call of the `x86_64` crate's mapper (`map_to`), which links tables
/// behind the engine's back: it hands out tables of the engine's memory, and when it is dropped it
/// counts those that were linked.
///
/// A kernel whose mapper writes entries keeps no used lines (rule P4).
///
/// # Examples
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/doc/memory.rs"));
/// # fn main() {
/// use mmu_pagetable::adapters::MapperTables;
/// use mmu_pagetable::{AddressSpace, Level, PagingMode};
/// use x86_64::VirtAddr;
/// use x86_64::structures::paging::{MappedPageTable, Mapper, Page, PageTableFlags, Size4KiB};
///
/// // `Memory` is the example of `TableMemory`; it is a `PageTableFrameMapping`, too.
/// let memory = Memory::new();
/// let root = memory.allocate_table().expect("a frame");
/// // SAFETY: the root is zeroed, belongs to no other address space, and is never freed.
/// let space = unsafe { AddressSpace::new(root, PagingMode::FourLevel) };
///
/// let page = Page::<Size4KiB>::containing_address(VirtAddr::new(0x40_0000));
/// let frame = PhysFrame::containing_address(PhysAddr::new(0x5000));
/// // SAFETY: nobody else looks at the tables while the mapper is there.
/// let mut mapper = unsafe { MappedPageTable::new(&mut *memory.frame_to_pointer(root), &memory) };
/// // SAFETY: as above, and the mapper works on the tables of `space`.
/// let mut tables = unsafe { MapperTables::new(&memory, &space, 0x40_0000) };
/// // SAFETY: no program uses the page.
/// let mapped = unsafe { mapper.map_to(page, frame, PageTableFlags::PRESENT, &mut tables) };
/// mapped.expect("frames are left").ignore();
/// drop(tables);
/// assert_eq!([Level::Pte, Level::Pmd, Level::Pud].map(|level| space.nr_tables(level)), [1, 1, 1]);
/// # }
/// ```
pub struct MapperTables<'a, M: TableMemory> {
    memory: &'a M,
    space: &'a AddressSpace,
    address: u64,
    taken: u64,
}

impl<'a, M: TableMemory> MapperTables<'a, M> {
    /// Tables for mapping `address`, a user address, in `space`.
    ///
    /// # Safety
    /// - As for [`AddressSpace::root_table`], until this is dropped, with the map lock held for
    ///   writing;
    /// - what is taken is linked on the path to `address` in `space`, or lost.
    #[must_use]
    pub const unsafe fn new(memory: &'a M, space: &'a AddressSpace, address: u64) -> Self {
        Self { memory, space, address, taken: 0 }
    }
}

// SAFETY: a table comes out of the memory once, and is known to nobody else.
unsafe impl<M: TableMemory> FrameAllocator<Size4KiB> for MapperTables<'_, M> {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let table = self.memory.allocate_table()?;
        self.taken += 1;
        Some(table)
    }
}

impl<M: TableMemory> Drop for MapperTables<'_, M> {
    /// Below a table that is new there was none. So the tables taken are the lowest of the path,
    /// however far the mapper came.
    fn drop(&mut self) {
        if self.taken == 0 || !self.space.user_range().contains(self.address) {
            return;
        }
        // SAFETY: passed on to the constructor's caller.
        let mut view = unsafe { self.space.root_table(self.memory) };
        // SAFETY: as above.
        while let Some(child) = unsafe { view.child(self.memory, self.address) } {
            view = child;
        }
        let mut level = Some(view.level());
        while let Some(new) = level.filter(|new| *new < self.space.mode().root_level() && self.taken > 0) {
            self.space.note_linked(new, 1);
            self.taken -= 1;
            level = new.above();
        }
    }
}

impl<M: TableMemory> fmt::Debug for MapperTables<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MapperTables")
            .field("address", &format_args!("{:#x}", self.address))
            .field("taken", &self.taken)
            .finish_non_exhaustive()
    }
}
