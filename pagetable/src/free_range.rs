//! Which tables may go when a range of addresses is given up.

use x86_64::structures::paging::PhysFrame;

use crate::level::Level;
use crate::range::VirtRange;
use crate::space::AddressSpace;
use crate::table::{TableMemory, TableView};

/// The stretch of addresses between the neighbours of a range: from the end of the area below (the floor) to the
/// start of the area above (the ceiling).
///
/// A table may go exactly if the whole span it covers lies between the two: then nobody else can need it.
/// Linux writes "no neighbour above" as `ceiling = 0`, which then means two things; here it is the end of user space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    floor: u64,
    ceiling: u64,
}

impl Bounds {
    /// Between the end of the area below and the start of the area above; `None` where there is none.
    ///
    /// Both must stay true until the tables are freed: an area that grows downwards into the stretch (a stack) while
    /// only the map lock's reader side is held would fault pages into tables on their way out (CVE-2021-20200).
    #[must_use]
    pub fn between(area_below_end: Option<u64>, area_above_start: Option<u64>) -> Self {
        Self { floor: area_below_end.unwrap_or(0), ceiling: area_above_start.unwrap_or(u64::MAX) }
    }

    /// No neighbours at all: the whole address space goes.
    #[must_use]
    pub const fn whole() -> Self {
        Self { floor: 0, ceiling: u64::MAX }
    }

    /// The same floor, under a ceiling that is not higher than before.
    #[must_use]
    pub fn below(self, ceiling: u64) -> Self {
        Self { floor: self.floor, ceiling: self.ceiling.min(ceiling) }
    }

    /// Whether a table that covers `span` may be freed (rule P3).
    #[must_use]
    #[inline]
    pub const fn allow_freeing(self, span: VirtRange) -> bool {
        self.floor <= span.start() && span.end() <= self.ceiling
    }
}

/// A table that has been unhooked and is not yet free.
///
/// Holding one proves that no walk that begins now can reach the table from its root. It does not prove that no CPU
/// has it cached: the page becomes free only after a flush that covers `span` and reaches lazy CPUs too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct FreedTable {
    /// The page.
    pub frame: PhysFrame,
    /// The level of the table it was.
    pub level: Level,
    /// The addresses that were translated through it.
    pub span: VirtRange,
}

#[expect(unsafe_code, reason = "walking follows links between tables")]
impl AddressSpace {
    /// Unhooks every table that `range` used and that `bounds` lets go, lowest level first, and hands each to `sink`.
    ///
    /// Leaves must be gone already: the contents of last-level tables are not looked at, and a page still mapped in
    /// one would be lost. The root is never unhooked. Each parent entry is cleared under the parent's lock, and no
    /// lock is held while `sink` runs, so it may flush, free what it was given before, and sleep.
    ///
    /// # Context
    /// The embedder's map lock is held for writing, or the areas in `range` are detached and their neighbours cannot
    /// grow into `bounds`; nobody walks `range` meanwhile, not even to fault.
    ///
    /// # Safety
    /// The context above holds, and `sink` lets no page be reused before every CPU has flushed `span` of it.
    ///
    /// # Source
    /// Linux: free_pgd_range, mm/memory.c.
    #[doc(alias = "free_pgd_range")]
    #[doc(alias = "free_pte_range")]
    pub unsafe fn free_range<M: TableMemory>(
        &self,
        memory: &M,
        range: VirtRange,
        bounds: Bounds,
        mut sink: impl FnMut(FreedTable),
    ) {
        let Some(range) = range.intersect(self.user_range()) else { return };
        // SAFETY: by our caller's promise nobody else frees tables in this range.
        let root = unsafe { self.root_table(memory) };
        self.free_below(memory, root, range, bounds, &mut sink);
    }

    /// Frees the tables below `view` that `range` used. `range` lies inside the span of `view`.
    fn free_below<'m, M: TableMemory>(
        &self,
        memory: &'m M,
        view: TableView<'m>,
        range: VirtRange,
        bounds: Bounds,
        sink: &mut impl FnMut(FreedTable),
    ) {
        let level = view.level();
        let Some(below) = level.below() else { return };
        let mut address = range.start();
        while address < range.end() {
            let part = range.within_entry(level, address);
            let span = VirtRange::of_entry(level, address);
            address = part.end();
            // SAFETY: `free_range`'s caller promised that nobody else frees tables in this range.
            let Some(child) = (unsafe { view.child(memory, part.start()) }) else { continue };
            if below > Level::Pte {
                self.free_below(memory, child, part, bounds, sink);
            }
            if bounds.allow_freeing(span) {
                self.unhook(memory, view, part.start());
                debug_assert!(child.table().is_empty(), "P3: {child:?} is freed with entries in it, {span}");
                sink(FreedTable { frame: child.frame(), level: below, span });
            }
        }
    }

    fn unhook<M: TableMemory>(&self, memory: &M, parent: TableView<'_>, address: u64) {
        let locked = parent.lock(memory);
        // INVARIANT: P2, the entry is cleared under the parent's lock before the table is handed on.
        let old = locked.entry(address).get_and_clear();
        debug_assert!(
            old.as_table(parent.level()).is_some(),
            "P2: {parent:?} changed under us at {address:#x}"
        );
        if let Some(below) = parent.level().below() {
            self.count_unlinked(below);
        }
    }
}
