//! What is noted of the lines of tables is no more than it must be, or walks of sparse memory would
//! look at lines for nothing. (That it is no less is rule P4, which the checker holds every run
//! to.)

use std::sync::Arc;

use mmu_adapter::{HostedKernel, HostedMm, Touched, boot, touch};
use mmu_gather::pagetable::{Level, VirtRange};
use mmu_hosted::{HostedMachine, Options};
use mmu_kernel_shim::{Area, Config, PageContent, UserAccess, Vma};

/// The first address of a PMD table.
const START: u64 = 0x7000_0000_0000;
const MIB: u64 = 1 << 20;

fn range(start: u64, len_bytes: u64) -> VirtRange {
    VirtRange::new(START + start, START + start + len_bytes).expect("a good range")
}

fn kernel() -> (Arc<HostedKernel>, Arc<HostedMm>) {
    let machine = Arc::new(HostedMachine::new(Options::new(1, 8192, 1)).expect("a small machine"));
    let kernel = boot(&machine, Config::default()).expect("it has frames");
    let mm = kernel.new_mm().expect("it has frames");
    kernel.switch_to(Some(&mm));
    (kernel, mm)
}

fn map(kernel: &HostedKernel, mm: &HostedMm, range: VirtRange) {
    kernel.mmap(mm, Vma { range, area: Area::anon() }).expect("nothing is there");
}

/// How many lines are noted of the table of `level` for an address.
#[expect(unsafe_code, reason = "reads page tables while nothing changes them")]
fn nr_noted(kernel: &HostedKernel, mm: &HostedMm, address: u64, level: Level) -> usize {
    // SAFETY: nothing else runs, so no table is freed meanwhile.
    let table = unsafe { mm.engine().space().find_table(kernel, address, level) }.expect("linked");
    table.used_lines(kernel).into_iter().len()
}

#[test]
fn a_table_in_the_frame_of_another_begins_without_lines() {
    let (kernel, mm) = kernel();
    let full = range(0, 2 * MIB);
    map(&kernel, &mm, full);
    kernel.populate(&mm, full, PageContent::Anon).expect("it has frames");
    // Page by page, none of which is a line: all stay noted, until the table goes.
    for page in 0..512 {
        assert_eq!(nr_noted(&kernel, &mm, START, Level::Pte), 64);
        kernel.munmap(&mm, range(page * 4096, 4096)).expect("no large page");
    }
    assert_eq!(mm.nr_tables(), [0, 0, 0], "all are free, to be given out next");

    // Page after page takes them: one line on each level.
    for place in [0, 1 << 30, 1 << 39] {
        let page = range(place, 4096);
        map(&kernel, &mm, page);
        assert_eq!(touch(&kernel, &mm, page.start(), UserAccess::Write), Touched::Reached);
        for level in [Level::Pte, Level::Pmd] {
            assert_eq!(nr_noted(&kernel, &mm, page.start(), level), 1, "{level:?} table at {page}");
        }
    }
}

#[test]
fn the_line_of_tables_that_went_is_forgotten() {
    let (kernel, mm) = kernel();
    // Tables in three lines of one PMD table, two in the last.
    let pages = [range(0, 4096), range(100 * MIB, 4096), range(200 * MIB, 4096), range(202 * MIB, 4096)];
    for page in pages {
        map(&kernel, &mm, page);
        assert_eq!(touch(&kernel, &mm, page.start(), UserAccess::Write), Touched::Reached);
    }
    let mut noted = vec![nr_noted(&kernel, &mm, START, Level::Pmd)];
    for page in &pages[..3] {
        kernel.munmap(&mm, *page).expect("no large page");
        noted.push(nr_noted(&kernel, &mm, START, Level::Pmd));
    }
    assert_eq!(noted, [3, 2, 1, 1]);
}

#[test]
fn a_kernel_that_runs_as_its_first_variant_notes_no_lines() {
    let options = Options { variants: [true, false], ..Options::new(1, 8192, 1) };
    let machine = Arc::new(HostedMachine::new(options).expect("a small machine"));
    let kernel = boot(&machine, Config::default()).expect("it has frames");
    let mm = kernel.new_mm().expect("it has frames");
    kernel.switch_to(Some(&mm));
    map(&kernel, &mm, range(0, 4096));
    assert_eq!(touch(&kernel, &mm, START, UserAccess::Write), Touched::Reached);
    // All of them may hold entries.
    assert_eq!(nr_noted(&kernel, &mm, START, Level::Pte), 64);
    kernel.munmap(&mm, range(0, 4096)).expect("no large page");
    assert_eq!(mm.nr_tables(), [0, 0, 0]);
}
