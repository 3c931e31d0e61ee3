//! Rules P1 to P4, each by its sentence.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use std::time::Instant;

use mmu_gather::pagetable::{Bounds, Entry, EntryValue, Level, Line, Marker, NonPresent};
use mmu_gather::{GatherEvent, Limits};
use mmu_tests::{
    Backing, CPU, Event, GIB, GatherOnPaper, LineNotes, MIB, Options, PaperKernel, TIB, area, range,
};
use x86_64::PhysAddr;
use x86_64::structures::paging::PageTableFlags;

const PAGE: u64 = 4096;

/// A page walker that sets the dirty bit of whatever is mapped, and notes in which round it did.
fn walker(entry: &Entry, done: &AtomicBool, marked: &[AtomicU64]) {
    while !done.load(Ordering::Relaxed) {
        let found = entry.load();
        if found.is_present() && !found.is_dirty() {
            let dirty = EntryValue::from_bits(found.bits() | PageTableFlags::DIRTY.bits());
            // SAFETY: what hardware does, in one step.
            if unsafe { entry.compare_exchange(found, dirty) }.is_ok() {
                let round = usize::try_from(found.leaf_address(Level::Pte).as_u64() >> 12).expect("small");
                marked[round].store(1, Ordering::Relaxed);
            }
        }
    }
}

/// Maps and clears while a walker sets dirty bits; returns how often one was seen. Panics if one
/// was set and lost.
fn play_against_a_walker(entry: &Entry) -> usize {
    const ROUNDS: u64 = 100_000;
    let (begun, done) = (AtomicBool::new(false), AtomicBool::new(false));
    let marked: Vec<AtomicU64> = (0..ROUNDS).map(|_| AtomicU64::new(0)).collect();
    let mut seen = vec![0; marked.len()];
    std::thread::scope(|threads| {
        threads.spawn(|| {
            begun.store(true, Ordering::Relaxed);
            walker(entry, &done, &marked);
        });
        while !begun.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        for (round, seen) in (0..ROUNDS).zip(&mut seen) {
            let leaf = EntryValue::leaf(Level::Pte, PhysAddr::new(round << 12), PageTableFlags::WRITABLE);
            // SAFETY: the entry is in no table that anybody walks, but for the thread above.
            unsafe { entry.store(leaf) };
            for _ in 0..round % 16 {
                core::hint::spin_loop();
            }
            // SAFETY: as above.
            *seen = u64::from(unsafe { entry.get_and_clear() }.is_dirty());
        }
        done.store(true, Ordering::Relaxed);
    });
    let marked: Vec<u64> = marked.iter().map(|mark| mark.load(Ordering::Relaxed)).collect();
    assert!(marked == seen, "a dirty bit was set and then lost");
    seen.iter().filter(|mark| **mark == 1).count()
}

#[test]
fn p1_an_entry_is_only_read_or_written_atomically_hardware_may_set_a_d_bits_at_any_time() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.map(mm, GIB, Level::Pte);
    let view = kernel.find_table(mm, GIB, Level::Pte).expect("linked");
    // On a busy machine the two may not meet for a while.
    let begun = Instant::now();
    let mut met = 0;
    while met < 10_000 && begun.elapsed() < Duration::from_secs(10) {
        met += play_against_a_walker(view.table().entry(7));
    }
    assert!(met > 0, "the two never met");
}

#[test]
fn p2_a_table_page_reachable_from_a_root_is_never_freed_or_reused_it_is_first_unhooked_under_the_lock_of_its_parent_entry()
 {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let vma = area(GIB, GIB + 6 * MIB, Backing::Anonymous);
    for address in [GIB, GIB + 2 * MIB, GIB + 4 * MIB] {
        kernel.map(mm, address, Level::Pte);
    }
    kernel.zap(mm, &vma, vma.range).free();
    let pmd = kernel.find_table(mm, GIB, Level::Pmd).expect("linked").frame();
    let tables = kernel.tables(mm);
    // When the parent's lock is asked for, the first table is still linked; when the table is
    // reported, it is not.
    let is_linked = |kernel: &PaperKernel| kernel.lookup(kernel.mm(0), GIB).level == Level::Pte;
    kernel.once(
        move |event| *event == Event::LockAsked(pmd),
        move |kernel| assert!(is_linked(kernel), "unhooked without the parent's lock"),
    );
    kernel.once(
        |event| *event == Event::Gather(GatherEvent::TableUnhooked(Level::Pte)),
        move |kernel| {
            assert!(!is_linked(kernel));
            assert!(!kernel.is_locked_now(), "no lock is held while it is queued");
        },
    );
    kernel.take_events();
    kernel.unmap(mm, &Limits::DEFAULT, &[vma], Bounds::whole());
    assert_eq!(kernel.nr_hooks_waiting(), 0);

    let events = kernel.take_events();
    let at = |wanted: Event| events.iter().position(|noted| noted.event == wanted).expect("it happened");
    for (level, table) in tables {
        let unhooked = at(Event::Gather(GatherEvent::TableUnhooked(level)));
        assert!(unhooked < at(Event::TableFreed(table)), "{level:?}");
        assert!(!kernel.is_live_table(table));
    }
    // When the kernel is dropped, the checker says whether a freed table was reachable.
}

#[test]
fn p3_table_lifetime_is_decided_by_vmas_floor_and_ceiling_never_by_guess() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let (first, second) = (range(GIB, GIB + PAGE), range(GIB + 8 * PAGE, GIB + 9 * PAGE));
    let [low, high] = [first, second].map(|range| area(range.start(), range.end(), Backing::Anonymous));
    kernel.map_range(mm, first);
    // The second area has no page yet, so the table looks unused once the first area is unmapped.
    // It must stay.
    kernel.unmap(mm, &Limits::DEFAULT, &[low], Bounds::between(None, Some(second.start())));
    assert_eq!(kernel.nr_tables(mm), [1, 1, 1, 0]);
    kernel.map_range(mm, second);
    kernel.zap(mm, &high, second).free();
    assert_eq!(kernel.nr_tables(mm), [1, 1, 1, 0], "an empty table stays while its area does");
    kernel.unmap(mm, &Limits::DEFAULT, &[high], Bounds::whole());
    assert_eq!(kernel.nr_tables(mm), [0; 4]);

    // A neighbour that is a whole table away keeps the tables above, and only those.
    kernel.run(CPU[1], mm);
    for at in [TIB, TIB + GIB] {
        kernel.map(mm, at, Level::Pte);
    }
    let gone = area(TIB + GIB, TIB + GIB + PAGE, Backing::Anonymous);
    kernel.unmap(mm, &Limits::DEFAULT, &[gone], Bounds::between(Some(TIB + PAGE), None));
    assert_eq!(kernel.nr_tables(mm), [1, 1, 1, 0]);
    assert!(kernel.lookup(mm, TIB).value.is_present());
}

#[test]
fn p3_table_lifetime_is_decided_by_all_512_entries_empty_under_both_locks() {
    for line_notes in [LineNotes::Kept, LineNotes::NotKept] {
        let kernel = PaperKernel::new(Options { line_notes, ..Options::default() });
        let mm = kernel.new_mm();
        kernel.map(mm, GIB, Level::Pte);
        kernel.map(mm, GIB + 2 * MIB, Level::Pte);
        let [pte, pmd] =
            [Level::Pte, Level::Pmd].map(|level| kernel.find_table(mm, GIB, level).expect("linked").frame());
        let vma = area(GIB, GIB + 4 * MIB, Backing::Anonymous);
        kernel.zap(mm, &vma, vma.range).free();
        let unhook = || {
            let mut gather = kernel.gather(mm);
            gather.unhook_empty_tables(range(GIB, GIB + PAGE));
            gather.flush().free();
        };
        // Somebody who works his way down by locks puts an entry into the last one, just before the
        // lock of the table is taken; its parent's is held by then. The table looked empty.
        for index in [0, 100, 511] {
            kernel.once(
                move |event| *event == Event::LockAsked(pte),
                move |kernel| {
                    assert!(kernel.is_locked_now(), "the parent's lock comes first");
                    let _page = kernel.map(kernel.mm(0), GIB + index * PAGE, Level::Pte);
                },
            );
            unhook();
            assert_eq!(kernel.nr_hooks_waiting(), 0, "both locks are taken");
            assert_eq!(kernel.nr_tables(mm), [2, 1, 1, 0], "with an entry at {index}");
            assert!(kernel.lookup(mm, GIB + index * PAGE).value.is_present());
            kernel.zap(mm, &vma, range(GIB, GIB + 2 * MIB)).free();
        }
        kernel.take_events();
        unhook();
        assert_eq!(kernel.nr_tables(mm), [1, 1, 1, 0]);
        let asked = kernel.take_events().into_iter().filter_map(|noted| match noted.event {
            Event::LockAsked(table) => Some(table),
            _ => None,
        });
        assert_eq!(asked.collect::<Vec<_>>(), [pmd, pte], "the table above is not empty: no lock is needed");
    }
}

#[test]
fn p4_where_a_kernel_notes_the_used_lines_of_its_tables_the_line_of_every_entry_that_is_not_empty_is_noted() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let holds = |when: &str| assert_eq!(kernel.tables_with_unnoted_entries(mm), [], "{when}");
    let used_lines = |address: u64| {
        let table = kernel.find_table(mm, address, Level::Pte).expect("linked");
        table.used_lines(&kernel).into_iter().map(Line::first_entry).collect::<Vec<_>>()
    };
    let vma = area(GIB, GIB + 4 * MIB, Backing::Anonymous);
    for page in [0, 7, 8, 300, 511, 512, 700] {
        kernel.map(mm, GIB + page * PAGE, Level::Pte);
    }
    holds("after mapping");
    assert_eq!(used_lines(GIB), [0, 8, 296, 504]);

    // A line whose other pages stay is still noted. A line that the range covers and leaves empty
    // is not noted any more.
    kernel.zap(mm, &vma, range(GIB + 7 * PAGE, GIB + 304 * PAGE)).free();
    holds("after pages went");
    assert_eq!(used_lines(GIB), [0, 504]);

    // An entry that is kept keeps its line noted.
    kernel.put_non_present(mm, GIB + 100 * PAGE, Level::Pte, NonPresent::Marker(Marker::Guard));
    kernel.zap(mm, &vma, vma.range).free();
    holds("after all pages went");
    assert!(used_lines(GIB).contains(&96));
    assert_ne!(kernel.lookup(mm, GIB + 100 * PAGE).value, EntryValue::EMPTY);
    let table = kernel.find_table(mm, GIB, Level::Pte).expect("linked");
    // SAFETY: a marker maps nothing.
    unsafe { table.lock(&kernel).entry(GIB + 100 * PAGE).store(EntryValue::EMPTY) };
    kernel.zap(mm, &vma, vma.range).free();
    assert!(used_lines(GIB).is_empty());

    // Moved entries are noted where they arrive, and no longer where they were.
    kernel.map(mm, GIB + 600 * PAGE, Level::Pte);
    let mut gather = kernel.gather(mm);
    gather.move_pages(range(GIB + 600 * PAGE, GIB + 601 * PAGE), GIB + 200 * PAGE).expect("room");
    gather.flush().free();
    holds("after a move");
    assert!(used_lines(GIB).contains(&200) && used_lines(GIB + 2 * MIB).is_empty());

    // A table that takes a large leaf's place is full at once.
    let large = area(TIB, TIB + 2 * MIB, Backing::Anonymous);
    kernel.map(mm, TIB, Level::Pmd);
    let mut gather = kernel.gather(mm);
    gather.split(large.area, TIB + 17 * PAGE).expect("memory");
    gather.flush().free();
    holds("after a split");
    assert_eq!(used_lines(TIB).len(), 64);

    kernel.unmap(mm, &Limits::DEFAULT, &[vma, large], Bounds::whole());
    assert_eq!(kernel.nr_tables(mm), [0; 4]);
}

/// A kernel that writes entries itself and does not note the line: such entries would be passed
/// over, and lost with their table.
#[cfg(debug_assertions)]
#[test]
fn entries_written_past_the_notes_of_used_lines_are_named_by_a_debug_build() {
    use core::panic::AssertUnwindSafe;
    use std::panic::catch_unwind;
    // In the last level, and above it, beside a leaf or beside a table, where its table's lock is
    // taken or not.
    let cases = [(Level::Pte, Level::Pte), (Level::Pmd, Level::Pmd), (Level::Pmd, Level::Pte)];
    for ((level, beside), exits) in cases.into_iter().flat_map(|case| [(case, false), (case, true)]) {
        let kernel = PaperKernel::new(Options::default());
        let mm = kernel.new_mm();
        let _table = kernel.map(mm, GIB, beside);
        let address = GIB + 100 * level.entry_span();
        let frame = kernel.ledger().new_page(level.entry_span());
        let table = kernel.find_table(mm, address, level).expect("linked");
        let value = EntryValue::leaf(level, frame.start_address(), PageTableFlags::USER_ACCESSIBLE);
        // SAFETY: the entry is empty, and no program runs.
        unsafe { table.table().entry(level.index(address)).store(value) };
        let start = if beside == level { GIB } else { GIB + level.entry_span() };
        let vma = area(start, GIB + level.table_span(), Backing::Anonymous);
        let panic = catch_unwind(AssertUnwindSafe(|| {
            if exits {
                kernel.exit(mm, &Limits::DEFAULT, &[vma]);
            } else {
                kernel.zap(mm, &vma, vma.range).free();
            }
        }));
        let said = panic.expect_err("it must be named").downcast::<String>().expect("a text");
        assert!(said.starts_with("P4: ") && said.contains("TableMemory::used_lines"), "{said}");
        kernel.take_violations();
    }
}
