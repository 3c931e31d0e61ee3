//! What a call may do under the map lock: the checker holds it to what it says when it takes the
//! lock.

use mmu_gather::GatherEvent;
use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::{CpuId, Laziness};
use mmu_hosted::{FrameRole, HostedMachine, Note, Options, UnderMapLock, ViolationKind};
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

/// What is found on a machine that is told all of this; besides that the frames which are freed
/// were never given out.
fn found(notes: &[Note]) -> Vec<ViolationKind> {
    let machine = machine();
    notes.iter().for_each(|note| machine.note(*note));
    let found = machine.violations();
    let kinds = found.told.iter().map(|violation| violation.kind);
    kinds.filter(|kind| *kind != ViolationKind::FreedTwice).collect()
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
