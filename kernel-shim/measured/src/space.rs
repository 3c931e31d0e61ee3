//! A shape as page tables, and the check of what a teardown freed.
#![expect(unsafe_code, reason = "builds page tables")]

use mmu_gather::Mm;
use mmu_gather::pagetable::{EntryValue, Level, PagingMode, TableView};
use mmu_gather::tlb::CtxIds;
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

use crate::machine::{Bits, Counting, Machine};
use crate::shape::{Leaf, Shape};

/// The entries of one last-level (W5: second-level) table that an area covers; the floors are told
/// these beforehand.
#[derive(Clone, Copy, Debug)]
pub struct Stretch {
    /// Physical address of the table.
    pub table: u64,
    /// The first entry of the area.
    pub first: usize,
    /// One past the last one.
    pub end: usize,
}

/// An entry that points to a table that is freed.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Physical address of the table the entry is in.
    pub parent: u64,
    /// Which entry.
    pub index: usize,
    /// Physical address of the table it points to.
    pub table: u64,
}

/// A shape, mapped.
#[derive(Debug)]
pub struct Space<'s> {
    /// What was mapped.
    pub shape: &'s Shape,
    /// The address space. Boxed, because a CPU that has it loaded remembers where it is.
    pub mm: Box<Mm<Bits>>,
    /// Where to look for leaves, in the order of the areas.
    pub stretches: Vec<Stretch>,
    /// How the tables that are freed are linked, lowest level first within each table of the next
    /// level.
    pub links: Vec<Link>,
    free_tables_before: u64,
}

impl<'s> Space<'s> {
    /// Maps `shape` below a root of its own.
    ///
    /// # Panics
    /// If memory is short.
    #[must_use]
    pub fn new<C: Counting>(machine: &Machine<'_, C>, shape: &'s Shape) -> Self {
        reset(machine, shape);
        let root = machine.memory().allocate_table().expect("memory was just reset");
        Self::below(machine, shape, root)
    }

    /// As [`new`](Self::new), without the stretches, which only the floors need: areas may be as
    /// large as they like.
    ///
    /// # Panics
    /// If memory is short.
    #[must_use]
    pub fn without_stretches<C: Counting>(machine: &Machine<'_, C>, shape: &'s Shape) -> Self {
        reset(machine, shape);
        let root = machine.memory().allocate_table().expect("memory was just reset");
        Self::mapped(machine, shape, root)
    }

    /// Maps `shape` below `root`, an empty table from this machine's memory, which has been
    /// [`reset`] for the shape.
    ///
    /// # Panics
    /// If memory is short.
    #[must_use]
    pub fn below<C: Counting>(machine: &Machine<'_, C>, shape: &'s Shape, root: PhysFrame) -> Self {
        let mut space = Self::mapped(machine, shape, root);
        space.find_stretches(machine);
        space
    }

    fn mapped<C: Counting>(machine: &Machine<'_, C>, shape: &'s Shape, root: PhysFrame) -> Self {
        // SAFETY: `root` is an empty table by the contract of this function (a harness; it frees no
        // root in use).
        let mm = Box::new(unsafe { Mm::new(&CtxIds::new(), root, PagingMode::FourLevel) });
        let mut space = Self { shape, mm, stretches: Vec::new(), links: Vec::new(), free_tables_before: 0 };
        let mut table = None;
        for leaf in shape.staying.iter().chain(&shape.leaves) {
            space.put(machine, shape.level, *leaf, &mut table);
        }
        table = None;
        for block in &shape.blocks {
            space.put(machine, Level::Pmd, *block, &mut table);
        }
        if shape.is_one_by_one() {
            // Where pages stay, so do the tables above the last level, and most often those, too.
        } else {
            space.find_links(machine, root, Level::P4d);
        }
        space.free_tables_before = machine.memory().nr_free_tables();
        space
    }

    /// Maps the leaves of the shape again.
    pub fn refill<C: Counting>(&mut self, machine: &Machine<'_, C>) {
        let mut table = None;
        for leaf in &self.shape.leaves {
            self.put(machine, self.shape.level, *leaf, &mut table);
        }
    }

    /// Checks that `pages` pages were freed since the last check, and `tables` tables since the
    /// space was made.
    ///
    /// # Panics
    /// If they were not.
    pub fn check<C: Counting>(&self, machine: &Machine<'_, C>, pages: u64, tables: u64) {
        let freed = machine.memory().take_free_pages();
        assert_eq!(freed, pages, "{:?}: pages freed", self.shape.workload);
        let freed = machine.memory().nr_free_tables() - self.free_tables_before;
        assert_eq!(freed, tables, "{:?}: tables freed", self.shape.workload);
    }

    /// Tables below the root that are freed when everything is unmapped that goes.
    #[must_use]
    pub const fn nr_tables(&self) -> u64 {
        if self.shape.tables_go_one_by_one() {
            self.shape.areas.len() as u64
        } else {
            self.links.len() as u64
        }
    }

    fn put<C: Counting>(
        &self,
        machine: &Machine<'_, C>,
        level: Level,
        leaf: Leaf,
        table: &mut Option<(u64, PhysFrame)>,
    ) {
        let span = leaf.address / level.table_span();
        let frame = match *table {
            Some((cached, frame)) if cached == span => frame,
            _ => {
                // SAFETY: nobody else walks this space.
                let view = unsafe { self.mm.space().ensure_table(machine, leaf.address, level) };
                view.expect("a new space has room, and memory was reset for it").frame()
            }
        };
        *table = Some((span, frame));
        machine.memory().make_page(leaf.physical);
        let flags = self.shape.kind.flags(leaf.address);
        let value = EntryValue::leaf(level, PhysAddr::new(leaf.physical), flags);
        // SAFETY: a table of this level that `ensure_table` returned; it stays while we build.
        let view = unsafe { TableView::new(machine, frame, level) };
        // SAFETY: the entry is empty, and the space is not in use yet.
        unsafe { view.lock(machine).entry(leaf.address).store(value) };
    }

    fn find_stretches<C: Counting>(&mut self, machine: &Machine<'_, C>) {
        let level = self.shape.level;
        for area in &self.shape.areas {
            let mut address = area.start();
            while address < area.end() {
                let end = area.end().min((address | (level.table_span() - 1)) + 1);
                // SAFETY: nobody else walks this space.
                let view = unsafe { self.mm.space().find_table(machine, address, level) };
                let first = level.index(address);
                let entries = (end - address) >> level.entry_shift();
                if let (Some(view), Ok(entries)) = (view, usize::try_from(entries)) {
                    let table = view.frame().start_address().as_u64();
                    self.stretches.push(Stretch { table, first, end: first + entries });
                }
                address = end;
            }
        }
    }

    fn find_links<C: Counting>(&mut self, machine: &Machine<'_, C>, parent: PhysFrame, level: Level) {
        // SAFETY: a table of this level of our own space.
        let view = unsafe { TableView::new(machine, parent, level) };
        let Some(below) = level.below() else { return };
        for (index, entry) in view.table().entries().iter().enumerate() {
            if let Some(table) = entry.load().as_table(level) {
                self.find_links(machine, table, below);
                let (parent, table) = (parent.start_address().as_u64(), table.start_address().as_u64());
                self.links.push(Link { parent, index, table });
            }
        }
    }
}

/// Makes memory ready for `shape`: as many free tables as it can need, in its order.
pub fn reset<C: Counting>(machine: &Machine<'_, C>, shape: &Shape) {
    let spans = |leaves: &[Leaf], level: Level| {
        let span = |leaf: &Leaf| leaf.address / level.table_span();
        leaves.chunk_by(|one, next| span(one) == span(next)).count() as u64
    };
    let mut tables = 16;
    let mut level = Some(Level::Pte);
    while let Some(here) = level {
        if here >= shape.level {
            tables += spans(&shape.staying, here) + spans(&shape.leaves, here);
        }
        if here >= Level::Pmd {
            tables += spans(&shape.blocks, here);
        }
        level = here.above();
    }
    machine.memory().reset(tables, shape.tables);
}
