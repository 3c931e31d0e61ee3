//! Walking: looking pages up one by one, and passing over tables in which nothing is left.

use core::hint::black_box;
use core::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mmu_benches::engine;
use mmu_benches::machine::{Batched, Machine};
use mmu_benches::memory::Memory;
use mmu_benches::shape::{Size, Workload};
use mmu_benches::space::Space;
use mmu_gather::Limits;
use mmu_gather::tlb::OnlineCpus;

fn walk(criterion: &mut Criterion) {
    let small = std::env::args().any(|argument| argument == "--test");
    let size = if small { Size::Small } else { Size::Quarter };
    let memory = Memory::new();
    let machine = Machine::<Batched>::new(&memory, OnlineCpus::Many);
    let mut group = criterion.benchmark_group("walk");
    for workload in [Workload::W2Dense64, Workload::W3Sparse, Workload::W4Areas] {
        let shape = workload.shape(size);
        let space = Space::new(&machine, &shape);
        group.throughput(Throughput::Elements(shape.leaves.len() as u64));
        group.bench_function(BenchmarkId::new("look every page up", workload.name()), |bencher| {
            bencher.iter(|| black_box(engine::look_up(&machine, &space)));
        });
        engine::discard(&machine, &space, &Limits::DEFAULT);
        let _ = memory.take_free_pages();
        let tables = space.stretches.len() as u64;
        group.throughput(Throughput::Elements(tables));
        group.bench_function(BenchmarkId::new("pass over empty tables", workload.name()), |bencher| {
            bencher.iter(|| engine::discard(&machine, &space, &Limits::DEFAULT));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500));
    targets = walk
}
criterion_main!(benches);
