//! Changing address spaces, going lazy and coming back: what a context switch costs, so that
//! shootdowns know which CPU holds what.

use core::pin::Pin;
use core::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use mmu_gather::tlb::{CpuId, CtxIds, MmContext, NR_DYN_ASIDS, OnlineCpus, enter_lazy_tlb, switch_mm};
use mmu_measured::machine::{Batched, Bits, Machine};
use mmu_measured::memory::Memory;
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

#[expect(unsafe_code, reason = "plays a CPU")]
fn switch(criterion: &mut Criterion) {
    let memory = Memory::new();
    let plain = Machine::<Batched>::new(&memory, OnlineCpus::Many);
    let tagged = Machine::<Batched>::new(&memory, OnlineCpus::Many).with_pcids();
    let ids = CtxIds::new();
    let root = PhysFrame::containing_address(PhysAddr::zero());
    // SAFETY: one source of names; nothing is mapped below the root that they seem to share.
    let new = |_| Box::pin(unsafe { MmContext::new(&ids, root) });
    let spaces: Vec<Pin<Box<MmContext<Bits>>>> = (0..=NR_DYN_ASIDS).map(new).collect();
    let first = spaces.first().map(Pin::as_ref);
    let here = CpuId::new(0);
    let mut group = criterion.benchmark_group("switch");
    let mut around = |name: &str, machine: &Machine<'_, Batched>, count: usize| {
        let mut next = spaces[..count].iter().map(Pin::as_ref).cycle();
        group.bench_function(name, |bencher| {
            // SAFETY: this thread is CPU 0; the spaces outlive the bench, and their root is never
            // walked.
            bencher.iter(|| unsafe { switch_mm(machine, here, next.next()) });
        });
    };
    around("between two, no PCIDs", &plain, 2);
    around("between two, PCIDs", &tagged, 2);
    around("around seven, PCIDs: every one flushed", &tagged, spaces.len());
    around("to the same", &tagged, 1);
    group.bench_function("lazy and back, nothing missed", |bencher| {
        bencher.iter(|| {
            // SAFETY: as above.
            unsafe { enter_lazy_tlb(&tagged, here) };
            // SAFETY: as above.
            unsafe { switch_mm(&tagged, here, first) };
        });
    });
    group.bench_function("lazy and back, a flush missed", |bencher| {
        bencher.iter(|| {
            // SAFETY: as above.
            unsafe { enter_lazy_tlb(&tagged, here) };
            spaces[0].raise_tlb_gen();
            // SAFETY: as above.
            unsafe { switch_mm(&tagged, here, first) };
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500));
    targets = switch
}
criterion_main!(benches);
