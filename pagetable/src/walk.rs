//! Walks from the root to one address.

use x86_64::PhysAddr;

use crate::entry::{Decoded, EntryValue};
use crate::level::{Level, PagingMode};
use crate::memory::TableMemory;
use crate::range::VirtRange;
use crate::space::AddressSpace;
use crate::table::TableView;

/// The lowest entry on the path to an address, as it was when read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Level of the table that holds the entry.
    pub level: Level,
    /// What the entry held. It links no table, unless that table was linked during the walk.
    pub value: EntryValue,
}

impl Mapping {
    /// The physical address that `address` translates to, if the entry maps a page.
    #[must_use]
    pub fn translate(&self, address: u64) -> Option<PhysAddr> {
        match self.value.decode(self.level) {
            Decoded::Leaf(page) => {
                let offset = address & (self.level.entry_span() - 1);
                // The page is aligned to its size, so this is their sum.
                Some(PhysAddr::new_truncate(page.as_u64() | offset))
            }
            _ => None,
        }
    }
}

#[expect(unsafe_code, reason = "walking follows links between tables")]
impl AddressSpace {
    /// The lowest entry on the path to `address`: a leaf, a kept entry, or an empty one at some
    /// level.
    ///
    /// # Safety
    /// As for [`AddressSpace::root_table`].
    #[must_use]
    pub unsafe fn lookup<M: TableMemory>(&self, memory: &M, address: u64) -> Mapping {
        // SAFETY: passed on to our caller.
        let mut view = unsafe { self.root_table(memory) };
        loop {
            let value = view.load(address);
            let (Some(frame), Some(below)) = (value.as_table(view.level()), view.level().below()) else {
                return Mapping { level: view.level(), value };
            };
            // SAFETY: P2: a link in a live table leads to a live table of the level below; our
            // caller keeps it alive.
            view = unsafe { TableView::new(memory, frame, below) };
        }
    }

    /// The table of `level` on the path to `address`; `None` if the path ends above that level.
    ///
    /// # Safety
    /// As for [`AddressSpace::root_table`].
    #[must_use]
    pub unsafe fn find_table<'m, M: TableMemory>(
        &self,
        memory: &'m M,
        address: u64,
        level: Level,
    ) -> Option<TableView<'m>> {
        // SAFETY: passed on to our caller.
        let mut view = unsafe { self.root_table(memory) };
        while view.level() > level {
            // SAFETY: passed on to our caller.
            view = unsafe { view.child(memory, address) }?;
        }
        Some(view)
    }

    /// The lowest table whose span covers all of `range`; or, where the path ends above it, the
    /// last table on the path.
    ///
    /// # Safety
    /// As for [`AddressSpace::root_table`].
    #[must_use]
    #[inline]
    pub unsafe fn lowest_table_of<'m, M: TableMemory>(
        &self,
        memory: &'m M,
        range: VirtRange,
    ) -> TableView<'m> {
        // SAFETY: passed on to our caller.
        let mut view = unsafe { self.root_table(memory) };
        let differing = range.start() ^ (range.end() - 1);
        while let Some(below) = view.level().below()
            && differing >> view.level().entry_shift() == 0
        {
            let Some(frame) = view.load(range.start()).as_table(view.level()) else { break };
            // SAFETY: P2: a link in a live table leads to a live table of the level below; our
            // caller keeps it alive.
            view = unsafe { TableView::new(memory, frame, below) };
        }
        view
    }

    /// The last-level table that covers all of `range`, if one table does and is linked. Most areas
    /// are smaller than its span.
    ///
    /// # Safety
    /// As for [`AddressSpace::root_table`].
    #[must_use]
    #[inline]
    pub unsafe fn last_level_table<'m, M: TableMemory>(
        &self,
        memory: &'m M,
        range: VirtRange,
    ) -> Option<TableView<'m>> {
        let address = range.start();
        if (address ^ (range.end() - 1)) >> Level::Pte.table_span().trailing_zeros() != 0 {
            return None;
        }
        // SAFETY: passed on to our caller. P2: a link leads to a live table of the level below.
        let pmd = unsafe { self.pmd_table(memory, address) }?;
        // SAFETY: as above.
        unsafe { pmd.child(memory, address) }
    }

    /// The PMD table on the path to `address`, if it is linked.
    ///
    /// Written out level by level, so that each level is a constant: half as many instructions as a
    /// loop.
    ///
    /// # Safety
    /// As for [`AddressSpace::root_table`].
    #[inline]
    pub(crate) unsafe fn pmd_table<'m, M: TableMemory>(
        &self,
        memory: &'m M,
        address: u64,
    ) -> Option<TableView<'m>> {
        // SAFETY: passed on to our caller, here and below. P2: a link leads to a live table of the
        // level below.
        let root = unsafe { self.root_table(memory) };
        let p4d = match self.mode() {
            PagingMode::FourLevel => root,
            // SAFETY: as above.
            PagingMode::FiveLevel => unsafe { root.child(memory, address) }?,
        };
        // SAFETY: as above.
        let pud = unsafe { p4d.child(memory, address) }?;
        // SAFETY: as above.
        unsafe { pud.child(memory, address) }
    }
}
