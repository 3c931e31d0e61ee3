//! INVLPGB and TLBSYNC. AMD64 APM vol. 3.

use mmu_hosted::arch::{LinearAddress, PageSize, TableLevel};
use mmu_hosted::broadcast::{Broadcast, Globals, Issuer, Pages, Stride, Uppers};
use mmu_hosted::invalidate::Cr3Load;
use mmu_hosted::mmu::{AccessKind, GeneralProtection};

use crate::rig::{G, PWU, Rig, VA, after, pcid};

const EVERYTHING: Broadcast =
    Broadcast { pcid: None, pages: None, globals: Globals::Included, uppers: Uppers::Dropped };
const ME: Issuer = Issuer(0);
const OTHER: Issuer = Issuer(1);

fn pages(first: LinearAddress, more: u16, stride: Stride) -> Broadcast {
    Broadcast {
        pcid: Some(pcid(0)),
        pages: Some(Pages { first, more, stride }),
        globals: Globals::Kept,
        uppers: Uppers::Dropped,
    }
}

/// Pages 0 to 9 from [`VA`] and one page 2 MiB on, cached under PCID 0; page 9 is global.
fn ten() -> Rig {
    let mut rig = Rig::amd();
    for page in 0..10 {
        rig.map_page(after(VA, page << 12), 0x10 + page, PWU | if page == 9 { G } else { 0 });
        rig.read(after(VA, page << 12));
    }
    rig.map_page(after(VA, 1 << 21), 0x20, PWU);
    rig.read(after(VA, 1 << 21));
    rig
}

fn broadcast(rig: &mut Rig, request: Broadcast) {
    let request = rig.mmu.invlpgb(request).expect("allowed");
    rig.mmu.post_broadcast(ME, request);
    rig.mmu.complete_broadcasts(ME, &mut rig.counts);
}

fn cached(rig: &Rig) -> Vec<u64> {
    (0..10).filter(|page| rig.in_tlb(after(VA, page << 12))).collect()
}

#[test]
fn a_broadcast_is_complete_only_after_tlbsync_of_its_issuer() {
    let mut rig = ten();
    let leaf = rig.slot(TableLevel::Pt, VA);
    rig.ram.poke(leaf, 0);
    rig.mmu.post_broadcast(ME, EVERYTHING);
    assert_eq!(rig.read(VA), 0x10, "it may still be used");
    rig.mmu.complete_broadcasts(OTHER, &mut rig.counts);
    assert_eq!(rig.read(VA), 0x10, "another CPU's TLBSYNC does not wait for it");
    assert_eq!(rig.mmu.pending_broadcasts(), [(ME, EVERYTHING)]);
    rig.mmu.complete_broadcasts(ME, &mut rig.counts);
    assert!(rig.mmu.pending_broadcasts().is_empty());
    rig.fault(VA, AccessKind::Read);
}

#[test]
fn a_broadcast_may_act_before_tlbsync_in_any_order() {
    let mut rig = ten();
    rig.mmu.post_broadcast(ME, pages(VA, 0, Stride::Small));
    rig.mmu.post_broadcast(ME, pages(after(VA, 0x1000), 0, Stride::Small));
    rig.mmu.deliver_broadcast(1, &mut rig.counts);
    assert_eq!(cached(&rig), [0, 2, 3, 4, 5, 6, 7, 8, 9]);
}

#[test]
fn a_broadcast_names_pages_by_first_and_count() {
    let mut rig = ten();
    broadcast(&mut rig, pages(after(VA, 0x2000), 3, Stride::Small));
    assert_eq!(cached(&rig), [0, 1, 6, 7, 8, 9]);
}

#[test]
fn a_broadcast_with_the_large_stride_skips_the_small_pages_between() {
    let mut rig = ten();
    broadcast(&mut rig, pages(VA, 1, Stride::Large));
    assert_eq!(cached(&rig), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert!(!rig.in_tlb(after(VA, 1 << 21)));
    let mut rig = Rig::amd();
    rig.map(PageSize::Size2MiB, VA, 0x80000, PWU);
    rig.read(VA);
    broadcast(&mut rig, pages(VA, 0, Stride::Large));
    assert!(!rig.in_tlb(VA));
}

#[test]
fn a_broadcast_keeps_globals_unless_it_includes_them() {
    let mut rig = ten();
    broadcast(&mut rig, Broadcast { globals: Globals::Kept, ..EVERYTHING });
    assert_eq!(cached(&rig), [9]);
    broadcast(&mut rig, EVERYTHING);
    assert_eq!((rig.mmu.tlb_len(), rig.mmu.structures_len()), (0, 0));
}

#[test]
fn a_broadcast_may_name_one_pcid() {
    let mut rig = ten();
    let root = rig.mmu.cr3().0;
    rig.load(root, 1, Cr3Load::Flush);
    rig.read(VA);
    broadcast(&mut rig, Broadcast { pcid: Some(pcid(1)), globals: Globals::Kept, ..EVERYTHING });
    assert!(!rig.in_tlb(VA));
    assert_eq!(rig.deepest(VA), None);
    rig.load(root, 0, Cr3Load::Keep);
    assert_eq!(cached(&rig), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
}

#[test]
fn a_broadcast_drops_only_the_structure_entries_that_lead_to_its_pages() {
    let mut rig = ten();
    broadcast(&mut rig, pages(VA, 0, Stride::Small));
    assert_eq!(rig.deepest(VA), None);
    assert_eq!(rig.deepest(after(VA, 1 << 21)), Some(TableLevel::Pd));
}

#[test]
fn a_final_only_broadcast_leaves_the_structure_caches() {
    for request in [EVERYTHING, pages(VA, 0, Stride::Small)] {
        let mut rig = ten();
        broadcast(&mut rig, Broadcast { uppers: Uppers::Kept, ..request });
        assert!(!rig.in_tlb(VA));
        assert_eq!(rig.deepest(VA), Some(TableLevel::Pd), "a freed page table would still be walked");
        assert_eq!(rig.mmu.structures_len(), 4);
    }
}

#[test]
fn a_broadcast_of_too_many_pages_is_refused() {
    let rig = Rig::amd();
    assert!(rig.mmu.invlpgb(pages(VA, 7, Stride::Small)).is_ok());
    assert_eq!(rig.mmu.invlpgb(pages(VA, 8, Stride::Small)), Err(GeneralProtection));
}
