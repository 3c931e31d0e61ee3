//! Each invalidating instruction drops what is promised and, here, nothing more. 4.10.4.1,
//! 4.10.4.2.

use mmu_hosted::arch::{LinearAddress, PageSize, TableLevel};
use mmu_hosted::features::{Features, InvlpgGlobals, InvlpgUppers, LargePages};
use mmu_hosted::invalidate::{Cr3Load, Invpcid};
use mmu_hosted::mmu::{AccessKind, GeneralProtection};
use mmu_hosted::walk::Depth;
use x86_64::registers::control::Cr4Flags;
use x86_64::structures::paging::PhysFrame;

use crate::rig::{G, P, PCID_OFF, PCID_ON, PWU, Rig, VA, after, frame, pcid};

/// On the same page table as [`VA`].
const NEXT: LinearAddress = LinearAddress::new(VA.as_u64() + 0x1000);
/// Under another PML4E.
const FAR: LinearAddress = LinearAddress::new(VA.as_u64() + (1 << 40));
/// Mapped global.
const GLOBAL: LinearAddress = LinearAddress::new(VA.as_u64() + 0x2000);

/// Two address spaces, PCID 1 (loaded) and PCID 2, both with [`VA`], [`NEXT`] and [`FAR`] cached;
/// [`GLOBAL`] is cached once. PCID 1 maps frames 0x11, 0x12, 0x13 and PCID 2 maps 0x21, 0x22, 0x23;
/// the global frame is 0x30.
fn two_spaces(features: Features) -> Rig {
    let mut rig = Rig::new(features, PCID_ON);
    let roots = [rig.ram.table(), rig.ram.table()];
    for number in [2, 1] {
        rig.load(roots[usize::from(number) - 1], number, Cr3Load::Flush);
        for (place, address) in [VA, NEXT, FAR].into_iter().enumerate() {
            let mapped = u64::from(number) * 0x10 + place as u64 + 1;
            rig.map_page(address, mapped, PWU);
            assert_eq!(rig.read(address), mapped);
        }
    }
    rig.map_page(GLOBAL, 0x30, PWU | G);
    rig.read(GLOBAL);
    assert_eq!((rig.mmu.tlb_len(), rig.mmu.structures_len()), (7, 12));
    rig
}

/// Frames of `two_spaces` that the TLB still names, with the number of structure entries left under
/// each PCID.
fn left(rig: &Rig) -> (Vec<u64>, usize, usize) {
    use mmu_hosted::watch::{Tag, Use};
    let mut pages = Vec::new();
    let mut tables = [0; 3];
    for entry in rig.mmu.entries() {
        match (entry.held.as_a, entry.held.tag) {
            (Use::Page(_), _) => pages.push(entry.frame.start_address().as_u64() >> 12),
            (Use::Table(_), Tag::Pcid(pcid)) => tables[usize::from(pcid.value())] += 1,
            (Use::Table(_), Tag::Global) => panic!("structure entries are never global"),
            (Use::Root, _) => {}
        }
    }
    pages.sort_unstable();
    (pages, tables[1], tables[2])
}

#[test]
fn invlpg_drops_the_page_under_the_current_pcid_only() {
    let mut rig = two_spaces(Features::INTEL);
    rig.invlpg(VA);
    assert_eq!(left(&rig).0, [0x12, 0x13, 0x21, 0x22, 0x23, 0x30]);
}

#[test]
fn invlpg_drops_every_structure_cache_entry_of_the_current_pcid() {
    let mut rig = two_spaces(Features::INTEL);
    rig.invlpg(VA);
    let (_, own, other) = left(&rig);
    assert_eq!((own, other), (0, 6), "all of PCID 1, none of PCID 2");
}

#[test]
fn invlpg_drops_structure_entries_even_where_no_page_is_cached() {
    let mut rig = two_spaces(Features::INTEL);
    rig.invlpg(after(VA, 0x7000));
    assert_eq!(left(&rig), (vec![0x11, 0x12, 0x13, 0x21, 0x22, 0x23, 0x30], 0, 6));
}

#[test]
fn with_tce_invlpg_drops_only_the_structure_entries_that_lead_to_its_address() {
    let mut rig = two_spaces(Features { invlpg_uppers: InvlpgUppers::LeadingToAddress, ..Features::INTEL });
    rig.invlpg(VA);
    assert_eq!(left(&rig), (vec![0x12, 0x13, 0x21, 0x22, 0x23, 0x30], 3, 6));
    assert_eq!((rig.deepest(VA), rig.deepest(FAR)), (None, Some(TableLevel::Pd)));
}

#[test]
fn invlpg_drops_a_global_page_whatever_the_pcid() {
    let mut rig = two_spaces(Features::INTEL);
    let root = rig.ram.table();
    rig.load(root, 9, Cr3Load::Flush);
    rig.invlpg(GLOBAL);
    assert_eq!(left(&rig), (vec![0x11, 0x12, 0x13, 0x21, 0x22, 0x23], 6, 6));
}

#[test]
fn by_erratum_invlpg_may_miss_globals_while_pcids_are_on() {
    let features = Features { invlpg_globals: InvlpgGlobals::MissedWithPcid, ..Features::INTEL };
    let mut rig = two_spaces(features);
    rig.invlpg(GLOBAL);
    assert!(rig.in_tlb(GLOBAL));
    let mut rig = Rig::new(features, PCID_OFF);
    rig.map_page(GLOBAL, 0x30, PWU | G);
    rig.read(GLOBAL);
    rig.invlpg(GLOBAL);
    assert!(!rig.in_tlb(GLOBAL), "not while PCIDs are off");
}

#[test]
fn invlpg_of_an_address_that_is_not_canonical_does_nothing() {
    let mut rig = two_spaces(Features::INTEL);
    let before = left(&rig);
    rig.invlpg(LinearAddress::new(VA.as_u64() | (1 << 60)));
    assert_eq!(left(&rig), before);
}

#[test]
fn one_invlpg_is_enough_for_a_large_page() {
    for size in [PageSize::Size2MiB, PageSize::Size1GiB] {
        let mut rig = Rig::intel();
        rig.map(size, VA, 0x80000, PWU);
        rig.read(VA);
        let last = LinearAddress::new((VA.as_u64() & !(size.bytes() - 1)) + size.bytes() - 0x1000);
        rig.invlpg(last);
        assert!(!rig.in_tlb(VA), "{size}");
    }
}

/// A large page cached as three pieces, and one piece of its neighbour.
fn pieces(size: PageSize) -> Rig {
    let mut rig = Rig::new(Features { large_pages: LargePages::InPieces, ..Features::INTEL }, PCID_ON);
    rig.map(size, VA, 0x80000, PWU);
    rig.map(size, after(VA, size.bytes()), 0xc0000, PWU);
    rig.read(after(VA, size.bytes()));
    let start = VA.as_u64() & !(size.bytes() - 1);
    for place in [0, size.bytes() / 2, size.bytes() - 1] {
        rig.read(LinearAddress::new(start + place));
    }
    assert_eq!(rig.mmu.tlb_len(), 4);
    rig
}

#[test]
fn one_invalidation_drops_every_piece_of_a_large_page() {
    for size in [PageSize::Size2MiB, PageSize::Size1GiB] {
        let mut rig = pieces(size);
        rig.invlpg(VA);
        assert_eq!(rig.mmu.tlb_len(), 1, "INVLPG, {size}");
        assert!(rig.in_tlb(after(VA, size.bytes())), "the neighbour stays");

        let mut rig = pieces(size);
        rig.mmu.invpcid(Invpcid::Address(pcid(0), VA), &mut rig.counts).expect("PCIDs are on");
        assert_eq!(rig.mmu.tlb_len(), 1, "INVPCID, {size}");

        let mut rig = pieces(size);
        let level = if size == PageSize::Size2MiB { TableLevel::Pd } else { TableLevel::Pdpt };
        let slot = rig.slot(level, VA);
        rig.ram.poke(slot, 0);
        rig.fault(after(VA, 0x5000), AccessKind::Read);
        assert_eq!(rig.mmu.tlb_len(), 1, "#PF, {size}");
    }
}

#[test]
fn pieces_are_dropped_though_the_large_page_is_already_gone_from_memory() {
    let mut rig = pieces(PageSize::Size2MiB);
    let slot = rig.slot(TableLevel::Pd, VA);
    rig.ram.poke(slot, 0);
    rig.invlpg(VA);
    assert_eq!(rig.mmu.tlb_len(), 1);
}

#[test]
fn a_small_page_among_the_pieces_of_a_large_one_is_no_piece() {
    let mut rig = pieces(PageSize::Size2MiB);
    let slot = rig.slot(TableLevel::Pd, VA);
    let small = after(VA, 0x3000);
    rig.ram.poke(slot, 0);
    rig.map_page(small, 7, PWU);
    rig.read(small);
    rig.invlpg(VA);
    assert!(rig.in_tlb(small));
    assert_eq!(rig.mmu.tlb_len(), 2, "it and the piece of the neighbour");
}

#[test]
fn invpcid_type_0_drops_one_address_and_its_path_under_one_pcid() {
    let mut rig = two_spaces(Features::INTEL);
    rig.mmu.invpcid(Invpcid::Address(pcid(2), VA), &mut rig.counts).expect("allowed");
    assert_eq!(left(&rig), (vec![0x11, 0x12, 0x13, 0x22, 0x23, 0x30], 6, 3));
    rig.mmu.invpcid(Invpcid::Address(pcid(1), GLOBAL), &mut rig.counts).expect("allowed");
    assert!(rig.in_tlb(GLOBAL), "globals stay");
}

#[test]
fn invpcid_type_1_drops_one_pcid_without_globals() {
    let mut rig = two_spaces(Features::INTEL);
    rig.mmu.invpcid(Invpcid::Context(pcid(2)), &mut rig.counts).expect("allowed");
    assert_eq!(left(&rig), (vec![0x11, 0x12, 0x13, 0x30], 6, 0));
}

#[test]
fn invpcid_type_2_drops_everything() {
    let mut rig = two_spaces(Features::INTEL);
    rig.mmu.invpcid(Invpcid::All, &mut rig.counts).expect("allowed");
    assert_eq!(left(&rig), (vec![], 0, 0));
}

#[test]
fn invpcid_type_3_drops_everything_but_globals() {
    let mut rig = two_spaces(Features::INTEL);
    rig.mmu.invpcid(Invpcid::AllNonGlobal, &mut rig.counts).expect("allowed");
    assert_eq!(left(&rig), (vec![0x30], 0, 0));
}

#[test]
fn invpcid_refuses_what_the_mode_does_not_allow() {
    let mut rig = Rig::new(Features::INTEL, PCID_OFF);
    let refused = rig.mmu.invpcid(Invpcid::Context(pcid(1)), &mut rig.counts);
    assert_eq!(refused, Err(GeneralProtection));
    let odd = LinearAddress::new(1 << 60);
    let refused = rig.mmu.invpcid(Invpcid::Address(pcid(0), odd), &mut rig.counts);
    assert_eq!(refused, Err(GeneralProtection));
}

#[test]
fn a_cr3_load_without_pcids_drops_everything_but_globals() {
    let mut rig = Rig::new(Features::INTEL, PCID_OFF);
    rig.map_page(VA, 7, PWU);
    rig.map_page(GLOBAL, 8, PWU | G);
    rig.read(VA);
    rig.read(GLOBAL);
    let root = rig.ram.table();
    rig.load(root, 0, Cr3Load::Flush);
    assert_eq!((rig.mmu.tlb_len(), rig.mmu.structures_len()), (1, 0));
    assert!(rig.in_tlb(GLOBAL));
}

#[test]
fn a_cr3_load_drops_what_the_new_pcid_holds_and_no_other() {
    let mut rig = two_spaces(Features::INTEL);
    let root = rig.ram.table();
    rig.load(root, 2, Cr3Load::Flush);
    assert_eq!(left(&rig), (vec![0x11, 0x12, 0x13, 0x30], 6, 0));
}

#[test]
fn a_cr3_load_with_bit_63_drops_nothing() {
    let mut rig = two_spaces(Features::INTEL);
    let before = left(&rig);
    let root = rig.ram.table();
    rig.load(root, 2, Cr3Load::Keep);
    assert_eq!(left(&rig), before);
}

#[test]
fn a_pcid_reused_for_another_root_without_a_flush_serves_the_old_space() {
    let mut rig = two_spaces(Features::INTEL);
    let stranger = rig.ram.table();
    rig.load(stranger, 2, Cr3Load::Keep);
    assert_eq!(rig.read(VA), 0x21);
    rig.load(stranger, 2, Cr3Load::Flush);
    rig.fault(VA, AccessKind::Read);
}

#[test]
fn invlpg_under_one_pcid_is_not_enough_for_the_others() {
    let mut rig = Rig::intel();
    let root = rig.mmu.cr3().0;
    let leaf = rig.map_page(VA, 7, PWU);
    rig.read(VA);
    rig.load(root, 1, Cr3Load::Flush);
    rig.read(VA);
    rig.ram.poke(leaf, 0);
    rig.invlpg(VA);
    rig.fault(VA, AccessKind::Read);
    rig.load(root, 0, Cr3Load::Keep);
    assert_eq!(rig.read(VA), 7, "still cached under PCID 0");
}

#[test]
fn a_change_of_cr4_pge_drops_everything() {
    let mut rig = two_spaces(Features::INTEL);
    rig.mmu.write_cr4(PCID_ON - Cr4Flags::PAGE_GLOBAL, &mut rig.counts).expect("allowed");
    assert_eq!(left(&rig), (vec![], 0, 0));
    rig.read(VA);
    rig.mmu.write_cr4(PCID_ON, &mut rig.counts).expect("allowed");
    assert_eq!(left(&rig), (vec![], 0, 0), "setting it, too");
}

#[test]
fn clearing_cr4_pcide_drops_everything_and_setting_it_nothing() {
    let mut rig = two_spaces(Features::INTEL);
    let root: PhysFrame = rig.mmu.cr3().0;
    rig.mmu.write_cr4(PCID_OFF, &mut rig.counts).expect("allowed");
    assert_eq!(left(&rig), (vec![], 0, 0));
    assert_eq!(rig.mmu.cr3(), (root, pcid(0)));
    rig.read(VA);
    rig.mmu.write_cr4(PCID_ON, &mut rig.counts).expect("allowed");
    assert!(rig.in_tlb(VA));
}

#[test]
fn setting_cr4_smep_drops_the_current_pcid() {
    let mut rig = two_spaces(Features::INTEL);
    let smep = PCID_ON | Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION;
    rig.mmu.write_cr4(smep, &mut rig.counts).expect("allowed");
    assert_eq!(left(&rig), (vec![0x21, 0x22, 0x23, 0x30], 0, 6));
    rig.read(VA);
    rig.mmu.write_cr4(PCID_ON, &mut rig.counts).expect("allowed");
    assert!(rig.in_tlb(VA), "clearing it drops nothing");
}

#[test]
fn cr4_la57_cannot_change_while_paging() {
    let mut rig = two_spaces(Features::INTEL);
    let refused = rig.mmu.write_cr4(PCID_ON | Cr4Flags::L5_PAGING, &mut rig.counts);
    assert_eq!(refused, Err(GeneralProtection));
    assert_eq!(rig.mmu.cr4(), PCID_ON);
}

#[test]
fn an_unhooked_table_stays_in_use_until_an_invalidation_though_it_was_empty() {
    // Freeing page tables: one INVLPG in the span is what ends the use of the table, even if no
    // page was mapped there.
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, 0);
    rig.speculate(VA, Depth::Page);
    let table = PhysFrame::containing_address(leaf);
    rig.ram.poke(rig.slot(TableLevel::Pd, VA), 0);
    assert!(rig.mmu.usable_now(table));
    rig.invlpg(VA);
    assert!(!rig.mmu.usable_now(table));
}

#[test]
fn a_table_freed_beside_the_flushed_address_stays_reachable_with_tce() {
    // Two tables unhooked, one INVLPG: enough for a blunt CPU, not for a precise one.
    for (features, reachable) in [(Features::INTEL, false), (Features::AMD, true)] {
        let mut rig = Rig::new(features, PCID_ON);
        let other = after(VA, 1 << 21);
        rig.map_page(VA, 7, P);
        let leaf = rig.map_page(other, 8, P);
        rig.speculate(VA, Depth::Page);
        rig.speculate(other, Depth::Structure(TableLevel::Pd));
        for address in [VA, other] {
            rig.ram.poke(rig.slot(TableLevel::Pd, address), 0);
        }
        rig.invlpg(VA);
        assert_eq!(rig.mmu.usable_now(PhysFrame::containing_address(leaf)), reachable);
        assert!(!rig.mmu.usable_now(frame(7)));
    }
}
