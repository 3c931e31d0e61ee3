//! What may be cached, when, and what an entry holds: 4.10.2, 4.10.3.

use mmu_hosted::Choices;
use mmu_hosted::arch::{LinearAddress, PageSize, TableLevel};
use mmu_hosted::features::{Capacity, Coexisting, Features, LargePages, Tlbs};
use mmu_hosted::invalidate::{Cr3Load, Invpcid};
use mmu_hosted::mmu::{AccessKind, AccessMode, Source, Start};
use mmu_hosted::walk::{Depth, Speculation};
use mmu_hosted::watch::{Tag, Use};

use crate::rig::{A, D, G, P, PCID_OFF, PCID_ON, PS, PWU, Rig, U, VA, W, XD, after, frame, la57, pcid};

#[test]
fn any_present_path_may_be_cached_at_any_time() {
    let mut rig = Rig::intel();
    let kernel_only = after(VA, 0x1000);
    rig.map_page(VA, 7, PWU);
    rig.map_page(kernel_only, 8, P);
    assert_eq!(rig.speculate(VA, Depth::Page), Speculation::Page);
    assert_eq!(rig.speculate(kernel_only, Depth::Page), Speculation::Page);
    assert!(rig.in_tlb(VA) && rig.in_tlb(kernel_only));
}

#[test]
fn a_speculative_fill_sets_accessed_and_never_dirty() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, PWU);
    rig.speculate(VA, Depth::Page);
    assert_eq!(rig.ram.peek(leaf) & (A | D), A);
    for level in [TableLevel::Pd, TableLevel::Pdpt, TableLevel::Pml4] {
        assert_eq!(rig.ram.peek(rig.slot(level, VA)) & A, A, "{level}");
    }
}

#[test]
fn a_speculative_fill_may_stop_at_any_structure_level() {
    for level in [TableLevel::Pml4, TableLevel::Pdpt, TableLevel::Pd] {
        let mut rig = Rig::intel();
        let leaf = rig.map_page(VA, 7, PWU);
        assert_eq!(rig.speculate(VA, Depth::Structure(level)), Speculation::Structure);
        assert_eq!(rig.deepest(VA), Some(level));
        assert_eq!(rig.mmu.structures_len(), 5 - level as usize);
        assert!(!rig.in_tlb(VA));
        assert_eq!(rig.ram.peek(leaf) & A, 0, "the leaf was not read");
        rig.ram.take_reads();
        assert_eq!(rig.speculate(VA, Depth::Structure(level)), Speculation::Structure);
        assert_eq!(rig.ram.take_reads(), 0, "it is cached already");
    }
}

#[test]
fn accessed_is_set_before_anything_is_cached() {
    for level in [TableLevel::Pt, TableLevel::Pd, TableLevel::Pdpt, TableLevel::Pml4] {
        let mut rig = Rig::intel();
        rig.map_page(VA, 7, PWU);
        let slot = rig.slot(level, VA);
        for above in
            [TableLevel::Pd, TableLevel::Pdpt, TableLevel::Pml4].into_iter().filter(|above| *above > level)
        {
            let above = rig.slot(above, VA);
            rig.ram.poke(above, rig.ram.peek(above) | A);
        }
        // Another CPU clears the entry after the walk has read it and before the walk could set A.
        rig.ram.store_before_update.set(Some((slot, 0)));
        assert_eq!(rig.speculate(VA, Depth::Page), Speculation::Nothing);
        assert_eq!(rig.ram.peek(slot), 0, "a cleared entry is not written to");
        assert!(!rig.in_tlb(VA));
        assert_eq!(rig.mmu.structures_len(), 4 - level as usize);
    }
}

#[test]
fn nothing_is_cached_from_a_non_present_entry() {
    for level in [TableLevel::Pt, TableLevel::Pd, TableLevel::Pdpt, TableLevel::Pml4] {
        let mut rig = Rig::intel();
        rig.map_page(VA, 7, PWU);
        let slot = rig.slot(level, VA);
        rig.ram.poke(slot, rig.ram.peek(slot) & !P);
        assert_eq!(rig.speculate(VA, Depth::Page), Speculation::Nothing);
        assert!(!rig.in_tlb(VA));
        assert_eq!(rig.mmu.structures_len(), 4 - level as usize, "only the levels above {level}");
        assert_eq!(rig.ram.peek(slot) & A, 0);
    }
}

#[test]
fn nothing_is_cached_from_an_entry_with_a_reserved_bit() {
    const ABOVE_MAXPHYADDR: u64 = 1 << 50;
    for (level, reserved) in [
        (TableLevel::Pt, ABOVE_MAXPHYADDR),
        (TableLevel::Pd, ABOVE_MAXPHYADDR),
        (TableLevel::Pdpt, ABOVE_MAXPHYADDR),
        (TableLevel::Pml4, ABOVE_MAXPHYADDR),
        (TableLevel::Pml4, PS),
        (TableLevel::Pd, PS | (1 << 13)),
        (TableLevel::Pdpt, PS | (1 << 29)),
    ] {
        let mut rig = Rig::intel();
        rig.map_page(VA, 7, PWU);
        let slot = rig.slot(level, VA);
        rig.ram.poke(slot, rig.ram.peek(slot) | reserved);
        assert_eq!(rig.speculate(VA, Depth::Page), Speculation::Nothing);
        assert!(!rig.in_tlb(VA));
        assert_eq!(rig.mmu.structures_len(), 4 - level as usize);
        let fault = rig.fault(VA, AccessKind::Read);
        assert_eq!(fault.code.bits(), 0b1101, "P, U/S and RSVD");
    }
}

#[test]
fn a_pml4e_never_maps_a_page_and_bit_12_of_a_large_page_is_no_address() {
    let mut rig = Rig::intel();
    rig.ram.poke(rig.slot(TableLevel::Pml4, VA), PWU | PS);
    assert_eq!(rig.fault(VA, AccessKind::Read).code.bits(), 0b1101, "P, U/S and RSVD");
    const PAT: u64 = 1 << 12;
    for size in [PageSize::Size2MiB, PageSize::Size1GiB] {
        let mut rig = Rig::intel();
        rig.map(size, VA, 0x80000, PWU | PAT);
        assert_eq!(rig.read(VA), 0x80000 + (VA.offset_in(size) >> 12));
    }
}

#[test]
fn entries_may_vanish_at_any_time() {
    let mut rig = Rig::intel();
    let choices = Choices::new(1);
    let large = after(VA, 1 << 30);
    let roots = [rig.ram.table(), rig.ram.table()];
    for (number, root) in (1..).zip(roots) {
        rig.load(root, number, Cr3Load::Flush);
        for page in 0..50 {
            rig.map_page(after(VA, page * 0x1000), 7, PWU | if page == 0 { G } else { 0 });
            rig.read(after(VA, page * 0x1000));
        }
        for (size, address) in [(PageSize::Size2MiB, large), (PageSize::Size1GiB, after(large, 1 << 30))] {
            rig.map(size, address, 0x80000, PWU);
            rig.read(address);
        }
    }
    let held = rig.mmu.tlb_len() + rig.mmu.structures_len();
    assert_eq!(held, 1 + 2 * (51 + 4));
    for left in (0..held).rev() {
        rig.mmu.forget_one(|len| choices.pick(len), &mut rig.counts);
        assert_eq!(rig.mmu.tlb_len() + rig.mmu.structures_len(), left);
    }
    rig.mmu.forget_one(|len| choices.pick(len), &mut rig.counts);
    assert_eq!(rig.read(VA), 7);
    rig.mmu.forget_everything(&mut rig.counts);
    assert_eq!((rig.mmu.tlb_len(), rig.mmu.structures_len()), (0, 0));
    assert_eq!(rig.read(VA), 7);
}

#[test]
fn a_full_cache_makes_room_or_holds_nothing() {
    for (most, held) in [(5, 5), (1, 1), (0, 0)] {
        let features = Features {
            tlb_capacity: Capacity::AtMost(most),
            structure_capacity: Capacity::AtMost(most),
            ..Features::INTEL
        };
        let mut rig = Rig::new(features, PCID_ON);
        for page in 0..64 {
            let address = after(VA, page << 21);
            rig.map_page(address, 7 + page, PWU);
            assert_eq!(rig.read(address), 7 + page);
            assert_eq!(rig.write(address), 7 + page);
            assert!(rig.mmu.tlb_len() <= most && rig.mmu.structures_len() <= most);
        }
        assert_eq!((rig.mmu.tlb_len(), rig.mmu.structures_len()), (held, held));
    }
}

#[test]
fn a_tlb_entry_holds_the_rights_of_the_whole_path() {
    // Each bit is taken away at one level only: R/W and U/S are ANDed, XD is ORed. 4.10.2.2.
    for level in [TableLevel::Pt, TableLevel::Pd, TableLevel::Pdpt, TableLevel::Pml4] {
        for (clear, set) in [(W, 0), (U, 0), (0, XD)] {
            let mut rig = Rig::intel();
            rig.map_page(VA, 7, PWU);
            let slot = rig.slot(level, VA);
            rig.ram.poke(slot, rig.ram.peek(slot) & !clear | set);
            rig.speculate(VA, Depth::Page);
            let rights = rig.mmu.lookup(VA).expect("cached").1.rights();
            assert_eq!(rights.bits(), (W | U) & !clear | set, "{level}");
        }
    }
}

#[test]
fn a_structure_entry_keeps_the_rights_above_it() {
    let mut rig = Rig::intel();
    rig.map_page(VA, 7, PWU);
    let pml4e = rig.slot(TableLevel::Pml4, VA);
    rig.ram.poke(pml4e, rig.ram.peek(pml4e) & !W);
    rig.speculate(VA, Depth::Structure(TableLevel::Pd));
    rig.ram.poke(pml4e, rig.ram.peek(pml4e) | W);
    rig.speculate(VA, Depth::Page);
    assert!(!rig.mmu.lookup(VA).expect("cached").1.rights().writable(), "the stale PML4E took part");
}

#[test]
fn only_entries_that_reference_a_table_enter_the_structure_caches() {
    for (size, structures) in [(PageSize::Size4KiB, 3), (PageSize::Size2MiB, 2), (PageSize::Size1GiB, 1)] {
        let mut rig = Rig::intel();
        rig.map(size, VA, 0x40000, PWU);
        rig.read(VA);
        assert_eq!(rig.mmu.structures_len(), structures, "{size}");
        assert_eq!(rig.mmu.lookup(VA).expect("cached").1.size(), size);
    }
}

#[test]
fn a_large_page_translates_every_byte_of_it() {
    for size in [PageSize::Size2MiB, PageSize::Size1GiB] {
        let mut rig = Rig::intel();
        rig.map(size, VA, 0x80000, PWU);
        let last = LinearAddress::new((VA.as_u64() & !(size.bytes() - 1)) + size.bytes() - 1);
        rig.read(VA);
        let access = rig.user(last, AccessKind::Read).expect("same page");
        assert_eq!(access.address.as_u64(), 0x8000_0000 + size.bytes() - 1);
        assert_eq!(access.source, Source::Tlb(Tag::Pcid(pcid(0))));
    }
}

#[test]
fn with_la57_a_pml5e_is_cached_and_addresses_have_57_bits() {
    let mut rig = la57();
    let high = LinearAddress::new(0x00ab_1234_5678_9000);
    rig.map_page(high, 7, PWU);
    rig.map_page(VA, 8, PWU);
    assert_eq!(rig.read(high), 7);
    assert_eq!(rig.ram.take_reads(), 5);
    assert_eq!(rig.mmu.structures_len(), 4);
    assert_eq!(rig.read(VA), 8);
    assert_eq!(rig.ram.take_reads(), 5, "another PML5E");
    let near = LinearAddress::new(0x00ab_0034_5678_9000);
    rig.map_page(near, 9, PWU);
    assert_eq!(rig.deepest(near), Some(TableLevel::Pml5));
    assert_eq!(rig.read(near), 9);
    assert_eq!(rig.ram.take_reads(), 4, "the PML5E is cached");
    let upper = LinearAddress::new(0xff00_0000_0000_0000);
    rig.map_page(upper, 10, P);
    let access = rig.try_access(upper, AccessKind::Read, AccessMode::Kernel).expect("canonical");
    assert_eq!(access.address.as_u64(), 10 << 12);
}

#[test]
fn structure_caches_ignore_the_global_flag() {
    let mut rig = Rig::intel();
    rig.map_page(VA, 7, PWU | G);
    let pde = rig.slot(TableLevel::Pd, VA);
    rig.ram.poke(pde, rig.ram.peek(pde) | G);
    rig.read(VA);
    let tables = rig.mmu.entries().filter(|entry| matches!(entry.held.as_a, Use::Table(_)));
    assert!(tables.into_iter().all(|entry| entry.held.tag == Tag::Pcid(pcid(0))));
}

#[test]
fn a_pde_may_be_cached_though_every_entry_of_its_table_is_absent() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, PWU);
    rig.ram.poke(leaf, 0);
    assert_eq!(rig.speculate(VA, Depth::Page), Speculation::Nothing);
    assert_eq!(rig.deepest(VA), Some(TableLevel::Pd));
    // The table is unhooked and its frame becomes a page full of what looks like entries: the walk
    // takes them for such.
    rig.ram.poke(rig.slot(TableLevel::Pd, VA), 0);
    rig.ram.poke(leaf, (0x66 << 12) | PWU);
    assert_eq!(rig.read(VA), 0x66);
}

#[test]
fn one_entry_in_memory_may_back_many_cached_entries() {
    // A self-referencing PML4E serves as PML4E, PDPTE, PDE and PTE at once. 4.10.3.3.
    let mut rig = Rig::intel();
    let root = rig.mmu.cr3().0;
    rig.ram.poke(root.start_address(), root.start_address().as_u64() | PWU);
    let zero = LinearAddress::new(0);
    assert_eq!(rig.read(zero), root.start_address().as_u64() >> 12);
    let uses: Vec<Use> = rig.mmu.entries_reaching(root).map(|entry| entry.held.as_a).collect();
    assert_eq!(uses.len(), 5, "CR3, TLB entry and three structure entries: {uses:?}");
    assert_eq!(rig.mmu.structures_len(), 3);
}

#[test]
fn a_large_page_may_be_cached_in_pieces() {
    for size in [PageSize::Size2MiB, PageSize::Size1GiB] {
        let mut rig = Rig::new(Features { large_pages: LargePages::InPieces, ..Features::INTEL }, PCID_ON);
        rig.map(size, VA, 0x80000, PWU);
        let start = LinearAddress::new(VA.as_u64() & !(size.bytes() - 1));
        for page in [0, 1, 511] {
            let access = rig.user(after(start, page * 0x1000 + 5), AccessKind::Write).expect("mapped");
            assert_eq!(access.address.as_u64(), 0x8000_0000 + page * 0x1000 + 5);
            assert_eq!((access.entry.size(), access.entry.origin()), (PageSize::Size4KiB, size));
        }
        assert_eq!(rig.mmu.tlb_len(), 3);
        assert!(!rig.in_tlb(after(start, 0x2000)));
    }
}

#[test]
fn a_global_entry_serves_every_pcid() {
    let mut rig = Rig::intel();
    rig.map_page(VA, 7, PWU | G);
    rig.read(VA);
    let other = rig.ram.table();
    rig.load(other, 5, Cr3Load::Flush);
    let access = rig.user(VA, AccessKind::Read).expect("global");
    assert_eq!(access.source, Source::Tlb(Tag::Global));
}

#[test]
fn only_the_global_flag_of_the_leaf_counts() {
    let mut rig = Rig::intel();
    rig.map_page(VA, 7, PWU);
    for level in [TableLevel::Pd, TableLevel::Pdpt, TableLevel::Pml4] {
        let slot = rig.slot(level, VA);
        rig.ram.poke(slot, rig.ram.peek(slot) | G);
    }
    rig.read(VA);
    assert_eq!(rig.mmu.lookup(VA).expect("cached").0, Tag::Pcid(pcid(0)));
}

#[test]
fn the_global_flag_counts_only_while_cr4_pge_is_set() {
    let mut rig = Rig::new(Features::INTEL, PCID_ON - PCID_OFF);
    rig.map_page(VA, 7, PWU | G);
    rig.read(VA);
    assert_eq!(rig.mmu.lookup(VA).expect("cached").0, Tag::Pcid(pcid(0)));
}

#[test]
fn an_entry_serves_only_its_own_pcid() {
    let mut rig = Rig::intel();
    let first = rig.mmu.cr3().0;
    rig.map_page(VA, 7, PWU);
    rig.read(VA);
    let other = rig.ram.table();
    rig.load(other, 5, Cr3Load::Keep);
    assert!(!rig.in_tlb(VA));
    assert_eq!(rig.deepest(VA), None, "structure entries have PCIDs too");
    rig.fault(VA, AccessKind::Read);
    rig.load(first, 0, Cr3Load::Keep);
    assert!(rig.in_tlb(VA));
}

#[test]
fn without_pcids_everything_is_pcid_zero() {
    let mut rig = Rig::new(Features::INTEL, PCID_OFF);
    rig.map_page(VA, 7, PWU);
    rig.read(VA);
    let root = rig.ram.table();
    let refused = rig.mmu.load_cr3(root, pcid(1), Cr3Load::Flush, &mut rig.counts);
    assert!(refused.is_err());
    let refused = rig.mmu.load_cr3(root, pcid(0), Cr3Load::Keep, &mut rig.counts);
    assert!(refused.is_err(), "bit 63 needs PCIDE");
    assert!(rig.in_tlb(VA), "a refused load changes nothing");
}

#[test]
fn after_a_page_size_change_either_translation_may_be_used() {
    for (coexisting, served) in [(Coexisting::SmallestFirst, 7), (Coexisting::LargestFirst, 0x80189)] {
        let mut rig = Rig::new(Features { coexisting, ..Features::INTEL }, PCID_ON);
        let pde = rig.map(PageSize::Size2MiB, VA, 0x80000, PWU);
        rig.read(VA);
        // The 2-MiB page is replaced by a page table, and nobody flushes.
        rig.ram.poke(pde, 0);
        rig.map_page(VA, 7, PWU);
        rig.speculate(VA, Depth::Page);
        assert_eq!(rig.mmu.tlb_len(), 2, "both are cached");
        assert_eq!(rig.read(VA), served);
        rig.invlpg(VA);
        assert_eq!(rig.mmu.tlb_len(), 0, "INVLPG drops every size");
    }
}

#[test]
fn a_global_entry_and_one_of_the_pcid_may_both_be_cached() {
    for (coexisting, served) in [(Coexisting::SmallestFirst, 8), (Coexisting::LargestFirst, 7)] {
        let mut rig = Rig::new(Features { coexisting, ..Features::INTEL }, PCID_ON);
        rig.map_page(VA, 7, PWU | G);
        rig.read(VA);
        rig.map_page(VA, 8, PWU);
        rig.speculate(VA, Depth::Page);
        assert_eq!(rig.mmu.tlb_len(), 2);
        assert_eq!(rig.read(VA), served);
        rig.invlpg(VA);
        assert_eq!(rig.mmu.tlb_len(), 0);
    }
}

#[test]
fn until_flushed_the_old_translation_may_be_used() {
    for kind in [AccessKind::Read, AccessKind::Write, AccessKind::Execute] {
        let mut rig = Rig::intel();
        let leaf = rig.map_page(VA, 7, PWU);
        rig.user(VA, kind).expect("mapped");
        rig.ram.poke(leaf, (8 << 12) | PWU);
        let stale = rig.user(VA, kind).expect("cached");
        assert_eq!(stale.address.as_u64() >> 12, 7);
        rig.speculate(VA, Depth::Page);
        assert_eq!(rig.read(VA), 7, "a speculative fill does not heal it");
        rig.invlpg(VA);
        assert_eq!(rig.read(VA), 8);
    }
}

#[test]
fn a_mapping_may_be_added_without_a_flush() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, 0);
    let fault = rig.fault(VA, AccessKind::Read);
    assert!(matches!(fault.source, Source::Walk { start: Start::Cr3, level: TableLevel::Pt, .. }));
    rig.speculate(VA, Depth::Page);
    rig.ram.poke(leaf, (7 << 12) | PWU);
    assert_eq!(rig.read(VA), 7);
}

const SPLIT: Features = Features { tlbs: Tlbs::Split, ..Features::INTEL };

/// What loads and what fetches at `VA` come to.
fn both_sides(rig: &mut Rig) -> [u64; 2] {
    [AccessKind::Read, AccessKind::Execute]
        .map(|kind| rig.user(VA, kind).expect("it goes through").address.as_u64() >> 12)
}

#[test]
fn one_cpu_may_have_two_translations_of_one_page_at_once() {
    let mut rig = Rig::new(SPLIT, PCID_ON);
    let leaf = rig.map_page(VA, 7, PWU);
    rig.read(VA);
    rig.ram.poke(leaf, (8 << 12) | PWU);
    // The instruction side walks, and leaves the data side as it is.
    assert_eq!(both_sides(&mut rig), [7, 8]);
    assert_eq!(both_sides(&mut rig), [7, 8], "both are served by the TLBs");
    assert!(
        rig.mmu.entries_reaching(frame(7)).count() == 1 && rig.mmu.entries_reaching(frame(8)).count() == 1
    );
    // A unified TLB has one answer.
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, PWU);
    rig.read(VA);
    rig.ram.poke(leaf, (8 << 12) | PWU);
    assert_eq!(both_sides(&mut rig), [7, 7]);
}

#[test]
fn speculation_fills_the_side_that_speculates_only() {
    for (depth, kind, other) in [
        (Depth::Fetch, AccessKind::Execute, AccessKind::Read),
        (Depth::Page, AccessKind::Read, AccessKind::Execute),
    ] {
        let mut rig = Rig::new(SPLIT, PCID_ON);
        rig.map_page(VA, 7, PWU);
        assert_eq!(rig.speculate(VA, depth), Speculation::Page);
        assert!(rig.mmu.lookup_for(VA, kind).is_some() && rig.mmu.lookup_for(VA, other).is_none());
    }
    let mut rig = Rig::intel();
    rig.map_page(VA, 7, PWU);
    assert_eq!(rig.speculate(VA, Depth::Fetch), Speculation::Page);
    assert!(rig.in_tlb(VA), "there is one TLB for all");
}

#[test]
fn every_invalidation_and_every_fault_drops_both_sides() {
    let ways: [fn(&mut Rig); 5] = [
        |rig| rig.invlpg(VA),
        |rig| rig.load(rig.mmu.cr3().0, 0, Cr3Load::Flush),
        |rig| rig.mmu.invpcid(Invpcid::Address(pcid(0), VA), &mut rig.counts).expect("PCIDs are on"),
        |rig| rig.mmu.forget_everything(&mut rig.counts),
        // The page is read-only: a store faults.
        |rig| {
            rig.fault(VA, AccessKind::Write);
        },
    ];
    for (number, way) in ways.into_iter().enumerate() {
        let mut rig = Rig::new(SPLIT, PCID_ON);
        rig.map_page(VA, 7, P | U);
        assert_eq!(both_sides(&mut rig), [7, 7]);
        assert_eq!(rig.mmu.tlb_len(), 2);
        way(&mut rig);
        assert_eq!(rig.mmu.tlb_len(), 0, "way {number}");
    }
}

#[test]
fn a_bound_on_translations_is_for_both_sides_together() {
    let mut rig = Rig::new(Features { tlb_capacity: Capacity::AtMost(3), ..SPLIT }, PCID_ON);
    for page in 0..8 {
        rig.map_page(after(VA, page << 12), 0x10 + page, PWU);
        for kind in [AccessKind::Read, AccessKind::Execute] {
            rig.user(after(VA, page << 12), kind).expect("it goes through");
            assert!(rig.mmu.tlb_len() <= 3);
        }
    }
    rig.mmu.forget_one(|count| count - 1 - 3, &mut rig.counts);
    assert_eq!(rig.mmu.tlb_len(), 2);
}

#[test]
fn small_caches_are_never_larger_than_what_was_there() {
    let small = Features::INTEL.with_small_caches();
    assert_eq!((small.tlb_capacity, small.structure_capacity), (Capacity::AtMost(12), Capacity::AtMost(4)));
    let none = Features { tlb_capacity: Capacity::AtMost(0), ..Features::INTEL }.with_small_caches();
    assert_eq!((none.tlb_capacity, none.structure_capacity), (Capacity::AtMost(0), Capacity::AtMost(4)));
}

#[test]
fn speculation_may_go_down_any_path_whether_a_program_has_been_there_or_not() {
    let mut rig = Rig::intel();
    let places = [0, 0x5000, 1 << 21, 1 << 30, 1 << 39].map(|bytes| after(VA, bytes));
    for (number, place) in places.into_iter().enumerate() {
        rig.map_page(place, 0x20 + number as u64, PWU);
    }
    let choices = Choices::new(1);
    let mut seen = [false; 5];
    for _ in 0..200 {
        let address = rig.mmu.somewhere(&rig.ram, |count| choices.below(count));
        let place = places.iter().position(|place| *place == address);
        seen[place.expect("the path is there")] = true;
        assert_eq!(rig.speculate(address, Depth::Page), Speculation::Page);
    }
    assert_eq!(seen, [true; 5]);
}

#[test]
fn a_path_that_ends_in_an_empty_table_leads_to_it() {
    let rig = Rig::intel();
    // A table of 4 KiB entries is linked, and nothing is in it yet.
    rig.slot(TableLevel::Pt, VA);
    let address = rig.mmu.somewhere(&rig.ram, |count| count - 1);
    assert_eq!(address.as_u64() >> 21, VA.as_u64() >> 21);
    let mut rig = rig;
    assert_eq!(rig.speculate(address, Depth::Page), Speculation::Nothing);
    assert_eq!(rig.deepest(VA), Some(TableLevel::Pd), "the empty table is cached all the same");
}
