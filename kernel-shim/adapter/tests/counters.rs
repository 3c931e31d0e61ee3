//! Each CPU counts for itself.

use std::sync::Arc;

use mmu_adapter::{HostedMm, HostedStage, Touched, touch};
use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::{CpuId, FlushKind, FlushRequest, FreedTables, TlbGen, flush_tlb_func};
use mmu_hosted::{HostedMachine, Options};
use mmu_kernel_shim::{Area, Config, CpuCounters, Snapshot, Stage, UserAccess, Vma};

const START: u64 = 0x7000_0000_0000;
const CPU: [CpuId; 3] = [CpuId::new(0), CpuId::new(1), CpuId::new(2)];

fn range(pages: u64) -> VirtRange {
    VirtRange::new(START, START + pages * 4096).expect("a good range")
}

/// Three CPUs; each runs a process of its own, which has written to as many pages as its number,
/// and one more.
fn three_processes() -> (HostedStage, Vec<Arc<HostedMm>>) {
    let machine = HostedMachine::new(Options::new(3, 4096, 1)).expect("a small machine");
    let stage = HostedStage::boot(machine, Config::default()).expect("it has frames");
    let mms = CPU.map(|cpu| {
        let mm = stage.kernel().new_mm().expect("it has frames");
        let range = range(u64::from(cpu.number()) + 1);
        stage.kernel().mmap(&mm, Vma { range, area: Area::anon() }).expect("nothing is there");
        stage.on_cpu(cpu, &|| {
            stage.kernel().switch_to(Some(&mm));
            for page in 0..=u64::from(cpu.number()) {
                let touched = touch(stage.kernel(), &mm, START + page * 4096, UserAccess::Write);
                assert_eq!(touched, Touched::Reached);
            }
        });
        mm
    });
    (stage, mms.into())
}

fn counted(stage: &HostedStage) -> [Snapshot; 3] {
    CPU.map(|cpu| stage.kernel().counters().of_cpu(cpu).snapshot())
}

#[test]
fn a_cpu_counts_on_lines_that_no_other_cpu_writes() {
    let (stage, mms) = three_processes();
    for (cpu, mm) in CPU.into_iter().zip(&mms) {
        let before = counted(&stage);
        let pages = u64::from(cpu.number()) + 1;
        stage.on_cpu(cpu, &|| stage.kernel().munmap(mm, range(pages)).expect("it is mapped"));
        for other in CPU {
            let since = counted(&stage)[other.index()].since(&before[other.index()]);
            if other == cpu {
                assert_eq!((since.leaves, since.flushes_ranged, since.released_slots), (pages, 1, pages));
            } else {
                assert_eq!(
                    counted(&stage)[other.index()],
                    before[other.index()],
                    "{cpu} counted for {other}"
                );
            }
        }
    }
    // What CPUs write lies on lines of their own.
    let lines = |counters: &CpuCounters| {
        let first = core::ptr::from_ref(counters).addr();
        first / 64..=(first + size_of::<CpuCounters>() - 1) / 64
    };
    let [one, other, last] = CPU.map(|cpu| lines(stage.kernel().counters().of_cpu(cpu)));
    assert!(one.end() < other.start() && other.end() < last.start());
}

#[test]
fn a_sum_has_the_highest_of_the_marks() {
    let (stage, mms) = three_processes();
    for (cpu, mm) in CPU.into_iter().zip(&mms) {
        let pages = u64::from(cpu.number()) + 1;
        stage.on_cpu(cpu, &|| stage.kernel().munmap(mm, range(pages)).expect("it is mapped"));
    }
    let all = stage.kernel().counters().snapshot();
    assert_eq!((all.leaves, all.released_slots), (1 + 2 + 3, 1 + 2 + 3));
    assert_eq!((all.max_leaves_per_lock, all.max_deferred_slots), (3, 3));
    let by_hand = counted(&stage).iter().fold(Snapshot::default(), |sum, cpu| sum.and(cpu));
    assert_eq!(all, by_hand);
}

#[test]
fn a_cpu_with_nothing_to_do_counts_that_for_itself() {
    let machine = HostedMachine::new(Options::new(2, 4096, 1)).expect("a small machine");
    let stage = HostedStage::boot(machine, Config::default()).expect("it has frames");
    let kernel = stage.kernel();
    let mm = kernel.new_mm().expect("it has frames");
    for cpu in &CPU[..2] {
        stage.on_cpu(*cpu, &|| kernel.switch_to(Some(&mm)));
    }
    let before = kernel.counters().of_cpu(CPU[0]).snapshot();
    stage.on_cpu(CPU[1], &|| {
        let kind = FlushKind::Mm { mm: mm.engine().context(), tlb_gen: TlbGen::START };
        // SAFETY: the address space has reached the generation, and nothing changed before.
        let request = unsafe { FlushRequest::new(kind, FreedTables::No, CPU[0]) };
        // SAFETY: on that CPU, and nothing interrupts it.
        unsafe { flush_tlb_func(kernel, CPU[1], &request) };
    });
    assert_eq!(kernel.counters().of_cpu(CPU[1]).snapshot().flushes_skipped, 1);
    assert_eq!(kernel.counters().of_cpu(CPU[0]).snapshot(), before);
}
