//! Putting entries in: linking tables and installing leaves.

use core::fmt;

use x86_64::structures::paging::PhysFrame;

use crate::entry::EntryValue;
use crate::level::Level;
use crate::memory::TableMemory;
use crate::range::VirtRange;
use crate::space::AddressSpace;
use crate::table::TableView;

/// Why an entry could not be installed. Nothing was changed, except that empty tables may have been
/// linked on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MapError {
    /// There is no memory for a table on the path to this address.
    NoTable(u64),
    /// The entry for this address, at this level, is not empty: it holds this value.
    Occupied(u64, Level, EntryValue),
    /// Only small leaves can be dealt with here, and a large leaf, or a kept entry in its place,
    /// stands at this address and level.
    Large(u64, Level, EntryValue),
    /// The address lies outside the user half of this address space.
    NotUserSpace(u64),
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoTable(address) => write!(f, "no memory for a page table on the path to {address:#x}"),
            Self::Occupied(address, level, value) => {
                write!(f, "{address:#x} is already mapped at level {level:?} by {:#x}", value.bits())
            }
            Self::Large(address, level, value) => {
                write!(
                    f,
                    "{address:#x} is mapped as one at level {level:?} by {:#x}: split it first",
                    value.bits()
                )
            }
            Self::NotUserSpace(address) => write!(f, "{address:#x} lies outside user space"),
        }
    }
}

impl core::error::Error for MapError {}

#[expect(unsafe_code, reason = "walking follows links between tables")]
impl AddressSpace {
    /// The table of `level` on the path to `address`. It is linked, with those above it, if it is
    /// missing.
    ///
    /// Each new table is linked under the lock of its parent entry. If two CPUs come at once, one
    /// table is linked, and the other goes straight back: no walk could reach it.
    ///
    /// # Context
    /// No table lock is held. Sleeps if `allocate_table` does.
    ///
    /// # Errors
    /// [`MapError::NoTable`] when memory is short; [`MapError::Occupied`] when a leaf or a kept
    /// entry stands where a table is needed; [`MapError::NotUserSpace`].
    ///
    /// # Safety
    /// As for [`AddressSpace::root_table`].
    ///
    /// # Source
    /// Linux: __p4d_alloc, __pud_alloc, __pmd_alloc and __pte_alloc, mm/memory.c.
    #[doc(alias = "__pte_alloc")]
    pub unsafe fn ensure_table<'m, M: TableMemory>(
        &self,
        memory: &'m M,
        address: u64,
        level: Level,
    ) -> Result<TableView<'m>, MapError> {
        if address >= self.mode().user_end() {
            return Err(MapError::NotUserSpace(address));
        }
        // SAFETY: passed on to our caller.
        let mut view = unsafe { self.root_table(memory) };
        while view.level() > level {
            // SAFETY: passed on to our caller.
            if let Some(child) = unsafe { view.child(memory, address) } {
                view = child;
                continue;
            }
            let new = memory.allocate_table().ok_or(MapError::NoTable(address))?;
            if cfg!(debug_assertions) {
                check_zeroed(memory, new);
            }
            // SAFETY: a table that was just allocated.
            if let Some(used) = unsafe { memory.used_lines(new) } {
                used.forget_all();
            }
            let locked = view.lock(memory);
            let found = locked.entry(address).load();
            if found.is_empty() {
                // SAFETY: the entry is empty, and the table is zeroed and known to nobody else.
                unsafe { locked.entry(address).store(EntryValue::table(new)) };
                if let Some(below) = view.level().below() {
                    self.count_linked(below);
                }
                continue;
            }
            drop(locked);
            // SAFETY: allocated above, and never linked.
            unsafe { memory.free_tables(&[new]) };
            if found.as_table(view.level()).is_none() {
                return Err(MapError::Occupied(address, view.level(), found));
            }
        }
        Ok(view)
    }

    /// Installs `value` as the entry of a `level` table that covers `address`.
    ///
    /// No flush is needed: nothing was cached from an entry that was not present (SDM 4.10.2.3),
    /// provided the last change from present to not present at this address was invalidated (SDM
    /// 4.10.4.3).
    ///
    /// # Context
    /// As for [`AddressSpace::ensure_table`].
    ///
    /// # Errors
    /// As for [`AddressSpace::ensure_table`]; also [`MapError::Occupied`] if the entry is not
    /// empty.
    ///
    /// # Safety
    /// - As for [`AddressSpace::root_table`].
    /// - Programs that run with this address space may use the page as the flags allow, until the
    ///   entry has been cleared and every CPU has flushed.
    pub unsafe fn map<M: TableMemory>(
        &self,
        memory: &M,
        address: u64,
        level: Level,
        value: EntryValue,
    ) -> Result<(), MapError> {
        // SAFETY: passed on to our caller.
        let view = unsafe { self.ensure_table(memory, address, level) }?;
        let locked = view.lock(memory);
        let entry = locked.entry(address);
        let found = entry.load();
        if !found.is_empty() {
            return Err(MapError::Occupied(VirtRange::of_entry(level, address).start(), level, found));
        }
        // SAFETY: the entry is empty; our caller answers for the page.
        unsafe { entry.store(value) };
        Ok(())
    }

    /// Links `table`, already filled in, in place of the kept entry `expected` at `address`.
    ///
    /// This is the last step of splitting a large leaf. The leaf was replaced by a migration entry
    /// and flushed, so no CPU holds a translation of the old size any more (SDM 4.10.4.2 asks for
    /// exactly that order).
    ///
    /// # Errors
    /// The entry found, if it was not `expected`; `table` is then still the caller's.
    ///
    /// # Safety
    /// - As for [`AddressSpace::root_table`].
    /// - `table` is a table of the level below `view`'s that nobody else knows, from the same
    ///   memory.
    pub unsafe fn link_table<M: TableMemory>(
        &self,
        memory: &M,
        view: TableView<'_>,
        address: u64,
        expected: EntryValue,
        table: PhysFrame,
    ) -> Result<(), EntryValue> {
        let locked = view.lock(memory);
        let found = locked.entry(address).load();
        if found != expected || found.is_present() {
            return Err(found);
        }
        // SAFETY: our caller answers for the table.
        if let Some(used) = unsafe { memory.used_lines(table) } {
            used.note_all();
        }
        // SAFETY: the entry is not present, so nothing is lost; our caller answers for the table.
        unsafe { locked.entry(address).store(EntryValue::table(table)) };
        if let Some(below) = view.level().below() {
            self.count_linked(below);
        }
        Ok(())
    }
}

/// Asserts that a table that was just allocated reads as zero.
#[expect(unsafe_code, reason = "looks at a frame before it is a table")]
fn check_zeroed<M: TableMemory>(memory: &M, new: PhysFrame) {
    // SAFETY: a frame that was just allocated for a table, and nobody else knows; the level plays
    // no part in reading it.
    let view = unsafe { TableView::new(memory, new, Level::Pte) };
    let dirty = (0..512).find(|index| !view.table().entry(*index).load().is_empty());
    if let Some(index) = dirty {
        panic!(
            "allocate_table returned frame {:#x}, and entry {index} of it is {:#x}: as a table it would map what nobody \
             has mapped. A new table reads as zero",
            new.start_address(),
            view.table().entry(index).load().bits(),
        );
    }
}
