//! What a call may do under the map lock: the checker holds it to what it says when it takes the
//! lock.

use std::sync::Arc;

use mmu_gather::GatherEvent;
use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::{CpuId, Laziness};
use mmu_hosted::{HostedMachine, Options, ViolationKind, boot};
use mmu_kernel_shim::{Area, Config, FrameRole, Machine, Note, PageContent, Protection, UnderMapLock, Vma};
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

const ROOT: u64 = 0x5000;
const PAGE: u64 = 0x7000_0000_0000;

fn frame(start: u64) -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new(start))
}

fn machine() -> HostedMachine {
    HostedMachine::new(Options::new(2, 64, 1)).expect("a small machine")
}

/// What is found on a machine that is told all of this.
fn found(notes: &[Note]) -> Vec<ViolationKind> {
    let machine = machine();
    notes.iter().for_each(|note| machine.note(*note));
    machine.violations().told.iter().map(|violation| violation.kind).collect()
}

fn locked(most: UnderMapLock) -> Note {
    Note::MapLocked { root: frame(ROOT), most }
}

const fn gather(event: GatherEvent) -> Note {
    Note::Gather(event)
}

fn unlocked() -> Note {
    Note::MapUnlocked { root: frame(ROOT) }
}

fn unmapped() -> Note {
    let range = VirtRange::new(PAGE, PAGE + 4096).expect("a good range");
    Note::Unmapped { root: frame(ROOT), range, caller: Laziness::Active }
}

fn freed(role: FrameRole) -> Note {
    Note::Freed(frame(0x9000), role)
}

const UNDER_THE_LOCK: [ViolationKind; 1] = [ViolationKind::FreedUnderMapLock];

#[test]
fn a_call_that_frees_after_the_map_lock_cannot_free_a_page_or_a_table_under_it() {
    for most in [UnderMapLock::WaitsForNobody, UnderMapLock::Flushes, UnderMapLock::FreesEarly] {
        for role in [FrameRole::Page, FrameRole::Block, FrameRole::Table] {
            assert_eq!(found(&[locked(most), freed(role), unlocked()]), UNDER_THE_LOCK, "{most:?} {role:?}");
            assert_eq!(found(&[locked(most), unlocked(), freed(role)]), [], "{most:?} {role:?}");
        }
    }
}

#[test]
fn a_call_that_frees_under_the_map_lock_can() {
    assert_eq!(found(&[locked(UnderMapLock::Frees), freed(FrameRole::Page), unlocked()]), []);
}

#[test]
fn a_downgrade_changes_what_a_call_can_do() {
    let page = freed(FrameRole::Page);
    let (flushes, frees) = (locked(UnderMapLock::Flushes), locked(UnderMapLock::Frees));
    assert_eq!(found(&[flushes, frees, page, unlocked()]), []);
    assert_eq!(found(&[frees, flushes, page, unlocked()]), UNDER_THE_LOCK);
    assert_eq!(found(&[frees, flushes, unlocked(), page]), [], "one unlock ends both");
}

#[test]
fn a_call_can_free_early_until_it_has_freed_what_its_gather_held() {
    let page = freed(FrameRole::Page);
    let early = [GatherEvent::ForcedFlush, GatherEvent::TableFallback, GatherEvent::DirtyFlush];
    for early in early.map(gather) {
        let lock = locked(UnderMapLock::FreesEarly);
        assert_eq!(found(&[lock, early, page]), []);
        assert_eq!(found(&[lock, early, gather(GatherEvent::NestedFlush), page]), []);
        assert_eq!(found(&[lock, early, gather(GatherEvent::LockDropped { leaves: 1 }), page]), []);
        let released = gather(GatherEvent::Released { slots: 1, tables: 0 });
        assert_eq!(found(&[lock, early, released, page]), UNDER_THE_LOCK);
        assert_eq!(found(&[lock, early, unmapped(), page]), UNDER_THE_LOCK, "its last flush is over");
        assert_eq!(found(&[locked(UnderMapLock::Flushes), early, page]), UNDER_THE_LOCK);
    }
}

#[test]
fn a_table_that_nobody_has_seen_can_be_given_back_under_the_map_lock_once() {
    let lock = locked(UnderMapLock::Flushes);
    let taken = Note::Allocated(frame(0x9000), FrameRole::Table);
    let given_back = freed(FrameRole::Table);
    assert_eq!(found(&[lock, taken, given_back, unlocked()]), []);
    assert_eq!(found(&[lock, taken, given_back, given_back]), UNDER_THE_LOCK);
    assert_eq!(found(&[lock, taken, unlocked(), lock, given_back]), UNDER_THE_LOCK);
}

#[test]
fn a_call_that_flushes_after_the_map_lock_cannot_wait_for_others_under_it() {
    for (most, expected) in [
        (UnderMapLock::WaitsForNobody, &[ViolationKind::WaitedUnderMapLock][..]),
        (UnderMapLock::Flushes, &[]),
        (UnderMapLock::FreesEarly, &[]),
        (UnderMapLock::Frees, &[]),
    ] {
        let machine = machine();
        machine.note(locked(most));
        machine.note(Note::Asked(CpuId::new(1)));
        let kinds: Vec<_> = machine.violations().told.iter().map(|violation| violation.kind).collect();
        assert_eq!(kinds, expected, "{most:?}");
    }
}

#[test]
fn every_call_of_the_small_kernel_keeps_to_its_row() {
    const NR_PAGES: u64 = 64;
    let machine = Arc::new(HostedMachine::new(Options::new(2, 8192, 1)).expect("a small machine"));
    let kernel = boot(&machine, Config::default()).expect("it has frames");
    let mm = kernel.new_mm().expect("frames");
    for cpu in 0..2 {
        machine.on_cpu(CpuId::new(cpu), || kernel.switch_to(Some(&mm)));
    }
    let range = VirtRange::new(PAGE, PAGE + NR_PAGES * 4096).expect("a good range");
    let lower = VirtRange::new(PAGE - (4 << 20), PAGE - (4 << 20) + NR_PAGES * 4096).expect("a good range");
    let filled = |range| {
        kernel.mmap(&mm, Vma { range, area: Area::anon() }).expect("nothing is there");
        kernel.populate(&mm, range, PageContent::Anon).expect("frames");
    };
    filled(range);
    kernel.mprotect(&mm, range, Protection::Read).expect("no split");
    kernel.madvise_dontneed(&mm, range).expect("no split");
    kernel.munmap(&mm, range).expect("no split");
    filled(range);
    kernel.mremap(&mm, range, lower).expect("it fits");
    kernel.guard_install(&mm, lower).expect("it is private");
    kernel.guard_remove(&mm, lower).expect("it is private");
    kernel.populate(&mm, lower, PageContent::Anon).expect("frames");
    assert_eq!(kernel.reclaim([(&*mm, lower)]), NR_PAGES);
    kernel.move_stack(&mm, lower, 16 * 4096).expect("nothing is in the way");
    let child = kernel.fork(&mm, []).expect("frames");
    kernel.exit(&child).expect("nobody runs there");
    for cpu in 0..2 {
        machine.on_cpu(CpuId::new(cpu), || kernel.switch_to(None));
    }
    kernel.exit(&mm).expect("everybody has left");
    let found = machine.violations();
    assert_eq!(found.count, 0, "{}", found.told[0]);
}
