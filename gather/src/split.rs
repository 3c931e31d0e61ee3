//! Replacing a large leaf by a table of smaller leaves.
#![expect(unsafe_code, reason = "walking follows links between tables")]

use core::fmt;

use mmu_pagetable::{Decoded, EntryValue, Level, MigrationAccess, NonPresent, TableView, VirtRange};
use mmu_tlb::{FreedTables, PageSpan};
use x86_64::PhysAddr;
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

use crate::gather::MmuGather;
use crate::platform::{Platform, UnmappedLeaf};

/// Why a large leaf could not be split. It is still there, unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SplitError {
    /// No memory for the table; carries the address at which the leaf was to be cut.
    NoTable(u64),
}

impl fmt::Display for SplitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoTable(address) => {
                write!(f, "no memory for a page table to split the large page at {address:#x}")
            }
        }
    }
}

impl core::error::Error for SplitError {}

impl<K: Platform> MmuGather<'_, '_, K> {
    /// Makes sure that no large leaf reaches across `address`: splits one of 1 GiB, then one of
    /// 2 MiB, if there is one. A migration entry or a marker in the place of a large leaf is split,
    /// too; entries of other meanings are left alone, and are the embedder's to split.
    ///
    /// It is to be called for both ends of a range before an unmapping can no longer be undone.
    /// That is the one place where teardown needs memory, and where it may still fail.
    ///
    /// While a leaf is being split its entry is a migration entry, so whoever faults waits. The old
    /// size is flushed from every CPU that runs programs here before the new one appears
    /// (SDM 4.10.4.2), and no lock is held meanwhile. A lazy CPU drops the old size before it uses
    /// the addresses again; what it caches speculatively until then, of either size, leads to the
    /// same memory with the same rights.
    ///
    /// # Context
    /// No table lock is held.
    ///
    /// # Errors
    /// [`SplitError::NoTable`] when memory is short. Nothing has changed then, or only a larger
    /// leaf was split.
    ///
    /// # Safety
    /// The map lock is held for writing: whoever zapped the migration entry would take the page for
    /// one on its way elsewhere, and drop its reference before the old size is flushed.
    ///
    /// # Source
    /// Linux: __split_huge_pmd, mm/huge_memory.c.
    #[doc(alias = "__split_huge_pmd")]
    pub unsafe fn split_leaf(&mut self, area: K::Area, address: u64) -> Result<(), SplitError> {
        for level in [Level::Pud, Level::Pmd] {
            // An address in the kernel's half is left alone.
            if address < self.mm.space().mode().user_end() && address & (level.entry_span() - 1) != 0 {
                self.split_at(area, address, level)?;
            }
        }
        Ok(())
    }

    fn split_at(&mut self, area: K::Area, address: u64, level: Level) -> Result<(), SplitError> {
        let (kernel, mm) = (self.kernel, self.mm);
        // SAFETY: the constructor's caller holds the map lock.
        let Some(view) = (unsafe { mm.space().find_table(kernel, address, level) }) else { return Ok(()) };
        let Some(below) = level.below() else { return Ok(()) };
        match view.load(address).decode(level) {
            Decoded::Leaf(_) => {}
            Decoded::NonPresent(meaning) => {
                return self.split_meaning(area, view, address, (level, below), meaning);
            }
            Decoded::Empty | Decoded::Table(_) => return Ok(()),
        }
        let table = kernel.allocate_table().ok_or(SplitError::NoTable(address))?;
        let whole = VirtRange::of_entry(level, address);

        let locked = view.lock(kernel);
        let entry = locked.entry(address);
        let value = entry.load();
        let Decoded::Leaf(first) = value.decode(level) else {
            drop(locked);
            // SAFETY: allocated above, and never linked.
            unsafe { kernel.free_tables(&[table]) };
            return Ok(());
        };
        let access = if value.is_writable() { MigrationAccess::Writable } else { MigrationAccess::ReadOnly };
        let frame = PhysFrame::containing_address(first);
        let marker = NonPresent::Migration { frame, access }.encode();
        // SAFETY: nothing is cached from what is put in, which is not present. What the leaf was is
        // flushed below, and its page is not freed.
        let old = unsafe { entry.exchange(marker) };
        kernel.leaf_was_split(area, &UnmappedLeaf { address: whole.start(), level, value: old, frame });
        drop(locked);

        let span = PageSpan { start: whole.start(), end: whole.end(), stride_shift: level.entry_shift() };
        kernel.flush_tlb(mm.context(), Some(span), FreedTables::No);

        // SAFETY: `allocate_table` returned this zeroed frame and nobody else knows it.
        map_the_same(unsafe { TableView::new(kernel, table, below) }, old, level, below);
        // SAFETY: the view is live as above; the table is ours, of the level below.
        let linked = unsafe { mm.space().link_table(kernel, view, address, marker, table) };
        debug_assert!(linked.is_ok(), "somebody replaced the migration entry at {address:#x}: {linked:?}");
        if linked.is_err() {
            // SAFETY: allocated above, and never linked.
            unsafe { kernel.free_tables(&[table]) };
        }
        Ok(())
    }
}

impl<K: Platform> MmuGather<'_, '_, K> {
    /// Replaces a migration entry or a marker by a table of 512 that say the same. Nothing was
    /// cached from it, so there is nothing to flush.
    ///
    /// Linux: the migration half of __split_huge_pmd_locked, mm/huge_memory.c.
    fn split_meaning(
        &mut self,
        area: K::Area,
        view: TableView<'_>,
        address: u64,
        (level, below): (Level, Level),
        whole: NonPresent,
    ) -> Result<(), SplitError> {
        if !matches!(whole, NonPresent::Migration { .. } | NonPresent::Marker(_)) {
            return Ok(());
        }
        let (kernel, mm) = (self.kernel, self.mm);
        let table = kernel.allocate_table().ok_or(SplitError::NoTable(address))?;
        // SAFETY: `allocate_table` returned this zeroed frame and nobody else knows it.
        let parts = unsafe { TableView::new(kernel, table, below) };
        for (index, entry) in (0u64..).zip(parts.table().entries()) {
            let part = match whole {
                NonPresent::Migration { frame, access } => {
                    let address = frame.start_address().as_u64() + index * below.entry_span();
                    let frame = PhysFrame::containing_address(PhysAddr::new_truncate(address));
                    NonPresent::Migration { frame, access }
                }
                other => other,
            };
            // SAFETY: nobody else knows the table. All its lines are noted when it is linked,
            // below.
            unsafe { entry.store(part.encode()) };
        }
        // SAFETY: the view is live, for the constructor's caller holds the map lock; the table is
        // ours, of the level below.
        if unsafe { mm.space().link_table(kernel, view, address, whole.encode(), table) }.is_err() {
            // The page has arrived meanwhile, or the marker is gone. What is there now may be a
            // leaf.
            // SAFETY: allocated above, and never linked.
            unsafe { kernel.free_tables(&[table]) };
            return self.split_at(area, address, level);
        }
        if let NonPresent::Migration { frame, .. } = whole {
            let address = VirtRange::of_entry(level, address).start();
            kernel.leaf_was_split(area, &UnmappedLeaf { address, level, value: whole.encode(), frame });
        }
        Ok(())
    }
}

/// The PAT bit of a leaf above the last level; SDM vol. 3A tables 4-17 and 4-19.
const LARGE_PAT: u64 = 1 << 12;
/// The PAT bit of a 4 KiB leaf; SDM vol. 3A table 4-20.
const SMALL_PAT: u64 = 1 << 7;

/// Fills `table` with 512 leaves that map what `old` mapped.
fn map_the_same(table: TableView<'_>, old: EntryValue, level: Level, below: Level) {
    let first = old.leaf_address(level);
    let mut flags = old.flags() - PageTableFlags::HUGE_PAGE;
    flags.insert(PageTableFlags::PRESENT);
    // The memory type must stay the same: two types for one page are undefined behaviour of the
    // hardware. Its PAT bit is bit 12 in a large leaf, and bit 7 in the last level, where that bit
    // has no other meaning.
    let pat = match (old.bits() & LARGE_PAT, below) {
        (0, _) => 0,
        (_, Level::Pte) => SMALL_PAT,
        _ => LARGE_PAT,
    };
    for (index, entry) in (0u64..).zip(table.table().entries()) {
        let address = PhysAddr::new_truncate(first.as_u64() + index * below.entry_span());
        let value = EntryValue::from_bits(EntryValue::leaf(below, address, flags).bits() | pat);
        // SAFETY: our caller's table is known to nobody else, and it maps what the large leaf did.
        unsafe { entry.store(value) };
    }
}
