//! Entries that are kept: not present, and not empty. Each kind is cleared or kept as the kernel
//! says, and none needs a flush.

use mmu_gather::Limits;
use mmu_gather::pagetable::{Bounds, Decoded, EntryValue, Level, Marker, MigrationAccess, NonPresent};
use mmu_tests::{Access, Backing, CPU, Event, Fault, GIB, MIB, Options, PaperKernel, area, range};
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

const PAGE: u64 = 4096;

fn every_kind() -> [NonPresent; 7] {
    let frame = PhysFrame::containing_address(PhysAddr::new(0xabc_d000));
    [
        NonPresent::Swap { device: 3, slot: 0x1234 },
        NonPresent::Swap { device: 0, slot: 0 },
        NonPresent::Migration { frame, access: MigrationAccess::Writable },
        NonPresent::Migration { frame, access: MigrationAccess::ReadOnly },
        NonPresent::Marker(Marker::Poison),
        NonPresent::Marker(Marker::Guard),
        NonPresent::Other(0x7ff0_0000_0000_0800),
    ]
}

#[test]
fn the_kernel_is_asked_about_every_kind_and_none_is_flushed_for() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.run(CPU[1], mm);
    for (page, meaning) in (0u64..).zip(every_kind()) {
        kernel.put_non_present(mm, GIB + page * PAGE, Level::Pte, meaning);
    }
    kernel.take_events();
    let vma = area(GIB, GIB + 16 * PAGE, Backing::Anonymous);
    kernel.zap(mm, &vma, vma.range).free();
    for (page, meaning) in (0u64..).zip(every_kind()) {
        let address = GIB + page * PAGE;
        let met = Event::NonPresentMet { address, level: Level::Pte, entry: meaning };
        assert_eq!(kernel.count(|event| *event == met), 1, "{meaning:?}");
        // This kernel keeps guards, and nothing else.
        let left = kernel.lookup(mm, address).value;
        let kept =
            if meaning == NonPresent::Marker(Marker::Guard) { meaning.encode() } else { EntryValue::EMPTY };
        assert_eq!(left, kept, "{meaning:?}");
    }
    assert_eq!(
        kernel.count(|event| matches!(event, Event::Ipi { .. } | Event::Invlpg { .. } | Event::Cr3 { .. })),
        0
    );
    assert_eq!(mm.context().tlb_gen().get(), 0, "no flush was asked for at all");
}

#[test]
fn entries_of_every_kind_among_pages_do_not_disturb_the_pages() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.run(CPU[1], mm);
    for (step, meaning) in (0u64..).zip(every_kind()) {
        let address = GIB + step * 3 * PAGE;
        kernel.map(mm, address, Level::Pte);
        kernel.touch(CPU[1], address, Access::Write).expect("mapped");
        kernel.put_non_present(mm, address + PAGE, Level::Pte, meaning);
    }
    let vma = area(GIB, GIB + MIB, Backing::Anonymous);
    kernel.zap(mm, &vma, vma.range).free();
    assert_eq!(kernel.ledger().nr_held(), 0);
    for step in 0..7 {
        assert_eq!(kernel.touch(CPU[1], GIB + step * 3 * PAGE, Access::Read), Err(Fault::NotPresent));
    }
}

/// If every entry were taken for either empty or present, a table with kept entries would leak, or
/// be freed with them.
#[test]
fn a_table_that_held_only_meanings_goes_with_its_area() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.put_non_present(mm, GIB, Level::Pte, NonPresent::Swap { device: 1, slot: 1 });
    kernel.put_non_present(mm, GIB + 2 * MIB, Level::Pte, NonPresent::Marker(Marker::Poison));
    let vma = area(GIB, GIB + 4 * MIB, Backing::Anonymous);
    kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
    assert_eq!(kernel.nr_tables(mm), [0; 4]);
}

#[test]
fn a_meaning_in_place_of_a_large_page_is_asked_about_at_its_level() {
    for level in [Level::Pmd, Level::Pud] {
        let kernel = PaperKernel::new(Options::default());
        let mm = kernel.new_mm();
        let frame = PhysFrame::containing_address(PhysAddr::new(GIB));
        let entry = NonPresent::Migration { frame, access: MigrationAccess::Writable };
        kernel.put_non_present(mm, GIB, level, entry);
        let vma = area(GIB, GIB + level.entry_span(), Backing::Anonymous);
        kernel.zap(mm, &vma, vma.range).free();
        assert_eq!(
            kernel.count(|event| *event == Event::NonPresentMet { address: GIB, level, entry }),
            1,
            "{level:?}"
        );
        assert!(kernel.lookup(mm, GIB).value.is_empty());
        kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
        assert_eq!(kernel.nr_tables(mm), [0; 4]);
    }
}

/// L1 terminal fault: a CPU that speculates past P = 0 must find no memory at the address the bits
/// seem to name.
#[test]
fn no_meaning_looks_like_the_address_of_memory() {
    for meaning in every_kind() {
        let value = meaning.encode();
        assert!(!value.is_present() && !value.is_empty(), "{meaning:?}");
        assert_eq!(value.decode(Level::Pte), Decoded::NonPresent(meaning));
        if !matches!(meaning, NonPresent::Other(_)) {
            assert!(value.leaf_address(Level::Pte).as_u64() > 1 << 46, "{meaning:?} names {value:?}");
        }
    }
}

#[test]
fn a_guard_in_the_area_above_is_not_met() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map(mm, GIB, Level::Pte);
    kernel.put_non_present(mm, GIB + PAGE, Level::Pte, NonPresent::Marker(Marker::Guard));
    let vma = area(GIB, GIB + PAGE, Backing::Anonymous);
    kernel.zap(mm, &vma, range(GIB, GIB + 2 * PAGE)).free();
    assert_eq!(kernel.count(|event| matches!(event, Event::NonPresentMet { .. })), 0);
}
