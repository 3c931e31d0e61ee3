//! Other crates on the same tables: `x86_64` and `page_table_multiarch`.
#![expect(unsafe_code, reason = "both crates free frames on trust")]

use core::marker::PhantomData;
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

use memory_addr::{PhysAddr as AxPhysAddr, VirtAddr as AxVirtAddr};
use mmu_gather::pagetable::{Level, VirtRange};
use page_table_entry::x86_64::X64PTE;
use page_table_multiarch::{PageTable64, PageTable64Cursor, PagingHandler, PagingMetaData};
use x86_64::structures::paging::mapper::{CleanUp, OffsetPageTable};
use x86_64::structures::paging::{FrameDeallocator, Mapper, Page, PageSize, PhysFrame, Size2MiB, Size4KiB};
use x86_64::{PhysAddr, VirtAddr};

use crate::machine::{Batched, Counting, Machine};
use crate::memory::{Memory, PHYS_OFFSET, pointer};
use crate::shape::Shape;
use crate::space::{self, Space};

/// What a crate that works page by page is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// The areas: it tries each page of them.
    Areas,
    /// Which pages exist.
    Pages,
}

/// Whether tables that have become empty are looked for and freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tables {
    /// After each area.
    Freed,
    /// Left where they are.
    Kept,
}

#[inline]
fn release(memory: &Memory, physical: u64) {
    if Batched::released(memory.frame(physical)) {
        memory.free_page(physical);
    }
}

/// A crate that is called page by page, and whatever it does after an area.
trait PageByPage {
    fn page(&mut self, address: u64);
    fn area(&mut self, range: VirtRange);
}

/// Calls `peer` for the address of every page that may be mapped, and after each area.
///
/// The loops are functions of their own, and the calls are inlined into each: a peer is measured as its best user would call it,
/// not through a function that two loops share (41 instructions a page more).
#[inline(always)]
fn for_each(shape: &Shape, told: Told, peer: &mut impl PageByPage) {
    match told {
        Told::Pages => for_each_leaf(shape, peer),
        Told::Areas => for_each_address(shape, peer),
    }
}

#[inline(never)]
fn for_each_leaf(shape: &Shape, peer: &mut impl PageByPage) {
    for leaf in &shape.leaves {
        peer.page(leaf.address);
    }
    for range in &shape.areas {
        peer.area(*range);
    }
}

#[inline(never)]
fn for_each_address(shape: &Shape, peer: &mut impl PageByPage) {
    let step = shape.level.entry_span();
    for range in &shape.areas {
        let mut address = range.start();
        while address < range.end() {
            peer.page(address);
            address += step;
        }
        peer.area(*range);
    }
}

struct Deallocator<'m>(&'m Memory);

impl FrameDeallocator<Size4KiB> for Deallocator<'_> {
    #[inline]
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame<Size4KiB>) {
        self.0.free_table(frame.start_address().as_u64());
    }
}

/// `OffsetPageTable::unmap` for each page, the flush ignored, then `clean_up_addr_range` for each area.
#[inline(never)]
pub fn x86_64<C: Counting>(machine: &Machine<'_, C>, space: &Space<'_>, told: Told, tables: Tables) {
    match space.shape.level {
        Level::Pte => unmap_with_x86_64::<Size4KiB, C>(machine, space, told, tables, |_| {}),
        _ => unmap_with_x86_64::<Size2MiB, C>(machine, space, told, tables, |_| {}),
    }
}

/// As [`x86_64()`], paying for an interrupt to `others` CPUs before each page is freed: its flush is a page's.
#[inline(never)]
pub fn x86_64_flushing<C: Counting>(
    machine: &Machine<'_, C>,
    space: &Space<'_>,
    told: Told,
    tables: Tables,
    others: u32,
) {
    let pay = |machine: &Machine<'_, C>| machine.pay_for_flush(others);
    match space.shape.level {
        Level::Pte => unmap_with_x86_64::<Size4KiB, C>(machine, space, told, tables, pay),
        _ => unmap_with_x86_64::<Size2MiB, C>(machine, space, told, tables, pay),
    }
}

struct ByX86_64<'a, 'm, C: Counting, S, F> {
    machine: &'a Machine<'m, C>,
    table: OffsetPageTable<'a>,
    tables: Tables,
    /// What a page costs before it is freed.
    pay: F,
    size: PhantomData<S>,
}

impl<C: Counting, S: PageSize, F: Fn(&Machine<'_, C>)> PageByPage for ByX86_64<'_, '_, C, S, F>
where
    for<'t> OffsetPageTable<'t>: Mapper<S>,
{
    #[inline(always)]
    fn page(&mut self, address: u64) {
        let page = Page::<S>::containing_address(VirtAddr::new(address));
        if let Ok((frame, flush)) = self.table.unmap(page) {
            flush.ignore();
            (self.pay)(self.machine);
            release(self.machine.memory(), frame.start_address().as_u64());
        }
    }

    #[inline(always)]
    fn area(&mut self, range: VirtRange) {
        if self.tables == Tables::Freed {
            let first = Page::<Size4KiB>::containing_address(VirtAddr::new(range.start()));
            let last = Page::<Size4KiB>::containing_address(VirtAddr::new(range.end() - 1));
            let mut deallocator = Deallocator(self.machine.memory());
            let pages = Page::range_inclusive(first, last);
            // SAFETY: the tables came from this memory, and nobody else uses them.
            unsafe { self.table.clean_up_addr_range(pages, &mut deallocator) };
        }
    }
}

#[inline(always)]
fn unmap_with_x86_64<S: PageSize, C: Counting>(
    machine: &Machine<'_, C>,
    space: &Space<'_>,
    told: Told,
    tables: Tables,
    pay: impl Fn(&Machine<'_, C>),
) where
    for<'t> OffsetPageTable<'t>: Mapper<S>,
{
    let root = pointer(space.mm.space().root().start_address().as_u64());
    // SAFETY: the root of a space that this thread alone uses while a peer runs.
    let root = unsafe { &mut *root };
    // SAFETY: all tables are mapped at this offset.
    let table = unsafe { OffsetPageTable::new(root, VirtAddr::new(PHYS_OFFSET)) };
    let mut peer = ByX86_64 { machine, table, tables, pay, size: PhantomData::<S> };
    for_each(space.shape, told, &mut peer);
}

/// Where `page_table_multiarch` gets and frees frames; its hooks are functions without a receiver.
static CURRENT: AtomicPtr<Memory> = AtomicPtr::new(ptr::null_mut());

fn current<'m>() -> &'m Memory {
    let memory = CURRENT.load(Ordering::Relaxed);
    assert!(!memory.is_null(), "a Multiarch lives while its page table does");
    // SAFETY: `Multiarch::new` stored it from a reference that outlives the page table, the only caller of the hooks, on
    // the same thread (`Memory` is not `Sync`, and a `Multiarch` holds a reference to it).
    unsafe { &*memory }
}

struct FourLevels;
struct Hooks;

impl PagingMetaData for FourLevels {
    const LEVELS: usize = 4;
    const PA_MAX_BITS: usize = 52;
    const VA_MAX_BITS: usize = 48;
    type VirtAddr = AxVirtAddr;
    // Only called when the target has no operating system.
    fn flush_tlb(_address: Option<AxVirtAddr>) {}
}

impl PagingHandler for Hooks {
    fn alloc_frames(_num: usize, _align: usize) -> Option<AxPhysAddr> {
        let table = current().allocate_table()?;
        Some(AxPhysAddr::from_usize(to_usize(table.start_address().as_u64())))
    }
    fn dealloc_frames(address: AxPhysAddr, _num: usize) {
        current().free_table(address.as_usize() as u64);
    }
    #[inline]
    fn phys_to_virt(address: AxPhysAddr) -> AxVirtAddr {
        AxVirtAddr::from_usize(to_usize(PHYS_OFFSET) + address.as_usize())
    }
}

#[expect(clippy::cast_possible_truncation, reason = "x86_64: usize has 64 bits")]
const fn to_usize(number: u64) -> usize {
    number as usize
}

/// A space whose root belongs to `page_table_multiarch`.
pub struct Multiarch<'m, 's> {
    /// The space.
    pub space: Space<'s>,
    memory: &'m Memory,
    table: Table,
}

impl core::fmt::Debug for Multiarch<'_, '_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Multiarch").field("root", &self.table.root_paddr()).finish_non_exhaustive()
    }
}

type Table = PageTable64<FourLevels, X64PTE, Hooks>;

/// One cursor for many pages.
struct ByCursor<'a, 'm> {
    cursor: PageTable64Cursor<'a, FourLevels, X64PTE, Hooks>,
    memory: &'m Memory,
}

impl PageByPage for ByCursor<'_, '_> {
    #[inline(always)]
    fn page(&mut self, address: u64) {
        if let Ok((frame, _, _)) = self.cursor.unmap(AxVirtAddr::from_usize(to_usize(address))) {
            release(self.memory, frame.as_usize() as u64);
        }
    }

    fn area(&mut self, _range: VirtRange) {}
}

/// A cursor a call.
#[inline(never)]
fn for_each_call(shape: &Shape, table: &mut Table, memory: &Memory) {
    for range in &shape.areas {
        let mut peer = ByCursor { cursor: table.cursor(), memory };
        let mut address = range.start();
        while address < range.end() {
            peer.page(address);
            address += shape.level.entry_span();
        }
    }
}

impl<'m, 's> Multiarch<'m, 's> {
    /// Maps `shape` below a root that the crate allocates.
    ///
    /// # Panics
    /// If memory is short.
    #[must_use]
    pub fn new<C: Counting>(machine: &Machine<'m, C>, shape: &'s Shape) -> Self {
        space::reset(machine, shape);
        let memory = machine.memory();
        CURRENT.store(ptr::from_ref(memory).cast_mut(), Ordering::Relaxed);
        let table = PageTable64::try_new().expect("memory was just reset");
        let root = PhysFrame::containing_address(PhysAddr::new(table.root_paddr().as_usize() as u64));
        Self { space: Space::below(machine, shape, root), memory, table }
    }

    /// `cursor().unmap` for each page, with one cursor for all where one call is for all: its flush is not compiled in here.
    #[inline(never)]
    pub fn unmap(&mut self, told: Told) {
        let (shape, memory) = (self.space.shape, self.memory);
        if shape.is_one_by_one() {
            for_each_call(shape, &mut self.table, memory);
        } else {
            for_each(shape, told, &mut ByCursor { cursor: self.table.cursor(), memory });
        }
    }

    /// Drops the page table, the only way it frees tables; the space that is left can only be checked.
    #[inline(never)]
    #[must_use]
    pub fn drop_tables(self) -> Space<'s> {
        drop(self.table);
        self.space
    }
}
