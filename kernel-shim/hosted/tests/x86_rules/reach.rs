//! What a checker asks: can this CPU still come to a frame, and through what.

use mmu_hosted::Choices;
use mmu_hosted::arch::{LinearAddress, PageSize, TableLevel};
use mmu_hosted::broadcast::{Broadcast, Globals, Issuer, Pages, Stride, Uppers};
use mmu_hosted::features::{Capacity, Features, LargePages};
use mmu_hosted::invalidate::{Cr3Load, Invpcid};
use mmu_hosted::mmu::{AccessKind, AccessMode, Mmu};
use mmu_hosted::walk::Depth;
use mmu_hosted::watch::{Reach, Tag, Use};
use x86_64::structures::paging::PhysFrame;

use crate::rig::{G, P, PCID_ON, PWU, Rig, U, VA, after, frame, pcid};

#[test]
fn a_frame_is_reached_now_later_or_not_at_all() {
    let mut rig = Rig::intel();
    rig.map_page(VA, 7, PWU);
    assert_eq!(rig.mmu.reach(frame(7)), Reach::Nowhere, "memory leads there, but nothing cached does");
    rig.read(VA);
    assert_eq!(rig.mmu.reach(frame(7)), Reach::Now);
    let (root, other) = (rig.mmu.cr3().0, rig.ram.table());
    rig.load(other, 1, Cr3Load::Keep);
    assert_eq!(rig.mmu.reach(frame(7)), Reach::OtherPcid);
    rig.load(root, 0, Cr3Load::Keep);
    assert_eq!(rig.mmu.reach(frame(7)), Reach::Now);
    rig.invlpg(VA);
    assert_eq!(rig.mmu.reach(frame(7)), Reach::Nowhere);
}

#[test]
fn a_global_entry_reaches_its_frame_under_every_pcid() {
    let mut rig = Rig::intel();
    rig.map_page(VA, 7, PWU | G);
    rig.read(VA);
    let other = rig.ram.table();
    rig.load(other, 1, Cr3Load::Flush);
    assert_eq!(rig.mmu.reach(frame(7)), Reach::Now);
}

#[test]
fn a_structure_entry_reaches_its_table() {
    let mut rig = Rig::intel();
    let leaf = rig.map_page(VA, 7, PWU);
    let table = PhysFrame::containing_address(leaf);
    rig.speculate(VA, Depth::Structure(TableLevel::Pdpt));
    assert_eq!(rig.mmu.reach(table), Reach::Nowhere);
    rig.speculate(VA, Depth::Structure(TableLevel::Pd));
    assert_eq!(rig.mmu.reach(table), Reach::Now);
    let entries: Vec<_> = rig.mmu.entries_reaching(table).collect();
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].held.as_a, Use::Table(TableLevel::Pt));
    assert_eq!(entries[0].held.tag, Tag::Pcid(pcid(0)));
    assert_eq!((entries[0].address.as_u64(), entries[0].span_shift), (VA.as_u64() & !0x1f_ffff, 21));
}

#[test]
fn the_loaded_root_is_in_reach_though_nothing_is_cached() {
    let mut rig = Rig::intel();
    let (old, new) = (rig.mmu.cr3().0, rig.ram.table());
    assert_eq!(rig.mmu.reach(old), Reach::Now);
    rig.load(new, 1, Cr3Load::Flush);
    assert_eq!((rig.mmu.reach(old), rig.mmu.reach(new)), (Reach::Nowhere, Reach::Now));
}

#[test]
fn a_large_page_reaches_every_frame_of_it() {
    for (size, frames) in [(PageSize::Size2MiB, 512), (PageSize::Size1GiB, 512 * 512)] {
        let mut rig = Rig::intel();
        rig.map(size, VA, 0x80000, PWU);
        rig.read(VA);
        for (number, reach) in [
            (0x80000 - 1, Reach::Nowhere),
            (0x80000, Reach::Now),
            (0x80000 + frames - 1, Reach::Now),
            (0x80000 + frames, Reach::Nowhere),
        ] {
            assert_eq!(rig.mmu.reach(frame(number)), reach, "{size} {number:#x}");
            assert_eq!(rig.mmu.entries_reaching(frame(number)).count(), usize::from(reach == Reach::Now));
        }
    }
}

#[test]
fn a_piece_of_a_large_page_reaches_its_own_frame_only() {
    let mut rig = Rig::new(Features { large_pages: LargePages::InPieces, ..Features::INTEL }, PCID_ON);
    rig.map(PageSize::Size2MiB, VA, 0x80000, PWU);
    let reached = frame(rig.read(VA));
    assert_eq!(reached, frame(0x80000 + 0x189));
    assert_eq!(rig.mmu.reach(reached), Reach::Now);
    assert_eq!(rig.mmu.reach(frame(0x80000)), Reach::Nowhere);
}

#[test]
fn a_frame_named_twice_stays_in_reach_until_both_are_gone() {
    let mut rig = Rig::intel();
    let alias = after(VA, 1 << 30);
    rig.map_page(VA, 7, PWU);
    rig.map_page(alias, 7, PWU);
    rig.read(VA);
    rig.read(alias);
    rig.invlpg(VA);
    assert_eq!(rig.mmu.reach(frame(7)), Reach::Now);
    let entry = rig.mmu.entries_reaching(frame(7)).next().expect("the alias");
    assert_eq!(entry.to_string(), "TLB entry (PCID 0) 0x123496789000 -> 4 KiB page at 0x7000, writable");
    rig.invlpg(alias);
    assert_eq!(rig.mmu.reach(frame(7)), Reach::Nowhere);
}

#[test]
fn entries_in_use_now_leave_out_other_pcids() {
    let mut rig = Rig::intel();
    rig.map_page(VA, 7, PWU);
    rig.map_page(after(VA, 0x1000), 8, PWU | G);
    rig.read(VA);
    rig.read(after(VA, 0x1000));
    let other = rig.ram.table();
    rig.load(other, 1, Cr3Load::Keep);
    let frames: Vec<PhysFrame> = rig.mmu.usable_entries().map(|entry| entry.frame).collect();
    assert_eq!(frames, [other, frame(8)]);
    assert_eq!(rig.mmu.entries().count(), 6);
}

#[test]
fn whatever_happens_the_watcher_knows_what_is_held() {
    for seed in 0..64 {
        let choices = Choices::new(seed);
        let mut features = if seed % 2 == 0 { Features::INTEL } else { Features::AMD };
        if seed % 3 == 0 {
            features.large_pages = LargePages::InPieces;
        }
        if seed % 5 == 0 {
            features.tlb_capacity = Capacity::AtMost(6);
            features.structure_capacity = Capacity::AtMost(3);
        }
        let mut rig = Rig::new(features, PCID_ON);
        let roots = [rig.mmu.cr3().0, rig.ram.table(), rig.ram.table()];
        for _ in 0..400 {
            any_operation(&mut rig, &choices, &roots);
        }
        rig.check();
        // With nothing cached the MMU agrees with one that never caches.
        let bare = Features {
            tlb_capacity: Capacity::AtMost(0),
            structure_capacity: Capacity::AtMost(0),
            ..features
        };
        let mut bare = Mmu::new(bare, PCID_ON, rig.mmu.cr3().0, &mut ());
        for place in 0..32 {
            rig.mmu.forget_everything(&mut rig.counts);
            let address = somewhere(place);
            let seen = rig.user(address, AccessKind::Read).map(|access| access.address);
            let truth = bare.access(address, AccessKind::Read, AccessMode::User, &rig.ram, &mut ());
            assert_eq!(seen.is_ok(), truth.is_ok(), "seed {seed}");
            assert_eq!(seen.ok(), truth.ok().map(|access| access.address), "seed {seed}");
        }
    }
}

/// One of 32 addresses under two PML4Es, two PDPTEs, two PDEs and four PTEs.
fn somewhere(place: u64) -> LinearAddress {
    after(
        VA,
        ((place & 3) << 12) + ((place >> 2 & 1) << 21) + ((place >> 3 & 1) << 30) + ((place >> 4 & 1) << 39),
    )
}

fn any_operation(rig: &mut Rig, choices: &Choices, roots: &[PhysFrame]) {
    let address = somewhere(choices.below(32));
    let (pcid_number, root) = [0, 1, 2].map(|number| (number, roots[usize::from(number)]))[choices.pick(3)];
    match choices.below(14) {
        0..3 => {
            let flags = [0, P, PWU, PWU | G, P | U][choices.pick(5)];
            rig.map_page(address, 1 + choices.below(19), flags);
        }
        3 => {
            rig.map(PageSize::Size2MiB, address, (1 + choices.below(7)) << 9, PWU);
        }
        4 => {
            let slot = rig.slot(TableLevel::Pdpt, address);
            rig.ram.poke(slot, 0);
        }
        5..8 => {
            let kind = [AccessKind::Read, AccessKind::Write, AccessKind::Execute][choices.pick(3)];
            let _ = rig.user(address, kind);
        }
        8 => {
            rig.speculate(address, [Depth::Page, Depth::Structure(TableLevel::Pd)][choices.pick(2)]);
        }
        9 => rig.invlpg(address),
        10 => rig.load(root, pcid_number, [Cr3Load::Keep, Cr3Load::Flush][choices.pick(2)]),
        11 => rig.mmu.forget_one(|len| choices.pick(len), &mut rig.counts),
        12 => {
            let what = [Invpcid::Context(pcid(pcid_number)), Invpcid::Address(pcid(pcid_number), address)];
            rig.mmu.invpcid(what[choices.pick(2)], &mut rig.counts).expect("PCIDs are on");
        }
        _ => {
            let pages = Some(Pages { first: address, more: 3, stride: Stride::Small });
            let request = Broadcast { pcid: None, pages, globals: Globals::Included, uppers: Uppers::Kept };
            rig.mmu.post_broadcast(Issuer(0), request);
            rig.mmu.complete_broadcasts(Issuer(0), &mut rig.counts);
        }
    }
}
