//! Which tables may go when a range of addresses is given up, and unhooking them.
#![expect(unsafe_code, reason = "walking follows links between tables")]

use arrayvec::ArrayVec;
use static_assertions::assert_not_impl_any;
use x86_64::structures::paging::PhysFrame;

use crate::entry::Entry;
use crate::level::Level;
use crate::memory::TableMemory;
use crate::range::VirtRange;
use crate::space::AddressSpace;
use crate::table::TableView;

/// The stretch of addresses between the neighbours of a range: from the end of the area below (the
/// floor) to the start of the area above (the ceiling).
///
/// A table may go exactly if the whole span it covers lies between the two: then nobody else can
/// need it. Linux writes "no neighbour above" as `ceiling = 0`, which then means two things; here
/// it is the largest number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    floor: u64,
    ceiling: u64,
}

impl Bounds {
    /// The bounds between the end of the area below and the start of the area above; `None` where
    /// there is no such area.
    ///
    /// Both must stay true until the tables are unhooked. If an area (a stack) grows downwards into
    /// the stretch while only the reader side of the map lock is held, pages are faulted into
    /// tables that are about to go (CVE-2021-20200).
    #[must_use]
    pub fn between(area_below_end: Option<u64>, area_above_start: Option<u64>) -> Self {
        Self { floor: area_below_end.unwrap_or(0), ceiling: area_above_start.unwrap_or(u64::MAX) }
    }

    /// The bounds around `range`, given the areas that stay, in any order. They may be all areas
    /// of the address space, or those near `range` alone.
    ///
    /// If one of them overlaps `range`, no table may go.
    ///
    /// ```
    /// # use mmu_pagetable::{Bounds, VirtRange};
    /// let page = |start: u64| VirtRange::new(start, start + 4096).expect("a page");
    /// let areas = [page(0x3000), page(0x7000), page(0x9000)];
    /// let between = Bounds::between(Some(0x4000), Some(0x7000));
    /// assert_eq!(Bounds::around(areas, page(0x5000)), between);
    /// assert_eq!(Bounds::around(areas, page(0xc000)), Bounds::between(Some(0xa000), None));
    /// let all = VirtRange::new(0, 1 << 30).expect("a range");
    /// assert_eq!(Bounds::around([page(512 << 20)], all).spans_of(all), None);
    /// ```
    #[must_use]
    pub fn around(areas: impl IntoIterator<Item = VirtRange>, range: VirtRange) -> Self {
        let mut bounds = Self::whole();
        for area in areas {
            if area.start() < range.end() {
                bounds.floor = bounds.floor.max(area.end());
            }
            if area.end() > range.start() {
                bounds.ceiling = bounds.ceiling.min(area.start());
            }
        }
        bounds
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

    /// The part of `range`, rounded out to the spans of last-level tables, in which such tables may
    /// go. `None` if none of them may go; then no table above them may go either.
    #[must_use]
    #[inline]
    pub const fn spans_of(self, range: VirtRange) -> Option<VirtRange> {
        const SPAN: u64 = Level::Pte.table_span();
        let start = range.start() & !(SPAN - 1);
        let floor = self.floor.saturating_add(SPAN - 1) & !(SPAN - 1);
        let end = (range.end() + (SPAN - 1)) & !(SPAN - 1);
        let ceiling = self.ceiling & !(SPAN - 1);
        let start = if start > floor { start } else { floor };
        let end = if end < ceiling { end } else { ceiling };
        match VirtRange::new(start, end) {
            Ok(range) => Some(range),
            Err(_) => None,
        }
    }

    /// Whether a table that covers `span` may be unhooked (rule P3).
    #[must_use]
    #[inline]
    pub const fn allow_unhooking(self, span: VirtRange) -> bool {
        self.floor <= span.start() && span.end() <= self.ceiling
    }
}

/// A table that has been unhooked and is not yet free.
///
/// Holding one proves that no walk that begins now can reach the table from its root. It does not
/// prove that no CPU has it cached: the page becomes free only after a flush that covers `span` and
/// reaches lazy CPUs too. Each table has one `UnhookedTable`, made where the table is unhooked and
/// nowhere else. It cannot be copied, so no table is queued twice.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a table that was unhooked and is not handed on is lost"]
pub struct UnhookedTable {
    frame: PhysFrame,
    level: Level,
    span: VirtRange,
    root: PhysFrame,
}

assert_not_impl_any!(UnhookedTable: Clone, Copy);

impl UnhookedTable {
    /// The table that was in `frame` and has just been unhooked.
    pub(crate) const fn new(frame: PhysFrame, level: Level, span: VirtRange, root: PhysFrame) -> Self {
        Self { frame, level, span, root }
    }

    /// The page that was the table.
    #[must_use]
    #[inline]
    pub const fn frame(&self) -> PhysFrame {
        self.frame
    }

    /// The level that the table had.
    #[must_use]
    #[inline]
    pub const fn level(&self) -> Level {
        self.level
    }

    /// The addresses that were translated through it.
    #[must_use]
    #[inline]
    pub const fn span(&self) -> VirtRange {
        self.span
    }

    /// The root of the address space that it was part of, whose flush it waits for.
    #[must_use]
    #[inline]
    pub const fn root(&self) -> PhysFrame {
        self.root
    }
}

impl AddressSpace {
    /// Unhooks every table that `range` used and that `bounds` lets go, lowest level first, and
    /// hands each to `sink`.
    ///
    /// Leaves must be gone already: the contents of last-level tables are not looked at, and a page
    /// still mapped in one would be lost. The root is never unhooked. Each parent entry is cleared
    /// under the parent's lock, and no lock is held while `sink` runs, so `sink` may flush, free
    /// what it was given before, and sleep.
    ///
    /// # Context
    /// The embedder's map lock is held for writing, or the areas in `range` are detached and their
    /// neighbours cannot grow into `bounds`; nobody walks `range` meanwhile, not even to fault.
    ///
    /// # Safety
    /// The context above holds, and `sink` lets no page be reused before every CPU has flushed its
    /// `span`.
    ///
    /// # Source
    /// Linux: free_pgd_range, mm/memory.c. It frees into the gather; here the gather is behind
    /// `sink`.
    #[doc(alias = "free_pgd_range")]
    #[doc(alias = "free_pte_range")]
    pub unsafe fn unhook_tables<M: TableMemory>(
        &self,
        memory: &M,
        range: VirtRange,
        bounds: Bounds,
        mut sink: impl FnMut(UnhookedTable),
    ) {
        let Some(range) = range.intersect(self.user_range()).and_then(|range| bounds.spans_of(range)) else {
            return;
        };
        let above = VirtRange::of_entry(Level::Pud, range.start());
        if above.covers(range) && !bounds.allow_unhooking(above) {
            // The usual case: one PMD table leads to all tables that may go, and stays.
            // SAFETY: by our caller's promise nobody else frees tables in this range.
            if let Some(view) = unsafe { self.pmd_table(memory, range.start()) } {
                if range.len_bytes() == Level::Pte.table_span() {
                    self.unhook_one(memory, view, range, &mut sink);
                } else {
                    self.unhook_last_level(memory, view, range, bounds, &mut sink);
                }
            }
            return;
        }
        // SAFETY: as above.
        let root = unsafe { self.root_table(memory) };
        self.unhook_below(memory, root, range, bounds, &mut sink);
    }

    /// Unhooks the tables below `view` that `range` used. `range` lies inside the span of `view`,
    /// and consists of spans of last-level tables that may go.
    fn unhook_below<'m, M: TableMemory>(
        &self,
        memory: &'m M,
        view: TableView<'m>,
        range: VirtRange,
        bounds: Bounds,
        sink: &mut impl FnMut(UnhookedTable),
    ) {
        let level = view.level();
        let Some(below) = level.below() else { return };
        if below == Level::Pte {
            self.unhook_last_level(memory, view, range, bounds, sink);
            return;
        }
        let mut address = range.start();
        while address < range.end() {
            let part = range.within_entry(level, address);
            let span = VirtRange::of_entry(level, address);
            address = part.end();
            // SAFETY: `unhook_tables`'s caller promised that nobody else frees tables in this
            // range.
            let Some(child) = (unsafe { view.child(memory, part.start()) }) else { continue };
            self.unhook_below(memory, child, part, bounds, sink);
            if bounds.allow_unhooking(span) {
                let locked = view.lock(memory);
                let index = level.index(part.start());
                // SAFETY: the parent's lock is held; the entry leads to `child`, whose tables and
                // leaves are gone.
                let old = unsafe { view.table().entry(index).unhook() };
                locked.forget_empty_lines(&(index..index + 1));
                drop(locked);
                debug_assert!(old.as_table(level) == Some(child.frame()), "P2: {view:?} changed at {span}");
                self.count_unhooked(below, 1);
                give(
                    memory,
                    UnhookedTable { frame: child.frame(), level: below, span, root: self.root() },
                    sink,
                );
            }
        }
    }

    /// Unhooks the last-level table that the entry for `span` of `view`, a PMD table, leads to, if
    /// it leads to one.
    #[inline]
    fn unhook_one<M: TableMemory>(
        &self,
        memory: &M,
        view: TableView<'_>,
        span: VirtRange,
        sink: &mut impl FnMut(UnhookedTable),
    ) {
        const LEVEL: Level = Level::Pmd;
        let index = LEVEL.index(span.start());
        let entry = view.table().entry(index);
        // Large leaves, and kept entries in their place, stay.
        let Some(frame) = entry.load().as_table(LEVEL) else { return };
        let locked = view.lock(memory);
        // SAFETY: the parent's lock is held; by `unhook_tables`'s contract nobody else unhooks
        // here, and the leaves below are gone.
        let old = unsafe { entry.unhook() };
        locked.forget_empty_lines(&(index..index + 1));
        drop(locked);
        debug_assert!(old.as_table(LEVEL) == Some(frame), "P2: {view:?} changed at {span}");
        self.count_unhooked(Level::Pte, 1);
        give(memory, UnhookedTable { frame, level: Level::Pte, span, root: self.root() }, sink);
    }

    /// Unhooks the last-level tables that `range` of `view`, a PMD table, leads to; up to
    /// [`AT_ONCE`] under one lock.
    fn unhook_last_level<M: TableMemory>(
        &self,
        memory: &M,
        view: TableView<'_>,
        range: VirtRange,
        bounds: Bounds,
        sink: &mut impl FnMut(UnhookedTable),
    ) {
        const LEVEL: Level = Level::Pmd;
        let entries = view.entries(range);
        let span =
            |index: usize| VirtRange::of_entry(LEVEL, range.start() + index as u64 * LEVEL.entry_span());
        let used = view.used_lines(memory);
        if cfg!(debug_assertions) {
            view.check_unused(memory, used, range);
        }
        let first = LEVEL.index(range.start());
        let find = |from: usize| {
            // A line that is noted may be empty.
            let noted = used.first_run(&(first + from..first + entries.len())).start - first;
            first_used(entries, noted)
        };
        let mut next = find(0);
        while next < entries.len() {
            let mut taken = ArrayVec::<_, AT_ONCE>::new();
            let locked = view.lock(memory);
            let from = next;
            while next < entries.len() && !taken.is_full() {
                // Large leaves, and kept entries in their place, stay.
                if let Some(frame) = entries[next].load().as_table(LEVEL) {
                    debug_assert!(
                        bounds.allow_unhooking(span(next)),
                        "P3: {bounds:?} does not let {range} go"
                    );
                    // SAFETY: the parent's lock is held; by `unhook_tables`'s contract the leaves
                    // below are gone.
                    let _ = unsafe { entries[next].unhook() };
                    taken.push((next, frame));
                }
                next = find(next + 1);
            }
            locked.forget_empty_lines(&(first + from..first + next));
            drop(locked);
            self.count_unhooked(Level::Pte, taken.len() as u64);
            for (index, frame) in &taken {
                let (level, span) = (Level::Pte, span(*index));
                give(memory, UnhookedTable { frame: *frame, level, span, root: self.root() }, sink);
            }
        }
    }
}

/// How many tables are unhooked under one lock: enough that the lock costs nothing, few enough for
/// the stack.
const AT_ONCE: usize = 32;

/// The index of the first entry from `from` on that is not empty, found by whole lines; the length
/// if all are empty.
#[inline]
fn first_used(entries: &[Entry], from: usize) -> usize {
    let mut index = from;
    while let Some(line) = entries.get(index..).and_then(|rest| rest.first_chunk::<8>()) {
        if line.iter().fold(0, |any, entry| any | entry.load().bits()) != 0 {
            break;
        }
        index += 8;
    }
    while index < entries.len() && entries[index].load().is_empty() {
        index += 1;
    }
    index
}

/// Hands `table` to `sink`. A debug build first looks whether the table is empty.
#[inline]
pub(crate) fn give<M: TableMemory>(memory: &M, table: UnhookedTable, sink: &mut impl FnMut(UnhookedTable)) {
    if cfg!(debug_assertions) {
        // SAFETY: the table was live a moment ago, and is not freed before the sink has it.
        let view = unsafe { TableView::new(memory, table.frame, table.level) };
        debug_assert!(
            view.table().is_empty(),
            "P3: {table:?} is freed with entries in it. The bounds of a munmap end where its neighbours begin, the areas \
             that stay (`Bounds::between`); and nobody maps anything in its range before its flush has returned"
        );
    }
    sink(table);
}
