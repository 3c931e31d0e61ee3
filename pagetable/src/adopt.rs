//! Taking over tables that somebody else has linked.
#![expect(unsafe_code, reason = "walking follows links between tables")]

use x86_64::structures::paging::PhysFrame;

use crate::level::PagingMode;
use crate::memory::TableMemory;
use crate::range::VirtRange;
use crate::space::AddressSpace;
use crate::table::TableView;
use crate::used_lines::Lines;

impl AddressSpace {
    /// An address space whose root table is `root`, below which tables are linked already: by a
    /// boot loader, or by a kernel's own code, before the engine.
    ///
    /// It counts the tables of the lower half. Where the kernel keeps used lines, it also notes
    /// those of every table that it finds. The kernel's half is not looked at, so it may be shared
    /// with other roots.
    ///
    /// # What stays
    /// Part of the lower half may be there for good, and be shared with other roots: an identity
    /// mapping of low memory, say. The engine does not know which part. It unhooks tables between
    /// the [`Bounds`](crate::Bounds) of a call only, so what stays is a neighbour like an area that
    /// stays: its end is the floor, or its start the ceiling, where no area is nearer. A table that
    /// also covers what stays is kept. An exit takes such bounds, too (`exit_mmap_within` of
    /// `mmu-gather`).
    ///
    /// # Context
    /// Takes no lock, and looks at every entry of every table: to be called before anybody else
    /// knows of the address space.
    ///
    /// # Safety
    /// - `root` holds a table of the mode's root level, in the memory that every later call is
    ///   given, and is the root of no other address space;
    /// - each link in its lower half leads to a table of the level below, in that memory; a table
    ///   that lies outside what stays is linked once, and may be given to
    ///   [`free_tables`](TableMemory::free_tables) later;
    /// - until this returns nobody but hardware changes these tables;
    /// - the root stays a table until the address space is dropped and every CPU has left it.
    #[must_use]
    pub unsafe fn adopt<M: TableMemory>(memory: &M, root: PhysFrame, mode: PagingMode) -> Self {
        // SAFETY: what `new` asks of the lower half is that what is linked there is counted, which
        // follows. The rest is passed on to our caller.
        let space = unsafe { Self::new(root, mode) };
        // SAFETY: passed on to our caller.
        let view = unsafe { space.root_table(memory) };
        space.adopt_below(memory, view, space.user_range());
        space
    }

    /// Notes the used lines of `view` in `range`, and counts the tables that it links there, and
    /// those below them.
    fn adopt_below<M: TableMemory>(&self, memory: &M, view: TableView<'_>, range: VirtRange) {
        let level = view.level();
        let entries = level.index(range.start())..level.index(range.end() - 1) + 1;
        if let Some(notes) = view.notes(memory) {
            let used =
                Lines::touched_by(&entries).into_iter().filter(|line| !view.table().line_is_empty(*line));
            notes.note_exactly(used.fold(Lines::EMPTY, Lines::with));
        }
        let Some(below) = level.below() else { return };
        for index in entries {
            let address =
                range.start() + (index as u64 - level.index(range.start()) as u64) * level.entry_span();
            // SAFETY: `adopt`'s caller promised that links lead to tables that nobody frees.
            if let Some(child) = unsafe { view.child(memory, address) } {
                self.note_linked(below, 1);
                self.adopt_below(memory, child, VirtRange::of_entry(level, address));
            }
        }
    }
}
