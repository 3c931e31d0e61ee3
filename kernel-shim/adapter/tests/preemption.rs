//! Rule G7 in a whole kernel: between two preemption points a call changes the leaves of one table
//! at most.

use std::sync::Arc;

use mmu_adapter::{HostedKernel, HostedMm, boot};
use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CpuId;
use mmu_hosted::{Found, HostedMachine, MostWork, Options, ViolationKind};
use mmu_kernel_shim::{Area, Config, PageContent, Protection, Vma};

/// Where a table of the level above begins, too.
const START: u64 = 0x4000_0000;
const SMALL: u64 = 4096;
const LARGE: u64 = 512 * SMALL;

/// What the checker finds while `call` works on so many leaves of each content, side by side.
fn found(most_leaves: u32, leaves: &[(PageContent, u64)], call: Call) -> Found {
    let options = Options::new(1, 16384, 1);
    let options = Options { most_work: MostWork { leaves: most_leaves, ..options.most_work }, ..options };
    let machine = Arc::new(HostedMachine::new(options).expect("a small machine"));
    let kernel = boot(&machine, Config::default()).expect("it has frames");
    let mm = kernel.new_mm().expect("it has frames");
    let mut parts = Vec::new();
    let mut end = START;
    for (content, nr_leaves) in leaves {
        let start = end;
        end += nr_leaves * if *content == PageContent::ZeroBlock { LARGE } else { SMALL };
        parts.push((VirtRange::new(start, end).expect("a good range"), *content));
    }
    let range = VirtRange::new(START, end).expect("a good range");
    kernel.mmap(&mm, Vma { range, area: Area::anon() }).expect("nothing is there");
    for (part, content) in parts {
        kernel.populate(&mm, part, content).expect("it has frames");
    }
    machine.on_cpu(CpuId::new(0), || kernel.switch_to(Some(&mm)));
    call(&kernel, &mm, range);
    machine.violations()
}

fn munmap(kernel: &HostedKernel, mm: &HostedMm, range: VirtRange) {
    kernel.munmap(mm, range).expect("nothing is split");
}

fn discard(kernel: &HostedKernel, mm: &HostedMm, range: VirtRange) {
    kernel.madvise_dontneed(mm, range).expect("nothing is split");
}

fn protect(kernel: &HostedKernel, mm: &HostedMm, range: VirtRange) {
    kernel.mprotect(mm, range, Protection::Nothing).expect("nothing is split");
}

fn fork(kernel: &HostedKernel, mm: &HostedMm, _range: VirtRange) {
    kernel.fork(mm, []).expect("it has frames");
}

fn remap(kernel: &HostedKernel, mm: &HostedMm, range: VirtRange) {
    let place =
        VirtRange::new(range.start() << 4, (range.start() << 4) + range.len_bytes()).expect("a good range");
    kernel.mremap(mm, range, place).expect("it has frames");
}

fn move_stack(kernel: &HostedKernel, mm: &HostedMm, range: VirtRange) {
    kernel.move_stack(mm, range, range.len_bytes()).expect("it has frames");
}

fn reclaim(kernel: &HostedKernel, mm: &HostedMm, range: VirtRange) {
    kernel.reclaim([(mm, range)]);
}

type Call = fn(&HostedKernel, &HostedMm, VirtRange);
const SMALL_CALLS: [(&str, Call); 5] =
    [("munmap", munmap), ("discard", discard), ("mprotect", protect), ("fork", fork), ("reclaim", reclaim)];
const LARGE_CALLS: [(&str, Call); 3] = [("munmap", munmap), ("discard", discard), ("mprotect", protect)];
const SPLITTING_CALLS: [(&str, Call); 3] = [("fork", fork), ("mremap", remap), ("exec", move_stack)];

#[test]
fn no_call_changes_more_leaves_than_one_table_has_without_a_preemption_point() {
    for (name, call) in SMALL_CALLS {
        let found = found(512, &[(PageContent::Anon, 4 * 512)], call);
        assert_eq!(found.count, 0, "{name} of small pages: {:?}", found.told.first());
    }
    for (name, call) in LARGE_CALLS {
        for leaves in [
            &[(PageContent::ZeroBlock, 512 + 100)][..],
            // Two levels of tables with leaves.
            &[(PageContent::ZeroBlock, 300), (PageContent::Anon, 512)],
        ] {
            let found = found(512, leaves, call);
            assert_eq!(found.count, 0, "{name} of {leaves:?}: {:?}", found.told.first());
        }
    }
}

#[test]
fn no_call_splits_many_large_leaves_without_a_preemption_point() {
    for (name, call) in SPLITTING_CALLS {
        let found = found(512, &[(PageContent::ZeroBlock, 12)], call);
        assert_eq!(found.count, 0, "{name}: {:?}", found.told.first());
    }
}

#[test]
fn every_leaf_is_counted() {
    for (name, call) in SMALL_CALLS {
        let found = found(511, &[(PageContent::Anon, 512)], call);
        let kinds: Vec<_> = found.told.iter().map(|told| told.kind).collect();
        assert_eq!(kinds, [ViolationKind::NoPreemptionPoint], "{name}");
    }
}
