//! Unhooking tables because they are empty: for kernels whose page-table layer knows no neighbours.
#![expect(unsafe_code, reason = "walking follows links between tables")]

use crate::memory::TableMemory;
use crate::range::VirtRange;
use crate::space::AddressSpace;
use crate::table::TableView;
use crate::unhook::{UnhookedTable, give};

impl AddressSpace {
    /// Unhooks the tables on the paths to `range` all 512 entries of which are empty, lowest level
    /// first, and hands each to `looked_at`; `None` for each that stays.
    ///
    /// Whether a table is empty is seen under both locks, that of its parent and its own (rule P3).
    /// A table covers more than `range`: one that a neighbour has an entry in stays, and so do
    /// those above it. An entry that is kept keeps its table. The root is never unhooked.
    ///
    /// Where areas are known, [`unhook_tables`](Self::unhook_tables) does not look into tables, and
    /// is faster. It also takes tables in which an area that stays has no entry yet no more than
    /// they are needed; this call takes them, and the next fault links new ones.
    ///
    /// No lock is held while `looked_at` runs, so it may flush, free what it was given before, and
    /// sleep.
    ///
    /// # Context
    /// No table lock is held.
    ///
    /// # Safety
    /// Until this returns, in this address space:
    /// - nobody else unhooks tables;
    /// - nobody else uses a view of a table that covers an address of `range`, or a reference into
    ///   one, except the root, a table whose lock he holds, and the one that an entry of such a
    ///   table links, which he locks before he drops that lock. (Whoever comes down from the root
    ///   like that finds no link to a table that was unhooked, and never puts an entry into one.)
    ///
    /// The map lock held for writing sees to both, if whoever walks holds it, for reading at least:
    /// reclaim, too. (Reclaim that finds tables by another lock, an rmap's, would find one that was
    /// unhooked here: the areas are still to be found.) Under the map lock held for reading it is
    /// not enough: [`ensure_table`](Self::ensure_table), [`map`](Self::map),
    /// [`lookup`](Self::lookup) and gathers use views without a lock, and so would put an entry
    /// into a table that has just been unhooked. Note that a table on the path to `range` may cover
    /// 512 GiB, or all of user space.
    ///
    /// And `looked_at` lets no page be reused before every CPU has flushed its `span`.
    pub unsafe fn unhook_empty_tables<M: TableMemory>(
        &self,
        memory: &M,
        range: VirtRange,
        mut looked_at: impl FnMut(Option<UnhookedTable>),
    ) {
        let Some(range) = range.intersect(self.user_range()) else { return };
        // SAFETY: by our caller's promise nobody else frees tables.
        let root = unsafe { self.root_table(memory) };
        self.unhook_empty_below(memory, root, range, &mut looked_at);
    }

    /// Unhooks the empty tables below `view` on the paths to `range`, which lies inside its span.
    fn unhook_empty_below<'m, M: TableMemory>(
        &self,
        memory: &'m M,
        view: TableView<'m>,
        range: VirtRange,
        looked_at: &mut impl FnMut(Option<UnhookedTable>),
    ) {
        if view.level().below().is_none() {
            return;
        }
        for address in view.used_parts(memory, range).addresses() {
            // SAFETY: by the promise of `unhook_empty_tables`'s caller nobody else frees tables,
            // and this one is unhooked below, after its last use here.
            let Some(child) = (unsafe { view.child(memory, address) }) else { continue };
            self.unhook_empty_below(memory, child, range.within_entry(view.level(), address), looked_at);
            looked_at(self.unhook_if_empty(memory, view, child, address));
        }
    }

    /// Unhooks `child`, which the entry of `parent` for `address` linked a moment ago, if it is
    /// empty.
    fn unhook_if_empty<M: TableMemory>(
        &self,
        memory: &M,
        parent: TableView<'_>,
        child: TableView<'_>,
        address: u64,
    ) -> Option<UnhookedTable> {
        // Most often it is not, and that can be told without a lock. What an entry is put into
        // after this is seen below.
        if !child.table().is_empty() {
            return None;
        }
        let level = parent.level();
        let index = level.index(address);
        let entry = parent.table().entry(index);
        let both = parent.lock_both(memory, child);
        // P3: under both locks. All entries are looked at, also where used lines are noted: this
        // is the last look before the table goes.
        if entry.load().as_table(level) != Some(child.frame()) || !both.second().view().table().is_empty() {
            return None;
        }
        // SAFETY: the parent's lock is held, and the entry leads to `child`, which is empty. By the
        // promise of `unhook_empty_tables`'s caller whoever else knows that table holds a lock that
        // is held here.
        let _ = unsafe { entry.unhook() };
        both.first().forget_empty_lines(&(index..index + 1));
        drop(both);
        self.count_unhooked(child.level(), 1);
        let span = VirtRange::of_entry(level, address);
        let mut unhooked = None;
        let table = UnhookedTable::new(child.frame(), child.level(), span, self.root());
        give(memory, table, &mut |table| unhooked = Some(table));
        unhooked
    }
}
