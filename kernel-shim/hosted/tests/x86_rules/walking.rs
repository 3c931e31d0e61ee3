//! Walks: where they start, what may happen between their reads, and what ends them. 4.10.3.2,
//! 4.10.4.3.

use mmu_hosted::arch::TableLevel;
use mmu_hosted::features::Features;
use mmu_hosted::invalidate::Cr3Load;
use mmu_hosted::mmu::{AccessKind, AccessMode, Begun, Mmu, Source, Start};
use mmu_hosted::walk::{Depth, Speculation, Step, Walk};

use crate::rig::{A, Counts, D, P, PCID_ON, PWU, Rig, VA, after, frame};

impl Rig {
    fn begin(&mut self, kind: AccessKind) -> Walk {
        match self.mmu.begin_access(VA, kind, AccessMode::User, &mut self.counts) {
            Ok(Begun::Walk(walk)) => walk,
            other => panic!("expected a walk, got {other:?}"),
        }
    }

    fn step(&mut self, walk: &mut Walk) -> Step {
        self.mmu.step(walk, &self.ram, &mut self.counts)
    }
}

#[test]
fn a_walk_may_start_from_the_deepest_cached_level() {
    for (level, reads) in [(TableLevel::Pml4, 3), (TableLevel::Pdpt, 2), (TableLevel::Pd, 1)] {
        let mut rig = Rig::intel();
        rig.map_page(VA, 7, PWU);
        rig.speculate(VA, Depth::Structure(level));
        // Clearing the PML4E alone stops nothing.
        rig.ram.poke(rig.slot(TableLevel::Pml4, VA), 0);
        rig.ram.take_reads();
        let access = rig.user(VA, AccessKind::Read).expect("the cached levels lead there");
        assert_eq!(rig.ram.take_reads(), reads);
        assert!(matches!(access.source, Source::Walk { start: Start::Structure(from), .. } if from == level));
        assert!(access.source.was_cached());
    }
}

#[test]
fn a_walk_reads_one_entry_at_a_time_top_down() {
    let mut rig = Rig::intel();
    rig.map_page(VA, 7, PWU);
    let mut walk = rig.begin(AccessKind::Read);
    for level in [TableLevel::Pml4, TableLevel::Pdpt, TableLevel::Pd] {
        assert_eq!(walk.level(), level);
        assert_eq!(rig.step(&mut walk), Step::Continue);
        assert_eq!(rig.ram.take_reads(), 1);
    }
    assert_eq!(walk.level(), TableLevel::Pt);
    assert!(matches!(rig.step(&mut walk), Step::Translated(_)));
}

#[test]
fn stores_may_come_between_the_reads_of_a_walk() {
    // The PML4E is read, then the whole path is replaced: the walk ends in a mix of both that never
    // existed at once.
    let mut rig = Rig::intel();
    rig.map_page(VA, 7, PWU);
    let old_pdpte = rig.slot(TableLevel::Pdpt, VA);
    let mut walk = rig.begin(AccessKind::Read);
    assert_eq!(rig.step(&mut walk), Step::Continue);
    rig.ram.poke(rig.slot(TableLevel::Pml4, VA), 0);
    rig.map_page(VA, 8, PWU);
    assert_ne!(rig.slot(TableLevel::Pdpt, VA), old_pdpte);
    let end = loop {
        match rig.step(&mut walk) {
            Step::Continue => {}
            end => break end,
        }
    };
    assert!(matches!(end, Step::Translated(access) if access.address.as_u64() >> 12 == 7));
}

#[test]
fn an_entry_cleared_during_the_walk_is_seen_or_not_but_never_written() {
    for level in [TableLevel::Pt, TableLevel::Pd, TableLevel::Pdpt, TableLevel::Pml4] {
        let mut rig = Rig::intel();
        rig.map_page(VA, 7, PWU);
        let slot = rig.slot(level, VA);
        let mut walk = rig.begin(AccessKind::Write);
        while walk.level() != level {
            assert_eq!(rig.step(&mut walk), Step::Continue);
        }
        rig.ram.store_before_update.set(Some((slot, 0)));
        assert_eq!(rig.step(&mut walk), Step::Continue, "the locked update failed");
        let Step::Fault(fault) = rig.step(&mut walk) else { panic!("the entry is gone") };
        assert_eq!(fault.code.bits(), 0b110, "W/R and U/S, not P");
        assert_eq!(rig.ram.peek(slot), 0);
    }
}

#[test]
fn an_entry_replaced_during_the_walk_is_read_again() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, PWU);
    rig.speculate(VA, Depth::Structure(TableLevel::Pd));
    rig.ram.store_before_update.set(Some((leaf, (8 << 12) | PWU)));
    assert_eq!(rig.write(VA), 8);
    assert_eq!(rig.ram.peek(leaf), (8 << 12) | PWU | A | D);
}

#[test]
fn an_older_structure_entry_is_not_displaced_by_a_walk_from_above() {
    // Two walks begin at CR3. The first caches the PDE, which then changes; the second reads the
    // new one and goes on with it.
    let mut rig = Rig::intel();
    rig.map_page(VA, 7, PWU);
    let pde = rig.slot(TableLevel::Pd, VA);
    let mut walks = [rig.begin(AccessKind::Read), rig.begin(AccessKind::Read)];
    for _ in 0..3 {
        assert_eq!(rig.step(&mut walks[0]), Step::Continue);
    }
    rig.ram.poke(pde, 0);
    rig.map_page(VA, 8, PWU);
    for _ in 0..3 {
        assert_eq!(rig.step(&mut walks[1]), Step::Continue);
    }
    let Step::Translated(access) = rig.step(&mut walks[1]) else { panic!("one read is left") };
    assert_eq!(access.address.as_u64() >> 12, 8);
    // The next page is mapped in the new page table only, and the cached PDE still leads to the old
    // one.
    rig.map_page(after(VA, 0x1000), 10, PWU);
    assert!(rig.fault(after(VA, 0x1000), AccessKind::Read).source.was_cached());
}

#[test]
fn an_invalidation_ends_the_walks_before_it() {
    // Invalidating instructions are serializing: what the walk had read of the old path is not used
    // after one.
    let mut rig = Rig::intel();
    rig.map_page(VA, 7, PWU);
    let mut walk = rig.begin(AccessKind::Read);
    assert_eq!(rig.step(&mut walk), Step::Continue);
    assert_eq!(rig.step(&mut walk), Step::Continue);
    rig.ram.poke(rig.slot(TableLevel::Pml4, VA), 0);
    rig.map_page(VA, 8, PWU);
    rig.invlpg(VA);
    let end = loop {
        match rig.step(&mut walk) {
            Step::Continue => {}
            end => break end,
        }
    };
    assert!(matches!(end, Step::Translated(access) if access.address.as_u64() >> 12 == 8));
}

#[test]
fn a_walk_goes_on_from_what_a_lesser_invalidation_left() {
    // With EFER.TCE an INVLPG elsewhere leaves the path that this walk has already cached, stale or
    // not.
    let mut rig = Rig::amd();
    rig.map_page(VA, 7, PWU);
    let mut walk = rig.begin(AccessKind::Read);
    for _ in 0..3 {
        assert_eq!(rig.step(&mut walk), Step::Continue);
    }
    rig.ram.poke(rig.slot(TableLevel::Pml4, VA), 0);
    rig.invlpg(after(VA, 1 << 40));
    let Step::Translated(access) = rig.step(&mut walk) else { panic!("one read is left") };
    assert_eq!(access.address.as_u64() >> 12, 7);
}

#[test]
fn a_speculative_walk_follows_the_root_that_is_loaded() {
    let mut rig = Rig::intel();
    rig.map_page(VA, 7, PWU);
    let mut walk = rig.mmu.begin_speculation(VA, Depth::Page).expect("canonical");
    assert_eq!(rig.step(&mut walk), Step::Continue);
    let empty = rig.ram.table();
    rig.load(empty, 3, Cr3Load::Keep);
    assert_eq!(rig.step(&mut walk), Step::Speculated(Speculation::Nothing));
    assert!(!rig.in_tlb(VA));
}

#[test]
fn a_speculative_walk_does_not_fault() {
    let mut rig = Rig::intel();
    rig.map_page(VA, 7, PWU);
    rig.read(VA);
    let next = after(VA, 0x1000);
    assert_eq!(rig.speculate(next, Depth::Page), Speculation::Nothing);
    assert_eq!(rig.deepest(next), Some(TableLevel::Pd), "nothing was dropped for it");
}

#[test]
fn a_load_sets_no_dirty_flag() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, PWU);
    rig.read(VA);
    assert_eq!(rig.ram.peek(leaf) & (A | D), A);
    assert!(!rig.mmu.lookup(VA).expect("cached").1.dirty());
}

#[test]
fn an_instruction_acts_on_its_own_cpu_only() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, PWU);
    let (root, _) = rig.mmu.cr3();
    let mut counts = Counts::default();
    let mut other = Mmu::new(Features::INTEL, PCID_ON, root, &mut counts);
    other.speculate(VA, Depth::Page, &rig.ram, &mut counts);
    rig.read(VA);
    rig.ram.poke(leaf, 0);
    rig.invlpg(VA);
    rig.fault(VA, AccessKind::Read);
    let stale = other.access(VA, AccessKind::Read, AccessMode::User, &rig.ram, &mut counts);
    assert!(stale.is_ok());
    assert!(other.usable_now(frame(7)) && !rig.mmu.usable_now(frame(7)));
}

#[test]
fn a_walk_in_progress_reads_on_in_an_unhooked_table() {
    // The table freed before its flush: the walk stands on a frame that now holds something else.
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, PWU);
    let mut walk = rig.begin(AccessKind::Write);
    for _ in 0..3 {
        assert_eq!(rig.step(&mut walk), Step::Continue);
    }
    let table = walk.table();
    rig.ram.poke(rig.slot(TableLevel::Pd, VA), 0);
    assert!(rig.mmu.usable_now(table));
    rig.ram.poke(leaf, (0x66 << 12) | PWU | P);
    let Step::Translated(access) = rig.step(&mut walk) else { panic!("one read is left") };
    assert_eq!(access.address.as_u64() >> 12, 0x66);
}
