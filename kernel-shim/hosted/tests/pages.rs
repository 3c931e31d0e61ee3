//! What is checked of a page when it changes hands: discarded, one program's own, mapped by nobody.

use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::{CachedTranslations, Laziness};
use mmu_hosted::{Content, FrameRole, HostedMachine, Note, Options, UserAccess, ViolationKind};
use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

const PAGE: u64 = 0x5000;
const OTHER: u64 = 0x6000;
const WRITE: PageTableFlags =
    PageTableFlags::PRESENT.union(PageTableFlags::USER_ACCESSIBLE).union(PageTableFlags::WRITABLE);

/// A machine whose CPU has tables in the frames 2 to 5, and a page in frame 6 at [`PAGE`].
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
        for (table, index, next) in [(2, 0, 3), (3, 0, 4), (4, 0, 5), (5, 5, 6)] {
            let table = rig.machine.frame_to_pointer(frame(table));
            // SAFETY: the frame is in the memory of the machine, which nobody else uses.
            let table = unsafe { &mut *table };
            table[index].set_addr(PhysAddr::new(next << 12), WRITE);
        }
        for number in 2..6 {
            rig.machine.allocated(frame(number), FrameRole::Table);
        }
        rig.machine.allocated(frame(6), FrameRole::Page);
        rig.machine.load_cr3(rig.root, Pcid::new(1).expect("below 4096"), CachedTranslations::Flush);
        rig
    }

    fn maps(&self) {
        self.machine.note(Note::Mapped { root: self.root, address: PAGE, frame: frame(6) });
    }

    /// A program writes to the page; then the CPU is back in the kernel.
    fn writes(&self) {
        self.machine.enter_user_mode();
        self.machine.user_access(PAGE, UserAccess::Write).expect("it is mapped");
        self.machine.leave_user_mode();
    }

    fn found_after(&self, note: Note) -> Vec<ViolationKind> {
        self.machine.note(note);
        self.machine.violations().told.iter().map(|violation| violation.kind).collect()
    }
}

#[test]
fn a_page_that_a_discard_has_left_is_told_where_the_kernel_says_what_it_maps() {
    let range = VirtRange::new(0x1000, 0x20_0000).expect("a good range");
    let discarded =
        |rig: &Rig, since| Note::Discarded { root: rig.root, range, since, caller: Laziness::Lazy };
    let rig = Rig::new();
    rig.maps();
    let since = rig.machine.moment();
    assert_eq!(rig.found_after(discarded(&rig, since)), [ViolationKind::PageLeftByDiscard]);

    let rig = Rig::new();
    let since = rig.machine.moment();
    rig.maps();
    assert_eq!(rig.found_after(discarded(&rig, since)), [], "a fault came meanwhile");

    let rig = Rig::new();
    let since = rig.machine.moment();
    assert_eq!(rig.found_after(discarded(&rig, since)), [], "it is not known when it was mapped");
}

#[test]
fn a_write_that_nobody_knows_of_at_writeback_is_lost_and_is_told_once_a_write() {
    let rig = Rig::new();
    let clean = Note::MappedByNobody(frame(6), Content::Clean);
    assert_eq!(rig.found_after(clean), [], "nobody wrote");
    rig.writes();
    assert_eq!(rig.found_after(Note::MappedByNobody(frame(6), Content::Dirty)), []);
    assert_eq!(rig.found_after(clean), [], "it was written back");
    rig.machine.invlpg(PAGE);
    rig.writes();
    rig.machine.invlpg(PAGE);
    assert_eq!(rig.found_after(clean), [ViolationKind::WriteLost]);
}

#[test]
fn a_page_is_one_programs_own_when_no_cpu_that_may_use_it_has_it_cached_for_another() {
    let owned = |root, address| Note::OwnedAlone { root, address, frame: frame(6) };
    for (root, address, is_wrong) in
        [(frame(2), PAGE, false), (frame(2), OTHER, true), (frame(9), PAGE, true)]
    {
        let rig = Rig::new();
        rig.writes();
        assert_eq!(rig.found_after(owned(root, address)), [], "the kernel does not say whom it runs");
        rig.machine.note(Note::Runs(Laziness::Lazy));
        assert_eq!(rig.found_after(owned(root, address)), [], "a lazy CPU uses no user address");
        rig.machine.note(Note::Runs(Laziness::Active));
        let wanted = if is_wrong { vec![ViolationKind::OwnedThoughCached] } else { vec![] };
        assert_eq!(rig.found_after(owned(root, address)), wanted, "{root:?} {address:#x}");
    }
}
