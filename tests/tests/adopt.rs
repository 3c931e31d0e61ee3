//! Tables that others have linked: a root that is filled already, and the `x86_64` crate's mapper.
#![expect(unsafe_code, reason = "tables are lent to the mapper, and entries written by hand")]

use mmu_gather::Limits;
use mmu_gather::pagetable::adapters::MapperTables;
use mmu_gather::pagetable::{Bounds, EntryValue, Level, PagingMode, TableMemory, TableView};
use mmu_tests::{
    Access, Backing, CPU, GIB, LineNotes, MIB, Options, PaperKernel, PaperMm, Supply, TIB, area,
};
use x86_64::VirtAddr;
use x86_64::structures::paging::mapper::{MapperFlush, PageTableFrameMapping};
use x86_64::structures::paging::{
    FrameAllocator, MappedPageTable, Mapper, Page, PageTableFlags, PhysFrame, Size4KiB,
};

const PAGE: u64 = 4096;
const FLAGS: PageTableFlags =
    PageTableFlags::PRESENT.union(PageTableFlags::WRITABLE).union(PageTableFlags::USER_ACCESSIBLE);

struct Tables<'k>(&'k PaperKernel);

// SAFETY: a table comes out of the kernel's memory once, and is known to nobody else.
unsafe impl FrameAllocator<Size4KiB> for Tables<'_> {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        self.0.allocate_table()
    }
}

/// Maps a new page at each address with the mapper of the `x86_64` crate.
fn fill(kernel: &PaperKernel, root: PhysFrame, addresses: &[u64]) {
    for address in addresses {
        let frame = kernel.ledger().new_page(PAGE);
        kernel.ledger().add_mapping(frame);
        map_with_mapper(kernel, root, *address, frame, &mut Tables(kernel)).expect("room");
    }
}

fn map_with_mapper(
    kernel: &PaperKernel,
    root: PhysFrame,
    address: u64,
    frame: PhysFrame,
    tables: &mut impl FrameAllocator<Size4KiB>,
) -> Option<()> {
    let page = Page::<Size4KiB>::containing_address(VirtAddr::new(address));
    // SAFETY: the root is a table as long as the kernel lives, and nobody else uses it meanwhile.
    let table = unsafe { &mut *kernel.frame_to_pointer(root) };
    // SAFETY: every entry of the tables leads to a frame of the kernel's memory.
    let mut mapper = unsafe { MappedPageTable::new(table, kernel) };
    // SAFETY: the page is new.
    let mapped = unsafe { mapper.map_to_with_table_flags(page, frame, FLAGS, FLAGS, tables) };
    mapped.map(MapperFlush::ignore).ok()
}

/// A table of the root's level, with an entry in the kernel's half that leads nowhere.
fn root_with_a_kernel_half(kernel: &PaperKernel) -> PhysFrame {
    let root = kernel.allocate_table().expect("unlimited");
    // SAFETY: nobody else knows the table yet.
    let view = unsafe { TableView::new(kernel, root, Level::P4d) };
    let nowhere = PhysFrame::from_start_address(x86_64::PhysAddr::new(0x1000)).expect("aligned");
    // SAFETY: as above; no CPU uses an address of the kernel's half.
    unsafe { view.table().entry(300).store(EntryValue::table(nowhere)) };
    root
}

#[test]
fn tables_that_were_linked_before_are_counted_and_their_used_lines_noted() {
    let kernel = PaperKernel::new(Options::default());
    let root = root_with_a_kernel_half(&kernel);
    let pages = [0x1000, 17 * PAGE, 300 * PAGE, 2 * MIB, 5 * GIB, TIB, (128 * TIB) - PAGE];
    fill(&kernel, root, &pages);
    let mm = kernel.adopt_mm(root);
    assert_eq!(kernel.nr_tables(mm), [5, 4, 3, 0]);
    assert_eq!(kernel.tables_with_unnoted_entries(mm), []);
    let table = kernel.find_table(mm, 0, Level::Pte).expect("linked");
    assert_eq!(table.used_lines(&kernel).into_iter().len(), 3, "and no other line");

    // From here on it is an address space like any other.
    kernel.run(CPU[1], mm);
    for page in pages {
        kernel.touch(CPU[1], page, Access::Write).expect("mapped");
    }
    let all = area(0, 128 * TIB, Backing::Anonymous);
    kernel.unmap(mm, &Limits::DEFAULT, &[all], Bounds::whole());
    assert_eq!(kernel.nr_tables(mm), [0; 4]);
    assert_eq!(kernel.tables(mm), []);
    assert_eq!(kernel.ledger().nr_held(), 0);
}

#[test]
fn five_levels_are_counted_too() {
    let kernel = PaperKernel::new(Options { mode: PagingMode::FiveLevel, ..Options::default() });
    let before = kernel.new_mm();
    for page in [GIB, 200 * TIB, 300 * TIB] {
        kernel.map(before, page, Level::Pte);
    }
    let mm = kernel.adopt_mm(before.space().root());
    assert_eq!(kernel.nr_tables(mm), [3, 3, 3, 2]);
    assert_eq!(kernel.nr_tables(mm), kernel.nr_tables(before));
}

/// Low memory, mapped in both address spaces by the same tables, and not theirs to give up.
fn spaces_that_share_low_memory(kernel: &PaperKernel) -> [&PaperMm; 2] {
    let boot = kernel.new_mm();
    for page in [0, MIB] {
        kernel.map(boot, page, Level::Pte);
    }
    // SAFETY: one thread, which frees no table.
    let low = unsafe { boot.space().root_table(kernel) }.load(0);
    [(); 2].map(|()| {
        let root = root_with_a_kernel_half(kernel);
        // SAFETY: nobody else knows the table yet.
        let view = unsafe { TableView::new(kernel, root, Level::P4d) };
        // SAFETY: as above; what is linked is never unhooked.
        unsafe { view.table().entry(0).store(low) };
        kernel.adopt_mm(root)
    })
}

#[test]
fn what_stays_in_the_lower_half_and_is_shared_is_kept_by_the_bounds() {
    let kernel = PaperKernel::new(Options::default());
    let floor = Bounds::between(Some(512 * GIB), None);
    let [first, second] = spaces_that_share_low_memory(&kernel);
    let vma = area(TIB, TIB + 4 * PAGE, Backing::Anonymous);
    for mm in [first, second] {
        assert_eq!(kernel.nr_tables(mm), [1, 1, 1, 0], "those that it shares");
        kernel.map_range(mm, vma.range);
        kernel.run(CPU[1], mm);
        kernel.touch(CPU[1], TIB, Access::Write).expect("mapped");
    }
    kernel.unmap(first, &Limits::DEFAULT, &[vma], floor);
    kernel.stop(CPU[1]);
    kernel.exit_within(second, &[vma], floor);
    for mm in [first, second] {
        assert_eq!(kernel.nr_tables(mm), [1, 1, 1, 0]);
        assert!(kernel.lookup(mm, MIB).value.is_present(), "low memory is there");
    }
    // The two pages of low memory.
    assert_eq!(kernel.ledger().nr_held(), 2);
}

#[test]
fn what_stays_in_a_table_that_areas_use_too_keeps_that_table() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map(mm, 0, Level::Pte);
    let vma = area(GIB, GIB + 4 * PAGE, Backing::Anonymous);
    kernel.map_range(mm, vma.range);
    kernel.exit_within(mm, &[vma], Bounds::between(Some(GIB), None));
    assert_eq!(kernel.nr_tables(mm), [1, 1, 1, 0]);
    assert!(kernel.lookup(mm, 0).value.is_present());
}

/// A debug build names it, and a release build goes on from zero.
#[test]
#[cfg_attr(debug_assertions, should_panic(expected = "others have linked tables here"))]
fn tables_that_others_linked_and_nobody_counted_are_named_and_the_count_does_not_wrap() {
    let kernel = PaperKernel::new(Options { line_notes: LineNotes::NotKept, ..Options::default() });
    let mm = kernel.new_mm();
    fill(&kernel, mm.space().root(), &[GIB]);
    let vma = area(GIB, GIB + PAGE, Backing::Anonymous);
    kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
    assert_eq!(kernel.nr_tables(mm), [0; 4]);
    kernel.map(mm, GIB, Level::Pte);
    assert_eq!(kernel.nr_tables(mm), [1, 1, 1, 0]);
}

#[test]
fn tables_lent_to_the_mapper_are_counted_however_far_it_comes() {
    for supply in 0..4 {
        let kernel = PaperKernel::new(Options { line_notes: LineNotes::NotKept, ..Options::default() });
        let mm = kernel.new_mm();
        let map = |address: u64| {
            let frame = kernel.ledger().new_page(PAGE);
            // SAFETY: one thread stands in for the map lock; the mapper maps that address.
            let mut tables = unsafe { MapperTables::new(&kernel, mm.space(), address) };
            let root = mm.space().root();
            map_with_mapper(&kernel, root, address, frame, &mut tables)
                .map(|()| kernel.ledger().add_mapping(frame))
        };
        kernel.supply_tables(Supply::Left(supply));
        assert_eq!(map(GIB).is_some(), supply == 3);
        assert_eq!(kernel.nr_tables(mm).iter().sum::<u64>(), u64::from(supply));
        let counted = kernel.nr_tables(mm);
        let at = |level| kernel.tables(mm).iter().filter(|(found, _)| *found == level).count() as u64;
        assert_eq!(counted, [Level::Pte, Level::Pmd, Level::Pud, Level::P4d].map(at), "{supply} tables");
        kernel.supply_tables(Supply::Unlimited);
        map(GIB + 2 * MIB).expect("room");
        map(GIB + 2 * MIB + PAGE).expect("room");
        map(2 * GIB).expect("room");
        assert_eq!(kernel.nr_tables(mm)[1..], [2, 1, 0]);
        let all = area(0, TIB, Backing::Anonymous);
        kernel.unmap(mm, &Limits::DEFAULT, &[all], Bounds::whole());
        assert_eq!(kernel.nr_tables(mm), [0; 4]);
    }
}
