//! The counts of every page: references, mappings, and whether it was freed.

use std::collections::BTreeMap;

use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

/// The first number of a data page: no heap address is there. Data pages have no memory behind
/// them.
const FIRST_PAGE: u64 = 1 << 48;

/// What the kernel knows of one page, of whatever size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageAccount {
    /// Its size.
    pub len_bytes: u64,
    /// References: one for each entry that maps the page, dropped through the gather.
    pub references: u32,
    /// Entries that map the page: one fewer when an entry is cleared, or after the flush if the
    /// page is a dirty page of a file.
    pub mappings: u32,
    /// Whether the allocator has it back.
    pub freed: bool,
}

/// Every page ever made.
#[derive(Debug)]
pub struct Ledger {
    pages: BTreeMap<PhysFrame, PageAccount>,
    next: u64,
}

/// What became of a reference that was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Released {
    StillReferenced,
    Freed(PageAccount),
    Twice,
    Unknown,
}

impl Ledger {
    pub(crate) const fn new() -> Self {
        Self { pages: BTreeMap::new(), next: FIRST_PAGE }
    }

    /// A new page of `len_bytes`, with no references yet.
    pub fn new_page(&mut self, len_bytes: u64) -> PhysFrame {
        let start = self.next.next_multiple_of(len_bytes);
        self.next = start + len_bytes;
        let frame = PhysFrame::containing_address(PhysAddr::new(start));
        self.pages.insert(frame, PageAccount { len_bytes, references: 0, mappings: 0, freed: false });
        frame
    }

    /// Counts one more entry that maps the page.
    pub fn add_mapping(&mut self, frame: PhysFrame) {
        if let Some(page) = self.pages.get_mut(&frame) {
            page.references += 1;
            page.mappings += 1;
        }
    }

    /// Counts one more reference without a mapping.
    pub fn add_reference(&mut self, frame: PhysFrame) {
        if let Some(page) = self.pages.get_mut(&frame) {
            page.references += 1;
        }
    }

    /// The account of the page that starts at `frame`.
    #[must_use]
    pub fn page(&self, frame: PhysFrame) -> Option<PageAccount> {
        self.pages.get(&frame).copied()
    }

    /// Whether a page that overlaps the `len_bytes` from `frame` on was freed.
    #[must_use]
    pub fn is_freed(&self, frame: PhysFrame, len_bytes: u64) -> bool {
        let end = frame + len_bytes.div_ceil(4096);
        let before = self.pages.range(..=frame).next_back();
        let reaches_in =
            before.is_some_and(|(first, page)| page.freed && *first + page.len_bytes / 4096 > frame);
        reaches_in || self.pages.range(frame..end).any(|(_, page)| page.freed)
    }

    /// Pages that have references: mapped, or unmapped and not yet freed.
    #[must_use]
    pub fn nr_held(&self) -> usize {
        self.pages.values().filter(|page| page.references > 0).count()
    }

    /// Counts one entry fewer that maps the page.
    ///
    /// # Panics
    /// If none did.
    pub fn remove_rmap(&mut self, frame: PhysFrame) {
        if let Some(page) = self.pages.get_mut(&frame) {
            page.mappings = page.mappings.checked_sub(1).expect("an rmap is removed once");
        }
    }

    pub(crate) fn release(&mut self, frame: PhysFrame) -> Released {
        let Some(page) = self.pages.get_mut(&frame) else { return Released::Unknown };
        match page.references {
            0 => Released::Twice,
            1 => {
                page.references = 0;
                page.freed = true;
                Released::Freed(*page)
            }
            _ => {
                page.references -= 1;
                Released::StillReferenced
            }
        }
    }

    /// Splits a page into 512.
    pub(crate) fn split(&mut self, frame: PhysFrame) {
        let Some(whole) = self.pages.remove(&frame) else { return };
        let part = PageAccount { len_bytes: whole.len_bytes / 512, ..whole };
        for index in 0..512 {
            let start = frame.start_address() + index * part.len_bytes;
            self.pages.insert(PhysFrame::containing_address(start), part);
        }
    }
}
