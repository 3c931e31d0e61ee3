//! What programs, schedulers and reclaim do around the engine: map, touch, switch, go lazy, unmap.
#![expect(unsafe_code, reason = "the engine's entry points take the map lock and the CPU on trust")]

use core::pin::Pin;

use mmu_gather::pagetable::{
    Bounds, Decoded, EntryValue, Level, Lines, Mapping, NonPresent, Table, TableMemory, TableView,
    UnhookedTable, VirtRange,
};
use mmu_gather::tlb::{
    CpuId, CpuTlb, Laziness, UnmapBatch, enter_lazy_tlb, init_cpu, leave_mm, offline_cpu, switch_mm,
};
use mmu_gather::{
    FlushedGather, Limits, MmuGather, Vma, VmaKind, exit_mmap, exit_mmap_within, unmap_range, unmap_region,
    zap_page_range,
};
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

use crate::cpu::{Access, Fault, Translation};
use crate::gather::GatherOnPaper;
use crate::kernel::{PaperKernel, PaperMm};
use crate::options::Bits;
use crate::platform::Backing;
use crate::violation::Violation;

/// 1024 bytes.
pub const KIB: u64 = 1 << 10;
/// 1024 KiB.
pub const MIB: u64 = 1 << 20;
/// 1024 MiB.
pub const GIB: u64 = 1 << 30;
/// 1024 GiB.
pub const TIB: u64 = 1 << 40;

/// The first eight CPUs.
pub const CPU: [CpuId; 8] = {
    let mut cpus = [CpuId::new(0); 8];
    let mut id = 0;
    while id < 8 {
        cpus[id as usize] = CpuId::new(id);
        id += 1;
    }
    cpus
};

/// The range `start..end`.
///
/// # Panics
/// If that is no range of user pages.
#[must_use]
pub fn range(start: u64, end: u64) -> VirtRange {
    VirtRange::new(start, end).expect("a range of user pages")
}

/// The area `start..end` with `backing` behind it.
#[must_use]
pub fn area(start: u64, end: u64, backing: Backing) -> Vma<Backing> {
    let kind = if backing == Backing::Device { VmaKind::PfnMap } else { VmaKind::Normal };
    Vma { range: range(start, end), kind, area: backing }
}

/// Mapping and looking.
impl PaperKernel {
    /// Maps a new page of the size that entries of `level` map.
    ///
    /// # Panics
    /// If no table can be had, or something is there.
    pub fn map(&self, mm: &PaperMm, address: u64, level: Level) -> PhysFrame {
        let frame = self.ledger().new_page(level.entry_span());
        self.map_page(mm, address, level, frame, PageTableFlags::WRITABLE);
        frame
    }

    /// Maps a new 4 KiB page at each address of `range`.
    pub fn map_range(&self, mm: &PaperMm, range: VirtRange) -> Vec<PhysFrame> {
        let pages = (range.start()..range.end()).step_by(4096);
        pages.map(|address| self.map(mm, address, Level::Pte)).collect()
    }

    /// Maps the page at `frame`, which may be mapped elsewhere already.
    ///
    /// # Panics
    /// If no table can be had, or something is there.
    pub fn map_page(
        &self,
        mm: &PaperMm,
        address: u64,
        level: Level,
        frame: PhysFrame,
        flags: PageTableFlags,
    ) {
        self.ledger().add_mapping(frame);
        let flags = flags | PageTableFlags::USER_ACCESSIBLE;
        self.put(mm, address, level, EntryValue::leaf(level, frame.start_address(), flags));
    }

    /// Puts an entry that is kept where nothing is mapped.
    pub fn put_non_present(&self, mm: &PaperMm, address: u64, level: Level, meaning: NonPresent) {
        self.put(mm, address, level, meaning.encode());
    }

    fn put(&self, mm: &PaperMm, address: u64, level: Level, value: EntryValue) {
        // SAFETY: one thread; nobody frees tables meanwhile. Pages have no memory behind them.
        let put = unsafe { mm.space().map(self, address, level, value) };
        put.expect("room for an entry");
    }

    /// The lowest entry on the path to `address`.
    #[must_use]
    pub fn lookup(&self, mm: &PaperMm, address: u64) -> Mapping {
        // SAFETY: one thread; nobody frees tables meanwhile.
        unsafe { mm.space().lookup(self, address) }
    }

    /// Tables linked below the root: PTE, PMD, PUD and P4D tables.
    #[must_use]
    pub fn nr_tables(&self, mm: &PaperMm) -> [u64; 4] {
        [Level::Pte, Level::Pmd, Level::Pud, Level::P4d].map(|level| mm.space().nr_tables(level))
    }

    /// The table of `level` on the path to `address`.
    #[must_use]
    pub fn find_table(&self, mm: &PaperMm, address: u64, level: Level) -> Option<TableView<'_>> {
        // SAFETY: one thread; nobody frees tables meanwhile.
        unsafe { mm.space().find_table(self, address, level) }
    }

    /// Level and address of every table linked below the root.
    #[must_use]
    pub fn tables(&self, mm: &PaperMm) -> Vec<(Level, PhysFrame)> {
        let mut tables = Vec::new();
        self.for_each_table(mm, &mut |view| tables.push((view.level(), view.frame())));
        tables
    }

    /// Whether the table in `frame` has an entry that is not empty.
    #[must_use]
    pub fn has_entries(&self, table: PhysFrame) -> bool {
        !self.table(table).is_empty()
    }

    /// Tables below the root with an entry that is not empty in a line that is not noted as used
    /// (rule P4).
    #[must_use]
    pub fn tables_with_unnoted_entries(&self, mm: &PaperMm) -> Vec<(Level, PhysFrame)> {
        let mut tables = Vec::new();
        self.for_each_table(mm, &mut |view| {
            let noted = view.used_lines(self);
            let is_noted = |index: usize| !noted.intersect(Lines::touched_by(&(index..index + 1))).is_empty();
            let mut entries = view.table().entries().iter().enumerate();
            if entries.any(|(index, entry)| !entry.load().is_empty() && !is_noted(index)) {
                tables.push((view.level(), view.frame()));
            }
        });
        tables
    }

    pub(crate) fn root_of(&self, mm: &PaperMm) -> TableView<'_> {
        // SAFETY: one thread; nobody frees tables meanwhile.
        unsafe { mm.space().root_table(self) }
    }

    pub(crate) fn child_of<'m>(&'m self, view: TableView<'m>, address: u64) -> Option<TableView<'m>> {
        // SAFETY: one thread; nobody frees tables meanwhile. The arena keeps even freed ones
        // readable.
        unsafe { view.child(self, address) }
    }

    pub(crate) fn table(&self, frame: PhysFrame) -> &Table {
        // SAFETY: a frame of the arena; the level is not used.
        unsafe { TableView::new(self, frame, Level::Pte) }.table()
    }
}

/// Programs and the scheduler.
impl PaperKernel {
    /// The engine's state of one CPU, as a test looks at it: nothing is noted.
    #[must_use]
    pub fn state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        &self.cpu(cpu).state
    }

    /// Runs a program of `mm` on `cpu`.
    pub fn run(&self, cpu: CpuId, mm: &PaperMm) {
        self.on(cpu, || {
            // SAFETY: every address space is in a box of this kernel, and never moved out of it.
            let next = unsafe { Pin::new_unchecked(mm) }.pinned_context();
            // SAFETY: this thread is that CPU while `on` runs; address spaces live as long as the
            // kernel.
            unsafe { switch_mm(self, cpu, Some(next)) };
        });
        self.check_what_was_kept(cpu);
    }

    /// Runs nothing on `cpu`, with the kernel's own address space.
    pub fn stop(&self, cpu: CpuId) {
        // SAFETY: this thread is that CPU while `on` runs.
        self.on(cpu, || unsafe { switch_mm(self, cpu, None) });
    }

    /// Takes `cpu` out of service.
    pub fn take_offline(&self, cpu: CpuId) {
        // SAFETY: as in `stop`.
        self.on(cpu, || unsafe { offline_cpu(self, cpu) });
    }

    /// Runs a kernel thread on `cpu`, which borrows the address space that is loaded.
    pub fn go_lazy(&self, cpu: CpuId) {
        // SAFETY: as in `run`.
        self.on(cpu, || unsafe { enter_lazy_tlb(self, cpu) });
    }

    /// Lets `cpu` drop the address space that it borrowed.
    pub fn leave_mm(&self, cpu: CpuId) {
        // SAFETY: as in `run`.
        self.on(cpu, || unsafe { leave_mm(self, cpu) });
    }

    /// Starts `cpu` again after it was off.
    pub fn restart(&self, cpu: CpuId) {
        // SAFETY: as in `run`.
        self.on(cpu, || unsafe { init_cpu(self, cpu) });
    }

    /// What `cpu` could use for `address` without looking at the tables.
    #[must_use]
    pub fn cached(&self, cpu: CpuId, address: u64) -> Option<Translation> {
        self.cpu(cpu).tlb.borrow().leaf(address)
    }

    /// Every leaf that `cpu` has cached under the tag `pcid`.
    #[must_use]
    pub fn cached_under(&self, cpu: CpuId, pcid: u16) -> Vec<Translation> {
        self.cpu(cpu).tlb.borrow().leaves_under(pcid).collect()
    }

    /// A program on `cpu` reads or writes at `address`, through what the CPU has cached.
    ///
    /// # Errors
    /// [`Fault`], as the hardware would raise it.
    ///
    /// # Panics
    /// If no program may run there: the CPU is lazy.
    pub fn touch(&self, cpu: CpuId, address: u64, access: Access) -> Result<PhysFrame, Fault> {
        assert_eq!(self.state(cpu).laziness(), Laziness::Active, "{cpu} runs no program");
        self.walk_if_need_be(cpu, address, access)
    }

    /// Speculation on `cpu`, lazy or not, follows `address`: it fills the TLB like a read.
    ///
    /// What is cached already it leaves alone: a lazy CPU may keep a stale leaf of a page that was
    /// freed (rule T5), and what speculation reads there no program sees.
    pub fn speculate(&self, cpu: CpuId, address: u64) {
        if self.cached(cpu, address).is_none() {
            let _ = self.walk_if_need_be(cpu, address, Access::Read);
        }
    }

    fn walk_if_need_be(&self, cpu: CpuId, address: u64, access: Access) -> Result<PhysFrame, Fault> {
        let cached = self.cached(cpu, address);
        if let Some(leaf) = cached.filter(|leaf| access == Access::Read || (leaf.writable && leaf.dirty)) {
            self.check_use(cpu, &leaf, address);
            return Ok(leaf.frame);
        }
        self.cpu(cpu).tlb.borrow_mut().forget_leaf(address);
        let remembered = self.cpu(cpu).tlb.borrow().table(address);
        let root = self.cpu(cpu).tlb.borrow().root();
        let (table, level) = remembered.unwrap_or((root, self.options().mode.root_level()));
        self.check_walk(cpu, table, address);
        // SAFETY: the arena keeps tables readable, even freed ones.
        let mut view = unsafe { TableView::new(self, table, level) };
        loop {
            let value = self.walker_reads(view, address, access)?;
            let mut tlb = self.cpu(cpu).tlb.borrow_mut();
            let Some(below) = self.child_of(view, address) else {
                let level = view.level();
                let leaf = Translation {
                    frame: PhysFrame::containing_address(value.leaf_address(level)),
                    len_bytes: level.entry_span(),
                    address: VirtRange::of_entry(level, address).start(),
                    writable: value.is_writable(),
                    dirty: value.is_dirty(),
                };
                tlb.remember_leaf(level, leaf);
                drop(tlb);
                self.check_use(cpu, &leaf, address);
                return Ok(leaf.frame);
            };
            tlb.remember_link(view.level(), address, below.frame());
            view = below;
        }
    }

    /// Reads one entry as the page walker does: sets A, and D in a leaf that is written.
    fn walker_reads(&self, view: TableView<'_>, address: u64, access: Access) -> Result<EntryValue, Fault> {
        let entry = view.table().entry(view.level().index(address));
        let value = entry.load();
        let mut set = PageTableFlags::ACCESSED;
        match value.decode(view.level()) {
            Decoded::Empty | Decoded::NonPresent(_) => return Err(Fault::NotPresent),
            Decoded::Leaf(_) if access == Access::Write && !value.is_writable() => {
                return Err(Fault::ReadOnly);
            }
            Decoded::Leaf(_) if access == Access::Write => set |= PageTableFlags::DIRTY,
            Decoded::Leaf(_) | Decoded::Table(_) => {}
        }
        let new = EntryValue::from_bits(value.bits() | set.bits());
        // SAFETY: what hardware does, in one step.
        let set = unsafe { entry.compare_exchange(value, new) };
        set.map_or(Err(Fault::NotPresent), |()| Ok(new))
    }
}

/// Unmapping, in one call each.
impl PaperKernel {
    /// A gather on `mm`.
    #[must_use]
    pub fn gather<'k, 'm>(&'k self, mm: &'m PaperMm) -> MmuGather<'k, 'm, Self> {
        // SAFETY: one thread stands in for the map lock.
        unsafe { MmuGather::new(self, mm) }
    }

    /// A gather for all of `mm`, which is dying.
    #[must_use]
    pub fn gather_fullmm<'k, 'm>(&'k self, mm: &'m PaperMm) -> MmuGather<'k, 'm, Self> {
        // SAFETY: as in `gather`.
        unsafe { MmuGather::new_fullmm(self, mm) }
    }

    /// Unmaps `vmas` and the tables only they used; munmap.
    ///
    /// # Panics
    /// If an area ends in the middle of a large leaf.
    pub fn unmap(&self, mm: &PaperMm, limits: &Limits, vmas: &[Vma<Backing>], bounds: Bounds) {
        let vmas = vmas.iter().copied();
        // SAFETY: as in `gather`; no table lock is held, and the caller answers for the areas.
        unsafe { unmap_region(self, mm, limits, vmas, bounds, || {}) }.expect("no leaf is cut").free();
    }

    /// Unmaps `range` of `vma`, and the tables that are empty then.
    ///
    /// # Panics
    /// If the range ends in the middle of a large leaf.
    pub fn unmap_alone(&self, mm: &PaperMm, limits: &Limits, vma: &Vma<Backing>, range: VirtRange) {
        // SAFETY: one thread stands in for the map lock.
        unsafe { unmap_range(self, mm, limits, vma, range) }.expect("no leaf is cut").free();
    }

    /// Queues one page at `nr_pages` addresses in one gather, and finishes it. Nothing maps the
    /// page.
    pub fn remove_single_pages(&self, mm: &PaperMm, limits: &Limits, nr_pages: u64) {
        let mut gather = self.gather(mm).with_limits(limits);
        let frame = self.ledger().new_page(4096);
        for page in 0..nr_pages {
            self.ledger().add_reference(frame);
            let address = GIB + page * 4096;
            gather.queue_page(frame, range(address, address + 4096), Level::Pte);
        }
    }

    /// Drops the pages of `range` in `vma` and keeps the tables; madvise(MADV_DONTNEED).
    ///
    /// # Panics
    /// If the range ends in the middle of a large leaf.
    pub fn zap(&self, mm: &PaperMm, vma: &Vma<Backing>, range: VirtRange) -> FlushedGather<'_, Self> {
        // SAFETY: as in `gather`.
        unsafe { zap_page_range(self, mm, &Limits::DEFAULT, vma, range) }.expect("no leaf is cut")
    }

    /// Unmaps everything; exit.
    pub fn exit(&self, mm: &PaperMm, limits: &Limits, vmas: &[Vma<Backing>]) {
        // SAFETY: as in `gather`; no CPU runs a program of `mm` any more, which the caller answers
        // for.
        unsafe { exit_mmap(self, mm, limits, vmas.iter().copied(), || {}) }.free();
    }

    /// Unmaps everything between `bounds`; exit where the rest is not the address space's own.
    pub fn exit_within(&self, mm: &PaperMm, vmas: &[Vma<Backing>], bounds: Bounds) {
        let vmas = vmas.iter().copied();
        // SAFETY: as in `exit`.
        unsafe { exit_mmap_within(self, mm, &Limits::DEFAULT, vmas, bounds, || {}) }.free();
    }

    /// Reclaim unmaps the page at `address` of `mm`; its flush comes with the batch. Returns the
    /// frame, which is not released yet.
    ///
    /// # Panics
    /// If no 4 KiB page is mapped there.
    pub fn reclaim(&self, batch: &mut UnmapBatch<Self>, mm: &PaperMm, address: u64) -> PhysFrame {
        self.reclaim_at(batch, mm, address, Level::Pte)
    }

    /// As [`reclaim`](Self::reclaim), of a leaf of `level`.
    ///
    /// # Panics
    /// If there is no table of that level.
    pub fn reclaim_at(
        &self,
        batch: &mut UnmapBatch<Self>,
        mm: &PaperMm,
        address: u64,
        level: Level,
    ) -> PhysFrame {
        let view = self.find_table(mm, address, level).expect("a mapped page");
        let locked = view.lock(self);
        // SAFETY: the batch is told before the lock drops, and the caller frees the page after its
        // flush.
        let old = unsafe { locked.entry(address).get_and_clear() };
        batch.add_mm(self, mm.context());
        drop(locked);
        let frame = PhysFrame::containing_address(old.leaf_address(level));
        self.ledger().remove_rmap(frame);
        frame
    }

    /// Unhooks the last-level table for `address` if it is there and empty, and leaves the tables
    /// above. The caller queues it in a gather; otherwise it leaks.
    pub fn unhook_empty_table(&self, mm: &PaperMm, address: u64) -> Option<UnhookedTable> {
        let table = self.find_table(mm, address, Level::Pte).filter(|view| view.table().is_empty())?;
        let span = VirtRange::of_entry(Level::Pmd, address);
        let mut unhooked = None;
        let bounds = Bounds::between(Some(span.start()), Some(span.end()));
        // SAFETY: one thread; nothing is mapped there. An `UnhookedTable` is freed by a gather's
        // flush only.
        unsafe { mm.space().unhook_tables(self, span, bounds, |table| unhooked = Some(table)) };
        debug_assert!(unhooked.as_ref().is_none_or(|unhooked| unhooked.frame() == table.frame()));
        unhooked
    }

    /// Frees a root that nobody uses any more; or any other table, which is a mistake that the
    /// checker sees.
    pub fn free_one_table(&self, table: PhysFrame) {
        // SAFETY: nothing is used again: the arena keeps even freed tables, and the checker says
        // what was wrong.
        unsafe { self.free_tables(&[table]) };
    }

    fn check_use(&self, cpu: CpuId, leaf: &Translation, address: u64) {
        let used = leaf.frame + ((address - leaf.address) >> 12);
        if self.ledger().is_freed(used, 4096) {
            self.violation(Violation::FreedPageUsed(used, cpu, address));
        }
    }

    fn check_walk(&self, cpu: CpuId, table: PhysFrame, address: u64) {
        if !self.is_live_table(table) {
            self.violation(Violation::FreedTableWalked(table, cpu, address));
        }
    }
}
