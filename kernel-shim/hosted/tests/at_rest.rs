//! What is compared of any kernel while nothing is going on.

use mmu_gather::tlb::CachedTranslations;
use mmu_hosted::{FrameRole, HostedMachine, Options, UserAccess, ViolationKind};
use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

const PAGE: u64 = 0x5000;
const USER: PageTableFlags = PageTableFlags::PRESENT.union(PageTableFlags::USER_ACCESSIBLE);
const WRITE: PageTableFlags = USER.union(PageTableFlags::WRITABLE);

/// A machine whose CPU 0 runs a program that has written to the page at [`PAGE`], by tables in the
/// frames 2 to 5.
struct Rig {
    machine: HostedMachine,
    root: PhysFrame,
}

fn frame(number: u64) -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new(number << 12))
}

impl Rig {
    fn new() -> Self {
        let machine = HostedMachine::new(Options::new(1, 64, 1)).expect("a small machine");
        let rig = Self { machine, root: frame(2) };
        for (table, next) in [(2, 3), (3, 4), (4, 5)] {
            rig.set(table, 0, next, WRITE);
        }
        rig.set(5, 5, 6, WRITE);
        for number in 2..6 {
            rig.machine.allocated(frame(number), FrameRole::Table);
        }
        rig.machine.allocated(frame(6), FrameRole::Page);
        rig.machine.load_cr3(rig.root, Pcid::new(1).expect("below 4096"), CachedTranslations::Flush);
        rig.machine.enter_user_mode();
        rig.machine.user_access(PAGE, UserAccess::Write).expect("it is mapped");
        rig
    }

    /// Writes an entry.
    fn set(&self, table: u64, index: usize, leads_to: u64, flags: PageTableFlags) {
        let table = self.machine.frame_to_pointer(frame(table));
        // SAFETY: the frame is in the memory of the machine, which nobody else uses.
        let table = unsafe { &mut *table };
        table[index].set_addr(PhysAddr::new(leads_to << 12), flags);
    }

    fn found(&self) -> Vec<ViolationKind> {
        self.machine.compare_caches_with_tables(&[self.root]);
        self.machine.compare_tables_with_frames(&[self.root]);
        self.machine.violations().told.iter().map(|violation| violation.kind).collect()
    }
}

#[test]
fn caches_that_say_what_the_tables_say_are_right() {
    assert_eq!(Rig::new().found(), []);
}

#[test]
fn a_change_that_was_not_flushed_is_found_and_one_that_was_is_not() {
    let accessed = PageTableFlags::ACCESSED;
    let dirty = accessed | PageTableFlags::DIRTY;
    for (leads_to, flags) in
        [(0, PageTableFlags::empty()), (7, WRITE | dirty), (6, USER | dirty), (6, WRITE | accessed)]
    {
        let rig = Rig::new();
        rig.set(5, 5, leads_to, flags);
        assert_eq!(rig.found(), [ViolationKind::StaleAtRest], "{flags:?}");

        let rig = Rig::new();
        rig.set(5, 5, leads_to, flags);
        rig.machine.invlpg(PAGE);
        assert_eq!(rig.found(), [], "{flags:?}");
    }
}

#[test]
fn a_table_that_was_unhooked_and_not_flushed_for_is_found() {
    for (table, below) in [(4, 5), (3, 4), (2, 3)] {
        let rig = Rig::new();
        rig.set(table, 0, 0, PageTableFlags::empty());
        assert_eq!(rig.found(), [ViolationKind::StaleAtRest], "table {below}");
    }
}

#[test]
fn rights_that_a_table_above_takes_away_are_not_there() {
    let rig = Rig::new();
    rig.set(4, 0, 5, USER | PageTableFlags::ACCESSED);
    assert_eq!(rig.found(), [ViolationKind::StaleAtRest]);
}

#[test]
fn a_cpu_that_runs_no_program_may_keep_what_it_has() {
    let rig = Rig::new();
    rig.set(5, 5, 0, PageTableFlags::empty());
    rig.machine.leave_user_mode();
    assert_eq!(rig.found(), []);
}

#[test]
fn an_entry_that_leads_to_a_free_frame_is_found() {
    let rig = Rig::new();
    rig.machine.leave_user_mode();
    rig.machine.invlpg(PAGE);
    rig.machine.freed(frame(6), FrameRole::Page);
    assert_eq!(rig.found(), [ViolationKind::FreePageMapped]);
}

#[test]
fn a_table_that_was_replaced_and_not_flushed_for_is_found() {
    let rig = Rig::new();
    let used = WRITE | PageTableFlags::ACCESSED;
    // Another table, in which the page is the same.
    rig.set(8, 5, 6, used | PageTableFlags::DIRTY);
    rig.set(4, 0, 8, used);
    assert_eq!(rig.found(), [ViolationKind::StaleAtRest]);
}

/// Each root has a copy of the kernel half, in which hardware sets A bits of its own.
#[test]
fn a_root_is_freed_with_the_kernel_half_in_it_and_with_nothing_else() {
    let kernel_half = PageTableFlags::PRESENT | PageTableFlags::WRITABLE;
    for (index, leads_to, flags, found) in [
        (256, 10, kernel_half | PageTableFlags::ACCESSED, vec![]),
        (511, 11, kernel_half, vec![ViolationKind::TableFreedInUse]),
        (256, 12, kernel_half, vec![ViolationKind::TableFreedInUse]),
        (255, 10, kernel_half, vec![ViolationKind::TableFreedInUse]),
    ] {
        let rig = Rig::new();
        // What the CPU has loaded when the kernel has booted is the kernel's own root.
        rig.set(2, 256, 10, kernel_half);
        rig.machine.note_booted();
        rig.machine.leave_user_mode();
        rig.machine.allocated(frame(9), FrameRole::Table);
        rig.set(9, index, leads_to, flags);
        rig.machine.freed(frame(9), FrameRole::Table);
        assert_eq!(rig.found(), found, "entry {index} leads to {leads_to}");
    }
}
