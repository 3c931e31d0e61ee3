//! Changing what programs may do with pages that stay mapped: what mprotect needs.
#![expect(unsafe_code, reason = "walking follows links between tables; rights are the caller's affair")]

use mmu_pagetable::{Decoded, EntryValue, Level, LockedTable, TableView, VirtRange};
use x86_64::structures::paging::PageTableFlags;

use crate::cut_leaf::CutLeaf;
use crate::gather::MmuGather;
use crate::platform::Platform;

/// The bits that change: what programs may do with a page, and those that hardware ignores (11:9
/// and 58:52 of a leaf, SDM vol. 3A tables 4-17 to 4-20).
const CHANGED: u64 = {
    let rights =
        PageTableFlags::WRITABLE.union(PageTableFlags::USER_ACCESSIBLE).union(PageTableFlags::NO_EXECUTE);
    rights.bits() | 0b111 << 9 | 0b111_1111 << 52
};

/// Whether a CPU that still has `old` cached could do something that `new` forbids.
const fn loses_rights(old: EntryValue, new: EntryValue) -> bool {
    let may = PageTableFlags::WRITABLE.union(PageTableFlags::USER_ACCESSIBLE).bits();
    let may_not = PageTableFlags::NO_EXECUTE.bits();
    (old.bits() & !new.bits() & may) | (!old.bits() & new.bits() & may_not) != 0
}

impl<K: Platform> MmuGather<'_, '_, K> {
    /// Gives every leaf in `range` the rights that `rights` answers for it, and notes those that
    /// lost some: no CPU can use what was taken away when [`flush`](Self::flush) has returned.
    ///
    /// `rights` gets the first address that the leaf maps, its level, and its entry. It answers the
    /// flags that the entry is to have, of which `WRITABLE`, `USER_ACCESSIBLE`, `NO_EXECUTE` and
    /// the bits that hardware ignores count; everything else of the entry stays. It is called again
    /// for a leaf in which hardware has set a bit meanwhile.
    ///
    /// Entries that are not present stay as they are. A migration entry remembers that its page was
    /// writable ([`MigrationAccess`]): the kernel takes that away itself, or asks the area when the
    /// page has arrived. Otherwise the right is back then.
    ///
    /// [`MigrationAccess`]: mmu_pagetable::MigrationAccess
    ///
    /// A leaf that only gains rights needs no flush: a CPU that has the old ones cached faults, and
    /// walks again.
    ///
    /// # Context
    /// No table lock is held; preemption points inside. The lock of the leaf's table is held while
    /// `rights` runs.
    ///
    /// # Errors
    /// [`CutLeaf`] if the range ends in the middle of a large leaf, which keeps its rights. All
    /// others have changed. It cannot come back after [`split_leaf`](Self::split_leaf) at both
    /// ends.
    ///
    /// # Safety
    /// - Programs may use the pages as `rights` answers: a page with other mappings that must not
    ///   change (copy on write) is not made writable;
    /// - no fault gives back what was taken until `flush` has returned, for the areas have their
    ///   new protection already.
    ///
    /// # Source
    /// Linux: change_protection, mm/mprotect.c.
    ///
    /// # Examples
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/small_kernel/machine.rs"));
    /// # fn main() -> Result<(), CutLeaf> {
    /// # let kernel = Kernel::new();
    /// # let mm = kernel.new_mm();
    /// # let vma = area(0x1000, 0x5000);
    /// # kernel.map(&mm, vma.range);
    /// // SAFETY: this thread alone unmaps, and `mm` is an address space of `kernel`.
    /// let mut gather = unsafe { MmuGather::new(&kernel, &mm) };
    /// let read_only = |_, _, old: EntryValue| old.flags() - PageTableFlags::WRITABLE;
    /// // SAFETY: reading is allowed everywhere in the area.
    /// unsafe { gather.change_protection(vma.range, read_only) }?;
    /// // When this returns, no program can write.
    /// gather.flush().free();
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "mprotect_fixup")]
    pub unsafe fn change_protection(
        &mut self,
        range: VirtRange,
        mut rights: impl FnMut(u64, Level, EntryValue) -> PageTableFlags,
    ) -> Result<(), CutLeaf> {
        if let Some(range) = range.intersect(self.mm.space().user_range()) {
            // SAFETY: the constructor's caller holds the map lock.
            let view = unsafe { self.mm.space().lowest_table_of(self.kernel, range) };
            self.protect_table(view, range, &mut rights);
        }
        self.state.cut.take().map_or(Ok(()), Err)
    }

    /// Changes the leaves below `view` in `range`, which lies inside its span.
    fn protect_table<F>(&mut self, view: TableView<'_>, range: VirtRange, rights: &mut F)
    where
        F: FnMut(u64, Level, EntryValue) -> PageTableFlags,
    {
        let (kernel, level) = (self.kernel, view.level());
        if level == Level::Pte {
            let locked = view.lock(kernel);
            // An empty entry may have been cleared by reclaim, whose flush is still to come.
            self.note_deferred_flushes();
            for address in view.used_parts(kernel, range).addresses() {
                self.protect_leaf(&locked, address, rights);
            }
            drop(locked);
            kernel.cond_resched();
            return;
        }
        for address in view.used_parts(kernel, range).addresses() {
            let part = range.within_entry(level, address);
            match view.load(address).decode(level) {
                Decoded::Table(_) => {
                    // SAFETY: as in `change_protection`.
                    if let Some(child) = unsafe { view.child(kernel, address) } {
                        self.protect_table(child, part, rights);
                    }
                }
                Decoded::Leaf(_) if part.len_bytes() < level.entry_span() => {
                    let address = VirtRange::of_entry(level, address).start();
                    self.state.cut.get_or_insert(CutLeaf { address, level });
                }
                Decoded::Leaf(_) => {
                    let locked = view.lock(kernel);
                    self.protect_leaf(&locked, address, rights);
                    drop(locked);
                    kernel.cond_resched();
                }
                Decoded::Empty | Decoded::NonPresent(_) => {}
            }
        }
        // What was passed over may be empty because reclaim is still to flush it.
        self.note_deferred_flushes_of(view);
    }

    fn protect_leaf<F>(&mut self, locked: &LockedTable<'_, impl Sized>, address: u64, rights: &mut F)
    where
        F: FnMut(u64, Level, EntryValue) -> PageTableFlags,
    {
        let level = locked.view().level();
        let entry = locked.entry(address);
        let mut old = entry.load();
        while let Decoded::Leaf(_) = old.decode(level) {
            let wanted = rights(address, level, old).bits() & CHANGED;
            let new = EntryValue::from_bits(old.bits() & !CHANGED | wanted);
            if new == old {
                return;
            }
            self.kernel.between_look_and_change();
            // SAFETY: the same page, with rights that our caller answers for; what it loses is
            // noted before the lock drops.
            match unsafe { entry.compare_exchange(old, new) } {
                Ok(()) if loses_rights(old, new) => {
                    self.changed(VirtRange::of_entry(level, address), level);
                    return;
                }
                Ok(()) => return,
                // Hardware has set a bit: look again.
                Err(found) => old = found,
            }
        }
    }
}
