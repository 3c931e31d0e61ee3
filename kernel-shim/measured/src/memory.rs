//! Fake physical memory: table pages, metadata of every frame, and two free lists.
#![expect(unsafe_code, reason = "frames are reached through a mapping at a fixed address")]

use core::cell::Cell;
use core::ptr;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::io;

use mmu_gather::pagetable::{TableLock, UsedLines};
use x86_64::PhysAddr;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::shuffle::shuffle;

/// Where physical address 0 is mapped. It is constant, as in a kernel's direct map, so that no peer
/// loads it from a variable.
pub const PHYS_OFFSET: u64 = 0x2000_0000_0000;
/// Bytes for table pages: reserved, touched only as far as they are used.
pub const TABLE_BYTES: u64 = 6 << 30;
/// Bytes of data frames. They are numbers only: they have metadata and no memory.
pub const DATA_BYTES: u64 = 64 << 30;

const METADATA: u64 = PHYS_OFFSET + TABLE_BYTES;
const METADATA_BYTES: u64 = ((TABLE_BYTES + DATA_BYTES) >> 12) * size_of::<Frame>() as u64;
const LIVE: u32 = 1;

/// What the kernel knows of one frame: 32 bytes, two to a cache line.
///
/// The counts are atomics so that one layout serves every way of counting; the plain ways use loads
/// and stores.
#[derive(Debug)]
#[repr(C, align(32))]
pub struct Frame {
    /// References.
    pub refcount: AtomicU32,
    /// Page-table entries that map the frame.
    pub mapcount: AtomicU32,
    flags: AtomicU32,
    lock: TableLock<spin::Spin>,
    used_lines: UsedLines,
    /// Physical address of the next free frame; 0 ends the list.
    next: AtomicU64,
}

const _: () = assert!(size_of::<Frame>() == 32);

impl Frame {
    fn new(count: u32, flags: u32) -> Self {
        Self {
            refcount: AtomicU32::new(count),
            mapcount: AtomicU32::new(count),
            flags: AtomicU32::new(flags),
            lock: TableLock::new(()),
            used_lines: UsedLines::new(),
            next: AtomicU64::new(0),
        }
    }

    /// The lock of the table in the frame.
    #[must_use]
    #[inline]
    pub const fn lock(&self) -> &TableLock<spin::Spin> {
        &self.lock
    }

    /// Which lines of the table in the frame are used.
    #[must_use]
    #[inline]
    pub const fn used_lines(&self) -> &UsedLines {
        &self.used_lines
    }
}

/// In which order the allocator hands out tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One after the other.
    Ascending,
    /// As after a long uptime.
    Shuffled,
}

/// The memory; a process has only one, because it lies at a fixed address.
///
/// Not shared between threads: the free lists are plain, like a kernel's per-CPU lists.
#[derive(Debug)]
pub struct Memory {
    free_tables: Cell<u64>,
    free_pages: Cell<u64>,
}

impl Memory {
    /// Maps the memory.
    ///
    /// # Panics
    /// As [`map`](Self::map) fails.
    #[must_use]
    pub fn new() -> Self {
        Self::map().unwrap_or_else(|error| panic!("{error}"))
    }

    /// Maps the memory.
    ///
    /// # Errors
    /// The host's, if the address range is taken, as it is for a second memory in the same process.
    pub fn map() -> io::Result<Self> {
        #[expect(clippy::cast_possible_truncation, reason = "x86_64: usize has 64 bits")]
        let (start, bytes) = (PHYS_OFFSET as usize, (TABLE_BYTES + METADATA_BYTES) as usize);
        let address = ptr::without_provenance_mut(start);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: a new anonymous mapping where nothing is mapped; touches no memory of ours.
        let mapped = unsafe { libc::mmap(address, bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if !ptr::eq(mapped, address) {
            let error = io::Error::last_os_error();
            let words = format!("cannot map {bytes} bytes at {address:p}, one memory a process: {error}");
            return Err(io::Error::new(error.kind(), words));
        }
        let _ = mapped.expose_provenance();
        // SAFETY: the mapping just made. A refusal costs speed only.
        unsafe { libc::madvise(mapped, bytes, libc::MADV_HUGEPAGE) };
        Ok(Self { free_tables: Cell::new(0), free_pages: Cell::new(0) })
    }

    /// Starts again with the first `tables` frames free, in `order`; the shuffle is the same every
    /// time.
    ///
    /// # Panics
    /// If that is more than there are.
    pub fn reset(&self, tables: u64, order: Order) {
        assert!(tables < TABLE_BYTES >> 12, "{tables} tables do not fit");
        self.free_pages.set(0);
        self.free_tables.set(0);
        let mut frames: Vec<u64> = (1..=tables).map(|number| number << 12).collect();
        if order == Order::Shuffled {
            shuffle(&mut frames);
        }
        for physical in frames.into_iter().rev() {
            self.describe(physical, Frame::new(0, 0));
            self.free_table(physical);
        }
    }

    /// Makes the frame at `physical` a mapped page: one reference, one mapping.
    #[inline]
    pub fn make_page(&self, physical: u64) {
        self.describe(physical, Frame::new(1, LIVE));
    }

    /// The first data frame.
    #[must_use]
    pub const fn data_start() -> u64 {
        TABLE_BYTES
    }

    #[inline]
    fn describe(&self, physical: u64, frame: Frame) {
        // SAFETY: `metadata` points into the mapping; nobody else looks at this frame's metadata
        // meanwhile, for it is neither on a list nor mapped.
        unsafe { ptr::write(metadata(physical).cast_mut(), frame) };
    }

    /// The metadata of the frame at `physical`.
    #[must_use]
    #[inline]
    pub fn frame(&self, physical: u64) -> &Frame {
        debug_assert!(physical < TABLE_BYTES + DATA_BYTES, "{physical:#x} is beyond memory");
        // SAFETY: inside the mapping, which lives until the process ends; only frames that
        // `describe` has filled are ever asked for, and all of their fields are atomics.
        unsafe { &*metadata(physical) }
    }

    /// Fetches the metadata of the frame at `physical` into the cache.
    #[inline]
    pub fn prefetch(&self, physical: u64) {
        // SAFETY: a prefetch of any address is harmless, and SSE is in the baseline of x86_64.
        unsafe {
            core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(
                metadata(physical).cast(),
            );
        }
    }

    /// The page at `physical` as a table.
    #[must_use]
    #[inline]
    pub fn pointer(&self, physical: u64) -> *mut PageTable {
        pointer(physical)
    }

    /// Puts a page on the free list.
    #[inline]
    pub fn free_page(&self, physical: u64) {
        self.frame(physical).next.store(self.free_pages.get(), Ordering::Relaxed);
        self.free_pages.set(physical);
    }

    /// Puts a chain of pages on the free list: `first` begins the chain, which ends with what was
    /// on the list before.
    #[inline]
    pub fn free_chain(&self, first: u64) {
        self.free_pages.set(first);
    }

    /// Links `physical` before `next`, which is what a chain began with so far; starts with
    /// [`chain_start`](Self::chain_start).
    #[inline]
    pub fn chain(&self, physical: u64, next: u64) -> u64 {
        self.frame(physical).next.store(next, Ordering::Relaxed);
        physical
    }

    /// What a new chain begins with.
    #[must_use]
    #[inline]
    pub const fn chain_start(&self) -> u64 {
        self.free_pages.get()
    }

    /// Puts a table on the free list.
    #[inline]
    pub fn free_table(&self, physical: u64) {
        self.frame(physical).next.store(self.free_tables.get(), Ordering::Relaxed);
        self.free_tables.set(physical);
    }

    /// Takes a zeroed table from the free list.
    #[must_use]
    pub fn allocate_table(&self) -> Option<PhysFrame> {
        let physical = self.free_tables.get();
        if physical == 0 {
            return None;
        }
        self.free_tables.set(self.frame(physical).next.load(Ordering::Relaxed));
        // SAFETY: a free frame of the mapping: 4096 writable bytes that nobody uses.
        unsafe { ptr::write_bytes(pointer(physical), 0, 1) };
        Some(PhysFrame::containing_address(PhysAddr::new(physical)))
    }

    /// Empties the page list; returns how many pages were on it.
    ///
    /// # Panics
    /// If a page on it was not live (it was freed twice, or never mapped), or has references left.
    pub fn take_free_pages(&self) -> u64 {
        let mut next = self.free_pages.replace(0);
        let mut pages = 0;
        while next != 0 {
            let frame = self.frame(next);
            assert_eq!(frame.flags.swap(0, Ordering::Relaxed), LIVE, "page {next:#x} was freed twice");
            assert_eq!(frame.refcount.load(Ordering::Relaxed), 0, "page {next:#x} was freed while in use");
            pages += 1;
            next = frame.next.load(Ordering::Relaxed);
        }
        pages
    }

    /// How many tables are free.
    ///
    /// # Panics
    /// If the list runs in a circle: a table was freed twice.
    #[must_use]
    pub fn nr_free_tables(&self) -> u64 {
        let mut next = self.free_tables.get();
        let mut tables = 0;
        while next != 0 {
            tables += 1;
            assert!(tables <= TABLE_BYTES >> 12, "a table was freed twice");
            next = self.frame(next).next.load(Ordering::Relaxed);
        }
        tables
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

/// Where the page at `physical` is seen.
#[must_use]
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "x86_64: usize has 64 bits")]
pub const fn pointer(physical: u64) -> *mut PageTable {
    ptr::with_exposed_provenance_mut((PHYS_OFFSET + physical) as usize)
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "x86_64: usize has 64 bits")]
fn metadata(physical: u64) -> *const Frame {
    // 32 bytes for each 4096.
    debug_assert!(physical.is_multiple_of(4096), "{physical:#x} is no frame");
    ptr::with_exposed_provenance((METADATA + (physical >> 7)) as usize)
}
