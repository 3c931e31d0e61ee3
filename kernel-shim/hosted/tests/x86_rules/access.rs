//! Rights, the dirty flag and page faults. 4.6, 4.7, 4.8, 4.10.4.1, 4.10.4.3.

use mmu_hosted::arch::{LinearAddress, TableLevel};
use mmu_hosted::features::{Features, SettingDirty};
use mmu_hosted::mmu::{AccessKind, AccessMode, Fault, Source, Start};
use mmu_hosted::walk::Depth;
use mmu_hosted::watch::Tag;
use x86_64::registers::control::Cr4Flags;

use crate::rig::{A, D, G, P, PCID_ON, PWU, Rig, U, VA, W, XD, after, pcid};

/// Whether an access to a page with `flags` goes through, first by a walk and then by the TLB.
fn allowed(cr4: Cr4Flags, flags: u64, kind: AccessKind, mode: AccessMode) -> bool {
    let outcomes = [Depth::Structure(TableLevel::Pd), Depth::Page].map(|depth| {
        let mut rig = Rig::new(Features::INTEL, cr4);
        rig.map_page(VA, 7, flags | A | D);
        rig.speculate(VA, depth);
        rig.try_access(VA, kind, mode).is_ok()
    });
    assert_eq!(outcomes[0], outcomes[1], "walk and TLB entry disagree");
    outcomes[0]
}

#[test]
fn rights_decide_what_user_and_kernel_may_do() {
    use AccessKind::{Execute, Read, Write};
    use AccessMode::{Kernel, User};
    for (flags, user, kernel) in [
        (P, [false; 3], [true, false, true]),
        (P | W, [false; 3], [true; 3]),
        (P | U, [true, false, true], [true, false, true]),
        (P | U | XD, [true, false, false], [true, false, false]),
        (PWU, [true; 3], [true; 3]),
        (PWU | XD, [true, true, false], [true, true, false]),
    ] {
        for (place, kind) in [Read, Write, Execute].into_iter().enumerate() {
            assert_eq!(allowed(PCID_ON, flags, kind, User), user[place], "{flags:#x} {kind:?} user");
            assert_eq!(allowed(PCID_ON, flags, kind, Kernel), kernel[place], "{flags:#x} {kind:?} kernel");
        }
    }
}

#[test]
fn smep_and_smap_keep_the_kernel_from_user_pages() {
    use AccessKind::{Execute, Read, Write};
    let smep = PCID_ON | Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION;
    let smap = PCID_ON | Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION;
    for (cr4, kernel) in [(smep, [true, true, false]), (smap, [false, false, true])] {
        for (place, kind) in [Read, Write, Execute].into_iter().enumerate() {
            assert_eq!(allowed(cr4, PWU, kind, AccessMode::Kernel), kernel[place], "{cr4:?} {kind:?}");
            assert!(allowed(cr4, PWU, kind, AccessMode::User));
            assert!(allowed(cr4, P | W, kind, AccessMode::Kernel));
        }
    }
}

#[test]
fn an_address_that_is_not_canonical_never_translates() {
    let mut rig = Rig::intel();
    for address in [0x0000_8000_0000_0000, 0xffff_7fff_ffff_ffff, 0x00ab_1234_5678_9000] {
        let address = LinearAddress::new(address);
        assert_eq!(rig.user(address, AccessKind::Read), Err(Fault::NonCanonical(address)));
    }
}

#[test]
fn a_store_sets_the_dirty_flag_once() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, PWU);
    rig.read(VA);
    assert_eq!(rig.ram.peek(leaf) & D, 0);
    rig.write(VA);
    assert_eq!(rig.ram.peek(leaf) & D, D);
    rig.ram.take_reads();
    rig.write(VA);
    assert_eq!(rig.ram.take_reads(), 0);
}

#[test]
fn a_store_through_a_clean_entry_walks_again_and_sees_that_the_page_is_gone() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, PWU);
    rig.read(VA);
    rig.ram.poke(leaf, 0);
    assert_eq!(rig.read(VA), 7, "a load is served by the stale entry");
    let fault = rig.fault(VA, AccessKind::Write);
    assert_eq!(fault.code.bits(), 0b110, "W/R and U/S, not P");
    assert_eq!(rig.ram.peek(leaf), 0);
}

#[test]
fn a_store_through_a_clean_entry_takes_the_new_translation() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, PWU);
    rig.read(VA);
    rig.ram.poke(leaf, (8 << 12) | PWU);
    assert_eq!(rig.write(VA), 8);
    assert_eq!(rig.read(VA), 8, "the old entry is displaced");
}

#[test]
fn the_dirty_flag_may_be_set_below_a_stale_structure_entry() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, PWU);
    rig.read(VA);
    rig.ram.poke(rig.slot(TableLevel::Pml4, VA), 0);
    assert_eq!(rig.write(VA), 7);
    assert_eq!(rig.ram.peek(leaf) & D, D);
}

#[test]
fn a_store_through_a_dirty_entry_looks_at_nothing() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, PWU);
    rig.write(VA);
    rig.ram.poke(leaf, 0);
    assert_eq!(rig.write(VA), 7);
    assert_eq!(rig.ram.peek(leaf), 0);
}

#[test]
fn a_dirty_flag_cleared_without_a_flush_stays_clear() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, PWU);
    rig.write(VA);
    rig.ram.poke(leaf, rig.ram.peek(leaf) & !D);
    rig.write(VA);
    assert_eq!(rig.ram.peek(leaf) & D, 0, "the store left no trace");
    rig.invlpg(VA);
    rig.write(VA);
    assert_eq!(rig.ram.peek(leaf) & D, D);
}

#[test]
fn an_entry_found_dirty_in_memory_is_cached_dirty() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, PWU | D);
    rig.speculate(VA, Depth::Page);
    rig.ram.poke(leaf, 0);
    assert_eq!(rig.write(VA), 7);
}

#[test]
fn a_page_fault_drops_what_was_cached_for_its_address() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, P | U);
    let next = after(VA, 0x1000);
    let far = after(VA, 1 << 39);
    rig.map_page(next, 8, P | U);
    rig.map_page(far, 9, P | U);
    rig.read(VA);
    rig.read(next);
    rig.read(far);
    let fault = rig.fault(VA, AccessKind::Write);
    assert_eq!((fault.code.bits(), fault.source), (0b111, Source::Tlb(Tag::Pcid(pcid(0)))));
    assert!(!rig.in_tlb(VA));
    assert_eq!(rig.deepest(VA), None, "its path too");
    assert!(rig.in_tlb(next), "another page stays");
    assert_eq!(rig.deepest(far), Some(TableLevel::Pd), "another path stays");
    rig.ram.poke(leaf, 0);
    rig.fault(VA, AccessKind::Read);
}

#[test]
fn a_page_fault_drops_a_global_entry_too() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, P | U | G);
    rig.read(VA);
    rig.ram.poke(leaf, (7 << 12) | PWU | G);
    assert_eq!(rig.fault(VA, AccessKind::Write).source, Source::Tlb(Tag::Global));
    assert_eq!(rig.write(VA), 7);
}

#[test]
fn more_rights_without_a_flush_cost_at_most_one_spurious_fault() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, P | U);
    rig.read(VA);
    rig.ram.poke(leaf, (7 << 12) | PWU);
    let fault = rig.fault(VA, AccessKind::Write);
    assert!(fault.source.was_cached());
    assert_eq!(rig.write(VA), 7);
    // The same for a right that was missing in a structure entry.
    let mut rig = Rig::intel();
    rig.map_page(VA, 7, PWU);
    let pde = rig.slot(TableLevel::Pd, VA);
    rig.ram.poke(pde, rig.ram.peek(pde) & !U);
    rig.speculate(VA, Depth::Structure(TableLevel::Pd));
    rig.ram.poke(pde, rig.ram.peek(pde) | U);
    let fault = rig.fault(VA, AccessKind::Read);
    assert!(matches!(fault.source, Source::Walk { start: Start::Structure(TableLevel::Pd), .. }));
    assert_eq!(rig.read(VA), 7);
}

#[test]
fn an_amd_fault_is_confirmed_by_a_walk_from_cr3() {
    let mut rig = Rig::amd();
    let leaf = rig.map_page(VA, 7, P | U);
    rig.read(VA);
    rig.ram.poke(leaf, (7 << 12) | PWU);
    assert_eq!(rig.write(VA), 7, "no spurious fault from the TLB");
    let pde = rig.slot(TableLevel::Pd, VA);
    let old_table = rig.ram.peek(pde);
    rig.invlpg(VA);
    rig.speculate(VA, Depth::Structure(TableLevel::Pd));
    rig.ram.poke(leaf, 0);
    rig.ram.poke(pde, 0);
    rig.map_page(VA, 8, PWU);
    assert_ne!(rig.ram.peek(pde), old_table);
    assert_eq!(rig.read(VA), 8, "no spurious fault from a structure cache");
    rig.ram.poke(pde, 0);
    rig.invlpg(VA);
    let fault = rig.fault(VA, AccessKind::Read);
    assert!(!fault.source.was_cached());
}

#[test]
fn a_fault_says_what_was_tried() {
    let mut rig = Rig::intel();
    let bits = |fault: Result<_, Fault>| match fault {
        Err(Fault::Page(fault)) => fault.code.bits(),
        other => panic!("expected a page fault, got {other:?}"),
    };
    assert_eq!(bits(rig.try_access(VA, AccessKind::Read, AccessMode::Kernel)), 0);
    assert_eq!(bits(rig.try_access(VA, AccessKind::Read, AccessMode::User)), 0b100);
    assert_eq!(bits(rig.try_access(VA, AccessKind::Write, AccessMode::User)), 0b110);
    assert_eq!(bits(rig.try_access(VA, AccessKind::Execute, AccessMode::User)), 0b1_0100);
    rig.map_page(VA, 7, P | XD);
    assert_eq!(bits(rig.try_access(VA, AccessKind::Write, AccessMode::Kernel)), 0b011);
    assert_eq!(bits(rig.try_access(VA, AccessKind::Execute, AccessMode::User)), 0b1_0101);
}

/// A CPU that asks nothing but whether an entry is present before it sets D in it.
const UNCHECKED: Features = Features { dirty: SettingDirty::Unchecked, ..Features::INTEL };

#[test]
fn a_store_through_a_clean_entry_meets_the_rights_of_now_where_there_are_shadow_stacks() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, PWU);
    rig.read(VA);
    rig.ram.poke(leaf, rig.ram.peek(leaf) & !W);
    let fault = rig.fault(VA, AccessKind::Write);
    assert_eq!(fault.code.bits(), 0b111, "P, W/R and U/S");
    assert_eq!(rig.ram.peek(leaf) & D, 0);
}

#[test]
fn a_store_through_a_clean_entry_may_set_the_dirty_flag_of_one_that_is_read_only_by_now() {
    let mut rig = Rig::new(UNCHECKED, PCID_ON);
    let leaf = rig.map_page(VA, 7, PWU);
    rig.read(VA);
    rig.ram.poke(leaf, rig.ram.peek(leaf) & !W);
    assert_eq!(rig.write(VA), 7);
    assert_eq!(rig.ram.peek(leaf) & (W | D), D);
    // From now on the cached entry is dirty: a store looks at nothing, until it is flushed.
    rig.ram.poke(leaf, 0);
    assert_eq!(rig.write(VA), 7);
    rig.invlpg(VA);
    assert_eq!(rig.fault(VA, AccessKind::Write).code.bits(), 0b110, "W/R and U/S, not P");
}

#[test]
fn the_dirty_flag_is_set_unchecked_in_no_entry_that_is_gone_or_leads_elsewhere_or_was_never_cached() {
    for (found, cached) in [(0, true), ((8 << 12) | P | U | A, true), ((7 << 12) | P | U | A, false)] {
        let mut rig = Rig::new(UNCHECKED, PCID_ON);
        let leaf = rig.map_page(VA, 7, PWU);
        if cached {
            rig.read(VA);
        }
        rig.ram.poke(leaf, found);
        rig.fault(VA, AccessKind::Write);
        assert_eq!(rig.ram.peek(leaf), found);
    }
    // Gone between the look at it and the locked update.
    let mut rig = Rig::new(UNCHECKED, PCID_ON);
    let leaf = rig.map_page(VA, 7, PWU);
    rig.read(VA);
    rig.ram.poke(leaf, rig.ram.peek(leaf) & !W);
    rig.ram.store_before_update.set(Some((leaf, 0)));
    rig.fault(VA, AccessKind::Write);
    assert_eq!(rig.ram.peek(leaf), 0);
}
