//! The kernel's data: an arena that plays memory, pretend CPUs, and the address spaces.

use core::cell::{Cell, OnceCell, RefCell, RefMut};
use core::fmt;
use std::collections::BTreeSet;

use bumpalo::Bump;
use mmu_gather::pagetable::{HashedLocks, TableLock, UsedLines};
use mmu_gather::tlb::{CpuId, CtxIds};
use mmu_gather::{BatchArena, BatchPage, Mm};
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

use crate::cpu::PaperCpu;
use crate::ledger::Ledger;
use crate::log::Log;
use crate::options::{Bits, Options, Supply};
use crate::table_page::{Deadlock, TablePage};
use crate::violation::Violation;

/// An address space of this kernel.
pub type PaperMm = Mm<Bits>;

/// A kernel that exists on paper: one thread that plays every CPU.
///
/// Dropped with violations that nobody [took](Self::take_violations), it panics and names them.
pub struct PaperKernel {
    options: Options,
    arena: Bump,
    tables: RefCell<BTreeSet<PhysFrame>>,
    kernel_root: PhysFrame,
    pub(crate) two_locks: HashedLocks<2, Deadlock>,
    pub(crate) one_lock: HashedLocks<1, Deadlock>,
    ids: CtxIds,
    mms: [OnceCell<Box<PaperMm>>; 16],
    cpus: Vec<PaperCpu>,
    here: Cell<CpuId>,
    table_supply: RefCell<Supply>,
    batches: BatchArena,
    batches_lent: Cell<u32>,
    batch_supply: RefCell<Supply>,
    ledger: RefCell<Ledger>,
    pub(crate) log: Log<Self>,
    pub(crate) locks_asked: RefCell<Vec<PhysFrame>>,
    pub(crate) dirty_flush: Cell<bool>,
    /// After so many steps of gathers the kernel's own hook unwinds, once.
    pub(crate) steps_to_unwinding: Cell<Option<u32>>,
    pub(crate) violations: RefCell<Vec<Violation>>,
}

impl PaperKernel {
    /// A kernel on a machine as `options` say. CPU 0 plays first; no CPU has an address space
    /// loaded.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let arena = Bump::new();
        let kernel_root = table_in(&arena);
        Self {
            options,
            tables: RefCell::new(BTreeSet::from([kernel_root])),
            arena,
            kernel_root,
            two_locks: HashedLocks::new(),
            one_lock: HashedLocks::new(),
            ids: CtxIds::new(),
            mms: core::array::from_fn(|_| OnceCell::new()),
            cpus: (0..options.cpus).map(|_| PaperCpu::new(kernel_root)).collect(),
            here: Cell::new(CpuId::new(0)),
            table_supply: RefCell::new(Supply::Unlimited),
            batches: BatchArena::new(None),
            batches_lent: Cell::new(0),
            batch_supply: RefCell::new(Supply::Unlimited),
            ledger: RefCell::new(Ledger::new()),
            log: Log::new(),
            locks_asked: RefCell::new(Vec::new()),
            dirty_flush: Cell::new(false),
            steps_to_unwinding: Cell::new(None),
            violations: RefCell::new(Vec::new()),
        }
    }

    /// The machine.
    #[must_use]
    pub const fn options(&self) -> &Options {
        &self.options
    }

    /// A new address space; up to 16 of them.
    ///
    /// # Panics
    /// At the seventeenth.
    #[expect(unsafe_code, reason = "a root table is taken on trust")]
    pub fn new_mm(&self) -> &PaperMm {
        let free = self.mms.iter().find(|cell| cell.get().is_none()).expect("no more than 16 address spaces");
        // SAFETY: the root is a zeroed table of this kernel's memory, and the arena is never reset.
        free.get_or_init(|| Box::new(unsafe { Mm::new(&self.ids, self.new_table(), self.options.mode) }))
    }

    /// An address space of tables that are linked below `root` already.
    ///
    /// # Panics
    /// If there are 16 address spaces already.
    #[expect(unsafe_code, reason = "a root table is taken on trust")]
    pub fn adopt_mm(&self, root: PhysFrame) -> &PaperMm {
        let free = self.mms.iter().find(|cell| cell.get().is_none()).expect("no more than 16 address spaces");
        // SAFETY: the root is a table of this kernel's memory, and so is what it links; the arena
        // is never reset.
        free.get_or_init(|| Box::new(unsafe { Mm::adopt(self, &self.ids, root, self.options.mode) }))
    }

    /// The address space made as number `index`; hooks, which cannot borrow one, find it this way.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn mm(&self, index: usize) -> &PaperMm {
        self.mms[index].get().expect("made before")
    }

    pub(crate) fn mms(&self) -> impl Iterator<Item = &PaperMm> {
        self.mms.iter().filter_map(|cell| cell.get().map(|mm| &**mm))
    }

    /// Says how many tables can be had from now on.
    pub fn supply_tables(&self, supply: Supply) {
        *self.table_supply.borrow_mut() = supply;
    }

    /// Says how many batch pages can be had from now on.
    pub fn supply_batches(&self, supply: Supply) {
        *self.batch_supply.borrow_mut() = supply;
    }

    /// Batch pages that gathers hold now.
    #[must_use]
    pub const fn batches_lent(&self) -> u32 {
        self.batches_lent.get()
    }

    /// The counts of every page.
    pub fn ledger(&self) -> RefMut<'_, Ledger> {
        self.ledger.borrow_mut()
    }

    /// The CPU being played.
    #[must_use]
    pub const fn here(&self) -> CpuId {
        self.here.get()
    }

    /// Plays `cpu` while `f` runs.
    pub fn on<R>(&self, cpu: CpuId, f: impl FnOnce() -> R) -> R {
        let before = self.here.replace(cpu);
        let result = f();
        self.here.set(before);
        result
    }

    /// Every CPU of the machine.
    pub fn cpu_ids(&self) -> impl Iterator<Item = CpuId> + use<> {
        (0..self.options.cpus).map(CpuId::new)
    }

    pub(crate) fn cpu(&self, cpu: CpuId) -> &PaperCpu {
        &self.cpus[cpu.index()]
    }

    pub(crate) const fn kernel_root(&self) -> PhysFrame {
        self.kernel_root
    }

    pub(crate) fn table_supply(&self) -> RefMut<'_, Supply> {
        self.table_supply.borrow_mut()
    }

    pub(crate) fn batch_supply(&self) -> RefMut<'_, Supply> {
        self.batch_supply.borrow_mut()
    }

    #[expect(unsafe_code, reason = "lends a page of the arena")]
    pub(crate) fn lend_batch(&self) -> Option<BatchPage> {
        self.batches_lent.set(self.batches_lent.get() + 1);
        // SAFETY: a gather gives its pages back before the kernel goes.
        unsafe { self.batches.allocate() }
    }

    pub(crate) fn take_batch_back(&self, page: BatchPage) {
        self.batches_lent.set(self.batches_lent.get() - 1);
        self.batches.free(page);
    }

    pub(crate) fn new_table(&self) -> PhysFrame {
        let frame = table_in(&self.arena);
        self.tables.borrow_mut().insert(frame);
        frame
    }

    /// Tables that were allocated and not freed.
    #[must_use]
    pub fn is_live_table(&self, frame: PhysFrame) -> bool {
        self.tables.borrow().contains(&frame)
    }

    /// Takes `frame` out of the live tables; false if it was not one.
    pub(crate) fn forget_table(&self, frame: PhysFrame) -> bool {
        self.tables.borrow_mut().remove(&frame)
    }
}

impl Drop for PaperKernel {
    fn drop(&mut self) {
        let violations = self.violations.borrow();
        if !std::thread::panicking() {
            assert!(violations.is_empty(), "the engine broke its rules: {violations:#?}");
        }
    }
}

impl fmt::Debug for PaperKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PaperKernel").field("options", &self.options).finish_non_exhaustive()
    }
}

/// A zeroed table in `arena`; its frame number is its address.
fn table_in(arena: &Bump) -> PhysFrame {
    let page = TablePage { entries: [0; 512], lock: TableLock::new(()), used_lines: UsedLines::new() };
    let page: *mut TablePage = arena.alloc(page);
    let address = page.expose_provenance() as u64;
    PhysFrame::from_start_address(PhysAddr::new(address)).expect("a table page is aligned to 4096")
}
