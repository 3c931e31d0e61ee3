//! What the machine was told of frames, against what the small kernel keeps of them.

use std::sync::Arc;

use mmu_adapter::{HostedKernel, boot, touch};
use mmu_gather::pagetable::VirtRange;
use mmu_hosted::{FrameRole, HostedMachine, Options};
use mmu_kernel_shim::{Area, AreaKind, Config, PageContent, UserAccess, Vma};

const START: u64 = 0x7000_0000_0000;

fn range(first: u64, end: u64) -> VirtRange {
    VirtRange::new(START + first * 4096, START + end * 4096).expect("a good range")
}

/// Pages and tables in use, as told; held against those that the kernel keeps.
fn in_use(machine: &HostedMachine, kernel: &HostedKernel) -> (u64, u64) {
    let told = machine.not_freed();
    let tables = told.iter().filter(|(_, role)| *role == FrameRole::Table).count() as u64;
    let told = (told.len() as u64 - tables, tables);
    assert_eq!(told, kernel.lost());
    told
}

#[test]
fn what_the_machine_was_told_of_frames_is_what_the_kernel_keeps() {
    let machine = Arc::new(HostedMachine::new(Options::new(1, 8192, 1)).expect("a small machine"));
    let kernel = boot(&machine, Config::default()).expect("it has frames");
    machine.note_booted();
    assert_eq!(in_use(&machine, &kernel), (0, 0));
    let mm = kernel.new_mm().expect("it has frames");
    kernel.switch_to(Some(&mm));
    kernel.mmap(&mm, Vma { range: range(0, 1024), area: Area::anon() }).expect("nothing is there");
    kernel.populate(&mm, range(512, 1024), PageContent::AnonBlock).expect("it has frames");
    let file = AreaKind::FilePrivate(1);
    let area = Area { kind: file, ..Area::anon() };
    kernel.mmap(&mm, Vma { range: range(1024, 1100), area }).expect("nothing is there");
    for page in [0, 3, 7, 1024, 1025] {
        touch(&kernel, &mm, START + page * 4096, UserAccess::Write);
        touch(&kernel, &mm, START + (page + 10) * 4096, UserAccess::Read);
    }
    let (pages, tables) = in_use(&machine, &kernel);
    assert!(pages > 512 && tables > 3, "{pages} pages, {tables} tables");
    // A large page is split, and its parts go one by one.
    kernel.munmap(&mm, range(600, 610)).expect("a table can be had");
    assert_eq!(in_use(&machine, &kernel).0, pages - 10);
    let copy = kernel.fork(&mm, []).expect("it has frames");
    kernel.madvise_dontneed(&mm, range(0, 1100)).expect("whole pages");
    in_use(&machine, &kernel);
    kernel.switch_to(None);
    for mm in [mm, copy] {
        kernel.exit(&mm).expect("nobody runs it");
        in_use(&machine, &kernel);
    }
    kernel.drop_caches();
    assert_eq!(in_use(&machine, &kernel), (0, 0));
    assert_eq!(machine.double_frees(), 0);
}
