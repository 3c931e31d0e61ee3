//! What one CPU has cached under one PCID: an array with the frame and the rights of each page, and
//! the paging structures on the way to them.
//!
//! It forgets nothing by itself: an entry goes by INVLPG, by a flush, or when speculation fills it
//! again. Its CPU alone writes it; the words are atomic because the interrupt of that CPU writes
//! them, too, and may come between any two instructions.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::memory::PAGE;

/// How many last-level tables cover the addresses that programs use, from address 0.
pub(crate) const TABLES: usize = 64;
/// Pages below one last-level table.
pub(crate) const PAGES_A_TABLE: usize = 512;
/// Where the addresses that programs use end.
pub(crate) const WINDOW_END: u64 = (TABLES * PAGES_A_TABLE) as u64 * PAGE;

/// The page is cached.
pub(crate) const CACHED: u64 = 1;
/// It may be written, and hardware has set the dirty bit already.
pub(crate) const WRITABLE: u64 = 2;
/// Of a cached paging structure: what it allows, as hardware has these bits in an entry.
pub(crate) const TABLE_RIGHTS: u64 = 2 | 4;

/// Pages used of late, which a processor may load again by speculation.
const RECENT: usize = 8;

#[derive(Debug)]
pub(crate) struct Tlb {
    /// By page: the frame's address and the bits above; 0 where nothing is cached.
    pages: Box<[AtomicU64]>,
    /// Bit n: entries below table n may be cached, or the table is.
    used: AtomicU64,
    /// Paging structures: the last-level table for each 2 MiB, with rights; 0 where none is cached.
    tables: [AtomicU64; TABLES],
    /// The table above them, with rights; 0 if it is not cached.
    upper: AtomicU64,
    recent: [AtomicU32; RECENT],
    next_recent: AtomicU32,
}

impl Tlb {
    pub(crate) fn new() -> Self {
        Self {
            pages: (0..TABLES * PAGES_A_TABLE).map(|_| AtomicU64::new(0)).collect(),
            used: AtomicU64::new(0),
            tables: [const { AtomicU64::new(0) }; TABLES],
            upper: AtomicU64::new(0),
            recent: [const { AtomicU32::new(0) }; RECENT],
            next_recent: AtomicU32::new(0),
        }
    }

    /// The entries, for the look-up in assembly.
    #[inline]
    pub(crate) fn entries(&self) -> &[AtomicU64] {
        &self.pages
    }

    #[inline]
    pub(crate) fn entry(&self, page: usize) -> u64 {
        self.pages[page].load(Ordering::Relaxed)
    }

    /// Caches a page.
    pub(crate) fn fill(&self, page: usize, entry: u64) {
        let table = page / PAGES_A_TABLE;
        self.used.store(self.used.load(Ordering::Relaxed) | 1 << table, Ordering::Relaxed);
        self.pages[page].store(entry, Ordering::Relaxed);
    }

    /// A program has used the page.
    pub(crate) fn note_recent(&self, page: usize) {
        let next = self.next_recent.load(Ordering::Relaxed);
        let slot = &self.recent[next as usize % RECENT];
        slot.store(u32::try_from(page).unwrap_or(0), Ordering::Relaxed);
        self.next_recent.store(next.wrapping_add(1), Ordering::Relaxed);
    }

    /// One of the pages used of late; `None` if there are not so many.
    pub(crate) fn recent(&self, which: u32) -> Option<usize> {
        let page = self.recent[which as usize % RECENT].load(Ordering::Relaxed);
        (page != 0).then_some(page as usize)
    }

    pub(crate) fn table(&self, number: usize) -> u64 {
        self.tables[number].load(Ordering::Relaxed)
    }

    pub(crate) fn cache_table(&self, number: usize, table: u64) {
        self.used.store(self.used.load(Ordering::Relaxed) | 1 << number, Ordering::Relaxed);
        self.tables[number].store(table, Ordering::Relaxed);
    }

    pub(crate) fn upper(&self) -> u64 {
        self.upper.load(Ordering::Relaxed)
    }

    pub(crate) fn cache_upper(&self, table: u64) {
        self.upper.store(table, Ordering::Relaxed);
    }

    /// INVLPG: the page, and every paging structure whatever the address (SDM 4.10.4.1).
    pub(crate) fn invalidate(&self, page: Option<usize>) {
        if let Some(page) = page {
            self.pages[page].store(0, Ordering::Relaxed);
        }
        self.forget_structures();
    }

    /// Everything goes.
    pub(crate) fn flush(&self) {
        self.forget_structures();
        let mut used = self.used.swap(0, Ordering::Relaxed);
        while used != 0 {
            let table = used.trailing_zeros() as usize;
            used &= used - 1;
            for entry in &self.pages[table * PAGES_A_TABLE..][..PAGES_A_TABLE] {
                entry.store(0, Ordering::Relaxed);
            }
        }
    }

    fn forget_structures(&self) {
        self.upper.store(0, Ordering::Relaxed);
        let mut used = self.used.load(Ordering::Relaxed);
        while used != 0 {
            self.tables[used.trailing_zeros() as usize].store(0, Ordering::Relaxed);
            used &= used - 1;
        }
    }
}

/// The page of an address, if programs use such addresses.
#[inline]
pub(crate) fn page_of(address: u64) -> Option<usize> {
    (address < WINDOW_END).then(|| usize::try_from(address / PAGE).unwrap_or(0))
}
